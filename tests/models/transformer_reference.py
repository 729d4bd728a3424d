"""A small Transformer of torch's `nn.Transformer`, to be agreed with; `measure` needs torch.

`python -m tests.models.transformer_reference` (with the extra `parity`) writes
`transformer_reference.npz`: sources and targets, some of them padding, and logits, loss and
gradients of weights that are `weight(...)` of their names. Torch has no embeddings, positions and
output layer of its own: they are written out here by sections 3.4 and 3.5 of arXiv:1706.03762.
"""

import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("transformer_reference.npz")
D, HEADS, HIDDEN, V = 16, 4, 20, 37
ENCODER, DECODER = 2, 3
SOURCE, TARGET = 19, 17


def weight(name, shape, *, seed=0):
    """A parameter that is far enough from its start, and the same on every machine."""
    drawn = np.random.RandomState(zlib.crc32(name.encode()) + seed).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.2 * drawn).astype(np.float32)
    return (0.3 * drawn).astype(np.float32)


def inputs(seed=0):
    """Sources, targets and which of their tokens are real, at random: int64."""
    random = np.random.RandomState(seed)
    source, tokens = (random.randint(0, V, (4, length)) for length in (SOURCE, TARGET))
    ends = random.randint(5, 1 + TARGET, 4)
    mask = np.arange(TARGET) < ends[:, None]
    source_mask = random.rand(4, SOURCE) < 0.7
    source_mask[:, 3] = True
    return {
        "source": source,
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "source_mask": source_mask.astype(int),
        "mask": mask.astype(int),
    }


def model_of(seed):
    """`nn.Transformer` without the norms that it puts behind its stacks, and the table."""
    import torch
    from torch import nn

    settings = {"dim_feedforward": HIDDEN, "dropout": 0.0, "batch_first": True}
    model = nn.Transformer(
        D,
        HEADS,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, HEADS, **settings), ENCODER, enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(
            nn.TransformerDecoderLayer(D, HEADS, **settings), DECODER
        ),
        batch_first=True,
    )
    model.table = nn.Parameter(torch.zeros(V, D))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, parameter.shape, seed=seed)))
    return model


def positions(length):
    """Section 3.5, element by element."""
    found = np.zeros((length, D))
    for position in range(length):
        for i in range(D // 2):
            angle = position / 10000 ** (2 * i / D)
            found[position, 2 * i : 2 * i + 2] = np.sin(angle), np.cos(angle)
    return found.astype(np.float32)


def measure(*, seed=0):
    """All that the reference holds, by name, as numpy arrays."""
    import torch

    model, arrays = model_of(seed), inputs(seed)
    given = {name: torch.as_tensor(x) for name, x in arrays.items()}

    def embedded(tokens):
        return model.table[tokens] * D**0.5 + torch.from_numpy(positions(tokens.shape[1]))

    hidden = model(
        embedded(given["source"]),
        embedded(given["tokens"]),
        tgt_mask=torch.triu(torch.ones(TARGET, TARGET, dtype=torch.bool), 1),
        src_key_padding_mask=given["source_mask"] == 0,
        memory_key_padding_mask=given["source_mask"] == 0,
        tgt_key_padding_mask=given["mask"] == 0,
    )
    logits = hidden @ model.table.T
    targets = torch.where(given["mask"] > 0, given["targets"], -100)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1
    )
    loss.backward()
    arrays |= {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    for name, parameter in model.named_parameters():
        arrays[f"gradient:{name}"] = parameter.grad.numpy()
    return arrays


def from_torch_names(found):
    """Arrays of `nn.Transformer` by our names: products turned round, heads apart, stacked."""
    found, ours = dict(found), {}

    def layers(name):
        some = []
        while name.format(len(some)) in found:
            some.append(found.pop(name.format(len(some))))
        return np.stack(some)

    for side in ("encoder", "decoder"):
        block, to = side + ".layers.{}.", f"{side}/block"
        attentions = {"self_attn": "attention"}
        if side == "decoder":
            attentions["multihead_attn"] = "cross_attention"
        for theirs, name in attentions.items():
            w_LED = layers(f"{block}{theirs}.in_proj_weight")  # E = 3 x heads x head dim
            L = len(w_LED)
            w_LDHXK = w_LED.reshape(L, 3, HEADS, -1, D).transpose(0, 4, 2, 1, 3)
            b_LHXK = layers(f"{block}{theirs}.in_proj_bias").reshape(L, 3, HEADS, -1)
            b_LHXK = b_LHXK.transpose(0, 2, 1, 3)
            if name == "attention":
                ours[f"{to}/{name}/qkv/kernel"], ours[f"{to}/{name}/qkv/bias"] = w_LDHXK, b_LHXK
            else:
                ours[f"{to}/{name}/q/kernel"] = w_LDHXK[:, :, :, 0]
                ours[f"{to}/{name}/q/bias"] = b_LHXK[:, :, 0]
                ours[f"{to}/{name}/kv/kernel"] = w_LDHXK[:, :, :, 1:]
                ours[f"{to}/{name}/kv/bias"] = b_LHXK[:, :, 1:]
            out_LDE = layers(f"{block}{theirs}.out_proj.weight")
            ours[f"{to}/{name}/out/kernel"] = out_LDE.transpose(0, 2, 1).reshape(L, HEADS, -1, D)
            ours[f"{to}/{name}/out/bias"] = layers(f"{block}{theirs}.out_proj.bias")
        for theirs, name in (("linear1", "up"), ("linear2", "down")):
            kernel = layers(f"{block}{theirs}.weight").transpose(0, 2, 1)
            ours[f"{to}/mlp/{name}/kernel"] = kernel
            ours[f"{to}/mlp/{name}/bias"] = layers(f"{block}{theirs}.bias")
        norms = ["attention", "cross", "mlp"] if side == "decoder" else ["attention", "mlp"]
        for number, name in enumerate(norms, start=1):
            ours[f"{to}/{name}_norm/scale"] = layers(f"{block}norm{number}.weight")
            ours[f"{to}/{name}_norm/bias"] = layers(f"{block}norm{number}.bias")
    ours["embed/table"] = found.pop("table")
    assert not found, sorted(found)
    return ours


if __name__ == "__main__":
    np.savez_compressed(PATH, **measure())
