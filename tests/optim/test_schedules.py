"""Schedules at steps worked out by hand. Steps count from 0; a decay arrives with step `steps`."""

import math

import jax
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.optim.schedules import constant, cosine, inverse_sqrt, linear, noam, wsd

SCHEDULES = {
    "constant": lambda **k: constant(peak=2.0, **k),
    "linear": lambda **k: linear(peak=2.0, steps=12, **k),
    "cosine": lambda **k: cosine(peak=2.0, steps=12, **k),
    "wsd": lambda **k: wsd(peak=2.0, steps=12, decay_steps=4, **k),
    "inverse_sqrt": lambda **k: inverse_sqrt(peak=2.0, **k),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_a_line_that_ends_at_the_peak(name):
    schedule = SCHEDULES[name](warmup_steps=4)
    np.testing.assert_allclose([schedule(s) for s in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(name):
    assert SCHEDULES[name]()(0) == 2.0


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (constant(peak=2.0, warmup_steps=4), {4: 2.0, 10**6: 2.0}),
        (linear(peak=2.0, steps=12, warmup_steps=4), {4: 2.0, 8: 1.0, 11: 0.25, 12: 0.0, 20: 0.0}),
        (
            linear(peak=2.0, steps=10, final_fraction=0.5),
            {0: 2.0, 5: 1.5, 9: 1.1, 10: 1.0, 11: 1.0},
        ),
        (
            cosine(peak=2.0, steps=12, warmup_steps=4),
            {4: 2.0, 8: 1.1, 11: 0.2 + 0.9 * (1 + math.cos(7 / 8 * math.pi)), 12: 0.2, 20: 0.2},
        ),
        (cosine(peak=2.0, steps=6, final_fraction=0.0), {0: 2.0, 2: 1.5, 3: 1.0, 4: 0.5, 6: 0.0}),
        (
            wsd(peak=2.0, steps=12, warmup_steps=4, decay_steps=4),
            {4: 2.0, 7: 2.0, 8: 2.0, 9: 1.5, 10: 1.0, 11: 0.5, 12: 0.0, 20: 0.0},
        ),
        (wsd(peak=2.0, steps=4, decay_steps=4, final_fraction=0.5), {0: 2.0, 2: 1.5, 4: 1.0}),
        (inverse_sqrt(peak=2.0, warmup_steps=4), {3: 2.0, 15: 1.0, 63: 0.5}),
    ],
)
def test_points(schedule, points):
    np.testing.assert_allclose(
        [schedule(s) for s in points], list(points.values()), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_is_float32_in_a_compiled_step(name):
    rate = jax.jit(SCHEDULES[name](warmup_steps=4))(jax.numpy.int32(1))
    assert (rate, rate.dtype, rate.shape) == (1.0, "float32", ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(peak=0.0), "peak is 0.0: a learning rate must be positive"),
        (lambda: constant(peak=math.nan), "peak is nan"),
        (lambda: constant(peak=math.inf), "peak is inf"),
        (lambda: constant(peak=1.0, warmup_steps=-1), "warmup_steps is -1"),
        (lambda: linear(peak=1.0, steps=5, warmup_steps=5), "warmup_steps 5 is not below steps 5"),
        (lambda: cosine(peak=1.0, steps=0), "warmup_steps 0 is not below steps 0"),
        (lambda: cosine(peak=1.0, steps=5, final_fraction=1.1), "final_fraction is 1.1"),
        (lambda: linear(peak=1.0, steps=5, final_fraction=-0.1), "final_fraction is -0.1"),
        (lambda: wsd(peak=1.0, steps=5, decay_steps=0), "decay_steps is 0: must be from 1 to"),
        (
            lambda: wsd(peak=1.0, steps=5, warmup_steps=2, decay_steps=4),
            "decay_steps is 4: must be from 1 to steps - warmup_steps = 3",
        ),
        (lambda: inverse_sqrt(peak=1.0, warmup_steps=0), "inverse_sqrt needs at least 1"),
        (lambda: linear(peak=1.0, steps=2**31), "steps is 2147483648 .* counted in 32 bits"),
        (lambda: constant(peak=1.0, warmup_steps=2**31), "warmup_steps 2147483648: at most"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_noam_is_equation_3():
    """As the paper writes it, steps counted from 1."""
    rate = noam(dim=512, warmup_steps=40, scale=2.0)
    for step in (1, 7, 40, 41, 1000):
        expected = 2.0 * 512**-0.5 * min(step**-0.5, step * 40**-1.5)
        assert float(rate(step - 1)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="dim is 0 and warmup_steps 40"):
        noam(dim=0, warmup_steps=40)
