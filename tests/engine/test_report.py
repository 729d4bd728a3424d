"""What is written of steps: their time without that of saves and evaluations, and health."""

import io

import jax
import pytest
from rich.console import Console

from lmjax.engine.curves import read_metrics
from lmjax.engine.goodput import read_launches
from lmjax.engine.program import compile_program
from lmjax.engine.report import Report
from tests.engine.linear_task import Linear, make_run
from tests.engine.test_goodput import Device, goodput, train

VALUES = {"loss": 1.0, "grad_norm": 1.0}


@pytest.fixture(scope="module")
def program():
    run = make_run()
    return compile_program(
        run.task, run.optimizer, run.layout, run.data.example,
        batch_size=run.batch_size, devices=jax.devices()[:1],
    )  # fmt: skip


def report_of(program, workdir, *, device, first=0, quiet=True, **changes):
    report = Report(
        make_run(**changes), program, workdir, first_step=first, quiet=quiet, clock=goodput(device)
    )
    return report


def follow(report, device, waits, *, first=0, then=(), aside=lambda: None, step_s=1.0):
    """Trains as the loop does: reads the step before the one dispatched, and all before an aside.

    `then` are the steps after which `aside` is called, for a save or an evaluation.
    """
    unread, last = first + 1, first + len(waits)

    def read(until):
        nonlocal unread
        while unread <= until:
            report.step(unread, VALUES)
            unread += 1

    def after(step):
        read(step - 1)
        if step in then or step == last:
            device.time = max(device.time, device.free)
            read(step)
        if step in then:
            aside()

    train(report.clock, device, waits, first=first, after=after, step_s=step_s)


@pytest.mark.parametrize("unit", ["nats", ""])
def test_the_loss_has_the_unit_that_the_task_names(tmp_path, program, monkeypatch, unit):
    drawn = []
    monkeypatch.setattr(
        "lmjax.engine.report.draw_curves", lambda *_, **options: drawn.append(options)
    )

    class Named(Linear):
        loss_unit = unit

    with report_of(
        program, tmp_path, device=Device(), task=Named() if unit else Linear()
    ) as report:
        report.console = Console(file=io.StringIO(), width=200)
        report.evaluation(10, {"valid/loss": 0.5, "valid/absolute": 0.25})
    said = [line.split() for line in report.console.file.getvalue().splitlines()]
    assert ["valid/loss", "0.5000", *([unit] if unit else [])] in said
    assert drawn[0]["loss_unit"] == unit


def rows_of(workdir):
    return read_metrics(workdir / "metrics.jsonl")


def test_the_time_of_a_step_is_without_saves_and_evaluations(tmp_path, program):
    device = Device()

    def evaluate():
        with report.clock.spent("evaluation"):
            device.time += 30.0

    with report_of(program, tmp_path, device=device, log_every=5, steps=20) as report:
        device.time += 7.0
        report.start()
        waits = [20.0] + [0.1] * 19
        follow(report, device, waits, then=range(4, 21, 4), aside=evaluate)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    # After an evaluation the devices wait for a batch and its dispatch, once in these steps.
    step_s = (5 * 1.0 + 0.1 + 0.01) / 5
    assert [row["step_s"] for row in rows] == pytest.approx([step_s] * 4, abs=0.01)
    assert [row["rows_per_s"] for row in rows] == pytest.approx([16 / step_s] * 4, rel=0.01)
    assert [row["input_share"] for row in rows] == pytest.approx([0.02] * 4, abs=0.002)
    assert {"host_memory_gb", "goodput"} <= rows[0].keys()
    share = 20 / (20 + 27 + 30 * 4)  # the last evaluation follows the last line
    assert rows[-1]["goodput"] == pytest.approx(share, abs=0.01)


def test_the_first_step_took_until_it_was_read(tmp_path, program):
    device = Device()
    with report_of(program, tmp_path, device=device, steps=3) as report:
        report.start()
        follow(report, device, [5.0, 0.0, 0.0], step_s=2.0)
    assert rows_of(tmp_path)[0]["step_s"] == pytest.approx(2.0, rel=0.05)


def test_starvation_is_in_the_metrics(tmp_path, program):
    device = Device()
    with report_of(program, tmp_path, device=device, log_every=10, steps=40) as report:
        report.start()
        follow(report, device, [9.0] + [4.0] * 39)
    assert [row["input_share"] for row in rows_of(tmp_path)][1:] == pytest.approx(
        [0.75] * 3, abs=0.02
    )


def test_the_table_at_the_end_is_over_all_launches(tmp_path, program, capsys):
    device = Device()
    for first in (0, 6):  # the first launch is killed at step 9, with a checkpoint of step 6
        report = report_of(program, tmp_path, device=device, first=first, quiet=not first, steps=12)
        device.time += 10.0
        report.__enter__().start()

        def save(clock=report.clock):
            with clock.spent("checkpoint"):
                device.time += 5.0

        follow(report, device, [0.0] * (6 if first else 9), first=first, then=[6], aside=save)
        if first:
            report.__exit__(None, None, None)
        else:
            report.clock._write()
            report.metrics.close()
            report.events.close()
            device.time += 100.4
    said = " ".join(capsys.readouterr().out.split())
    times = "step 0m12s, compile 0m20s, checkpoint 0m05s, lost 1m43s, over 2 launches"
    assert f"goodput 8.5 %: {times}" in said
    assert [launch["first"] for launch in read_launches(tmp_path / "goodput.jsonl")] == [0, 6]


def test_going_back_drops_lines_and_loses_time(tmp_path, program):
    device = Device()
    with report_of(program, tmp_path, device=device, steps=12) as report:
        report.start()

        def save():
            with report.clock.spent("checkpoint"):
                device.time += 3.0

        follow(report, device, [0.0] * 9, then=[4], aside=save)
        device.time += 50.0
        report.rewind(4)
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
        follow(report, device, [0.0] * 8, first=4)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step_s"] for row in rows] == pytest.approx([1.0] * 12, abs=0.02)
    assert report.clock.total()["lost"] == pytest.approx(55.0, abs=0.2)
