"""torch's LSTM and GRU as references.

`python -m tests.layers.torch_reference` (with the extra `parity`) writes `torch_reference.npz`.
"""

from pathlib import Path

import numpy as np

KINDS = {"lstm": 4, "gru": 3}


def drawn(kind, *, rows, length, dim, units, seed=0):
    """Arrays by name: weights as torch names them, inputs, the state before, cotangents."""
    random = np.random.default_rng(seed)
    gates = KINDS[kind]

    def normal(*shape, scale=1.0):
        return (scale * random.standard_normal(shape)).astype("f4")

    states = ("h", "c")[: 2 if kind == "lstm" else 1]
    return {
        "weight_ih": normal(gates * units, dim, scale=dim**-0.5),
        "weight_hh": normal(gates * units, units, scale=units**-0.5),
        "bias_ih": normal(gates * units, scale=0.5),
        "bias_hh": normal(gates * units, scale=0.5),
        "x": normal(rows, length, dim),
        "dy": normal(rows, length, units),
        **{name: normal(rows, units, scale=0.5) for name in states},
        **{f"d{name}": normal(rows, units) for name in states},
    }


def answers(kind, given):
    """What torch makes of them: outputs, the state after, and a gradient for each input."""
    import torch

    units, dim = given["weight_hh"].shape[1], given["weight_ih"].shape[1]
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](dim, units, batch_first=True)
    weights = {name: getattr(layer, f"{name}_l0") for name in given if "_" in name}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.tensor(given[name]))
    names = [name for name in ("x", "h", "c") if name in given]
    inputs = {name: torch.tensor(given[name], requires_grad=True) for name in names}
    state = tuple(inputs[name][None] for name in names[1:])
    y, after = layer(inputs["x"], state if kind == "lstm" else state[0])
    after = after if kind == "lstm" else (after,)
    total = (y * torch.tensor(given["dy"])).sum()
    for name, part in zip(names[1:], after, strict=True):
        total = total + (part[0] * torch.tensor(given[f"d{name}"])).sum()
    total.backward()
    found = {"y": y} | {
        f"{name}_after": part[0] for name, part in zip(names[1:], after, strict=True)
    }
    found |= {f"gradient_{name}": x.grad for name, x in {**weights, **inputs}.items()}
    return {name: x.detach().numpy() for name, x in found.items()}


def main():
    arrays = {}
    for kind in KINDS:
        given = drawn(kind, rows=3, length=7, dim=5, units=6)
        for name, x in {**given, **answers(kind, given)}.items():
            arrays[f"{kind}:{name}"] = x
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
