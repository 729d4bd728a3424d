"""Who goes to which expert, and the losses that keep experts evenly used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.routing import (
    load_balance_loss,
    router_logits,
    router_z_loss,
    sigmoid_top_k,
    softmax_top_k,
)

B, T, E, K = 3, 7, 5, 2


@pytest.fixture
def logits_BTE():
    return np.random.default_rng(0).normal(size=(B, T, E)).astype(np.float32)


def test_softmax_weights_are_a_softmax_over_the_chosen(logits_BTE):
    experts, weights, probs = softmax_top_k(logits_BTE, K)
    expected = np.argsort(-logits_BTE, axis=-1)[..., :K]
    np.testing.assert_array_equal(experts, expected)
    chosen = np.take_along_axis(logits_BTE, expected, axis=-1)
    np.testing.assert_allclose(weights, jax.nn.softmax(chosen), rtol=1e-5)
    np.testing.assert_allclose(probs, jax.nn.softmax(logits_BTE), rtol=1e-5)
    again, weights, _ = softmax_top_k(logits_BTE, K, normalise=False)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_allclose(weights, np.take_along_axis(probs, expected, axis=-1), rtol=1e-6)


def test_sigmoid_weights_by_hand():
    logits = jnp.log(jnp.array([[[1 / 3, 3.0, 1.0]]]))  # sigmoids 1/4, 3/4, 1/2
    experts, weights, shares = sigmoid_top_k(logits, 2, scale=2.5)
    assert experts.tolist() == [[[1, 2]]]
    np.testing.assert_allclose(weights, [[[2.5 * 3 / 5, 2.5 * 2 / 5]]], rtol=1e-6)
    np.testing.assert_allclose(shares, [[[1 / 6, 3 / 6, 2 / 6]]], rtol=1e-6)


def test_load_balance_is_the_papers_sum(logits_BTE):
    """Equations 17 to 20 of DeepSeek-V3, with loops."""
    experts, _, probs = softmax_top_k(logits_BTE, K)
    losses = []
    for b in range(B):
        f = [E / (K * T) * sum(i in experts[b, t] for t in range(T)) for i in range(E)]
        p = [sum(probs[b, t, i] for t in range(T)) / T for i in range(E)]
        losses.append(sum(x * y for x, y in zip(f, p, strict=True)))
    found = load_balance_loss(experts, probs)
    np.testing.assert_allclose(found.value, np.mean(losses), rtol=1e-5)
    assert found.weight == B * T


def test_load_balance_is_one_where_even_and_num_experts_where_one_takes_all():
    experts = jnp.arange(4).reshape(1, 4, 1)
    even = load_balance_loss(experts, jnp.full((1, 4, 4), 0.25))
    assert even.value == pytest.approx(1)
    one = load_balance_loss(0 * experts, jnp.eye(4)[jnp.zeros((1, 4), int)])
    assert one.value == pytest.approx(4)


def test_losses_add_over_rows(logits_BTE):
    @jax.jit
    def both(logits):
        experts, _, probs = softmax_top_k(logits, K)
        return load_balance_loss(experts, probs), router_z_loss(logits)

    for whole, first, rest in zip(
        both(logits_BTE), both(logits_BTE[:1]), both(logits_BTE[1:]), strict=True
    ):
        np.testing.assert_allclose((first + rest).total, whole.total, rtol=1e-5)
        np.testing.assert_allclose((first + rest).weight, whole.weight)


def test_load_balance_pushes_the_fullest_expert_down():
    """One expert takes all first choices: descending must lower its logits, raise the others'."""
    logits = jnp.zeros((1, T, E)).at[..., 3].set(1.0)

    def loss(logits):
        experts, _, probs = softmax_top_k(logits, 1)
        return load_balance_loss(experts, probs).value

    slope = jax.jit(jax.grad(loss))(logits)
    assert (slope[..., 3] > 0).all() and (np.delete(slope, 3, axis=-1) < 0).all()


def test_z_loss_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 2.0], [3.0, 1.0]]]))
    expected = (np.log(3) ** 2 + np.log(4) ** 2) / 2
    np.testing.assert_allclose(router_z_loss(logits).value, expected, rtol=1e-6)


def test_scores_are_float32_whatever_comes_in():
    x = jnp.ones((1, 1, 300), jnp.bfloat16)
    kernel = jnp.full((300, 1), 1 + 2**-12)  # bfloat16 would round it to 1
    logits = router_logits(x, kernel)
    np.testing.assert_allclose(logits, 300 * (1 + 2**-12), rtol=1e-6)
