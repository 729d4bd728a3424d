"""Initialisers by name: their variances and bounds."""

import jax
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.ops.initializers import INITIALIZERS, initializer

IN, OUT = 100, 300
DEFAULT = ("truncated_normal", "he_normal", "xavier_uniform")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
        for name in INITIALIZERS
    ],
)
def test_variance_and_bound(name):
    w = np.asarray(initializer(name, std=0.1)(jax.random.key(0), (IN, OUT)))
    std = {
        "normal": 0.1,
        "truncated_normal": 0.1,
        "xavier_uniform": (2 / (IN + OUT)) ** 0.5,
        "xavier_normal": (2 / (IN + OUT)) ** 0.5,
        "he_uniform": (2 / IN) ** 0.5,
        "he_normal": (2 / IN) ** 0.5,
    }[name]
    np.testing.assert_allclose(w.std(), std, rtol=0.02)
    np.testing.assert_allclose(w.mean(), 0, atol=0.02 * std)
    if name.endswith("uniform"):
        assert 0.99 * 3**0.5 * std < abs(w).max() <= 3**0.5 * std
    elif name == "truncated_normal":
        assert 2.2 * std < abs(w).max() < 2 / 0.8796 * std
    else:
        assert abs(w).max() > 3 * std


def test_bad_names():
    with pytest.raises(UserError, match="Did you mean 'he_normal'"):
        initializer("he_norm")
    with pytest.raises(UserError, match="std is 0"):
        initializer("normal", std=0.0)
