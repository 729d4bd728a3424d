"""Cross-entropy: whole = chunked = explicit formula; padding never leaks; memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.core import Unembedding
from lmjax.ops.losses import cross_entropy, logits

B, T, D, V, VOCAB = 2, 9, 16, 40, 37  # V rows of which VOCAB are tokens
Z = 0.01


def _draw() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((V, D)) / 4, jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
    return hidden, weights, targets, jnp.asarray(rng.standard_normal((2, B, T)), jnp.float32)


def _naive(
    hidden: jax.Array, weights: jax.Array, targets: jax.Array, softcap: float | None = None
) -> tuple[jax.Array, ...]:
    scores = jnp.einsum("btd,vd->btv", hidden, weights[:VOCAB])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    lse = jax.nn.logsumexp(scores, axis=-1)
    label = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return lse - label, Z * lse**2


def _value_and_grads(function, hidden, weights, targets, g):  # type: ignore[no-untyped-def]
    outputs, pull = jax.vjp(lambda h, w: function(h, w, targets), hidden, weights)
    return (*outputs, *pull((g[0], g[1])))


@pytest.mark.parametrize("chunk", [0, 1, 7, 20, 40])
def test_value_and_gradients(chunk: int) -> None:
    def ours(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(h, Unembedding(w, VOCAB), t, vocab_chunk=chunk, z_loss=Z)

    args = _draw()
    got = jax.jit(lambda *args: _value_and_grads(ours, *args))(*args)
    for a, b in zip(got, _value_and_grads(_naive, *args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(got[3])[VOCAB:] == 0)  # padding rows learn nothing


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("z_loss", [0.0, Z])
def test_soft_cap(chunk: int, z_loss: float) -> None:
    hidden, weights, targets, g = _draw()

    def ours(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        capped = Unembedding(w, VOCAB, softcap=0.8)
        nll, z = cross_entropy(h, capped, t, vocab_chunk=chunk, z_loss=z_loss)
        return nll, z if z_loss else jnp.zeros_like(z)

    def naive(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll, z = _naive(h, w, t, 0.8)
        return nll, z if z_loss else jnp.zeros_like(z)

    args = hidden, weights, targets, g
    got = jax.jit(lambda *args: _value_and_grads(ours, *args))(*args)
    for a, b in zip(got, _value_and_grads(naive, *args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    scores = logits(hidden, Unembedding(weights, VOCAB, softcap=0.8))
    assert np.all(np.isneginf(scores[..., VOCAB:])) and np.abs(scores[..., :VOCAB]).max() < 0.8
    label = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got[0], -label, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "z_loss"), [(0, Z), (7, 0.0)])
def test_bias(chunk: int, z_loss: float) -> None:
    hidden, weights, targets, g = _draw()
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(V), jnp.float32)

    def ours(h: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        unembedding = Unembedding(w, VOCAB, softcap=2.0, bias_V=b)
        nll, z = cross_entropy(h, unembedding, targets, vocab_chunk=chunk, z_loss=z_loss)
        return jnp.sum(g[0] * nll + g[1] * z), logits(h, unembedding)

    def naive(h: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A bias is the weight of a feature that is always 1."""
        h, w = jnp.pad(h, ((0, 0), (0, 0), (0, 1)), constant_values=1.0), jnp.c_[w, b]
        nll, z = _naive(h, w, targets, 2.0)
        scores = 2.0 * jnp.tanh(jnp.einsum("btd,vd->btv", h, w[:VOCAB]) / 2.0)
        return jnp.sum(g[0] * nll + (g[1] * z if z_loss else 0.0)), scores

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(hidden, weights, bias)
        for f in (ours, naive)
    )
    (loss, scores), grads = got
    got = loss, scores[..., :VOCAB], *grads
    for a, b in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.all(np.isneginf(scores[..., VOCAB:]))


@pytest.mark.parametrize("chunk", [0, 8])
def test_without_z_loss(chunk: int) -> None:
    hidden, weights, targets, g = _draw()

    def ours(h: jax.Array, w: jax.Array) -> jax.Array:
        nll, z = cross_entropy(h, Unembedding(w, VOCAB), targets, vocab_chunk=chunk)
        return jnp.sum(g[0] * nll + g[1] * z)

    got = jax.grad(ours, (0, 1))(hidden, weights)
    want = jax.grad(lambda h, w: jnp.sum(g[0] * _naive(h, w, targets)[0]), (0, 1))(hidden, weights)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("z_loss", [0.0, Z])
