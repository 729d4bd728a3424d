"""Where the adapters of a product lie in our arrays, which follows from where its kernel does.

The family's table of tensors is read for it, both ways.
"""

# r rank; theirs [out, in], A [r, in], B [out, r]; ours [*in, *out], A [*in, r], B [r, *out]

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.adapt.sites import Site
from lmjax.convert.parts import Part
from lmjax.layers import linear

EXAMPLE = np.zeros((1, 1), np.int32)  # tokens, of which models are traced


@dataclass(frozen=True)
class Place:
    """A product of theirs, and the piece of one layer of a kernel of ours that it is.

    Args:
      module: its name there, as 'model.layers.0.self_attn.q_proj'.
      table: where its weight lies.
      site: our product.
      part: the piece of it.
    """

    module: str
    table: Part
    site: Site
    part: linear.Part | None

    @property
    def path(self) -> str:
        """Of our product."""
        return "/".join(self.site.path)

    @property
    def lead(self) -> int:
        """How many axes stack layers."""
        return len(self.table.where) - len(self.site.axes)

    @property
    def at(self) -> tuple[int, ...]:
        """Which layer."""
        return tuple(start for start, _ in self.table.where[: self.lead])

    def _sides(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Sizes of outputs and inputs in their order, and their order in ours."""
        split, axes = self.table.split[self.lead :], self.table.axes[self.lead :]
        count, size = len(split), 1
        while count and size < self.table.shape[1]:
            count -= 1
            size *= split[count]
        ins = [a - self.lead - count for a in axes if a - self.lead >= count]
        outs = [a - self.lead for a in axes if a - self.lead < count]
        return list(split[:count]), list(split[count:]), outs, ins

    def ours(self, tensor: np.ndarray, kind: str) -> np.ndarray:
        """One layer's array of ours of their tensor: of A ('a'), B ('b'), outputs or inputs."""
        out_sizes, in_sizes, outs, ins = self._sides()
        rank = tensor.shape[0] if kind == "a" else tensor.shape[-1]
        shape = self.site.shape(self.part)
        if kind == "a":
            x = tensor.reshape(rank, *in_sizes).transpose([*(i + 1 for i in ins), 0])
            return x.reshape(*self.site.in_shape, rank)
        if kind == "b":
            x = tensor.reshape(*out_sizes, rank).transpose([len(out_sizes), *outs])
            return x.reshape(rank, *shape)
        if kind == "outputs":
            return tensor.reshape(out_sizes).transpose(outs).reshape(shape)
        return tensor.reshape(in_sizes).transpose(ins).reshape(self.site.in_shape)

    def theirs(self, array: np.ndarray, kind: str) -> np.ndarray:
        """Inverse of `ours`; vectors are flat."""
        out_sizes, in_sizes, outs, ins = self._sides()
        ours_out = [out_sizes[i] for i in outs]
        ours_in = [in_sizes[i] for i in ins]
        if kind == "a":
            x = array.reshape(*ours_in, -1)
            return x.transpose([len(ins), *np.argsort(ins)]).reshape(x.shape[-1], -1)
        if kind == "b":
            x = array.reshape(-1, *ours_out)
            return x.transpose([*(1 + np.argsort(outs)), 0]).reshape(-1, x.shape[0])
        sizes, order = (ours_out, outs) if kind == "outputs" else (ours_in, ins)
        return array.reshape(sizes).transpose(np.argsort(order)).reshape(-1)

    def norms(self, kernel: np.ndarray) -> np.ndarray:
        """Of the columns of the piece; `kernel` is whole."""
        cut = tuple(slice(*ends) for ends in self.table.where)
        piece = np.asarray(kernel[cut], np.float64).reshape(
            *self.site.in_shape, *self.site.shape(self.part)
        )
        size = np.sqrt(np.sum(np.square(piece), axis=tuple(range(self.site.in_dims))))
        return size.astype(np.float32)


def places_of(model: Any, parts: Sequence[Part]) -> dict[str, Place]:
    """The products of a model, by their names there.

    Those that keep weights as [in, out] there (GPT-2) or are no `Linear` here are left out.
    """
    every = adapted(model=model, adapters=(Lora(targets=("*",), rank=1),)).sites(EXAMPLE)["lora"]
    found = {}
    for p in parts:
        path, _, kind = p.path.rpartition("/")
        if kind != "kernel" or path not in every or len(p.shape) != 2:
            continue
        site = every[path]
        lead = len(p.where) - len(site.axes)
        if p.axes[lead] == lead:  # their inputs come first
            continue
        first = lead + site.in_dims
        for part in site.pieces:
            if part is None or p.where[first + part.axis] == (part.start, part.stop):
                module = p.tensor.removesuffix(".weight")
                found[module] = Place(module, p, site, part)
    return found
