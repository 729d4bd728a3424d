"""Checkpoints: kept, moved between layouts, and what happens when one is damaged or unwritable."""

import logging
import os
import subprocess

import jax
import numpy as np
import pytest

from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.loop import train
from lmjax.engine.run import compile_run
from lmjax.errors import UserError
from lmjax.sharding import Layout
from tests.engine.linear_task import make_run


def files_of(step_folder):
    return sorted(
        (p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


@pytest.fixture
def quiet():
    return {"quiet": True, "devices": jax.devices()[:1]}


def test_keeps_the_last_and_every_kth(tmp_path, quiet):
    run = make_run(steps=12, save_every=2, keep_last=2, keep_every=4)
    train(run, tmp_path, **quiet)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8, 10, 12]


def test_a_state_moves_to_another_layout(tmp_path, quiet, devices):
    state = train(make_run(steps=4), tmp_path, **quiet)
    layout = Layout(data=4, fsdp=2)
    program = compile_run(make_run(layout=layout), devices=devices)
    step, moved, _ = Checkpoints(tmp_path / "checkpoints").restore(
        program.abstract_state, lambda about: None
    )
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, moved, state)
    assert moved.params["kernel"].sharding == program.abstract_state.params["kernel"].sharding


def test_an_async_save_holds_the_state_of_its_step(tmp_path, quiet):
    """Although the next step consumes the arrays that are being written."""
    program = compile_run(make_run(), devices=jax.devices()[:1])
    checkpoints, state = Checkpoints(tmp_path, keep_last=20), program.init()
    batches = make_run().data.batches(batch_size=16, seed=0)
    expected = {}
    for step in range(1, 11):
        state, _ = program.train_step(state, program.put(next(batches)))
        expected[step] = np.array(state.params["kernel"])
        checkpoints.save(step, state, {})
    checkpoints.wait()
    for step, kernel in expected.items():
        _, variables, _ = checkpoints.restore_for_inference(step)
        np.testing.assert_array_equal(variables["params"]["kernel"], kernel)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, quiet, caplog, damage):
    whole = train(make_run(), tmp_path / "whole", **quiet)
    run = make_run(steps=8, keep_last=5)
    train(run, tmp_path / "run", **quiet)
    newest = tmp_path / "run" / "checkpoints" / "8"
    for path in files_of(newest / "state" / "d") + files_of(newest / "state" / "ocdbt.process_0"):
        if damage == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
    with caplog.at_level(logging.WARNING):
        resumed = train(make_run(keep_last=5), tmp_path / "run", **quiet)
    assert "the checkpoint of step 8 cannot be read and is set aside" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "8.unreadable").is_dir()
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_no_readable_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path, quiet):
    train(make_run(steps=4), tmp_path, **quiet)
    for path in files_of(tmp_path / "checkpoints" / "4" / "state"):
        os.truncate(path, 0)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        train(make_run(), tmp_path, **quiet)


def test_a_checkpoint_of_another_model_is_refused_and_stays(tmp_path, quiet):
    train(make_run(steps=4, trainable="offset"), tmp_path, **quiet)
    with pytest.raises(UserError, match="holds another model"):
        train(make_run(), tmp_path, **quiet)
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_full_disk_is_said(tmp_path, quiet):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        program = compile_run(make_run(), devices=jax.devices()[:1])
        checkpoints = Checkpoints(small / "checkpoints")
        state = program.init()
        big = state.replace(
            params={"kernel": jax.numpy.asarray(np.random.default_rng(0).normal(size=10**6))}
        )
        with pytest.raises(UserError, match=r"could not .*GB free.*untouched"):
            checkpoints.save(1, big, {})
            checkpoints.wait()
        assert checkpoints.steps() == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint; there are: none"):
        checkpoints.restore_for_inference()
