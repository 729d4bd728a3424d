"""What every config must pass, found by discovery: a new family is checked by being there."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import build_and_resolve, leaves, load_config, to_dict
from lmjax.convert.imports import import_folder
from lmjax.engine.curves import read_metrics
from lmjax.engine.loop import train
from lmjax.engine.program import Program
from lmjax.engine.run import Run, compile_run
from lmjax.sharding import Layout
from tests.convert import folders

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def by_default(*names):
    """What a config hardly changes is proved with these by default, and with all if slow."""
    params = [
        pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in CONFIGS
    ]
    return pytest.mark.parametrize("smoke", params, indirect=True)


# Floating-point sums in another order, over a few updates of a small float32 model.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """A workdir of small random weights, for configs that go on from some."""
    base = tmp_path_factory.mktemp("imported")
    source = folders.write(base / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    import_folder(source, base / "run")
    return str(base / "run")


@pytest.fixture(scope="module", params=CONFIGS)
def smoke(request, imported):
    """(name, run, resolved tree) of a config's smoke variant, products in float32."""
    path = ROOT / "configs" / f"{request.param}.py"
    config = load_config(str(path))
    changes = {
        name: "float32" for name, _ in leaves(config) if re.fullmatch(r"task\..*\.dtype", name)
    }
    if start := config.init_from:
        changes["init_from" if isinstance(start, str) else "init_from.path"] = imported
    run, tree = build_and_resolve(load_config(f"{path}:smoke", changes))
    return request.param, dataclasses.replace(run, log_every=1), tree


@pytest.fixture(scope="module")
def program(smoke):
    """The config's program on one device."""
    return compile_run(smoke[1], devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def one_device(smoke, program):
    return losses_of(program, smoke[1])


def losses(run: Run, *, devices) -> list[float]:
    return losses_of(compile_run(run, devices=devices), run)


def losses_of(program: Program, run: Run, *, num_steps: int = 4) -> list[float]:
    state, found = program.init(), []
    batches = run.data.batches(batch_size=run.batch_size, seed=run.seed)
    for batch in itertools.islice(batches, num_steps):
        state, metrics = program.train_step(state, program.put(batch))
        found.append(float(metrics["loss"].value))
    return found


def test_golden(smoke):
    """A config means what it meant: its recorded calls equal the stored ones."""
    name, _, _ = smoke
    tree = to_dict(load_config(str(ROOT / "configs" / f"{name}.py")))
    text = json.dumps(tree, indent=1) + "\n"
    golden = GOLDEN / f"{name}.json"
    assert golden.exists() and golden.read_text() == text, (
        f"configs/{name}.py changed. If that is meant, write the new golden file and say in the "
        "commit why: python -m tests.golden"
    )


@by_default("shakespeare")
def test_one_device_equals_eight(smoke, one_device):
    run = dataclasses.replace(smoke[1], layout=Layout(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses(run, devices=jax.devices()[:8]), one_device, rtol=TOLERANCE)


@by_default("char")
def test_microbatched_equals_whole(smoke, one_device, program):
    if "batch_stats" in program.abstract_state.model_state:
        pytest.skip("the statistics that normalise a batch are those of each microbatch")
    run = dataclasses.replace(smoke[1], microbatches=4)
    np.testing.assert_allclose(losses(run, devices=jax.devices()[:1]), one_device, rtol=TOLERANCE)


@by_default("char")
def test_compiles_for_sixteen_devices(smoke):
    """No step runs: only the compiler sees them."""
    program = compile_run(smoke[1], devices=jax.devices())
    assert program.mesh.size == 16
    assert program.memory["temporaries"] > 0


@by_default("char", "shakespeare")
def test_loss_falls(smoke, program):
    """On one batch over and over, by a good part of what there is to learn."""
    run = smoke[1]
    if hasattr(run.task, "discriminator"):
        pytest.skip("two networks against each other: what one wins the other loses")
    batch = program.put(next(iter(run.data.batches(batch_size=run.batch_size, seed=0))))
    state, found = program.init(), []
    for _ in range(run.steps):
        state, metrics = program.train_step(state, batch)
        found.append(float(metrics["loss"].value))
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.98 * found[0]


@dataclasses.dataclass(frozen=True)
class Failing:
    """A data set whose reader dies before batch `last`."""

    data: object
    last: int

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batches(self, *, start=0, **arguments):
        yield from itertools.islice(self.data.batches(start=start, **arguments), self.last - start)
        raise OSError("the disk is gone")


@by_default("shakespeare")
def test_resumed_equals_uninterrupted(smoke, tmp_path):
    """Bit for bit: losses, and the parameters at the end."""
    _, run, tree = smoke
    run = dataclasses.replace(run, steps=4, save_every=2, evals={})
    options = {"config": tree, "devices": jax.devices()[:2], "quiet": True}
    whole = train(run, tmp_path / "whole", **options)
    failing = dataclasses.replace(run, data=Failing(run.data, last=3))
    with pytest.raises(OSError, match="the disk is gone"):
        train(failing, tmp_path / "torn", **options)
    resumed = train(run, tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    rows = [
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_metrics(tmp_path / d / "metrics.jsonl")
        ]
        for d in ("whole", "torn")
    ]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == [1, 2, 3, 4]
