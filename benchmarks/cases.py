"""What is timed, in numbers that both sides read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step: a GPT-2 without dropout, AdamW, random tokens."""

    name: str
    num_layers: int
    dim: int
    num_heads: int
    vocab_size: int
    length: int
    batch_size: int
    dtype: str
    bar: (
        float  # the least ratio of tokens per second, ours to theirs, that is asked for; 0 for none
    )
    steps: int  # in one turn
    remat: str = "none"

    def flop_per_step(self) -> float:
        """FLOP of the products of one step, attention in full; multiply-adds count two."""
        layer = 24 * self.dim**2 + 4 * self.length * self.dim
        return (
            3.0
            * self.batch_size
            * self.length
            * (self.num_layers * layer + 2 * self.dim * self.vocab_size)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


CHAR = {"num_layers": 6, "dim": 384, "num_heads": 6, "vocab_size": 96, "length": 256}
GPT2 = {"num_layers": 12, "dim": 768, "num_heads": 12, "vocab_size": 50257}
ONE_B = {"num_layers": 16, "dim": 2048, "num_heads": 16, "vocab_size": 50257}

CPU = [
    Case(name="char-bf16", **CHAR, batch_size=12, dtype="bfloat16", bar=0.9, steps=4),
    Case(name="char-fp32", **CHAR, batch_size=12, dtype="float32", bar=0.75, steps=4),
    Case(name="124m-bf16", **GPT2, length=256, batch_size=4, dtype="bfloat16", bar=1.1, steps=2),
    Case(name="124m-fp32", **GPT2, length=256, batch_size=4, dtype="float32", bar=1.1, steps=2),
]
GPU = [
    Case(name="124m-1024", **GPT2, length=1024, batch_size=32, dtype="bfloat16", bar=0, steps=20),
    Case(
        name="1b-1024",
        **ONE_B,
        length=1024,
        batch_size=8,
        dtype="bfloat16",
        bar=0,
        steps=10,
        remat="dots",
    ),
]
CASES = {case.name: case for case in CPU + GPU}
