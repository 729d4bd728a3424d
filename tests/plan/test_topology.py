"""Names of topologies, and what is said of those that are none."""

import jax
import pytest

from lmjax.errors import UserError
from lmjax.plan import topology as module
from lmjax.plan.topology import devices, parse_topology


@pytest.mark.parametrize(
    "name, platform, num_chips, num_devices, wrap",
    [
        ("v5e:4x4", "tpu", 16, 16, (False, False)),
        ("v5e:8x16", "tpu", 128, 128, (False, True)),
        ("v6e:16x16", "tpu", 256, 256, (True, True)),
        ("v5p:2x2x1", "tpu", 4, 4, (False,) * 3),
        ("v5p:8x8x4", "tpu", 256, 256, (True,) * 3),
        ("tpu7x:4x4x4", "tpu", 64, 128, (True,) * 3),
        ("2*v5e:16x16", "tpu", 512, 512, (True, True)),
        ("V4:4x4x4", "tpu", 64, 64, (True,) * 3),
        ("h100:64", "gpu", 64, 64, (False,)),
        ("cpu:8", "cpu", 8, 8, (False,)),
    ],
)
def test_known(name, platform, num_chips, num_devices, wrap):
    found = parse_topology(name)
    assert (found.platform, found.num_chips, found.num_devices) == (
        platform,
        num_chips,
        num_devices,
    )
    assert found.wrap == wrap
    assert (found.limit_bytes > 0) == (platform != "cpu")


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:4x4", "unknown topology 'v9:4x4'.*Allowed:.*v5p"),
        ("v5q:4x4x4", "Did you mean 'v5"),
        ("v5p", r"is not \[SLICES\*\]FAMILY:SIZE.*v5e:4x4"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions, as in v5p:8x8x8"),
        ("v5e:4x4x4", "2 dimensions, as in v5e:4x4"),
        ("v5e:0x4", "size of 0"),
        ("cpu:99999999", "has more than 1048576 chips"),
        (f"v5e:{'9' * 5000}x4", "has more than 1048576 chips"),
        ("2*cpu:8", "of cpu give a number"),
        ("h100:8x8", "of h100 give a number"),
    ],
)
def test_unknown(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'lmjax\[plan-tpu\]'"):
        devices(parse_topology("v5e:4x4"))


def test_more_cpu_devices_than_were_started():
    assert len(jax.devices()) < 4096
    with pytest.raises(UserError, match=r"4096 CPU devices are asked for.*process of its own"):
        devices(parse_topology("cpu:4096"))
    assert len(devices(parse_topology("cpu:4"))) == 4
