"""Their side: Hugging Face's `generate` in torch. Imports nothing of lmjax.

Also makes the folders of weights that both sides read: published shapes at random numbers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import Generation, prompts, serve_generation

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-124m": ("GPT2", {}),
    "smollm2-135m": (
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def main(folder: str) -> None:
    import torch
    import transformers

    began = time.perf_counter()
    dtype = torch.bfloat16 if folder.endswith("bfloat16") else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    large = torch.ones(2**28, dtype=torch.uint8).view(torch.float32)

    class Clock(transformers.StoppingCriteria):
        """Is asked after each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(rows: int, length: int, num_tokens: int) -> Generation:
        tokens = torch.tensor(prompts(rows, length))
        clock = Clock()
        with torch.inference_mode():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        return Generation(clock.times, output[:, length:].tolist())

    def read_bytes_per_s() -> float:
        """Of a sum over 256 MB on all cores, the best of three."""
        took = []
        for _ in range(3):
            start = time.perf_counter()
            large.sum().item()
            took.append(time.perf_counter() - start)
        return large.numel() * 4 / min(took)

    ready = {
        "ready_s": time.perf_counter() - began,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    serve_generation(ready, run, lambda: {"read_bytes_per_s": read_bytes_per_s()})


def make(folder: Path, name: str) -> None:
    """Writes `name`-float32 and `name`-bfloat16, with a tokenizer of bytes."""
    import tokenizers
    import torch
    import transformers

    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        config
    )
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    vocabulary = tokenizers.Tokenizer(words)
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = tokenizers.decoders.ByteLevel()
    vocabulary.add_special_tokens(["<|endoftext|>"])
    for dtype in ("float32", "bfloat16"):
        to = folder / f"{name}-{dtype}"
        model.to(getattr(torch, dtype)).save_pretrained(to)
        vocabulary.save(str(to / "tokenizer.json"))
        (to / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1])
