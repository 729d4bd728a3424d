"""The feed-forward half of a block."""

from __future__ import annotations

from typing import Literal

import jax
from flax import linen as nn

from lmjax.core import Mean
from lmjax.layers.linear import Linear
from lmjax.ops.activations import gelu, gelu_erf, swiglu
from lmjax.sharding import shard


class GeluMlp(nn.Module):
    """gelu(x W1 + b1) W2 + b2.

    Source: Vaswani et al., arXiv:1706.03762, equation 2, with the GELU of arXiv:1606.08415.

    Args:
      out_std: standard deviation of the initialisation of W2.
      form: of GELU: 'tanh', its approximation (GPT-2), or 'erf', what it approximates (BERT).
    """

    dim: int
    hidden: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    form: Literal["tanh", "erf"] = "tanh"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns (y_BTD, {}): a dense MLP has nothing beside its output to report."""
        h_BTF = Linear(
            features=(self.hidden,),
            axes=("embed", "mlp"),
            init_std=self.init_std,
            dtype=self.dtype,
            name="up",
        )(x_BTD)
        activation = gelu if self.form == "tanh" else gelu_erf
        h_BTF = activation(shard(h_BTF, "batch", "length", "act_mlp"), dtype=self.dtype)
        y_BTD = Linear(
            features=(self.dim,),
            axes=("mlp", "embed"),
            init_std=self.out_std,
            dtype=self.dtype,
            name="down",
        )(h_BTF)
        return y_BTD, {}

    def flop_per_token(self) -> float:
        """FLOP of one token's forward pass."""
        return 4.0 * self.dim * self.hidden


class ReluMlp(nn.Module):
    """relu(x W1) W2, without biases, or relu(x W1 + b1) W2 + b2.

    Source: Raffel et al. (T5), arXiv:1910.10683, section 2.1; with biases Vaswani et al.,
    arXiv:1706.03762, equation 2.

    Args:
      out_std: standard deviation of the initialisation of W2.
    """

    dim: int
    hidden: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns (y_BTD, {}): a dense MLP has nothing beside its output to report."""
        h_BTF = Linear(
            features=(self.hidden,),
            axes=("embed", "mlp"),
            use_bias=self.use_bias,
            init_std=self.init_std,
            dtype=self.dtype,
            name="up",
        )(x_BTD)
        h_BTF = jax.nn.relu(shard(h_BTF, "batch", "length", "act_mlp"))
        return _down(self, h_BTF, use_bias=self.use_bias), {}

    def flop_per_token(self) -> float:
        """FLOP of one token's forward pass."""
        return 4.0 * self.dim * self.hidden


class SwiGlu(nn.Module):
    """(silu(x W1) * x W2) W3, without biases.

    Source: Shazeer, arXiv:2002.05202, equation 6.

    Args:
      out_std: standard deviation of the initialisation of W3.
    """

    dim: int
    hidden: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns (y_BTD, {}): a dense MLP has nothing beside its output to report."""
        gate_BTF, up_BTF = _gate_and_up(self, x_BTD)
        return _down(self, swiglu(gate_BTF, up_BTF, dtype=self.dtype)), {}

    def flop_per_token(self) -> float:
        """FLOP of one token's forward pass."""
        return 6.0 * self.dim * self.hidden


class GeGlu(nn.Module):
    """(gelu(x W1) * x W2) W3, without biases; GELU in its tanh form.

    Source: Shazeer, arXiv:2002.05202, equation 6.

    Args:
      out_std: standard deviation of the initialisation of W3.
    """

    dim: int
    hidden: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        """Returns (y_BTD, {}): a dense MLP has nothing beside its output to report."""
        gate_BTF, up_BTF = _gate_and_up(self, x_BTD)
        return _down(self, gelu(gate_BTF, dtype=self.dtype) * up_BTF), {}

    def flop_per_token(self) -> float:
        """FLOP of one token's forward pass."""
        return 6.0 * self.dim * self.hidden


def _gate_and_up(mlp: SwiGlu | GeGlu, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two products into the hidden units, called within the module's compact method."""
    gate_BTF, up_BTF = (
        Linear(
            features=(mlp.hidden,),
            axes=("embed", "mlp"),
            use_bias=False,
            init_std=mlp.init_std,
            dtype=mlp.dtype,
            name=name,
        )(x_BTD)
        for name in ("gate", "up")
    )
    gate_BTF = shard(gate_BTF, "batch", "length", "act_mlp")
    return gate_BTF, shard(up_BTF, "batch", "length", "act_mlp")


def _down(mlp: SwiGlu | GeGlu | ReluMlp, h_BTF: jax.Array, *, use_bias: bool = False) -> jax.Array:
    """The product out of the hidden units, likewise."""
    return Linear(
        features=(mlp.dim,),
        axes=("mlp", "embed"),
        use_bias=use_bias,
        init_std=mlp.out_std,
        dtype=mlp.dtype,
        name="down",
    )(h_BTF)
