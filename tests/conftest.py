"""Every test runs on 16 imaginary CPU devices, of which equalities use the first 8."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What lmjax caches lies in a folder of the session, not in the user's home."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMJAX_CACHE", str(folder))
        yield folder


@pytest.fixture
def devices():
    return jax.devices()[:8]
