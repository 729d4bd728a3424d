"""attention: every mask against loops, gradients against naive code, causality, sharding."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.ops import attention_cpu
from lmjax.ops.attention import attention

B, H, K = 2, 4, 8


def _draw(T: int, S: int, G: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)
    q, k, v, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    return q, k, v, g


def _sees(b: int, i: int, j: int, mask: dict[str, Any]) -> bool:
    def row(value: Any) -> int:
        return int(np.broadcast_to(np.asarray(value), (B,))[b])

    seen = True
    if mask["causal"]:
        seen &= j <= row(mask.get("q_offset", 0)) + i
        if "window" in mask and mask.get("windowed", True):
            seen &= j > row(mask.get("q_offset", 0)) + i - mask["window"]
    if "kv_length" in mask:
        seen &= j < row(mask["kv_length"])
    if "segments_q_BT" in mask:
        seen &= int(mask["segments_q_BT"][b, i]) == int(mask["segments_kv_BS"][b, j])
    return bool(seen)


def _loops(q: Any, k: Any, v: Any, mask: dict[str, Any]) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        g = h // (H // k.shape[2])
        seen = [j for j in range(k.shape[1]) if _sees(b, i, j, mask)]
        if seen:
            scores = np.array([q[b, i, h] @ k[b, j, g] for j in seen]) / np.sqrt(K)
            if "softcap" in mask:
                scores = mask["softcap"] * np.tanh(scores / mask["softcap"])
            probs = np.exp(scores - scores.max())
            out[b, i, h] = sum(
                p * v[b, j, g] for p, j in zip(probs / probs.sum(), seen, strict=True)
            )
    return out


def _naive(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: dict[str, Any], bias: jax.Array | None = None
) -> jax.Array:
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    allowed = np.array(
        [
            [[_sees(b, i, j, mask) for j in range(k.shape[1])] for i in range(q.shape[1])]
            for b in range(B)
        ]
    )[:, None]
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    if "softcap" in mask:
        scores = mask["softcap"] * jnp.tanh(scores / mask["softcap"])
    scores = scores if bias is None else scores + bias[None]
    probs = jax.nn.softmax(jnp.where(allowed, scores, -1e9), axis=-1) * allowed
    return jnp.einsum("bhts,bshk->bthk", probs, v)


def _segments(length: int) -> np.ndarray:
    rows = [[0] * 3 + [1] * (length - 3), [0] * (length // 2) + [2] * (length - length // 2)]
    return np.asarray(rows, np.int32)


OWN_SEGMENT = {"segments_q_BT": _segments(9), "segments_kv_BS": _segments(9)}

OWN_SEGMENTS_128 = {"segments_q_BT": _segments(128), "segments_kv_BS": _segments(128)}

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "all": (5, 7, {"causal": False}),
    "causal": (9, 9, {"causal": True}),
    "segments": (9, 9, {"causal": True, **OWN_SEGMENT}),
    "segments_both_ways": (9, 9, {"causal": False, **OWN_SEGMENT}),
    "sees_nothing": (
        6,
        6,
        {"causal": True, "segments_q_BT": _segments(6), "segments_kv_BS": _segments(6) + 1},
    ),
    "prefill": (4, 12, {"causal": True, "q_offset": 3}),
    "prefill_rows": (4, 12, {"causal": True, "q_offset": jnp.asarray([0, 7])}),
    "decode": (1, 12, {"causal": True, "q_offset": jnp.asarray(5)}),
    "decode_rows": (1, 12, {"causal": True, "q_offset": jnp.asarray([2, 11])}),
    "decode_sees_nothing": (1, 12, {"causal": False, "kv_length": jnp.asarray([0, 3])}),
    "cross": (5, 7, {"causal": False, "kv_length": jnp.asarray([7, 2])}),
    "cross_scalar": (5, 7, {"causal": False, "kv_length": 4}),
    "window": (9, 9, {"causal": True, "window": 3, **OWN_SEGMENT}),
    "windowed": (9, 9, {"causal": True, "window": 3, "windowed": jnp.asarray(True)}),
    "not_windowed": (9, 9, {"causal": True, "window": 3, "windowed": jnp.asarray(False)}),
    "window_prefill": (4, 12, {"causal": True, "window": 3, "q_offset": jnp.asarray([0, 7])}),
    "window_decode": (1, 12, {"causal": True, "window": 3, "q_offset": jnp.asarray(5)}),
    "softcap": (9, 9, {"causal": True, "window": 4, "softcap": 0.7, **OWN_SEGMENT}),
    "causal_length": (5, 7, {"causal": True, "q_offset": 2, "kv_length": jnp.asarray([0, 4])}),
}


@pytest.mark.parametrize(
    ("case", "G"), [*((case, 2) for case in CASES), ("segments", 4), ("cross", 1), ("decode", 4)]
)
def test_value_and_gradients(case: str, G: int) -> None:
    T, S, mask = CASES[case]
    q, k, v, g = _draw(T, S, G)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **mask), q, k, v)
        return out, *pull(g)

    out, *grads = run(q, k, v)
    np.testing.assert_allclose(out, _loops(q, k, v, mask), rtol=1e-5, atol=1e-5)
    want = jax.jit(lambda *args: jax.vjp(lambda *qkv: _naive(*qkv, mask), *args)[1](g))(q, k, v)
    for a, b in zip(grads, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "G"),
    [
        ("segments", 2),
        pytest.param("decode_rows", 2, marks=pytest.mark.slow),
        pytest.param("sees_nothing", 4, marks=pytest.mark.slow),
        pytest.param("cross", 2, marks=pytest.mark.slow),
    ],
)
def test_a_bias_is_added_to_the_scores(case: str, G: int) -> None:
    """Value and gradients, the bias's too, on both paths: a decoding step has jax's gradient."""
    T, S, mask = CASES[case]
    q, k, v, g = _draw(T, S, G)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((H, T, S)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def run(function: Any, *args: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *args: function(*args), *args)
        return out, *pull(g)

    found = run(lambda q, k, v, bias: attention(q, k, v, bias_HTS=bias, **mask), q, k, v, bias)
    want = run(lambda q, k, v, bias: _naive(q, k, v, mask, bias), q, k, v, bias)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["causal", "segments", "sees_nothing", "prefill", "decode_rows"])
def test_bf16(case: str) -> None:
    T, S, mask = CASES[case]
    q, k, v, g = _draw(T, S, 2)

    @partial(jax.jit, static_argnums=0)
    def run(dtype: str) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, dtype=dtype, **mask), q, k, v)
        return out, *pull(g)

    # Scores of size 3 or so are off by 2^-8 of that, hence probabilities by 1.2 %; outputs and
    # gradients are sums of at most 9 such terms of size 3 or so, whose errors do not align.
    for a, b in zip(run("bfloat16"), run("float32"), strict=True):
        assert a.dtype == jnp.float32
        assert np.max(np.abs(a - b)) < 3 * 2.0**-8 * 3 * np.sqrt(9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_prove_causality(dtype: str) -> None:
    q, k, v, _ = _draw(9, 9, 2)

    @jax.jit
    def seen_by(i: jax.Array) -> jax.Array:
        """Which keys or values the outputs of query i change with, in each row."""

        def one(k: jax.Array, v: jax.Array) -> jax.Array:
            out = attention(q, k, v, causal=True, dtype=dtype)
            return jnp.sum(jnp.square(jnp.take(out, i, axis=1)))

        dk, dv = jax.grad(one, (0, 1))(k, v)
        return jnp.any((dk != 0) | (dv != 0), axis=(2, 3))

    for i in range(9):
        assert np.array_equal(seen_by(jnp.asarray(i)), np.tile(np.arange(9) <= i, (B, 1)))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_blocks_of_queries_equal_the_whole(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, g = _draw(128, 128, 4)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((H, 128, 128)), jnp.float32)

    def run(long: int) -> tuple[jax.Array, ...]:
        monkeypatch.setattr(attention_cpu, "_LONG", long)
        options = {"dropout_rate": rate, "dropout_rng": jax.random.key(0), **OWN_SEGMENTS_128}
        options["window"] = 40

        def both(*given: jax.Array) -> tuple[jax.Array, ...]:
            see = lambda q, k, v, bias: attention(  # noqa: E731
                q, k, v, causal=True, bias_HTS=bias, **options
            )
            out, pull = jax.vjp(see, *given)
            return out, *pull(g)

        return jax.jit(both)(q, k, v, bias)

    for a, b in zip(run(128), run(10**9), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_masked_giant_cannot_hide_the_rest() -> None:
    q, k, v, _ = _draw(9, 9, 4)
    k = k.at[:, 8].set(1e4)
    out = attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, _loops(q, k, v, {"causal": True}), rtol=1e-5, atol=1e-5)


def test_dropout_of_probabilities() -> None:
    q, k, v, g = _draw(9, 9, 4)
    rng = jax.random.key(0)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        return attention(q, k, v, causal=True, dropout_rate=0.5, dropout_rng=rng, **options)

    # With the identity for v the output is the dropped probabilities themselves.
    eye = jnp.broadcast_to(jnp.eye(9)[None, :, None, :], (B, 9, H, 9))
    wide = [jnp.concatenate([x, jnp.zeros((B, 9, H, 1))], axis=-1) for x in (q, k)]
    dropped = jnp.swapaxes(jax.jit(run)(*wide, eye), 1, 2)
    scale = np.sqrt(K / (K + 1))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K) * scale
    probs = jax.nn.softmax(jnp.where(jnp.tri(9, dtype=bool)[None, None], scores, -jnp.inf), axis=-1)
    kept = dropped > 0
    np.testing.assert_allclose(dropped, jnp.where(kept, 2 * probs, 0.0), rtol=1e-5, atol=1e-6)
    fraction = float(jnp.sum(kept) / jnp.sum(probs > 0))
    assert abs(fraction - 0.5) < 5 * 0.5 / np.sqrt(B * H * 45)

    def naive(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
        allowed = jnp.tri(9, dtype=bool)[None, None]
        probs = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshk->bthk", jnp.where(kept, 2 * probs, 0.0), v)

    grads, want = jax.jit(lambda *args: [jax.vjp(f, *args)[1](g) for f in (run, naive)])(q, k, v)
    for a, b in zip(grads, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_under_remat_and_scan() -> None:
    q, k, v, g = _draw(9, 9, 2)

    def looped(q: jax.Array) -> jax.Array:
        for _ in range(3):
            q = attention(q, k, v, causal=True)
        return jnp.sum(q * g)

    def scanned(q: jax.Array) -> jax.Array:
        @jax.checkpoint
        def body(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            return attention(q, k, v, causal=True), None

        return jnp.sum(jax.lax.scan(body, q, None, length=3)[0] * g)

    np.testing.assert_allclose(
        jax.jit(jax.grad(scanned))(q), jax.grad(looped)(q), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_over_batch_and_heads_without_communication(dtype: str) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    shapes = (4, 16, 8, 8), (4, 16, 4, 8), (4, 16, 4, 8)
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=heads) for s in shapes)
    segments = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=rows)

    def grads(q: Any, k: Any, v: Any, s: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            out = attention(q, k, v, causal=True, segments_q_BT=s, segments_kv_BS=s, dtype=dtype)
            return jnp.sum(jnp.square(out), axis=(1, 2, 3))

        out, pull = jax.vjp(loss, q, k, v)
        return out, pull(jnp.ones_like(out))

    lowered = jax.jit(grads, out_shardings=(None, (heads,) * 3)).lower(q, k, v, segments)
    text = lowered.compile().as_text()
    # the sum over heads is one all-reduce of [B]; nothing else moves
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce)\(", text)
    assert all(re.fullmatch(r"f32\[\d?\](\{0\})?", shape) for shape in moved), moved


def test_misfits_are_told() -> None:
    q, k, v, _ = _draw(9, 9, 2)
    with pytest.raises(ValueError, match="segments"):
        attention(q, k, v, causal=True, segments_q_BT=_segments(9))
    with pytest.raises(ValueError, match="no multiple"):
        attention(q[:, :, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="cudnn attention"):
        attention(q, k, v, causal=True, q_offset=1, implementation="cudnn")
    with pytest.raises(ValueError, match="knows no softcap"):
        attention(q, k, v, causal=True, softcap=1.0, implementation="cudnn")
    for kernel in ("cudnn", "splash", "ring"):
        with pytest.raises(ValueError, match=f"{kernel} attention knows no bias"):
            bias = jnp.zeros((H, 9, 9))
            attention(q, k, v, causal=True, bias_HTS=bias, implementation=kernel)
    for bad in ({"causal": True, "window": 0}, {"causal": False, "window": 3}):
        with pytest.raises(ValueError, match="want at least 1, and True"):
            attention(q, k, v, **bad)
    with pytest.raises(ValueError, match="implementation"):
        attention(q, k, v, causal=True, implementation="flash")  # type: ignore[arg-type]
