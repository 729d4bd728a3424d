"""Every kind of parallelism gives the numbers of one device: loss, gradients, state after steps."""

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine.program import Program, compile_program
from lmjax.errors import UserError
from lmjax.models.llama import llama
from lmjax.models.moe import moe
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import constant
from lmjax.sharding import MESH_AXES, Layout
from lmjax.tasks.causal_lm import CausalLM

TOLERANCE = 1e-5  # float32, sums in another order
B, T, V = 16, 32, 61  # batch, length, vocabulary


def task() -> CausalLM:
    """Rotary positions, grouped heads, shared and routed experts, a padded vocabulary."""
    return CausalLM(
        model=moe(
            num_layers=4,
            dim=32,
            num_heads=16,
            num_kv_heads=8,
            head_dim=8,
            vocab_size=V,
            vocab_multiple=64,
            max_length=T,
            num_experts=8,
            experts_per_token=2,
            expert_hidden=16,
            num_shared_experts=1,
        ),
        aux_losses={"load_balance_loss": 0.1, "router_z_loss": 0.01},
    )


EXAMPLE = {
    "tokens": jax.ShapeDtypeStruct((T,), jnp.int32),
    "targets": jax.ShapeDtypeStruct((T,), jnp.int32),
    "weights": jax.ShapeDtypeStruct((T,), jnp.float32),
    "segments": jax.ShapeDtypeStruct((T,), jnp.int32),
    "positions": jax.ShapeDtypeStruct((T,), jnp.int32),
}


def batch(step: int) -> dict[str, np.ndarray]:
    """Random tokens in documents of random lengths, some tokens without weight."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, V, (B, T + 1), np.int32)
    starts = draw.random((B, T)) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (draw.random((B, T)) < 0.8).astype(np.float32),
        "segments": segments,
        "positions": (np.arange(T) - first).astype(np.int32),
    }


def compiled(devices, *, microbatches: int = 1, **sizes: int) -> Program:
    return compile_program(
        task(),
        adamw(learning_rate=constant(peak=1e-3)),
        Layout(**{"data": 1, **sizes}),
        EXAMPLE,
        batch_size=B,
        microbatches=microbatches,
        devices=devices,
    )


def run(program: Program, num_steps: int = 5):
    """Rows of metrics, the state at the start and the state after the steps, on the host."""
    state = program.init()
    start, rows = jax.device_get(state), []
    for step in range(num_steps):
        state, metrics = program.train_step(state, program.put(batch(step)))
        rows.append({name: float(mean.value) for name, mean in metrics.items()})
    return rows, start, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return run(compiled(jax.devices()[:1]))


def check(found, expected):
    """The gradient is compared by its norm at each step and by the moments that it leaves."""
    (rows, start, state), (one_rows, one_start, one_state) = found, expected
    jax.tree.map(np.testing.assert_array_equal, start, one_start)
    for row, one_row in zip(rows, one_rows, strict=True):
        assert row.keys() == one_row.keys()
        for name in row:
            np.testing.assert_allclose(
                row[name], one_row[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE),
        state,
        one_state,
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 2, "tensor": 2, "context": 2},
        pytest.param({"slices": 2, "stage": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_three_axes_equal_one_device(sizes, one_device, devices):
    check(run(compiled(devices, **sizes)), one_device)


@pytest.mark.slow
@pytest.mark.parametrize("axis", MESH_AXES)
def test_each_axis_equals_one_device(axis, one_device, devices):
    sizes = {"stage": 4, "data": 2} if axis == "stage" else {axis: 8}
    check(run(compiled(devices, **sizes)), one_device)


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(MESH_AXES, 2)), ids="-".join)
def test_each_pair_of_axes_equals_one_device(pair, one_device, devices):
    check(run(compiled(devices, **dict(zip(pair, (2, 4), strict=True)))), one_device)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["slices", "fsdp", "stage", "expert"])
def test_microbatches_on_a_mesh_equal_the_whole_on_one_device(axis, one_device, devices):
    check(run(compiled(devices, microbatches=2, **{axis: 4, "data": 2})), one_device)


def test_a_layout_that_does_not_divide_the_model_is_refused_with_the_nearest():
    with pytest.raises(UserError) as refused:
        compiled(jax.devices(), tensor=16)
    assert "which tensor = 16 devices do not divide" in str(refused.value)
    assert "The nearest layouts that fit: (fsdp=2, tensor=8), (data=2, tensor=8)" in str(
        refused.value
    )


def test_a_layout_that_does_not_divide_the_batch_is_refused_with_the_nearest(devices):
    with pytest.raises(UserError) as refused:
        compiled(jax.devices()[:12], data=12)
    assert "batch_size 16 does not divide into 12 data-parallel parts" in str(refused.value)
    assert "No layout of these axes" in str(refused.value)


def collectives(text: str) -> list[tuple[str, str, int]]:
    """(kind, shape, bytes) of every array that a collective in the compiled text returns."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", line)
        if match:
            for kind, size in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                width = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}[kind]
                count = math.prod(int(n) for n in size.split(",")) if size else 1
                found.append((match[2], size, width * count))
    return found


def test_fsdp_moves_no_more_than_it_must(devices):
    """Each kernel is gathered once forward and once backward, and its gradient scattered."""
    D, H, K, F, layers = 256, 8, 32, 2048, 2
    model = llama(
        num_layers=layers,
        dim=D,
        num_heads=H,
        num_kv_heads=H,
        head_dim=K,
        hidden=F,
        vocab_size=1024,
        max_length=T,
        remat="full",
    )
    program = compile_program(
        CausalLM(model=model),
        adamw(learning_rate=constant(peak=1e-3)),
        Layout(data=1, fsdp=8),
        EXAMPLE,
        batch_size=B,
        devices=devices,
    )
    found = collectives(program.compiled.as_text())
    gathered = collections.Counter(size for kind, size, _ in found if kind == "all-gather")
    scattered = collections.Counter(size for kind, size, _ in found if kind == "reduce-scatter")
    assert gathered == {
        f"{D},{H},3,{K}": 2,
        f"{H},{K},{D}": 2,
        f"{D},{F}": 4,  # gate and up
        f"{F},{D}": 2,
        f"1024,{D}": 2,  # the embedding, and the output layer, whose loss has its own gradient
    }
    assert scattered == {
        f"{D // 8},{H},3,{K}": 1,
        f"{H},{K},{D // 8}": 1,
        f"{D // 8},{F}": 2,
        f"{F},{D // 8}": 1,
        f"1024,{D // 8}": 2,
    }
    rest = [x for x in found if x[0] not in ("all-gather", "reduce-scatter") and x[2] > 2**20]
    assert rest == []
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    assert program.memory["state and batch"] < state / 8 * 1.05 + 2**20
