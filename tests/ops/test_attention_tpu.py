"""The TPU kernel, interpreted: equal to plain attention, on any mesh; and when it is chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.ops import attention as attention_module
from lmjax.ops import attention_tpu
from lmjax.ops.attention import attention
from lmjax.sharding import Layout

B, H, G, K = 2, 2, 1, 64


def _draw(T: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def _documents(T: int) -> jax.Array:
    ends = np.asarray([[30, 131], [64, 65]])
    return jnp.asarray([np.searchsorted(e, np.arange(T), side="right") for e in ends], jnp.int32)


@pytest.mark.parametrize(
    ("T", "causal", "case"),
    [
        (200, True, "documents"),
        pytest.param(300, True, "window", marks=pytest.mark.slow),
        pytest.param(300, True, "windowed", marks=pytest.mark.slow),
        pytest.param(300, True, "not windowed", marks=pytest.mark.slow),
        pytest.param(256, True, "plain", marks=pytest.mark.slow),
        pytest.param(200, False, "lengths", marks=pytest.mark.slow),
        pytest.param(200, False, "plain", marks=pytest.mark.slow),
        pytest.param(640, True, "documents", marks=pytest.mark.slow),
    ],
)
def test_interpreted_kernel_equals_xla(
    monkeypatch: pytest.MonkeyPatch, devices: Any, T: int, causal: bool, case: str
) -> None:
    q, k, v, dout = _draw(T)
    options: dict[str, Any] = {}
    if case == "documents":
        options = {"segments_q_BT": _documents(T), "segments_kv_BS": _documents(T)}
    elif case == "lengths":
        options = {"kv_length": jnp.asarray([0, 150])}
    elif "window" in case:
        options = {"window": 140, "softcap": 2.0}
        options |= {"segments_q_BT": _documents(T), "segments_kv_BS": _documents(T)}
        if case != "window":
            options["windowed"] = jnp.asarray(case == "windowed")
    interpreted = partial(attention_tpu.attention, interpret=True)
    monkeypatch.setattr(attention_module.attention_tpu, "attention", interpreted)
    mesh = Layout(data=2).mesh(devices[:2])

    @jax.jit
    def run(*args: Any) -> Any:
        def both(implementation: Any) -> Any:
            options["implementation"] = implementation
            out, pull = jax.vjp(lambda *qkv: attention(*qkv, causal=causal, **options), *args[:3])
            return out, *pull(args[3])

        with sharding.use(mesh):
            got = both("splash")
        return got, both("xla")

    for x, y in zip(*run(q, k, v, dout), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def _chosen(q: Any, k: Any, v: Any, **options: Any) -> str:
    """Which primitive computes attention."""
    options = {"causal": True, "dtype": "bfloat16", **options}
    text = str(jax.make_jaxpr(lambda *qkv: attention(*qkv, **options))(q, k, v))
    (name,) = [x for x in ("pallas_call", "cudnn", "dot_general") if x in text][:1]
    return name


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    long, short = _draw(256)[:3], _draw(64)[:3]
    assert _chosen(*long) == "dot_general"
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert _chosen(*long) == _chosen(*long, causal=False) == "pallas_call"
    assert _chosen(*long, window=9, softcap=2.0) == "pallas_call"
    assert _chosen(*short) == "dot_general"
    assert _chosen(*long, q_offset=1) == _chosen(long[0][:, :1], *long[1:]) == "dot_general"
    dropout = {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}
    assert _chosen(*long, **dropout) == "dot_general"
    with sharding.use(Layout(data=2).mesh(devices[:2])):
        assert _chosen(*long) == "pallas_call"
        assert _chosen(*(x[:1] for x in long)) == "dot_general"  # one row for two devices
    with sharding.use(Layout(data=1, context=2).mesh(devices[:2])):
        text = str(jax.make_jaxpr(partial(attention, causal=True))(*long))
    assert "ppermute" in text
    assert "pallas_call" not in text
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert _chosen(*long, softcap=2.0) == "dot_general"
    with pytest.raises(ValueError, match="neither dropout nor q_offset"):
        attention(*long, causal=True, implementation="splash", **dropout)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(long[0][:, :200], *long[1:], causal=False, implementation="splash")


@pytest.mark.parametrize("case", ["documents", "lengths", "window"])
def test_cudnn_is_called_with_each_devices_part(
    monkeypatch: pytest.MonkeyPatch, devices: Any, case: str
) -> None:
    """With jax's own attention in its place: a kernel that does not know the mesh."""
    q, k, v, _ = (jnp.tile(x, (1, 1, 2, 1)) for x in _draw(16))
    shapes = []

    def kernel(q: Any, k: Any, v: Any, *, implementation: str, **options: Any) -> Any:
        assert implementation == "cudnn"
        shapes.append((q.shape, k.shape))
        return dot_product_attention(q, k, v, implementation="xla", **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    options: dict[str, Any] = {"causal": case != "lengths"}
    if case == "documents":
        segments = jnp.asarray(np.arange(16)[None] // np.asarray([[5], [7]]), jnp.int32)
        options |= {"segments_q_BT": segments, "segments_kv_BS": segments}
    elif case == "lengths":
        options["kv_length"] = jnp.asarray([0, 9])
    else:
        options["window"] = 5

    def run(q: Any, k: Any, v: Any) -> Any:
        with sharding.use(Layout(data=2, tensor=2).mesh(devices[:4])):
            return attention(q, k, v, **options, implementation="cudnn")

    got = jax.jit(run)(q, k, v)
    want = jax.jit(partial(attention, **options))(q, k, v)
    assert shapes == [((1, 16, 2, K), (1, 16, 1, K))]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
