"""A model and its weights as decoding wants them: layers apart, dtypes that are read fastest.

A step of decoding does little but read the weights. Those of stacked layers are sliced out of the
stack first, which on a CPU is a copy: a loop over layers then takes twice as long as the products
alone, and the unrolled loop eight times. With an array a layer there is nothing to slice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lmjax.adapt.adapted import Adapted
from lmjax.adapt.quantized import Quantized
from lmjax.core import Decoder, EncoderDecoder, Variables

# Below this many rows a CPU multiplies in float32 (ops.matmul), and wants float32 weights for it.
FEW_ROWS = 8
# What is only ever an operand of a product in the model's dtype; a router decides in float32.
_OPERANDS = re.compile(r"(?<!router_)(kernel|table)$")
_STACKED = "block"  # a Stack has its layers' parameters under this name
_ALL = 2**20  # more layers than any model has


class Weights(NamedTuple):
    """Variables as the model has them, and where they are given, once more with layers apart."""

    stacked: Variables
    apart: Any = None


def apart(variables: Variables) -> Any:
    """The same weights with a tuple of layers in the place of each array of a stack.

    For arrays that lie in the memory of one CPU: it copies none whose layers are aligned.
    """

    def split(path: Any, x: jax.Array) -> Any:
        if not any(getattr(key, "key", None) == _STACKED for key in path):
            return x
        return tuple(map(jax.device_put, np.asarray(x)))

    return jax.tree_util.tree_map_with_path(split, variables)


def together(variables: Any) -> Variables:
    """Inverse of `apart`; in an unrolled program the compiler removes stack and slices."""
    return jax.tree.map(
        lambda x: jnp.stack(x) if isinstance(x, tuple) else x,
        variables,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def unrolled(model: Decoder | EncoderDecoder) -> Decoder | EncoderDecoder:
    """The same model without loops over layers, if it has any."""
    if isinstance(model, Adapted | Quantized):
        return dataclasses.replace(model, model=unrolled(model.model))
    return _with_field(model, "unroll", _ALL) if isinstance(model, nn.Module) else model


def product_dtype(model: Decoder | EncoderDecoder) -> str:
    """The dtype of the model's products, "float32" where its modules are not of one mind."""
    inner: Any = model
    while isinstance(inner, Adapted | Quantized):
        inner = inner.model
    dtypes = set(_fields(inner, "dtype"))
    return str(dtypes.pop()) if len(dtypes) == 1 else "float32"


def in_float32(variables: Variables) -> Variables:
    """The same weights, all of them in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, variables
    )


def in_dtype(variables: Variables, dtype: str) -> Variables:
    """The same weights, with the operands of products rounded to `dtype` once and for all.

    Products round them anyway; a tied embedding is rounded in the place where it is looked up too.
    """

    def cast(path: Any, x: jax.Array) -> jax.Array:
        is_operand = _OPERANDS.search(str(getattr(path[-1], "key", "")))
        return x.astype(dtype) if is_operand and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree_util.tree_map_with_path(cast, variables)


def _modules(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple):
        for part in tree:
            yield from _modules(part)
    elif isinstance(tree, nn.Module):
        yield tree
        for field in _own(tree):
            yield from _modules(getattr(tree, field))


def _own(module: nn.Module) -> list[str]:
    """Names of the fields that a module's author gave it."""
    names = [field.name for field in dataclasses.fields(module)]
    return [name for name in names if name not in ("parent", "name")]


def _fields(tree: Any, name: str) -> Iterator[Any]:
    for module in _modules(tree):
        if name in _own(module):
            yield getattr(module, name)


def _with_field(tree: Any, name: str, value: Any) -> Any:
    """A copy of a tree of modules in which every field of that name has that value."""
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(_with_field(part, name, value) for part in tree)
    if not isinstance(tree, nn.Module):
        return tree
    changes = {
        field: value if field == name else _with_field(getattr(tree, field), name, value)
        for field in _own(tree)
    }
    return tree.clone(parent=None, **changes)
