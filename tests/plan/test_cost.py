"""Times and money, calculated by hand."""

from dataclasses import dataclass

import pytest

from lmjax.plan.collectives import Collective
from lmjax.plan.cost import bandwidth, roofline, run_cost, seconds
from lmjax.plan.memory import refused
from lmjax.plan.topology import parse_topology


@dataclass
class Place:
    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0
    id: int = 0


def line(axis, length, **fields):
    return [
        Place(coords=tuple(i if a == axis else 0 for a in range(3)), **fields)
        for i in range(length)
    ]


def test_links_of_a_torus():
    """v5p: 100 GB/s each way of a link; a closed ring has two ways."""
    cube, corner = parse_topology("v5p:4x4x4"), parse_topology("v5p:2x2x1")
    assert bandwidth(cube, line(0, 4)) == 200e9
    assert bandwidth(cube, line(0, 2)) == 100e9  # half a ring is a line
    assert bandwidth(corner, line(0, 2)) == 100e9
    plane = [Place(coords=(i, j, 0)) for i in range(4) for j in range(4)]
    assert bandwidth(cube, plane) == 400e9


def test_slow_networks():
    slices = parse_topology("2*v5e:4x4")
    assert bandwidth(slices, [Place(slice_index=0), Place(slice_index=1)]) == 3.125e9
    gpus = parse_topology("h100:16")
    assert bandwidth(gpus, [Place(id=0), Place(id=7)]) == 450e9
    assert bandwidth(gpus, [Place(id=0), Place(id=8)]) == 50e9
    assert bandwidth(parse_topology("cpu:8"), [Place(), Place()]) is None


def test_seconds_of_a_collective():
    gather = Collective(
        kind="all-gather",
        axes=("fsdp",),
        group=(0, 1, 2, 3),
        payload_bytes=0,
        sent_bytes=400e9,
        times=1,
        source="",
    )
    assert seconds(parse_topology("v5p:4x4x4"), gather, line(0, 4)) == 2.0


def test_roofline_takes_the_largest_and_says_which():
    """16 v5e: 197 TFLOP/s and 819 GB/s each."""
    topology = parse_topology("v5e:4x4")
    flop = 16 * 197e12
    options = {"executed_flop": 4 * flop, "model_flop": 2.5 * flop, "model_flop_full": 3 * flop}
    times = roofline(topology, **options, hbm_bytes=819e9, network_s=2.0)
    assert (times.compute_s, times.hbm_s, times.network_s) == (4.0, 1.0, 2.0)
    assert (times.step_s, times.serial_s, times.bound) == (4.0, 6.0, "compute")
    assert (times.mfu, times.mfu_full) == (0.625, 0.75)
    times = roofline(topology, **options, hbm_bytes=819e9 * 5, network_s=6.0)
    assert (times.step_s, times.serial_s, times.bound) == (6.0, 11.0, "network")
    unknown = roofline(parse_topology("cpu:8"), **options, hbm_bytes=1.0, network_s=0.0)
    assert unknown.step_s is None and "not listed" in unknown.bound


def test_run_cost():
    cost = run_cost(
        steps=7200,
        units_per_step=1000,
        flop_per_step=120e18 / 7200,
        step_s=0.5,
        num_chips=256,
        price_per_chip_hour=2.0,
    )
    assert (cost.hours, cost.chip_hours, cost.money) == (1.0, 256.0, 512.0)
    assert cost.units == 7_200_000
    # C = 6 N D and D = 20 N: C = 120 N^2
    assert cost.chinchilla_parameters == pytest.approx(1e9)
    assert cost.chinchilla_tokens == pytest.approx(20e9)


@pytest.mark.parametrize(
    "message, sizes",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (112.00G) exceeds available HBM (15.75G).",
            (112 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G "
            "hbm. Exceeded hbm capacity by 7.75G.",
            (23.5 * 2**30, 15.75 * 2**30),
        ),
        ("INVALID_ARGUMENT: 112.00G", None),
    ],
)
def test_what_the_compiler_says_of_memory(message, sizes):
    assert refused(message) == sizes
