import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.data.images import Images
from lmjax.engine.program import compile_program
from lmjax.errors import UserError
from lmjax.models.resnet import resnet
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import constant
from lmjax.sharding import Layout
from lmjax.tasks.classify import Classify

SMALL = {"blocks": (1, 1), "width": 8, "num_classes": 10, "stem": "small"}


@pytest.mark.parametrize(
    ("depth", "parameters", "gigaflop"),
    [
        (18, 11_689_512, 3.63),
        (34, 21_797_672, 7.33),
        (50, 25_557_032, 8.18),
        (101, 44_549_160, 15.6),
    ],
)
def test_counts_are_torchvisions(depth, parameters, gigaflop):
    """Parameters with 1000 classes; work is twice the multiply-adds that it lists."""
    model = resnet(depth=depth)
    spec = {"images": jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)}
    batch = {"images": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    counts = model.count_params(sharding.unbox(variables["params"]))
    assert sum(counts.values()) == parameters
    assert model.flop(spec) / 1e9 == pytest.approx(gigaflop, abs=0.01)


def steps(devices, layout):
    data = Images(path="glyphs")
    task = Classify(model=resnet(**SMALL))
    optimizer = adamw(learning_rate=constant(peak=1e-2))
    program = compile_program(task, optimizer, layout, data.example, batch_size=16, devices=devices)
    state, losses = program.init(), []
    for batch in itertools.islice(data.batches(batch_size=16, seed=0), 4):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(float(metrics["loss"].value))
    return losses, jax.device_get(state.model_state)


@pytest.mark.slow
def test_one_device_equals_four(devices):
    """Statistics are of the whole batch, wherever its rows lie."""
    losses, stats = steps(devices[:1], Layout())
    found, found_stats = steps(devices[:4], Layout(data=2, fsdp=2))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_stats, stats
    )
    start = {"mean": 0.0, "var": 1.0}
    moved = [np.abs(x - start[path[-1].key]).max() for path, x in jax.tree.leaves_with_path(stats)]
    assert min(moved) > 1e-3


def test_numbers_that_make_no_model_are_refused():
    with pytest.raises(UserError, match="depth is 19: give one of 18, 34"):
        resnet(depth=19)
    with pytest.raises(UserError, match=r"stem is 'smal'.*Did you mean 'small'"):
        resnet(stem="smal")
    with pytest.raises(UserError, match="at least one stage"):
        resnet(blocks=())
