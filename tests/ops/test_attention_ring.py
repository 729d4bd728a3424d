"""Ring attention: equal to attention on one device, in balance, and made of permutations only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

from lmjax import sharding
from lmjax.errors import UserError
from lmjax.ops import attention_ring
from lmjax.ops.attention import attention
from lmjax.sharding import Layout

B, H, K = 2, 4, 8


def _draw(T: int, G: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
    return tuple(rng.standard_normal(s, np.float32) for s in shapes)


def _documents(T: int, seed: int = 0) -> np.ndarray:
    """Packed documents of random lengths, cut wherever they end."""
    rng = np.random.default_rng(seed)
    ends = [np.sort(rng.choice(np.arange(1, T), size=5, replace=False)) for _ in range(B)]
    return np.stack([np.searchsorted(e, np.arange(T), side="right") for e in ends]).astype(np.int32)


def _reference(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    causal: bool,
    segments: tuple[Any, Any] | None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, ...]:
    """out and the gradients of q, k and v, in float64 with the whole matrix of probabilities."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    R = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, R, axis=2) for x in (k, v))
    seen = np.ones((q.shape[0], 1, q.shape[1], k.shape[1]), bool)
    if causal:
        seen &= np.tri(q.shape[1], k.shape[1], dtype=bool)
    if window is not None:
        seen &= ~np.tri(q.shape[1], k.shape[1], -window, dtype=bool)
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    scores = np.einsum("bthk,bshk->bhts", q, wide_k) / math.sqrt(K)
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(seen, np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    probs = weights / np.where(total > 0, total, 1.0)
    out = np.einsum("bhts,bshk->bthk", probs, wide_v)
    dprobs = np.einsum("bthk,bshk->bhts", dout, wide_v)
    dscores = slope * probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) / math.sqrt(K)
    dq = np.einsum("bhts,bshk->bthk", dscores, wide_k)
    dk = np.einsum("bhts,bthk->bshk", dscores, q)
    dv = np.einsum("bhts,bthk->bshk", probs, dout)
    dk, dv = (x.reshape(*k.shape[:3], R, K).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


def _compiled(mesh: Any, arrays: Any, options: Any, **static: Any) -> tuple[Any, Any]:
    """(the compiled (out, dq, dk, dv) of attention, its arguments laid out on the mesh)."""
    heads = NamedSharding(mesh, sharding.spec(("batch", "length", "act_heads", None)))
    rows = NamedSharding(mesh, sharding.spec(("batch", "length")))

    @partial(jax.jit, out_shardings=heads)
    def both(arrays: Any, options: Any) -> Any:
        with sharding.use(mesh):
            q, k, v, dout = arrays
            out, pull = jax.vjp(lambda *qkv: attention(*qkv, **static, **options), q, k, v)
        return out, *pull(dout)

    args = (
        jax.device_put(arrays, heads),
        {
            name: jax.device_put(x, rows) if name.startswith("segments") else x
            for name, x in options.items()
        },
    )
    return both.lower(*args).compile(), args


def _agree(got: Any, want: Any) -> None:
    for x, y, tolerance in zip(got, want, (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
        assert np.max(np.abs(x - y)) < tolerance


@pytest.mark.parametrize("causal", [True, False])
def test_eight_shards_equal_one_device(devices: Any, causal: bool) -> None:
    arrays, options = _draw(64, 2), {}
    segments = documents = _documents(64)
    if not causal:  # row 0 sees nothing at all
        options["kv_length"] = np.asarray([0, 41], np.int32)
        segments = np.where(np.arange(64) < options["kv_length"][:, None], documents, -1)
    options |= {"segments_q_BT": documents, "segments_kv_BS": documents}
    mesh = Layout(data=1, context=8).mesh(devices)
    run, args = _compiled(mesh, arrays, options, causal=causal)
    _agree(run(*args), _reference(*arrays, causal, (documents, segments)))
    text = run.as_text()
    assert "collective-permute" in text
    assert not re.search(r"= \S+ (all-gather|all-to-all|all-reduce|reduce-scatter)", text)


@pytest.mark.parametrize(
    ("layout", "T", "block"),
    [(Layout(data=2, context=2, tensor=2), 16, 512), (Layout(data=1, context=3), 30, 3)],
    ids=["batch_and_heads", "odd_ring_blocks_of_queries"],
)
def test_layouts(
    monkeypatch: pytest.MonkeyPatch, devices: Any, layout: Layout, T: int, block: int
) -> None:
    monkeypatch.setattr(attention_ring, "_QUERY_BLOCK", block)
    arrays = _draw(T, 2)
    mesh = layout.mesh(devices[: layout.context * layout.data * layout.tensor])
    run, args = _compiled(mesh, arrays, {}, causal=True)
    _agree(run(*args), _reference(*arrays, True, None))


def test_windows_and_caps(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    """A window that ends within halves, with blocks of queries; switched on and off as it runs."""
    monkeypatch.setattr(attention_ring, "_QUERY_BLOCK", 3)
    arrays, documents = _draw(32, 2), _documents(32)
    options = {"segments_q_BT": documents, "segments_kv_BS": documents}
    mesh = Layout(data=1, context=4).mesh(devices[:4])
    options["windowed"] = np.asarray(True)
    run, args = _compiled(mesh, arrays, options, causal=True, window=6, softcap=0.9)
    _agree(run(*args), _reference(*arrays, True, (documents, documents), 6, 0.9))
    args[1]["windowed"] = np.asarray(False)
    _agree(run(*args), _reference(*arrays, True, (documents, documents), None, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("context", [2, 4, 5, 8])
def test_many(monkeypatch: pytest.MonkeyPatch, context: int, causal: bool, G: int) -> None:
    monkeypatch.setattr(attention_ring, "_QUERY_BLOCK", 4)
    arrays, documents = _draw(12 * context, G, context), _documents(12 * context, context)
    mesh = Layout(data=1, context=context).mesh(jax.devices()[:context])
    options = {"segments_q_BT": documents, "segments_kv_BS": documents}
    run, args = _compiled(mesh, arrays, options, causal=causal)
    _agree(run(*args), _reference(*arrays, causal, (documents, documents)))


def test_bf16_operands(devices: Any) -> None:
    arrays = _draw(16, 2)
    mesh = Layout(data=1, context=2).mesh(devices[:2])
    run, args = _compiled(mesh, arrays, {}, causal=True, dtype="bfloat16")
    got, want = run(*args), _reference(*arrays, True, None)
    # As in test_attention: scores of size 3 or so are off by 2^-8 of that, and sums of at most 16
    # terms of size 3 or so have errors that do not align.
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.float32
        assert np.max(np.abs(x - y)) < 3 * 2.0**-8 * 3 * np.sqrt(16)
    assert np.max(np.abs(got[0] - want[0])) > 1e-5  # the operands were rounded


@pytest.mark.slow
def test_under_stages_scan_and_remat(devices: Any) -> None:
    """As a pipeline runs it: mapped over `stage`, in a loop of layers that computes them again."""
    mesh = Layout(data=2, stage=2, context=2).mesh(devices)
    stages = [_draw(16, 2, seed) for seed in range(2)]
    q, k, v, dout = (jnp.stack(x) for x in zip(*stages, strict=True))
    segments = jnp.stack([_documents(16, seed) for seed in range(2)])

    def loss(q: Any, k: Any, v: Any, dout: Any, segments: Any) -> Any:
        options = {"segments_q_BT": segments, "segments_kv_BS": segments}

        @jax.checkpoint
        def layer(q: Any, _: None) -> Any:
            return q + attention(q, k, v, causal=True, **options), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0] * dout)

    def whole(q: Any, k: Any, v: Any) -> Any:
        with sharding.use(mesh), sharding.mapped("stage"):
            mapped = jax.vmap(loss, spmd_axis_name="stage")
            return jnp.sum(mapped(q, k, v, dout, segments))

    def part(q: Any, k: Any, v: Any) -> Any:
        return sum(loss(*(x[i] for x in (q, k, v, dout, segments))) for i in range(2))

    got = jax.jit(jax.grad(whole, (0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(part, (0, 1, 2)))(q, k, v)
    for x, y in zip(got, want, strict=True):
        assert np.max(np.abs(x - y)) < 1e-5


def _traced(context: int, T: int, **static: Any) -> Any:
    """The jaxpr of (out, dq, dk, dv) on a mesh of so many devices."""
    mesh = Layout(data=1, context=context).mesh(jax.devices()[:context])

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        with sharding.use(mesh):
            out, pull = jax.vjp(lambda *qkv: attention(*qkv, **static), q, k, v)
        return out, pull(dout)

    return jax.make_jaxpr(both)(*_draw(T, 2)).jaxpr


def _equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, and how often it is computed."""
    for equation in jaxpr.eqns:
        yield equation, times
        assert equation.primitive.name not in ("cond", "while")
        inner = (
            times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        )
        for sub in jaxprs_in_params(equation.params):
            yield from _equations(sub, inner)


def _multiplications(jaxpr: Any) -> int:
    total = 0
    for equation, times in _equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += times * math.prod((*equation.outvars[0].aval.shape, *sizes))
    return total


@pytest.mark.parametrize("context", [2, 8])
def test_causal_work_is_half_and_the_diagonal_on_every_device(context: int) -> None:
    causal, full = (
        _multiplications(_traced(context, 16 * context, causal=c)) for c in (True, False)
    )
    chunk = 16
    # Two products in the forward pass and five in the backward, over the whole chunk of keys at
    # each step; one program serves all devices, so no device computes more than another.
    assert full == context * (2 + 5) * B * H * chunk * chunk * K
    # Of four pairs of halves two at each step, and one more at the first.
    assert causal / full == (2 * context + 1) / (4 * context)


def test_keys_travel_once_for_all_heads_that_share_them() -> None:
    context, T = 8, 128
    sent = [
        equation.invars[0].aval
        for equation, times in _equations(_traced(context, T, causal=True))
        if equation.primitive.name == "ppermute" and times == context - 2
    ]
    # In a step of the loops: k and v, then k, v and their gradients.
    assert [x.size for x in sent] == [B * (T // context) * 2 * K] * 6


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ring, "_QUERY_BLOCK", 16)
    context, T = 2, 256
    inside = [
        out.aval.size
        for equation, times in _equations(_traced(context, T, causal=True))
        if times > 1
        for out in equation.outvars
    ]
    assert max(inside) == B * H * 16 * (T // context // 2)  # scores of a block and half a chunk
    arrays = _draw(T, 2)
    with sharding.use(Layout(data=1, context=context).mesh(jax.devices()[:context])):
        _, pull = jax.eval_shape(
            lambda *qkv: jax.vjp(partial(attention, causal=True), *qkv), *arrays[:3]
        )
    kept = sum(x.size for x in jax.tree.leaves(pull))
    q, k, v, out = (x.size for x in arrays)
    assert kept == q + k + v + out + B * T * H


def test_decoding_goes_no_ring(devices: Any) -> None:
    q, k, v, _ = _draw(16, 2)
    mesh = Layout(data=1, context=2).mesh(devices[:2])

    def run(q: Any, offset: Any) -> Any:
        with sharding.use(mesh):
            return attention(q, k, v, causal=True, q_offset=offset)

    for tokens in (1, 4):
        out = jax.jit(run)(q[:, 5 : 5 + tokens], jnp.asarray(5))
        want, *_ = _reference(q, k, v, q, True, None)
        np.testing.assert_allclose(out, want[:, 5 : 5 + tokens], rtol=1e-5, atol=1e-5)


def test_misfits_are_told(devices: Any) -> None:
    q, k, v, _ = _draw(20, 2)
    with sharding.use(Layout(data=1, context=8).mesh(devices)):
        with pytest.raises(UserError, match=r"20 tokens .* = 16 .* nearest .*: 16 or 32\."):
            attention(q, k, v, causal=True)
        with pytest.raises(UserError, match=r"20 tokens .* = 8\. .* nearest .*: 16 or 24\."):
            attention(q, k, v, causal=False)
        with pytest.raises(UserError, match=r"dropout of 0.1 .* needs context=1"):
            attention(q, k, v, causal=True, dropout_rate=0.1, dropout_rng=jax.random.key(0))
        with pytest.raises(ValueError, match="not for a mesh with context=8"):
            attention(q, k, v, causal=True, implementation="splash")
    with (
        sharding.use(Layout(data=4, context=2).mesh(devices)),
        pytest.raises(UserError, match=r"2 along 'batch', .* 4 devices"),
    ):
        attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="not for a mesh with context=1"):
        attention(q, k, v, causal=True, implementation="ring")
