"""Checkpoints with files deleted, cut, flipped, emptied or exchanged: exact, older, or refused."""

import logging
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.loop import train
from lmjax.engine.run import compile_run
from tests.engine.linear_task import make_run
from tests.fuzz.outcome import examples, few_and_many, outcome

STEPS = (4, 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir of a run of 8 steps with two checkpoints, its program, the states by step)."""
    workdir = tmp_path_factory.mktemp("finished")
    run = make_run(steps=8)
    devices = jax.devices()[:1]
    train(run, workdir, quiet=True, devices=devices)
    program = compile_run(run, devices=devices)
    states = {}
    for step in STEPS:
        checkpoints = Checkpoints(workdir / "checkpoints")
        found, state, _ = checkpoints.restore(
            program.abstract_state, lambda about: None, at_most=step
        )
        assert found == step
        states[step] = jax.device_get(state)
        checkpoints.close()
    return workdir, program, states


def damage(data, folder):
    """Does something to one to three files or folders below `folder`; returns what."""
    said = []
    for _ in range(data.draw(st.integers(1, 3))):
        every = sorted(p for p in folder.rglob("*"))
        files = [p for p in every if p.is_file()]
        if not files:
            break
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(
            st.sampled_from(["flip", "cut", "delete", "empty", "swap", "add", "remove"])
        )
        said.append(f"{kind} {file.relative_to(folder)} at {at} of {len(content)}")
        if kind == "flip" and content:
            flipped = content[at] ^ (1 << data.draw(st.integers(0, 7)))
            file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        elif kind == "cut":
            file.write_bytes(content[:at])
        elif kind == "delete":
            file.unlink()
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "swap":
            file.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
        elif kind == "add":
            file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=4)))
        elif folders := [p for p in every if p.is_dir()]:
            shutil.rmtree(data.draw(st.sampled_from(folders)))
    return said


def copied(workdir, to):
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(workdir, to)
    return to


def same(state, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


@few_and_many(25, 300)
def test_restore(count, finished, tmp_path, caplog):
    """The newest, bit for bit; or an older one, and the log names what was passed over."""
    workdir, program, states = finished

    @examples(count)
    @given(st.data())
    def check(data):
        folder = copied(workdir / "checkpoints", tmp_path / "checkpoints")
        said = damage(data, folder)
        caplog.clear()

        def restore():
            checkpoints = Checkpoints(folder)
            try:
                return checkpoints.restore(program.abstract_state, lambda about: None)
            finally:
                checkpoints.close()

        found, message = outcome(restore)
        if found is not None:
            step, state, about = found
            same(state, states[step])
            assert about["step"] == step
            assert (
                step == max(STEPS) or "set aside" in caplog.text or not (folder / "8").exists()
            ), said
        else:
            assert message is not None or not any((folder / str(s)).exists() for s in STEPS), said

    with caplog.at_level(logging.WARNING, "lmjax"):
        check()


@few_and_many(15, 200)
def test_restore_for_inference(count, finished, tmp_path):
    workdir, _, states = finished

    @examples(count)
    @given(st.data())
    def check(data):
        folder = copied(workdir / "checkpoints", tmp_path / "checkpoints")
        damage(data, folder)

        def read():
            checkpoints = Checkpoints(folder)
            try:
                return checkpoints.restore_for_inference(data.draw(st.sampled_from([None, *STEPS])))
            finally:
                checkpoints.close()

        found, _ = outcome(read)
        if found is not None:
            step, variables, _ = found
            same(variables["params"], states[step].params)

    check()


@few_and_many(2, 40)
def test_resume(count, finished, tmp_path, capfd):
    """The whole folder of a run: what goes on from it ends where the undamaged run ended."""
    workdir, _, states = finished
    state = states[max(STEPS)]

    @examples(count)
    @given(st.data())
    def check(data):
        folder = copied(workdir, tmp_path / "run")
        shutil.rmtree(folder / "checkpoints" / "8")  # so that there is something to do
        damage(data, folder)

        def resume():
            return train(make_run(steps=8), folder, quiet=True, devices=jax.devices()[:1])

        found, message = outcome(resume)
        if message is None:
            same(found, state)

    check()
