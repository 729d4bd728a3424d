"""What recorded calls of the tests of configs call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lmjax.config import call
from lmjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    width: int = 4
    rate: float = 0.5
    name: str = "part"
    made: list = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part
    size: int
    other: Any = None
    kind: Literal["big", "small"] = "big"
    level: Literal[1, 2] = 1
    fast: bool = False
    limit: int | None = None
    rate: float = 1.0
    label: str | None = None
    shape: tuple[int, ...] = (2, 3)
    pair: tuple[int, str] = (1, "a")
    axes: tuple[str | None, ...] = ()
    names: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    parts: Sequence[Part] = ()

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size is {self.size}: must be at least 1.")
        if self.size == 13:
            raise ZeroDivisionError("a bug")
        if self.size == 99:
            raise ValueError("99 is too much")


def count(of: Part) -> int:
    return of.width * 10


def whole(**fields):
    """Sequences too are leaves only where they are given: scalar defaults alone are recorded."""
    given = {
        "part": call(Part),
        "size": 3,
        "shape": (2, 3),
        "pair": (1, "a"),
        "axes": (),
        "names": (),
    }
    return call(Whole, **(given | fields))
