"""Replicas are compared device by device: a flipped bit is found, and its device named."""

import jax
import numpy as np
import optax
import pytest

from lmjax.engine.replicas import Corrupt, compare, replica_check
from lmjax.engine.run import compile_run
from lmjax.errors import Exit
from lmjax.sharding import Layout
from tests.many_hosts import Network, Rows
from tests.many_hosts import make_run as network_run

PATHS = {"params/into": (64, 16), "params/out": (16,)}


def program_of(layout, devices, **changes):
    fields = {"task": Network(), "data": Rows(), "evals": {}, "optimizer": optax.sgd(0.1)}
    return compile_run(network_run(layout, **fields, **changes), devices=devices)


@pytest.fixture(scope="module")
def checked():
    """On data=4 x fsdp=2: four replicas of each part of `into`, eight of `out`."""
    program = program_of(Layout(data=4, fsdp=2), jax.devices()[:8])
    return program, replica_check(program)


def flipped(x, device, bit=0, element=-1):
    """The array with one bit of what `device` holds flipped."""
    parts = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def test_equal_replicas_pass(checked):
    program, check = checked
    state = program.init()
    check(state)
    batch = next(Rows().batches(batch_size=16, seed=0))
    check(program.train_step(state, program.put(batch))[0])


@pytest.mark.parametrize("name", ["into", "out"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_flipped_bit_is_found_and_its_device_named(checked, devices, name, place):
    program, check = checked
    state = program.init()
    bit = int(np.random.default_rng(place).integers(32))
    params = {**state.params, name: flipped(state.params[name], devices[place], bit, place)}
    with pytest.raises(Corrupt) as caught:
        check(state.replace(params=params))
    message, others = str(caught.value), {"into": 3, "out": 7}[name]
    assert "after step 0 are not the same" in message
    assert (
        f"  device {place} (cpu, process 0) differs from {others} others, in params/{name}\n"
        in (message)
    )
    assert message.count("process 0") == 1
    assert caught.value.code == Exit.CORRUPT


def test_frozen_parameters_are_compared_as_well(devices):
    program = program_of(Layout(data=4), devices[:4], trainable="out")
    state, check = program.init(), replica_check(program)
    check(state)
    frozen = {"into": flipped(state.frozen["into"], devices[2])}
    with pytest.raises(Corrupt, match=r"device 2 .* in frozen/into"):
        check(state.replace(frozen=frozen))


def test_two_against_each_other_are_both_named(devices):
    program = program_of(Layout(data=2), devices[:2])
    state = program.init()
    params = {**state.params, "out": flipped(state.params["out"], devices[1])}
    with pytest.raises(Corrupt, match=r"device 0 \(.*\) and device 1 \(.*\) differ from each ot"):
        replica_check(program)(state.replace(params=params))


def test_without_replicas_there_is_nothing_to_compare(devices):
    """Over `tensor` each device holds a part of both: nothing is compiled, and all passes."""
    program = program_of(Layout(data=1, tensor=2), devices[:2])
    state = program.init()
    params = {**state.params, "out": flipped(state.params["out"], devices[1])}
    replica_check(program)(state.replace(params=params))


def test_the_majority_decides(devices):
    rows = np.array([[1, 2], [1, 2], [1, 3], [1, 2]], np.uint32)
    odd = compare("p", devices[:4], rows)
    assert odd.devices == (devices[2],) and odd.majority == 3
    assert compare("p", devices[:2], rows[:2]) is None
    tie = compare("p", devices[:4], rows[[0, 1, 2, 2]])
    assert tie.devices == tuple(devices[:4]) and tie.majority == 0
