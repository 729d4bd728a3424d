"""A model whose products multiply by weights of few bits, or by weights rounded to such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax import sharding
from lmjax.adapt import sites
from lmjax.adapt.intercepted import Intercepted
from lmjax.adapt.sites import Site
from lmjax.errors import UserError
from lmjax.layers.linear import Linear
from lmjax.ops import blockwise
from lmjax.ops.blockwise import BLOCK, Blocks, Kind
from lmjax.ops.spread import scale_axes
from lmjax.sharding import Boxed

_SCALE = "kernel_scale"


@dataclass(frozen=True)
class Quantized(Intercepted["_Seen"]):
    """A model over weights of few bits; it is to a task whatever the model is.

    In the place of a product's `kernel` are `kernel_int4` (the kind) and `kernel_scale`, arrays
    with the names of the kernel's axes, stacked and split as it is. They are made whole where they
    are multiplied by, in the forward and again in the backward pass, and have no gradient.

    With `aware` the parameters are the model's own, and products see them rounded, with the
    gradient of the identity: what is trained so loses nothing when it is quantised.
    """

    model: Any
    kind: str = "int4"
    block: int = BLOCK
    targets: tuple[str, ...] = ("*",)
    aware: bool = False

    def __post_init__(self) -> None:
        blockwise.check(self.kind, self.block)
        if not self.targets or isinstance(self.targets, str):
            raise UserError(f"targets is {self.targets!r}: give names, as ('qkv', 'mlp/up').")
        if isinstance(self.model, Quantized):
            raise UserError("the model is quantised already: name all targets at once.")
        if hasattr(self.model, "adapters"):
            raise UserError(
                "the model has adapters: quantise what they tune, adapted(model=quantized(...))."
            )
        super().__post_init__()

    def interceptor(self) -> _Seen:
        """Puts quantised arrays in the place of kernels."""
        return _Seen(self)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Those of the model by part, as it has them in float32."""
        flat = flatten_dict(dict(params), sep="/", is_leaf=lambda _, x: not isinstance(x, Mapping))
        plain: dict[str, Any] = {}
        for path, x in flat.items():
            module, _, name = path.rpartition("/")
            if name == self._data:
                pair = 2 if blockwise.is_packed(self.kind) else 1
                shape = sharding.unbox(x).shape
                plain[f"{module}/kernel"] = jax.ShapeDtypeStruct(
                    (*shape[:-1], pair * shape[-1]), jnp.float32
                )
            elif name != _SCALE:
                plain[path] = x
        return dict(self.model.count_params(unflatten_dict(plain, sep="/")))

    def sites(self, *example: Any) -> dict[str, Site]:
        """What is quantised, by the path of the module.

        Args:
          example: what `init` takes beside the key; shapes will do.

        Raises UserError as `init`.
        """
        return self.seen(*example).found

    def quantised(self, params: Mapping[str, Any], *example: Any) -> dict[str, Any]:
        """Parameters of this model, from those of the model that it wraps.

        Args:
          example: as of `sites`.
        """
        flat = flatten_dict(dict(params), sep="/")
        for path, site in self.sites(*example).items():
            made = self._blocks(flat.pop(f"{path}/kernel"), site)
            flat |= {f"{path}/{self._data}": made.data, f"{path}/{_SCALE}": made.scale}
        return unflatten_dict(flat, sep="/")

    def plain(self, params: Mapping[str, Any], *example: Any) -> dict[str, Any]:
        """Parameters of the model that this one wraps, which compute the same, in float32.

        Args:
          example: as of `sites`.
        """
        flat = flatten_dict(dict(params), sep="/")
        for path, site in self.sites(*example).items():
            if self.aware:
                made = self._blocks(flat[f"{path}/kernel"], site)
            else:
                data, scale = flat.pop(f"{path}/{self._data}"), flat.pop(f"{path}/{_SCALE}")
                axis = data.ndim - len(site.axes) + site.in_dims - 1
                made = Blocks(data, scale, self.kind, self.block, axis)
            flat[f"{path}/kernel"] = _dequantise(made)
        return unflatten_dict(flat, sep="/")

    def _blocks(self, kernel: Any, site: Site) -> Blocks:
        axis = kernel.ndim - len(site.axes) + site.in_dims - 1  # layers are stacked in front
        return _quantise(kernel, self.kind, self.block, axis)

    @property
    def _data(self) -> str:
        return f"kernel_{self.kind}"