def test_bf16(chunk: int, z_loss: float) -> None:
    hidden, weights, targets, g = _draw()

    def run(dtype: str) -> tuple[jax.Array, ...]:
        def ours(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            unembedding = Unembedding(w, VOCAB, dtype)
            return cross_entropy(h, unembedding, t, vocab_chunk=chunk, z_loss=z_loss)

        return jax.jit(lambda *args: _value_and_grads(ours, *args))(hidden, weights, targets, g)

    # a logit is off by at most 2^-8 of |h| @ |w|, about 16 x 0.8 x 0.2 = 2.6 (4.6 at the most);
    # a gradient by three such roundings of terms of size one
    for a, b in zip(run("bfloat16"), run("float32"), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2.0**-6, atol=2.0**-8 * 12)


@pytest.mark.parametrize("chunk", [0, 8])
def test_padding_never_leaks(chunk: int) -> None:
    hidden, weights, targets, _ = _draw()
    huge = weights.at[VOCAB:].set(1e4)
    for w in (weights, huge):
        nll, _ = cross_entropy(hidden, Unembedding(w, VOCAB), targets, vocab_chunk=chunk)
        np.testing.assert_allclose(nll, _naive(hidden, w, targets)[0], rtol=1e-5, atol=1e-5)
    scores = logits(hidden, Unembedding(huge, VOCAB))
    assert scores.shape == (B, T, V) and scores.dtype == jnp.float32
    assert jnp.all(scores[..., VOCAB:] == -jnp.inf)
    np.testing.assert_allclose(
        scores[..., :VOCAB], jnp.einsum("btd,vd->btv", hidden, huge)[..., :VOCAB], atol=1e-5
    )


def test_gradient_through_padded_logits_is_finite() -> None:
    hidden, weights, targets, _ = _draw()

    def loss(h: jax.Array, w: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(logits(h, Unembedding(w, VOCAB)))
        return -jnp.sum(jnp.take_along_axis(scores, targets[..., None], axis=-1))

    got = jax.grad(loss, (0, 1))(hidden, weights)
    want = jax.grad(lambda h, w: jnp.sum(_naive(h, w, targets)[0]), (0, 1))(hidden, weights)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 8])
def test_large_logits_neither_overflow_nor_vanish(chunk: int) -> None:
    hidden, weights, targets, _ = _draw()
    nll, _ = cross_entropy(1e3 * hidden, Unembedding(weights, VOCAB), targets, vocab_chunk=chunk)
    want, _ = _naive(1e3 * hidden, weights, targets)
    np.testing.assert_allclose(nll, want, rtol=1e-5, atol=1e-2)  # of logits in the thousands


def test_uniform_logits_cost_log_of_the_vocabulary() -> None:
    hidden, weights, targets, _ = _draw()
    nll, z = cross_entropy(hidden, Unembedding(0 * weights, VOCAB), targets, z_loss=1.0)
    np.testing.assert_allclose(nll, np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(z, np.log(VOCAB) ** 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_never_hold_all_logits(dtype: str) -> None:
    batch, length, dim, vocab = 4, 64, 32, 4096
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((batch, length, dim), (vocab, dim))]
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def temporaries(chunk: int) -> int:
        def loss(h: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
            return jnp.sum(cross_entropy(h, Unembedding(w, vocab, dtype), t, vocab_chunk=chunk)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, targets).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    logits_bytes = batch * length * vocab * 4
    assert temporaries(0) > logits_bytes
    assert temporaries(256) < logits_bytes / 2


def test_under_remat_and_scan() -> None:
    hidden, weights, targets, _ = _draw()

    def micro(w: jax.Array, chunk: int) -> jax.Array:
        @jax.checkpoint
        def one(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            h, t = row
            nll, _ = cross_entropy(h[None], Unembedding(w, VOCAB), t[None], vocab_chunk=chunk)
            return total + jnp.sum(nll), None

        return jax.lax.scan(one, jnp.zeros(()), (hidden, targets))[0]

    want = jax.grad(lambda w: jnp.sum(_naive(hidden, w, targets)[0]))(weights)
    for chunk in (0, 8):
        got = jax.jit(jax.grad(micro), static_argnums=1)(weights, chunk)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_negative_chunk_is_refused() -> None:
    hidden, weights, targets, _ = _draw()
    with pytest.raises(ValueError, match="vocab_chunk"):
        cross_entropy(hidden, Unembedding(weights, VOCAB), targets, vocab_chunk=-1)


@pytest.mark.parametrize(
    ("chunk", "z_loss", "softcap"), [(0, 0.0, None), (7, Z, None), (7, Z, 0.8)]
)
def test_label_smoothing(chunk: int, z_loss: float, softcap: float | None) -> None:
    """nll + extra is the cross-entropy with the smoothed distribution, as it is written down."""
    hidden, weights, targets, g = _draw()

    def ours(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(
            h,
            Unembedding(w, VOCAB, softcap=softcap),
            t,
            vocab_chunk=chunk,
            z_loss=z_loss,
            label_smoothing=0.2,
        )

    def naive(h: jax.Array, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("btd,vd->btv", h, w[:VOCAB])
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        smooth = 0.8 * jax.nn.one_hot(t, VOCAB) + 0.2 / VOCAB
        smoothed = -jnp.sum(smooth * jax.nn.log_softmax(scores), axis=-1)
        nll, z = _naive(h, w, t, softcap)
        return nll, smoothed - nll + z * (z_loss > 0)

    args = hidden, weights, targets, g
    got = jax.jit(lambda *args: _value_and_grads(ours, *args))(*args)
    expected = jax.jit(lambda *args: _value_and_grads(naive, *args))(*args)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(got[3])[VOCAB:] == 0)  # padding rows learn nothing
