"""No change makes the compiled step cost more: collectives, their bytes, memory of a device."""

import importlib.util
import json

import pytest

from tests.plan.budget import STORED, cases, measure

TOLERANCE = 1.02
BUDGET = json.loads(STORED.read_text())


def over(found, stored):
    """What rose by more than the tolerance, and what is new."""
    return {
        name: f"{value:,.0f}, budget {stored.get(name, 0):,.0f}"
        for name, value in found.items()
        if value > TOLERANCE * stored.get(name, 0)
    }


def test_over_names_what_rose():
    stored = {"a": 100.0, "b": 100.0, "c": 100.0}
    found = {"a": 102.0, "b": 103.0, "d": 1.0}
    assert over(found, stored) == {"b": "103, budget 100", "d": "1, budget 0"}


def test_every_case_is_stored():
    assert set(BUDGET) == {f"{preset} on {topology}" for preset, topology in cases()}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs extra plan-tpu")
@pytest.mark.parametrize("preset, topology", cases())
def test_budget(preset, topology):
    rose = over(measure(preset, topology), BUDGET[f"{preset} on {topology}"])
    assert not rose, f"{preset} on {topology} costs more; if that is meant, run " + (
        f"python -m tests.plan.budget: {rose}"
    )
