"""Makes sft_reference.json: conversations as transformers reads them, and Llama's loss of each.

The targets that are not the assistant's have the label -100, which transformers leaves out.

Usage: python -m tests.tasks.sft_reference, in an environment with torch, transformers and jinja2.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lmjax.data.dialogue import PLAIN_TEMPLATE
from tests.convert import folders

FILE = Path(__file__).with_suffix(".json")
CONFIG = {**folders.LLAMA, "num_hidden_layers": 1, "max_position_embeddings": 256}
CONVERSATIONS = [
    [
        {"role": "user", "content": "Where is the harbour?"},
        {"role": "assistant", "content": "Down the hill."},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve 漢?"},
        {"role": "assistant", "content": "Ü!"},
        {"role": "user", "content": "And\nthen?"},
        {"role": "assistant", "content": "Two\nlines."},
        {"role": "user", "content": "Bye."},
    ],
    [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "A much longer answer to a short question, with a tail."},
    ],
]


def computed() -> list[dict[str, object]]:
    """Of each conversation its ids, the assistant's mask, and the mean of the loss over it."""
    import torch
    import transformers

    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = folders.write(Path(folder) / "llama", CONFIG, folders.drawn(CONFIG))
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        model = transformers.LlamaForCausalLM.from_pretrained(str(path)).float().eval()
    for messages in CONVERSATIONS:
        made = tokenizer.apply_chat_template(
            messages,
            chat_template=PLAIN_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = made["input_ids"], made["assistant_masks"]
        labels = [i if said else -100 for i, said in zip(ids, mask, strict=True)]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        found.append({"ids": ids, "mask": mask, "loss": float(loss)})
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(computed()) + "\n")
