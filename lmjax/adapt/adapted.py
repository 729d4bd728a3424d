"""A model with adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.adapt import sites
from lmjax.adapt.intercepted import Intercepted
from lmjax.adapt.prefix import Prefix
from lmjax.adapt.quantized import Quantized
from lmjax.adapt.sites import Site
from lmjax.errors import UserError
from lmjax.layers.attention import Attention
from lmjax.layers.linear import Linear

Run = Callable[[jax.Array], jax.Array]


@runtime_checkable
class Adapter(Protocol):
    """A way of tuning: which products, and what it makes of each.

    Its parameters are those of one submodule of the `Linear`, called `name`.
    """

    @property
    def name(self) -> str:
        """In the paths of its parameters."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Which products: see `sites.matches`."""
        ...

    def check(self, site: Site) -> None:
        """Raises UserError where it cannot tune this product."""
        ...

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """What the product becomes: `run(x)` is what it would be. Called inside of the module."""
        ...

    def merged(
        self, kernel: Any, bias: Any, params: Mapping[str, Any], site: Site
    ) -> tuple[Any, Any]:
        """(kernel, bias) of a product without adapter that computes the same.

        Raises UserError where there is none.
        """
        ...

    def unmerged(
        self, kernel: Any, bias: Any, params: Mapping[str, Any], site: Site
    ) -> tuple[Any, Any]:
        """Inverse of `merged`, up to rounding. Raises UserError where there is none."""
        ...


