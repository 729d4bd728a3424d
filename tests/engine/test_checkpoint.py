"""Checkpoints: kept, moved between layouts, and what happens when one is damaged or unwritable."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.engine import manifest
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.loop import train
from lmjax.engine.run import compile_run
from lmjax.errors import UserError
from lmjax.sharding import Layout
from tests.engine.linear_task import make_run
from tests.engine.test_stored import overwrite
from tests.test_many_hosts import end, start


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(program, folder, states): the states of steps 1, 2 and 3, and checkpoints of them."""
    program, folder = (
        compile_run(make_run(), devices=jax.devices()[:1]),
        tmp_path_factory.mktemp("a"),
    )
    checkpoints, state, states = Checkpoints(folder, keep_last=9), program.init(), {}
    batches = make_run().data.batches(batch_size=16, seed=0)
    for step in (1, 2, 3):
        state, _ = program.train_step(state, program.put(next(batches)))
        states[step] = jax.device_get(state)
        checkpoints.save(step, state, {"config": {}, "tokenizer": "none"})
    checkpoints.close()
    return program, folder, states


def restored(program, folder, **options):
    step, state, _ = Checkpoints(folder).restore(
        program.abstract_state, lambda about: None, **options
    )
    return step, jax.device_get(state)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_happens_to_a_file_no_wrong_state_is_restored(trained, tmp_path, caplog, damage):
    """Either the file was not needed, or the checkpoint is set aside, named with its reason."""
    program, folder, states = trained
    set_aside = []
    files = [p.relative_to(folder / "3") for p in (folder / "3").rglob("*") if p.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        DAMAGES[damage](copy / "3" / file)
        caplog.clear()
        step, state = restored(program, copy)
        assert_same(state, states[step])
        reason = copy / "3.unreadable" / "reason.txt"
        assert reason.exists() == (step == 2)
        if step == 2:
            set_aside.append(str(file))
            assert f"step 3 cannot be read and is set aside: {reason.read_text().strip()}" in (
                caplog.text
            )
        shutil.rmtree(copy)
    assert "about/metadata" in set_aside
    assert any(name.startswith("state/d/") for name in set_aside)


def test_a_value_that_only_the_checksum_contradicts_is_not_restored(trained, tmp_path, caplog):
    program, folder, states = trained
    shutil.copytree(folder, tmp_path / "run")
    value = states[3].params["kernel"][1]
    overwrite(tmp_path / "run" / "3", "params/kernel", 1, np.nextafter(value, np.float32(9)))
    with pytest.raises(UserError, match=r"step 3 .* by their checksums: params/kernel. Other"):
        Checkpoints(tmp_path / "run").restore_for_inference()
    step, state = restored(program, tmp_path / "run")
    assert step == 2
    assert_same(state, states[2])
    assert "set aside: not what was saved, by their checksums: params/kernel" in caplog.text


def test_at_most_leaves_later_ones_alone(trained, tmp_path):
    program, folder, states = trained
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "3" / "about" / "metadata").unlink()
    for at_most in (1, 2):
        step, state = restored(program, tmp_path / "run", at_most=at_most)
        assert step == at_most
        assert_same(state, states[step])
    assert Checkpoints(tmp_path / "run").steps() == [1, 2, 3]
    options = {"at_most": 0}
    assert Checkpoints(tmp_path / "run").restore(program.abstract_state, print, **options) is None


def test_a_checkpoint_without_a_manifest_is_refused(trained, tmp_path):
    program, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    old = {"config": {}, "tokenizer": "none", "data": {"next_step": 3}}
    (tmp_path / "run" / "3" / "about" / "metadata").write_text(json.dumps(old))
    for read in (lambda: restored(program, tmp_path / "run"), lambda: restore(tmp_path / "run")):
        with pytest.raises(UserError, match=r"3 has no manifest: it was written by a version"):
            read()
    assert (tmp_path / "run" / "3").is_dir()


def restore(folder):
    return Checkpoints(folder).restore_for_inference()


def big_state(program):
    noise = np.random.default_rng(0).normal(size=10**6)
    return program.init().replace(params={"kernel": jax.numpy.asarray(noise)})


def test_a_failed_save_is_an_error_at_the_next_one(trained, tmp_path):
    """It fails in the background, as no file may grow beyond 100 kB."""
    program, _, _ = trained
    checkpoints, state = Checkpoints(tmp_path), program.init()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints.save(2, big_state(program), {})
        deadline = time.monotonic() + 60
        while checkpoints._manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(UserError, match=r"could not save step 3 to .*GB free.*untouched"):
        checkpoints.save(3, state, {})
    assert Checkpoints(tmp_path).steps() == [1]
    again = Checkpoints(tmp_path)
    again.save(2, state, {})
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # what was begun is swept


def test_a_slow_save_is_said_waited_for_and_then_an_error(trained, tmp_path, monkeypatch, caplog):
    program, _, _ = trained
    checkpoints, state = Checkpoints(tmp_path, slow_s=0.4), program.init()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    saving, began = checkpoints._manager.is_saving_in_progress, time.monotonic()
    monkeypatch.setattr(
        checkpoints._manager,
        "is_saving_in_progress",
        lambda: saving() or time.monotonic() < began + 0.3,
    )
    checkpoints.save(2, state, {})
    assert time.monotonic() > began + 0.3
    assert "the save of step 1 has not ended, and the next is due: waiting up to" in caplog.text
    checkpoints.wait()
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
    with pytest.raises(UserError, match=r"the save of step 2 .* did not end in 0 s more"):
        checkpoints.save(3, state, {})
    checkpoints.close()  # does not wait for it
    assert checkpoints.steps() == [1, 2]


def test_a_step_below_the_newest_is_saved_all_the_same(trained, tmp_path):
    """As after a rollback; orbax by itself would leave it out without a word."""
    program, _, _ = trained
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (8, 4):
        checkpoints.save(step, program.init(), {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [4, 8]


def test_a_checkpoint_that_was_set_aside_says_why(trained, tmp_path):
    _, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.set_aside(2, "for a test")
    assert checkpoints.steps() == [1, 3]
    assert (tmp_path / "run" / "2.unreadable" / "reason.txt").read_text() == "for a test\n"


def test_there_is_no_checkpoint_without_its_manifest(trained, tmp_path):
    """The folder gets its name when arrays and manifest are written: before that it is nobody's."""
    program, _, _ = trained
    checkpoints, names = Checkpoints(tmp_path, keep_last=9), set()
    for step in range(1, 6):
        checkpoints.save(step, program.init(), {})
        while checkpoints._manager.is_saving_in_progress():
            for folder in tmp_path.iterdir():
                if folder.name.isdigit():
                    names.add(folder.name)
                    assert manifest.read(folder)["step"] == int(folder.name)
    checkpoints.close()
    assert names


@pytest.mark.slow
def test_a_process_holds_its_part_of_a_state_and_not_the_whole(cache, tmp_path):
    """Two processes restore what one device saved: each needs half of it, and a margin."""
    code = "import sys; from tests.engine.restore_parts import save; save(sys.argv[1])"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=root, check=True)
    command = ["tests.engine.restore_parts", str(tmp_path / "a")]
    for output in end(start(command, count=2, devices=1, cache=cache), [0, 0]):
        peak, whole = map(int, re.search(r"peak (\d+) of (\d+)", output).groups())
        assert 0.4 * whole < peak < 0.75 * whole
