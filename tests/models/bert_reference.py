"""A small BERT of Hugging Face transformers, to be agreed with; needs torch but not jax.

`python -m tests.models.bert_reference` (with the extra `parity`) writes `bert_reference.npz`:
tokens and targets of whole, packed and padded rows, and the logits, pooled vectors, loss and
gradients of a model whose weights are `weight(...)` of their names.
"""

from pathlib import Path

import numpy as np

from tests.models import family_reference

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 28,
    "type_vocab_size": 2,
    "pad_token_id": None,  # else that row of the embedding gets no gradient
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",
}
ROWS = 2  # of each kind: whole, packed, padded
LENGTH = 24
FIRST = 9  # tokens of the first of two documents in a packed row
PADDING = 7  # tokens at the end of a padded row
PATH = Path(__file__).parent / "bert_reference.npz"


def weight(name, shape, *, seed=0):
    """A parameter that is far enough from its start, and the same on every machine."""
    return family_reference.weight(name.lower(), shape, unit_norms=1.0, seed=seed)


def rows(*, seed=0):
    """The arrays of a batch: ROWS whole rows, then as many packed and padded ones."""
    random = np.random.RandomState(seed)
    shape, at = (3 * ROWS, LENGTH), np.arange(LENGTH)[None]
    kind = np.repeat(np.arange(3), ROWS)[:, None]
    second, padded = (kind == 1) & (at >= FIRST), (kind == 2) & (at >= LENGTH - PADDING)
    return {
        "tokens": random.randint(0, SIZES["vocab_size"], shape),
        "targets": random.randint(0, SIZES["vocab_size"], shape),
        "weights": ((random.uniform(size=shape) < 0.4) & ~padded).astype(np.float32),
        "token_types": random.randint(0, 2, shape),
        "positions": np.where(second, at - FIRST, at),
        "segments": np.where(padded, 7, second + 1),
    }


def measure(*, seed=0):
    """All that the reference holds, by name, as numpy arrays.

    Packed documents go through the model apart, padded rows with an attention mask.
    """
    import torch
    import transformers

    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            drawn = weight(name, parameter.shape, seed=seed)
            parameter.copy_(torch.from_numpy(drawn))
    batch = {name: torch.as_tensor(x) for name, x in rows(seed=seed).items()}

    def run(cut, mask=None):
        arguments = {"input_ids": "tokens", "token_type_ids": "token_types"}
        given = {name: batch[ours][cut] for name, ours in arguments.items()}
        states = model.bert(**given, attention_mask=mask)
        scores, _ = model.cls(states.last_hidden_state, states.pooler_output)
        return scores, states.pooler_output

    whole, packed, padded = (slice(i * ROWS, (i + 1) * ROWS) for i in range(3))
    real = torch.ones(ROWS, LENGTH)
    real[:, LENGTH - PADDING :] = 0
    parts = [run(whole), run((packed, slice(FIRST)))]
    second, _ = run((packed, slice(FIRST, None)))
    parts[1] = torch.cat([parts[1][0], second], dim=1), parts[1][1]
    parts.append(run(padded, real))
    logits, pooled = (torch.cat(x) for x in zip(*parts, strict=True))
    nll = -torch.log_softmax(logits, -1).gather(-1, batch["targets"][..., None])[..., 0]
    loss = (nll * batch["weights"]).sum() / batch["weights"].sum()
    loss = loss + (pooled * torch.as_tensor(probe())).sum()
    loss.backward()
    arrays = {"logits": logits, "pooled": pooled, "loss": loss}
    arrays |= {f"gradient:{k}": p.grad for k, p in named.items() if p.grad is not None}
    return {name: np.asarray(x.detach()) for name, x in arrays.items()}


def probe():
    """What the pooled vectors are multiplied with in the loss."""
    return family_reference.weight("probe", (3 * ROWS, SIZES["hidden_size"]), unit_norms=0.0)


def from_torch_names(weights, *, num_heads):
    """Weights of transformers' BERT as {path: array} of ours."""
    weights = {k.removeprefix("bert."): v for k, v in weights.items()}
    layers = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.layer."))

    def stack(name):
        return np.stack([weights[f"encoder.layer.{i}.{name}"] for i in range(layers)])

    def heads(kind):
        """[L, heads * head_dim, ...] -> [L, ..., heads, head_dim]"""
        x = np.stack([stack(f"attention.self.{n}.{kind}") for n in ("query", "key", "value")], 1)
        x = x.reshape(layers, 3, num_heads, -1, *x.shape[3:])  # [L, 3, H, K, ...]
        return np.moveaxis(x, (2, 1, 3), (-3, -2, -1))

    block = "blocks/block"
    out = stack("attention.output.dense.weight").swapaxes(1, 2)
    found = {
        "embed/table": weights["embeddings.word_embeddings.weight"],
        "positions/table": weights["embeddings.position_embeddings.weight"],
        "token_types/table": weights["embeddings.token_type_embeddings.weight"],
        f"{block}/attention/qkv/kernel": heads("weight"),
        f"{block}/attention/qkv/bias": heads("bias"),
        f"{block}/attention/out/kernel": out.reshape(layers, num_heads, -1, out.shape[2]),
        f"{block}/attention/out/bias": stack("attention.output.dense.bias"),
    }
    for ours, theirs in (("up", "intermediate"), ("down", "output")):
        found[f"{block}/mlp/{ours}/kernel"] = stack(f"{theirs}.dense.weight").swapaxes(1, 2)
        found[f"{block}/mlp/{ours}/bias"] = stack(f"{theirs}.dense.bias")
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        found[f"embed_norm/{ours}"] = weights[f"embeddings.LayerNorm.{theirs}"]
        found[f"{block}/attention_norm/{ours}"] = stack(f"attention.output.LayerNorm.{theirs}")
        found[f"{block}/mlp_norm/{ours}"] = stack(f"output.LayerNorm.{theirs}")
    if "pooler.dense.weight" in weights:
        found["pooler/kernel"] = weights["pooler.dense.weight"].T
        found["pooler/bias"] = weights["pooler.dense.bias"]
    if "cls.predictions.bias" in weights:
        transform = "cls.predictions.transform"
        found["head/dense/kernel"] = weights[f"{transform}.dense.weight"].T
        found["head/dense/bias"] = weights[f"{transform}.dense.bias"]
        found["head/norm/scale"] = weights[f"{transform}.LayerNorm.weight"]
        found["head/norm/bias"] = weights[f"{transform}.LayerNorm.bias"]
        found["head/bias"] = weights["cls.predictions.bias"]
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **measure())