@dataclass(frozen=True)
class Adapted(Intercepted["_Seen"]):
    """A model whose products are tuned by adapters; it is to a task whatever the model is.

    It is initialised as without adapters. FLOP are those of the model alone (adapters of rank r add
    2 r (in + out) to a product of 2 in out).
    """

    model: Any
    adapters: tuple[Adapter | Prefix, ...]

    def __post_init__(self) -> None:
        names = [adapter.name for adapter in self.adapters]
        if not names:
            raise UserError("adapters is empty: give at least one, or the model itself.")
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two adapters are called {twice.pop()!r}: give one another `name`.")
        if isinstance(self.model, Adapted):
            raise UserError("the model is adapted already: give all adapters at once.")
        if isinstance(self.model, Quantized) and any(
            getattr(a, "dora", False) for a in self.adapters
        ):
            raise UserError(
                "DoRA needs the norms of kernels, and the model's are quantised: set dora=False."
            )
        super().__post_init__()

    def interceptor(self) -> _Seen:
        """Puts the adapters around the products."""
        return _Seen(self.adapters)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Those of the model by part, and those of each adapter by its name."""
        model, own = split(params, self._names)
        found = dict(self.model.count_params(model))
        for adapter in self.adapters:
            leaves = [jax.tree.leaves(p[adapter.name]) for p in own.values() if adapter.name in p]
            found[adapter.name] = sum(x.size for part in leaves for x in part)
        return found

    def sites(self, *example: Any) -> dict[str, dict[str, Site]]:
        """What each adapter tunes: {its name: {path of the module: site}}.

        Args:
          example: what `init` takes beside the key; shapes will do.

        Raises UserError as `init`.
        """
        return self.seen(*example).tuned

    def merged(self, params: Mapping[str, Any], *example: Any) -> dict[str, Any]:
        """Parameters of the model alone that compute what these do, up to rounding of one product.

        Of a quantised model they are those of the model that it wraps, in float32.

        Args:
          example: as of `sites`.

        Raises UserError where an adapter is no linear function (`Houlsby`).
        """
        return self._changed(params, params, example, list(self.adapters), "merged")

    def unmerged(
        self, merged: Mapping[str, Any], params: Mapping[str, Any], *example: Any
    ) -> dict[str, Any]:
        """The adapted parameters that `merged` was made of, up to rounding of a sum.

        Args:
          merged: the model's.
          params: adapted ones, of which the adapters' are read.
          example: as of `sites`.

        Raises UserError where an adapter cannot be undone (`Lora` with `dora`), and where the model
        is quantised.
        """
        if isinstance(self.model, Quantized):
            raise UserError("quantised weights cannot be unmerged: keep the run of the adapters.")
        model = self._changed(merged, params, example, list(self.adapters)[::-1], "unmerged")
        own = split(params, self._names)[1]
        flat = flatten_dict(model, sep="/")
        for path, adapters in own.items():
            flat |= {f"{path}/{k}": v for k, v in flatten_dict(adapters, sep="/").items()}
        return unflatten_dict(flat, sep="/")

    def _changed(
        self,
        params: Mapping[str, Any],
        of: Mapping[str, Any],
        example: tuple[Any, ...],
        adapters: list[Adapter | Prefix],
        method: str,
    ) -> dict[str, Any]:
        """Kernels and biases of `params` with what a method of each adapter makes of them."""
        base = split(params, self._names)[0]
        if isinstance(self.model, Quantized) and method == "merged":
            base = self.model.plain(base, *example)
        flat = flatten_dict(base, sep="/")
        own, tuned = split(of, self._names)[1], self.sites(*example)
        for adapter in adapters:
            if isinstance(adapter, Prefix):
                raise UserError(
                    f"{adapter.name} cannot be merged: no kernel computes what it adds. Keep it."
                )
            for path, site in tuned[adapter.name].items():
                kernel, bias = flat[f"{path}/kernel"], flat.get(f"{path}/bias")
                one = functools.partial(getattr(adapter, method), site=site)
                for _ in range(kernel.ndim - len(site.axes)):  # layers are stacked in front
                    one = jax.vmap(one)
                kernel, bias = one(kernel, bias, own[path][adapter.name])
                flat |= {f"{path}/kernel": kernel} | (
                    {} if bias is None else {f"{path}/bias": bias}
                )
        return unflatten_dict(flat, sep="/")

    @property
    def _names(self) -> set[str]:
        return {adapter.name for adapter in self.adapters}


@dataclass
class _Seen:
    """The interceptor; what it has met."""

    adapters: tuple[Adapter | Prefix, ...]
    names: set[str] = field(default_factory=set)
    attentions: set[str] = field(default_factory=set)
    tuned: dict[str, dict[str, Site]] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError where a target is nothing that was met."""
        for adapter in self.adapters:
            known = self.attentions if isinstance(adapter, Prefix) else self.names
            sites.check_targets({adapter.name: adapter.targets}, known)

    def __call__(
        self, run: Run, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        linear = context.module
        if isinstance(linear, Attention) and context.method_name == "attend":
            return self._attend(linear, functools.partial(run, *args, **kwargs))
        if not isinstance(linear, Linear) or context.method_name != "__call__":
            return run(*args, **kwargs)
        (x,) = args
        whole = sites.site_of(linear, x)
        path = "/".join(linear.path)
        self.names |= {path, *(f"{path}/{part.name}" for part in linear.parts)}
        for adapter in self.adapters:
            site = sites.chosen(adapter.targets, whole, linear)
            if site is not None and not isinstance(adapter, Prefix):
                adapter.check(site)
                self.tuned.setdefault(adapter.name, {})[path] = site
                on_it = [a for a in self.adapters if path in self.tuned.get(a.name, {})]
                if len(on_it) > 1 and any(getattr(a, "dora", False) for a in on_it):
                    raise UserError(
                        f"{path} is tuned by {' and '.join(a.name for a in on_it)}, and DoRA "
                        "shares a product with no other adapter: give them other targets."
                    )
                run = functools.partial(adapter.around, linear, site, run)
        return run(x)

    def _attend(self, attention: Attention, run: Callable[..., jax.Array]) -> jax.Array:
        """Attention with the prefixes of those adapters that have one."""
        path = "/".join(attention.path)
        self.attentions.add(path)
        for adapter in self.adapters:
            if isinstance(adapter, Prefix) and any(
                sites.matches(target, path) for target in adapter.targets
            ):
                run = functools.partial(run, prefix=adapter.pairs(attention))
        return run()


def adapted(*, model: Any, adapters: tuple[Adapter | Prefix, ...]) -> Adapted:
    """A model with adapters, for tasks that take such a model.

    Set `Run.trainable` to what trains: r"/lora/" (the adapter's name) for the adapters alone.

    Args:
      model: any `core.Decoder`, `Encoder`, `EncoderDecoder` or `Network` made of `layers.Linear`.
      adapters: `Lora`, `AdaLora`, `Ia3`, `Houlsby`, `Prefix`; of several on one product, the later
        are around the earlier.

    Raises UserError for no adapters, and for two of one name.
    """
    return Adapted(model, tuple(adapters))


def split(
    params: Mapping[str, Any], names: set[str], path: str = ""
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the model's parameters, {path of a module: {adapter's name: its parameters}})."""
    model: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        at = f"{path}/{name}" if path else name
        if name in names and isinstance(value, Mapping):
            own.setdefault(path, {})[name] = value
        elif isinstance(value, Mapping):
            model[name], more = split(value, names, at)
            own |= more
        else:
            model[name] = value
    return model, own
