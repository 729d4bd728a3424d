"""Factored moments: each matrix of a stack for itself, kept small and sharded by name."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax import sharding
from lmjax.optim.factored import scale_by_factored_rms
from lmjax.sharding import Boxed, Layout

# name: (axes, shape): as layers declare them, smaller.
STACKS = {
    "qkv": (("layers", "embed", "kv_heads", None, "head_dim"), (3, 16, 2, 4, 5)),
    "out": (("layers", "heads", "head_dim", "embed"), (3, 4, 5, 24)),
    "experts": (("layers", "experts", "embed", "mlp"), (3, 4, 16, 8)),
    "table": (("vocab", "embed"), (32, 16)),
    "scale": (("layers", "norm"), (3, 16)),
    "router": (("layers", "embed", None), (3, 16, 2)),
}
# name: axis of the rows, the largest
ROWS = {"qkv": 1, "out": 3, "experts": 2, "table": 0}


def optimizer(**changes):
    return scale_by_factored_rms(
        **{"decay_rate": 0.8, "min_dim_factored": 4, "clip": 0.9, **changes}
    )


def boxed_zeros():
    return {k: Boxed(jnp.zeros(shape), axes) for k, (axes, shape) in STACKS.items()}


def gradients(step):
    random = np.random.default_rng(step)
    return {k: random.normal(size=shape).astype("f4") for k, (_, shape) in STACKS.items()}


def by_paper(gradients_of_steps, factored):
    """arXiv:1804.04235, algorithms 4 and 5, of one matrix (or what is not factored) in float64."""
    row = col = v = 0.0
    for t, g in enumerate(gradients_of_steps, 1):
        b2, square = 1 - t**-0.8, g.astype("f8") ** 2 + 1e-30
        if factored:
            row = b2 * row + (1 - b2) * square.sum(1)
            col = b2 * col + (1 - b2) * square.sum(0)
            estimate = np.outer(row, col) / row.sum()
        else:
            v = b2 * v + (1 - b2) * square
            estimate = v
        update = g / np.sqrt(estimate)
        update = update / max(1, np.sqrt(np.mean(update**2)) / 0.9)
    return update


def test_each_matrix_of_a_stack_is_the_papers():
    state = sharding.unbox(optimizer().init(boxed_zeros()))
    update = jax.jit(optimizer().update)
    for step in range(3):
        updates, state = update(gradients(step), state)
    for name, (axes, shape) in STACKS.items():
        stacked = sum(axis in ("layers", "experts") for axis in axes)
        history = [np.moveaxis(gradients(s)[name], ROWS.get(name, -1), stacked) for s in range(3)]
        found = np.moveaxis(np.asarray(updates[name]), ROWS.get(name, -1), stacked)
        for index in np.ndindex(shape[:stacked]):
            matrices = [h[index].reshape(h[index].shape[0], -1) for h in history]
            wanted = by_paper(matrices, factored=name in ROWS).reshape(found[index].shape)
            np.testing.assert_allclose(found[index], wanted, rtol=2e-5, err_msg=name)


def test_what_is_kept_is_small_and_sharded_by_its_names(devices):
    state = optimizer().init(boxed_zeros())
    kept = {k: (state.rows[k], state.columns[k]) for k in ROWS}
    shapes = {k: tuple(x.value.shape for x in pair) for k, pair in kept.items()}
    assert shapes == {
        "qkv": ((3, 16), (3, 2, 4, 5)),
        "out": ((3, 24), (3, 4, 5)),
        "experts": ((3, 4, 16), (3, 4, 8)),
        "table": ((32,), (16,)),
    }
    assert all(state.whole[k] is None for k in ROWS)
    assert {k for k in STACKS if state.columns[k] is None} == {"scale", "router"}
    mesh = Layout(fsdp=2, tensor=2, expert=2, data=1).mesh(devices)
    split = sharding.shardings_of(state, mesh)
    specs = {
        "qkv": (PartitionSpec(None, "fsdp"), PartitionSpec(None, "tensor")),
        "experts": (PartitionSpec(None, "expert", "fsdp"), PartitionSpec(None, "expert", "tensor")),
        "table": (PartitionSpec("tensor"), PartitionSpec("fsdp")),
    }
    for name, wanted in specs.items():
        for box, found, spec in zip(
            kept[name], (split.rows[name], split.columns[name]), wanted, strict=True
        ):
            assert found.is_equivalent_to(NamedSharding(mesh, spec), box.value.ndim), name
