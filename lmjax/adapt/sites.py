"""The products of a model that adapters tune, by name."""

# B batch, T length.

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmjax.errors import UserError, did_you_mean
from lmjax.layers.linear import Linear, Part

# What libraries and papers call the products that layers here have by another name.
ALIASES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention/out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Site:
    """One `Linear` as an adapter sees it, or the parts of its kernel that are tuned.

    Args:
      path: of the module in the model.
      in_shape: the axes of x that are contracted.
      features: those of the result.
      axes: names of the kernel's axes, inputs first.
      dtype: of the operands.
      parts: those of the kernel's parts that are tuned; empty for the kernel as a whole.
    """

    path: tuple[str, ...]
    in_shape: tuple[int, ...]
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str
    parts: tuple[Part, ...] = ()

    @property
    def in_dims(self) -> int:
        """How many axes of x are contracted."""
        return len(self.in_shape)

    @property
    def pieces(self) -> tuple[Part | None, ...]:
        """What is tuned: parts, or None, the whole."""
        return self.parts or (None,)

    def shape(self, part: Part | None) -> tuple[int, ...]:
        """The features of a piece."""
        if part is None:
            return self.features
        return tuple(
            part.stop - part.start if axis == part.axis else n
            for axis, n in enumerate(self.features)
        )

    def names(self) -> list[str]:
        """What it is called: its path, and where parts are tuned, one for each."""
        path = "/".join(self.path)
        return [path if part is None else f"{path}/{part.name}" for part in self.pieces]

    def vector_axes(self, *, inputs: bool = False) -> tuple[str | None, ...]:
        """Names of the axes of a vector over the outputs, or the inputs, as of a bias."""
        axes = self.axes[: self.in_dims] if inputs else self.axes[self.in_dims :]
        return tuple("norm" if axis == "embed" else axis for axis in axes)


def named(part: Part | None, name: str) -> str:
    """The name of a piece's parameter: 'query_a' of a part, 'a' of the whole."""
    return name if part is None else f"{part.name}_{name}"


def site_of(linear: Linear, x: jax.Array) -> Site:
    """A product as a whole."""
    shape = x.shape[-linear.in_dims :]
    return Site(linear.path, shape, linear.features, linear.axes, linear.dtype)


def chosen(targets: Sequence[str], site: Site, linear: Linear) -> Site | None:
    """What the targets name of a product: some of its parts, else all of it, else nothing."""
    path = "/".join(site.path)
    parts = [p for p in linear.parts if any(matches(t, f"{path}/{p.name}") for t in targets)]
    if parts:
        return Site(site.path, site.in_shape, site.features, site.axes, site.dtype, tuple(parts))
    return site if any(matches(t, path) for t in targets) else None


def matches(target: str, name: str) -> bool:
    """Whether a target means this product: its path, the end of it, or a pattern ('*') of either.

    Names of other libraries stand for ours (`ALIASES`).
    """
    target = ALIASES.get(target, target)
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*/{target}")


def check_targets(targets: Mapping[str, Sequence[str]], names: Iterable[str]) -> None:
    """Raises UserError for a target, by its adapter's name, that means no product of the model."""
    names = sorted(set(names))
    for adapter, wanted in targets.items():
        for target in wanted:
            if not any(matches(target, name) for name in names):
                depth = target.count("/") + 1
                near = {"/".join(name.split("/")[-depth:]) for name in names}
                near |= {t for t in ALIASES if any(matches(t, name) for name in names)}
                raise UserError(
                    f"{adapter}.targets names {target!r}, and the model has no such product."
                    + did_you_mean(target, near)
                )


def slice_of(y: jax.Array, site: Site, part: Part | None) -> jax.Array:
    """The columns of a piece: of y [..., *features], or of a kernel."""
    if part is None:
        return y
    axis = y.ndim - len(site.features) + part.axis
    return jax.lax.slice_in_dim(y, part.start, part.stop, axis=axis)


def leading(vector: jax.Array, y: jax.Array) -> jax.Array:
    """A vector over the last axes of y, in its dtype and with axes of size 1 in front."""
    return jnp.asarray(vector, y.dtype)[(None,) * (y.ndim - vector.ndim)]


def replaced(y: jax.Array, site: Site, new: Sequence[tuple[Part | None, jax.Array]]) -> jax.Array:
    """`y` with other columns in the place of those of some pieces."""
    if new[0][0] is None:
        return new[0][1]
    parts = sorted(((p, x) for p, x in new if p is not None), key=lambda item: item[0].start)
    first = parts[0][0]
    axis = y.ndim - len(site.features) + first.axis
    pieces, at = [], 0
    for part, x in parts:
        if at < part.start:
            pieces.append(jax.lax.slice_in_dim(y, at, part.start, axis=axis))
        pieces.append(x)
        at = part.stop
    if at < y.shape[axis]:
        pieces.append(jax.lax.slice_in_dim(y, at, y.shape[axis], axis=axis))
    return jnp.concatenate(pieces, axis=axis)
