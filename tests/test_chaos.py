"""scripts/chaos: that tortured runs reach its bars, and that it notices runs that do not."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "scripts" / "chaos"


def chaos(*flags):
    return subprocess.run([sys.executable, CHAOS, *flags], capture_output=True, text=True)


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    module = types.ModuleType("chaos")
    module.__file__ = str(CHAOS)
    exec(compile(CHAOS.read_text(), CHAOS, "exec"), module.__dict__)
    return module


@pytest.mark.slow
def test_runs_that_meet_everything_once_reach_all_bars(tmp_path):
    """Run 0 in two processes, run 1 on two devices and then elsewhere."""
    done = chaos("--runs=2", f"--folder={tmp_path}/chaos")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs reached all bars" in done.stdout
    for kind in ("kill@", "save@", "term@", "truncate@", "flip@", "delete@", "disk@", "move@"):
        assert kind in done.stdout


def test_each_kind_is_met_as_often(script):
    kinds = [script.KINDS[i % len(script.KINDS)] for i in range(20 * script.PER_RUN)]
    assert {kinds.count(kind) for kind in script.KINDS} == {10}


@pytest.fixture
def stub(script, tmp_path):
    """The torture of a run that was killed once, with what it said and wrote since."""

    def make(said="", losses=None):
        job = script.Job(tmp_path / "run", "config", {})
        job.attempts = lambda: [([1], ""), ([2], said)]
        job.workdir.mkdir()
        rows = [
            {"step": step, "loss": loss, "grad_norm": norm}
            for step, (loss, norm) in (losses or {}).items()
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (job.workdir / "metrics.jsonl").write_text(text)
        return script.Torture(job, (), (1, 1), None)

    return make


SET_ASIDE = "the checkpoint of step 20 cannot be read and is set aside: torn\n"


@pytest.mark.parametrize(
    ("said", "damaged", "missed"),
    [
        ("continuing from step 15\n", {}, ""),
        ("continuing from step 10\n", {}, "went on from step 10, though 15 was saved"),
        ("step 1/50  loss 3\n", {}, "went on from step 0, though 15 was saved"),
        ("continuing from step 15\n", {20: "d/x"}, "d/x of checkpoint 20 was damaged, and nothing"),
        (SET_ASIDE + "continuing from step 15\n", {20: "d/x"}, ""),
        ("Traceback\n", {}, ""),  # it was killed before it had read anything
        ("continuing from step 20\n", {20: "d/x"}, ""),  # the wrong bit says nothing
        (SET_ASIDE + "continuing from step 10\n", {20: "d/x"}, "from step 10, though 15"),
    ],
)
def test_what_a_restart_must_go_on_from(script, stub, said, damaged, missed):
    torture = stub(said)
    if not missed:
        torture.resumes(1, [10, 15], 24, damaged)
        return
    with pytest.raises(script.Missed, match=missed):
        torture.resumes(1, [10, 15], 24, damaged)


def test_a_run_that_goes_far_back_misses_a_bar(script, stub):
    torture = stub("continuing from step 15\n")
    torture.resumes(1, [15], 25, {})
    with pytest.raises(script.Missed, match="went back from step 26 to 15"):
        torture.resumes(1, [15], 26, {})


def test_losses_are_compared_to_the_bit_or_where_moved_to_the_tolerance(script, stub):
    reference = {step: (3.0 / step, 1.0) for step in range(1, 51)}
    near = {**reference, 50: (3.0 / 50 * (1 + 5e-6), 1.0)}
    job = stub(losses=near).job
    assert script.compare(job, reference, moved=True) == pytest.approx(5e-6, rel=1e-3)
    with pytest.raises(script.Missed, match=r"losses differ by 5\.0e-06"):
        script.compare(job, reference, moved=False)
    assert script.compare(job, near, moved=False) == 0
    with pytest.raises(script.Missed, match=r"losses differ by 1\.0e\+00"):
        script.compare(job, {**near, 7: (3.0 / 7, 0.5)}, moved=True)


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_each_step_must_be_reported_once(script, stub, change):
    losses = {step: (1.0, 1.0) for step in range(1, 51)}
    job = stub(losses=losses).job
    path = job.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1] if change == "missing" else [*lines, lines[-1]]))
    with pytest.raises(script.Missed, match="not every step is reported once"):
        script.compare(job, losses, moved=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--runs=0"], "--runs is 0: give at least 1"), (["--run=3"], "unrecognized arguments")],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    done = chaos(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "precious").touch()
    done = chaos(f"--folder={tmp_path}")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