@dataclass
class _Seen:
    """The interceptor; what it has met."""

    model: Quantized
    names: set[str] = field(default_factory=set)
    parts: dict[str, str] = field(default_factory=dict)
    found: dict[str, Site] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError where a target is nothing that was met, or a part of it."""
        for target in self.model.targets:
            if any(sites.matches(target, name) for name in self.names):
                continue
            for part, path in self.parts.items():
                if sites.matches(target, part):
                    raise UserError(
                        f"quantized.targets names {target!r}, a part of the kernel {path}, which "
                        f"is quantised as a whole: name {path.split('/')[-1]!r}."
                    )
            sites.check_targets({"quantized": (target,)}, self.names)

    def __call__(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        linear = context.module
        if not isinstance(linear, Linear) or context.method_name != "declare_kernel":
            return run(*args, **kwargs)
        (in_shape,) = args
        path = "/".join(linear.path)
        self.names.add(path)
        self.parts |= {f"{path}/{part.name}": path for part in linear.parts}
        if not any(sites.matches(target, path) for target in self.model.targets):
            return run(in_shape)
        site = Site(linear.path, in_shape, linear.features, linear.axes, linear.dtype)
        self.found[path] = site
        kind, block, axis = self.model.kind, self.model.block, len(in_shape) - 1
        if blockwise.is_packed(kind) and in_shape[-1] % 2:
            raise UserError(
                f"{path} has {in_shape[-1]} inputs, and {kind} packs two weights into a byte: "
                "leave it out of quantized.targets, or choose int8 or fp8."
            )
        if self.model.aware:
            return blockwise.rounded(run(in_shape), kind, block, axis)
        return _declared(linear, in_shape, kind, block, axis)


def quantized(
    *,
    model: Any,
    kind: Kind = "int4",
    block: int = BLOCK,
    targets: tuple[str, ...] = ("*",),
    aware: bool = False,
) -> Quantized:
    """A model over quantised weights, for tasks that take such a model.

    Its weights come from `python -m lmjax.convert quantize`. Under adapters it is QLoRA:
    `adapted(model=quantized(model=...), adapters=...)`, with `trainable` that names the adapters.
    Embeddings, experts and convolutions stay as they are. A product over several axes (heads and
    their dimensions) has its blocks along the last one.

    Args:
      model: any `core.Decoder`, `Encoder`, `EncoderDecoder` or `Network` with `layers.Linear`.
      kind: 'int8', 'int4', 'nf4' or 'fp8': see `ops.blockwise`.
      block: weights along the inputs that share a scale; the last block may be shorter.
      targets: which products, by the ends of their paths: "qkv", "mlp/up", "*" (`sites.matches`).
      aware: train weights in float32 that products see quantised.

    Raises UserError for a kind or a block that there is not, and for a model with adapters.
    """
    return Quantized(model, kind, block, tuple(targets), aware)


def _declared(
    linear: Linear, in_shape: tuple[int, ...], kind: str, block: int, axis: int
) -> Blocks:
    """The two parameters in the place of the kernel."""
    shape, axes, name = (*in_shape, *linear.features), linear.axes, f"kernel_{kind}"
    few = scale_axes(axes, axis)
    if not linear.has_variable("params", name):
        # Both are made of one kernel, by the one key that the kernel would take.
        kernel = linear.drawn()(linear.make_rng("params"), shape, jnp.float32)
        made = blockwise.quantise(kernel, kind=kind, block=block, axis=axis)
        linear.put_variable("params", name, Boxed(made.data, axes))
        linear.put_variable("params", _SCALE, Boxed(made.scale, few))
    rows = shape[axis] // (2 if blockwise.is_packed(kind) else 1)
    zeros = nn.initializers.zeros  # never drawn: they only tell the shapes
    data, scale = (
        sharding.param(linear, key, zeros, (*shape[:axis], size, *shape[axis + 1 :]), names)
        for key, size, names in ((name, rows, axes), (_SCALE, -(-shape[axis] // block), few))
    )
    return Blocks(data, scale, kind, block, axis)


def _quantise(kernel: Any, kind: str, block: int, axis: int) -> Blocks:
    made: Blocks = jax.jit(lambda w: blockwise.quantise(w, kind=kind, block=block, axis=axis))(
        kernel
    )
    return made


_dequantise = jax.jit(blockwise.dequantise)
