"""Weights of a run with a part of them set to zero at once, as a workdir of their own."""

# Shape legend: B rows, T length; kernels are [*stacked, *inputs, *outputs].

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax import sharding
from lmjax.adapt.adapted import Adapted, Run, adapted
from lmjax.adapt.quantized import Quantized
from lmjax.adapt.sites import Site
from lmjax.config import build, to_dict
from lmjax.convert.held_out import BATCH, measure, windows_of
from lmjax.convert.places import EXAMPLE
from lmjax.convert.workdirs import check_empty, read_all, tree, whole, with_model, write_arrays
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.errors import UserError, did_you_mean
from lmjax.layers.linear import Linear
from lmjax.models.saved import recorded_model
from lmjax.optim.pruning import keep_pattern, pattern_of

Method = Literal["magnitude", "wanda"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What became of a model.

    Args:
      sparsity: the share of zeros, by the kernel's path.
      before: loss on held-out text in nats a token; NaN without text.
      after: the same of what was written.
    """

    sparsity: Mapping[str, float]
    before: float
    after: float


def prune(
    workdir: Path,
    to: Path,
    *,
    method: Method = "wanda",
    pattern: str = "",
    sparsity: float = 0.5,
    text: str = "",
    length: int = 256,
    num_windows: int = 128,
    step: int | None = None,
) -> Pruning:
    """Writes a workdir of a decoder whose products have zeros, without any training.

    Of the kernels of all `layers.Linear` (embeddings and experts are not), each output apart, the
    weights of the lowest scores along the inputs are set to zero. The score is |w| ('magnitude'),
    or |w| times the root of the sum of squares of the input that it multiplies, over `num_windows`
    windows of the text ('wanda': Sun et al., arXiv:2306.11695, equation 1; all layers' inputs are
    those of the whole model, where the paper's see earlier layers pruned).

    Args:
      workdir: a run, or imported weights.
      to: is made.
      pattern: '2:4' or the like, in the place of `sparsity`.
      sparsity: the share of each output's weights.
      text: see `data.source.read_documents`. Its last tenth is held out: the losses are of as
        many windows of that. 'wanda' needs it.
      length: of a window; at most the model's context.

    Raises:
      UserError: where the run is no decoder, has adapters or is damaged; for a method, a pattern or
        a share that makes no sense; where `to` holds a run; where the text is too short.
    """
    n_of_m = pattern_of(pattern)
    if method not in get_args(Method):
        raise UserError(f"method is {method!r}." + did_you_mean(method, get_args(Method)))
    if not 0 < sparsity < 1:
        raise UserError(f"sparsity is {sparsity}: must be above 0 and below 1.")
    if method == "wanda" and not text:
        raise UserError("wanda reads text, and none is named: give one, or method='magnitude'.")
    check_empty(to)
    stored, held, lie = whole(workdir, step)
    node = recorded_model(workdir)
    model = build(node)
    if isinstance(model, Adapted | Quantized) or not hasattr(model, "init_cache"):
        raise UserError(
            f"{workdir} is no plain decoder: merge its adapters first, or dequantise it."
        )
    flat = read_all(stored, lie)
    params = tree(flat)
    probed = adapted(model=model, adapters=(_Probe(),))
    sites = probed.sites(EXAMPLE)[_Probe.name]
    windows = held_out = None
    if text:
        tokenizer = tokenizer_from_json(held["tokenizer"])
        length = min(length, model.max_length - 1)
        windows, held_out = windows_of(text, tokenizer, length)
        windows, held_out = windows[:num_windows], held_out[:num_windows]
    squares: dict[str, Any] = {}
    if method == "wanda":
        assert windows is not None
        squares = _squares(probed, params, windows)
    zeros = {}
    for path, site in sites.items():
        kernel = f"{path}/kernel"
        lead = flat[kernel].ndim - len(site.axes)  # layers are stacked in front
        inputs = tuple(range(lead, lead + site.in_dims))
        score = jnp.abs(jnp.asarray(flat[kernel], jnp.float32))
        if squares:
            norm = jnp.sqrt(squares[path])
            score = score * norm.reshape(*norm.shape, *[1] * (score.ndim - norm.ndim))
        kept = np.asarray(_kept(score, inputs, n_of_m, sparsity, kernel))
        flat[kernel] = np.where(kept, flat[kernel], np.zeros((), flat[kernel].dtype))
        zeros[kernel] = float(np.mean(flat[kernel] == 0))
    losses = [float("nan")] * 2
    if held_out is not None:
        losses = [measure(model, p, held_out).loss for p in (params, tree(flat))]
    write_arrays(workdir, to, held, with_model(held, to_dict(node)), flat)
    return Pruning(sparsity=zeros, before=losses[0], after=losses[1])


@dataclass(frozen=True)
class _Probe:
    """An adapter that changes nothing: the gradient of its parameter is the inputs' squares."""

    name = "inputs"
    targets = ("*",)

    def check(self, site: Site) -> None:
        """It fits every product."""

    def around(self, linear: Linear, site: Site, run: Run, x: jax.Array) -> jax.Array:
        """The product, and nothing added to it."""
        whole = Site(site.path, site.in_shape, site.features, site.axes, site.dtype)
        y = run(x)
        return y + _nothing(_Zeros(name=self.name)(whole), x, y)

    def merged(self, kernel: Any, bias: Any, params: Any, site: Site) -> tuple[Any, Any]:
        """The product's own."""
        return kernel, bias

    unmerged = merged


class _Zeros(nn.Module):
    """A vector over a product's inputs."""

    @nn.compact
    def __call__(self, site: Site) -> jax.Array:
        axes = site.vector_axes(inputs=True)
        return sharding.param(self, "squares", nn.initializers.zeros, site.in_shape, axes)


@jax.custom_vjp
def _nothing(vector: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.zeros_like(y)


def _nothing_forward(vector: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    inputs = x.reshape(-1, *vector.shape).astype(jnp.float32)
    return jnp.zeros_like(y), (jnp.sum(jnp.square(inputs), axis=0), x)


def _nothing_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    squares, x = saved
    return squares, jnp.zeros_like(x), jnp.zeros_like(gradient)


_nothing.defvjp(_nothing_forward, _nothing_backward)


def _squares(model: Adapted, params: Mapping[str, Any], windows: np.ndarray) -> dict[str, Any]:
    """The sum of squares of every product's inputs, over all tokens of the windows, by its path."""
    shapes = jax.eval_shape(
        lambda: sharding.unbox(model.init(jax.random.key(0), EXAMPLE))["params"]
    )
    own = {
        k: jnp.zeros(x.shape)
        for k, x in flatten_dict(shapes, sep="/").items()
        if k.endswith(f"/{_Probe.name}/squares")
    }
    base = flatten_dict(dict(params), sep="/")

    def total(own: Mapping[str, Any], tokens_BT: jax.Array) -> jax.Array:
        joined = unflatten_dict({**base, **own}, sep="/")
        return jnp.sum(model.apply({"params": joined}, tokens_BT).hidden_BTD)

    gradient = jax.jit(jax.grad(total))
    found = jax.tree.map(jnp.zeros_like, own)
    for at in range(0, len(windows), BATCH):
        more = gradient(own, windows[at : at + BATCH, :-1])
        found = jax.tree.map(jnp.add, found, more)
    return {k.removesuffix(f"/{_Probe.name}/squares"): x for k, x in found.items()}


def _kept(
    score: jax.Array,
    inputs: tuple[int, ...],
    pattern: tuple[int, int] | None,
    sparsity: float,
    path: str,
) -> jax.Array:
    size = int(np.prod([score.shape[axis] for axis in inputs]))
    if pattern is None:
        return keep_pattern(score, (size - int(sparsity * size + 1e-6), size), axes=inputs)
    if size % pattern[1]:
        raise UserError(f"{path} has {size} inputs, which {pattern[1]} does not divide.")
    return keep_pattern(score, pattern, axes=inputs)
