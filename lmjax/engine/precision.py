"""In what precision a run keeps its parameters and multiplies by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lmjax.errors import UserError, check_regex, did_you_mean
from lmjax.ops.quantize import Products
from lmjax.ops.rounding import join_halves, split_halves, stochastic_round
from lmjax.sharding import Boxed

Kept = Literal["float32", "bfloat16_master", "bfloat16_stochastic"]

# Of the key of a step, whose microbatches count up from 0.
_ROUNDING = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How parameters are kept between steps, and what products with them are made of.

    The optimizer sees float32 parameters and gradients in every case. In bfloat16 are matrices, and
    all frozen ones; vectors (scales, biases) stay float32, as they weigh nothing, and what a model
    does not have in float32 stays as it is.

    Args:
      params: 'float32'; 'bfloat16_master', where the model has the nearest bfloat16 and the
        optimizer's state the other 16 bits of a float32, which it updates exactly; or
        'bfloat16_stochastic', where the update is rounded by chance and nothing else is kept.
      products: 'int8' or 'fp8' quantises products with weights, see `ops.quantize`; of evaluations
        too.
      quantized: regex over parameter paths; the products with those in which it is found.
    """

    params: Kept = "float32"
    products: Products = "default"
    quantized: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("params", get_args(Kept)), ("products", get_args(Products))):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} is {value!r}." + did_you_mean(str(value), allowed))
        check_regex("quantized", self.quantized)


class MasterState(NamedTuple):
    """The state of the optimizer, and the lower halves of the parameters that are bfloat16."""

    lower_bits: Any
    optimizer: Any


def keep(
    precision: Precision, optimizer: optax.GradientTransformation, params: Any, frozen: Any
) -> tuple[Any, Any, Any]:
    """(params, frozen, opt_state) as they are kept, of float32 parameters, boxed or not."""
    opt_state = optimizer.init(params)
    if precision.params == "float32":
        return params, frozen, opt_state
    nearest, lower = _split(params)
    if precision.params == "bfloat16_master":
        opt_state = MasterState(lower, opt_state)
    return nearest, _split(frozen)[0], opt_state


def widen(precision: Precision, params: Any, frozen: Any, opt_state: Any) -> tuple[Any, Any, Any]:
    """(params, frozen, opt_state) as they would be in a run that keeps float32.

    What `keep` rounded stays rounded; the moments stay as the optimizer keeps them.
    """
    if precision.params == "bfloat16_master":
        params, opt_state = _join(params, opt_state.lower_bits), opt_state.optimizer
    wide = jax.tree.map(
        lambda p: p.astype(jnp.float32) if p.dtype == jnp.bfloat16 else p, (params, frozen)
    )
    return *wide, opt_state


def update(
    precision: Precision,
    optimizer: optax.GradientTransformation,
    gradient: Any,
    params: Any,
    opt_state: Any,
    rng: jax.Array,
) -> tuple[Any, Any]:
    """One step of the optimizer: (params, opt_state). `rng` is of the step."""
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    if precision.params == "bfloat16_master":
        whole = _join(params, opt_state.lower_bits)
        updates, inner = optimizer.update(gradient, opt_state.optimizer, whole)
        nearest, lower = _split(optax.apply_updates(whole, updates), like=params)
        return nearest, MasterState(lower, inner)
    whole = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    updates, opt_state = optimizer.update(gradient, opt_state, whole)
    leaves, structure = jax.tree.flatten(optax.apply_updates(whole, updates))
    rng = jax.random.fold_in(rng, _ROUNDING)
    rounded = [
        stochastic_round(new, jax.random.fold_in(rng, i)) if old.dtype == jnp.bfloat16 else new
        for i, (new, old) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded), opt_state


def _is_matrix(param: Any) -> bool:
    """Whether it is of float32, and has two axes beside the one that stacks layers."""
    if (param.value if isinstance(param, Boxed) else param).dtype != jnp.float32:
        return False  # quantised
    if isinstance(param, Boxed):
        return sum(axis != "layers" for axis in param.axes) > 1
    return param.ndim > 1


def _split(params: Any, like: Any = None) -> tuple[Any, Any]:
    """(nearest bfloat16, lower bits) of the matrices, or of what is bfloat16 in `like`.

    Other leaves stay, and have no lower bits.
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Boxed))
    if like is None:
        chosen = [_is_matrix(leaf) for leaf in leaves]
    else:
        chosen = [leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(like)]
    halves: list[tuple[Any, Any]] = []
    for leaf, low in zip(leaves, chosen, strict=True):
        if not low:
            halves.append((leaf, None))
        elif isinstance(leaf, Boxed):
            nearest, lower = split_halves(leaf.value)
            halves.append((Boxed(nearest, leaf.axes), Boxed(lower, leaf.axes)))
        else:
            halves.append(split_halves(leaf))
    upper_tree = jax.tree.unflatten(structure, [upper for upper, _ in halves])
    return upper_tree, jax.tree.unflatten(structure, [lower for _, lower in halves])


def _join(params: Any, lower: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    halves = zip(leaves, jax.tree.leaves(lower, is_leaf=lambda x: x is None), strict=True)
    joined = [p if low is None else join_halves(p, low) for p, low in halves]
    return jax.tree.unflatten(structure, joined)
