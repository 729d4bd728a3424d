"""Ways to draw the first weights, by name."""

from __future__ import annotations

import math
from typing import Literal

from flax import linen as nn

from lmjax.errors import UserError, did_you_mean

Init = Literal[
    "normal",
    "truncated_normal",
    "xavier_uniform",
    "xavier_normal",
    "he_uniform",
    "he_normal",
]
_BY_FANS = {
    "xavier_uniform": (1.0, "fan_avg", "uniform"),
    "xavier_normal": (1.0, "fan_avg", "normal"),
    "he_uniform": (2.0, "fan_in", "uniform"),
    "he_normal": (2.0, "fan_in", "normal"),
}
INITIALIZERS = ("normal", "truncated_normal", *_BY_FANS)


def initializer(name: Init, *, std: float = 0.02) -> nn.initializers.Initializer:
    """The initialiser of this name, for kernels [in, out].

    Sources: Xavier: Glorot & Bengio, AISTATS 2010, equation 16: variance 2 / (in + out). He: He et
    al., arXiv:1502.01852, equation 10: variance 2 / in. Uniform ones lie within sqrt(3 variance),
    normal ones have no bounds; "truncated_normal" is a normal distribution cut at two standard
    deviations, scaled so that what is left has `std`.

    Args:
      std: of "normal" and "truncated_normal"; the others need none.
    """
    if name not in INITIALIZERS:
        raise UserError(f"the initialiser is {name!r}." + did_you_mean(str(name), INITIALIZERS))
    if not (std > 0 and math.isfinite(std)):
        raise UserError(f"the initialiser's std is {std}: must be above 0, and finite.")
    if name == "normal":
        return nn.initializers.normal(std)
    if name == "truncated_normal":
        return nn.initializers.truncated_normal(std / _LEFT)
    scale, mode, distribution = _BY_FANS[name]
    # The table's strings are no literals to the type checker.
    return nn.initializers.variance_scaling(scale, mode, distribution)  # type: ignore[arg-type]


# The standard deviation of a standard normal that is cut at -2 and 2.
_LEFT = 0.87962566103423978
