import numpy as np
import pytest

from lmjax.evaluate.frechet import frechet_distance


def test_distance_of_normal_distributions():
    """Of diagonal covariances it is |m - n|^2 + sum (s - t)^2, s and t standard deviations."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4000, 5))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(len(x) - 1)  # mean 0, covariance 1, exactly
    s, t, shift = (random.uniform(0.5, 2, 5) for _ in range(3))
    expected = np.sum(shift**2) + np.sum((s - t) ** 2)
    assert frechet_distance(x * s, x[::-1] * t + shift) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_of_a_set_to_itself_nothing():
    random = np.random.default_rng(1)
    a, b = (
        random.standard_normal((50, 80)),
        random.standard_normal((60, 80)) @ random.random((80, 80)),
    )
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)  # covariances without full rank
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
