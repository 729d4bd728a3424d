"""Groups of parameters with their own optimizers and learning rates."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.errors import UserError
from lmjax.optim.by_path import by_path, multiplied
from lmjax.optim.presets import adamw, average_params, sgd
from lmjax.optim.schedules import constant

PARAMS = {
    "blocks": {"up": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5, 0.25])}},
    "embed": {"table": jnp.array([[3.0], [4.0]])},
}
RNG = np.random.default_rng(0)
GRADIENTS = [
    {
        "blocks": {"up": {"kernel": RNG.normal(size=(1, 2)), "bias": RNG.normal(size=2)}},
        "embed": {"table": RNG.normal(size=(2, 1))},
    }
    for _ in range(3)
]


def run(optimizer, params=PARAMS):
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(optax.tree.cast(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


FAST = sgd(learning_rate=constant(peak=0.5), momentum=0.0)
ADAM = adamw(learning_rate=constant(peak=0.1), clip_norm=None)


def test_each_group_is_updated_by_its_own_optimizer():
    both, state = run(by_path(optimizers=[("bias$", FAST), ("", ADAM)]))
    fast, adam = run(FAST)[0], run(ADAM)[0]
    close(both["blocks"]["up"]["bias"], fast["blocks"]["up"]["bias"])
    close(both["blocks"]["up"]["kernel"], adam["blocks"]["up"]["kernel"])
    close(both["embed"]["table"], adam["embed"]["table"])
    rates = [float(x) for _, x in optax.tree_utils.tree_get_all_with_path(state, "learning_rate")]
    close(rates, [0.5, 0.1])


def test_clipping_is_over_all_groups_and_the_average_is_of_all():
    slow = sgd(learning_rate=constant(peak=0.1), momentum=0.0)
    both, state = run(by_path(optimizers=[("bias$", FAST), ("", slow)], clip_norm=0.1, average=0.9))
    want = {"bias": np.array([0.5, 0.25]), "table": np.array([[3.0], [4.0]])}
    mean = dict(want)
    for g in GRADIENTS:
        norm = float(optax.tree.norm(g))
        want["bias"] = want["bias"] - 0.5 * g["blocks"]["up"]["bias"] * min(1, 0.1 / norm)
        want["table"] = want["table"] - 0.1 * g["embed"]["table"] * min(1, 0.1 / norm)
        mean = {k: 0.9 * mean[k] + 0.1 * want[k] for k in mean}
    close(both["blocks"]["up"]["bias"], want["bias"])
    close(both["embed"]["table"], want["table"])
    average = optax.tree_utils.tree_get(state, "averaged_params")
    close(average["blocks"]["up"]["bias"], mean["bias"])
    close(average["embed"]["table"], mean["table"])


def test_a_factor_is_another_learning_rate():
    both, state = run(multiplied(optimizer=ADAM, factors=[("embed", 0.25)], average=0.5))
    other = run(adamw(learning_rate=constant(peak=0.025), clip_norm=None))[0]
    close(both["embed"]["table"], other["embed"]["table"])
    close(both["blocks"]["up"]["kernel"], run(ADAM)[0]["blocks"]["up"]["kernel"])
    close(optax.tree_utils.tree_get(state, "learning_rate"), 0.1)
    assert optax.tree_utils.tree_get(state, "averaged_params")["embed"]["table"].shape == (2, 1)


AVERAGING = optax.chain(FAST, average_params(0.9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_path(optimizers=[("bais", FAST), ("", ADAM)]), "Did you mean 'bias'"),
        (lambda: by_path(optimizers=[("bias", FAST)]), "found in blocks/up/kernel, embed/table"),
        (lambda: by_path(optimizers=[("", FAST), ("bias", ADAM)]), "an earlier regex"),
        (lambda: by_path(optimizers=[("", AVERAGING)]), "set its average to None"),
        (lambda: by_path(optimizers=[("(", FAST)]), "no regular expression"),
        (lambda: by_path(optimizers=[]), "optimizers is empty"),
        (lambda: by_path(optimizers=[("", FAST)], clip_norm=0.0), "clip_norm is 0.0"),
        (lambda: by_path(optimizers=[("", FAST)], average=1.0), "average is 1.0"),
        (lambda: multiplied(optimizer=ADAM, factors=[("tabel", 2.0)]), "Did you mean 'table'"),
        (lambda: multiplied(optimizer=ADAM, factors=[("bias", -1.0)]), "has -1.0"),
        (lambda: multiplied(optimizer=AVERAGING, factors=[("bias", 1.0)]), "set its average"),
        (lambda: multiplied(optimizer=ADAM, factors=[]), "factors is empty"),
    ],
)
def test_what_makes_no_groups_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make().init(PARAMS)
