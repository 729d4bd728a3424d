"""What a person sees of a run: a table at its start, a live line, metrics in files, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lmjax.engine import distributed, goodput
from lmjax.engine.curves import draw_curves, read_metrics
from lmjax.engine.goodput import Goodput, duration
from lmjax.engine.program import Program
from lmjax.engine.watchdog import Health
from lmjax.errors import UserError
from lmjax.hardware import chip

if TYPE_CHECKING:
    from lmjax.engine.run import Run

SECONDS_BETWEEN_LINES = 10.0  # where the output is no terminal
MANY_EPOCHS = 20.0


class Report:
    """Writes `metrics.jsonl`, TensorBoard events, `samples.txt` and `curves.png`; prints the rest.

    A line of metrics is of one step, not of an average since the last line, so that a resumed run
    writes the same lines. Only the first process writes.
    """

    def __init__(
        self,
        run: Run,
        program: Program,
        workdir: Path,
        *,
        first_step: int,
        quiet: bool,
        clock: Goodput,
    ) -> None:
        self.run, self.program, self.workdir, self.first = run, program, workdir, first_step
        self.writes = jax.process_index() == 0
        self.console = Console(quiet=quiet or not self.writes, highlight=False, soft_wrap=True)
        self.work = run.task.work(run.data.example)
        self.chip = chip(program.mesh.devices.flat[0].device_kind)
        self.clock = clock
        process = jax.process_index() if jax.process_count() > 1 else None
        self.health = Health(run.watch, self.clock, process=process)
        self.last_line = 0.0
        self.measured = (0.0, first_step)  # seconds of training at the end of a step
        self.progress: Progress | None = None
        self.wandb: Any = None

    def __enter__(self) -> Report:
        if self.writes:
            self._open_files()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.writes:
            self.metrics.close()
            self.events.close()
            if self.wandb is not None:
                self.wandb.finish()
            if kind is None:
                self._finish()

    def start(self) -> None:
        """Prints what is about to run, and starts the clock."""
        self.clock.start(self.first, self.workdir / goodput.FILE if self.writes else None)
        self.console.print(self._table(self.clock.seconds["compile"]))
        for line in self._warnings():
            self.console.print(f"[yellow]note:[/] {line}")
        if self.first:
            self.console.print(f"continuing after step {self.first}")
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(compact=True),
            )
            self.progress = Progress(*columns, console=self.console)
            self.bar = self.progress.add_task(
                "", total=self.run.steps, completed=self.first, line=""
            )
            self.progress.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step that has just ended."""
        due = step % self.run.log_every == 0 or step == self.run.steps
        if not due and step > self.first + 1:
            return
        (then, last_step), trained = self.measured, self.clock.training()[0]
        seconds = max(trained - then, 1e-9) / (step - last_step)
        self.measured = trained, step
        speed, unit = self._speed(seconds), self.work.unit
        epochs = self.run.data.epochs(step * self.run.batch_size)
        row = dict(values) | speed
        row |= {"epoch" if len(epochs) == 1 else f"epoch/{k}": v for k, v in epochs.items()}
        if due:
            self._write(step, row | self.health.look(step))
        line = f"loss {values['loss']:.4f}  {speed[f'{unit}_per_s']:,.0f} {unit}/s"
        if "mfu" in speed:
            line += f"  MFU {speed['mfu']:.1%}"
        left = (self.run.steps - step) * seconds
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, line=line)
        elif (now := self.clock.now()) - self.last_line > SECONDS_BETWEEN_LINES or step in (
            self.first + 1,
            self.run.steps,
        ):
            self.last_line = now
            self.console.print(f"step {step}/{self.run.steps}  {line}  {duration(left)} left")

    def evaluation(self, step: int, results: Mapping[str, float | str]) -> None:
        """Takes what the evaluators found: numbers are metrics, strings samples."""
        numbers = {k: float(v) for k, v in results.items() if not isinstance(v, str)}
        samples = {k: v for k, v in results.items() if isinstance(v, str)}
        self._write(step, numbers)
        if numbers:
            text = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            self.console.print(f"[bold]step {step}  {text}[/]")
        for name, sample in samples.items():
            self.console.print(f"{name}:", style="dim")
            self.console.print(sample, markup=False)
            if self.writes:
                self.events.add_text(name, sample, step)
                with (self.workdir / "samples.txt").open("a") as file:
                    file.write(f"=== step {step}, {name}\n{sample}\n")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` is among the metrics, as the first process sees."""
        rows = read_metrics(self.metrics_path) if self.writes else []
        found = any(row["step"] == step and "loss" not in row for row in rows)
        return bool(distributed.exchange(found)[0])

    def rewind(self, step: int) -> None:
        """Goes back to `step`: what was written of later ones is dropped, as they run again."""
        self.clock.rewind(step)
        self.first, self.measured = step, (self.clock.training()[0], step)
        if self.writes:
            self.metrics.close()
            self.events.close()
            self._open_files()
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line."""
        return self.workdir / "metrics.jsonl"

    def _open_files(self) -> None:
        """Opens the sinks; lines of steps that will run again are dropped: each stands once."""
        from tensorboardX import SummaryWriter

        if self.metrics_path.exists():
            rows = [r for r in read_metrics(self.metrics_path) if r["step"] <= self.first]
            kept = self.metrics_path.with_suffix(".tmp")
            kept.write_text("".join(json.dumps(r) + "\n" for r in rows))
            kept.replace(self.metrics_path)
        self.metrics = self.metrics_path.open("a", buffering=1)
        self.events = SummaryWriter(str(self.workdir), purge_step=self.first + 1)
        if self.run.wandb_project and self.wandb is None:
            try:
                import wandb
            except ImportError as error:
                raise UserError("wandb_project is set: pip install 'lmjax[wandb]'.") from error
            self.wandb = wandb.init(
                project=self.run.wandb_project, dir=str(self.workdir), name=self.workdir.name
            )

    def _finish(self) -> None:
        """Draws the curves, and says what came out and where it lies."""
        rows, picture = read_metrics(self.metrics_path), self.workdir / "curves.png"
        title = f"{self.workdir.name}: {self.run.steps} steps"
        loss_unit = getattr(self.run.task, "loss_unit", "")
        draw_curves(rows, picture, title=title, unit=self.work.unit, loss_unit=loss_unit)
        evaluated = [row for row in rows if any("/" in key for key in row)]
        table = _plain_table("done")
        for name, value in (evaluated[-1] if evaluated else {}).items():
            if name.endswith(("/loss", "/bits_per_byte")):
                of_loss = f" {loss_unit}" if name.endswith("/loss") else ""
                table.add_row(name, f"{value:.4f}{of_loss}".rstrip())
        table.add_row("goodput", self.clock.summary())
        table.add_row("curves", str(picture))
        table.add_row("TensorBoard", f"tensorboard --logdir={self.workdir}")
        table.add_row("metrics", str(self.metrics_path))
        table.add_row("checkpoint", str(self.workdir / "checkpoints" / str(self.run.steps)))
        self.console.print(table)

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        if not self.writes or not row:
            return
        self.metrics.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self.events.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(row), step=step)

    def _speed(self, seconds: float) -> dict[str, float]:
        """Throughput, and the share of the chips' peak in both accountings where it is known."""
        devices, batch_size = self.program.mesh.size, self.run.batch_size
        rate = batch_size * self.work.units / seconds
        name = f"{self.work.unit}_per_s"
        speed = {"step_s": seconds, name: rate, f"{name}_per_device": rate / devices}
        if self.chip is not None:
            peak = seconds * devices * self.chip.flop_per_s / batch_size
            speed |= {"mfu": self.work.flop / peak, "mfu_full": self.work.flop_full / peak}
        return speed

    def _table(self, setup_s: float) -> Table:
        run, mesh, unit = self.run, self.program.mesh, self.work.unit.removesuffix("s")
        table = _plain_table("run")
        params = self.program.abstract_state.variables()["params"]
        counts = run.task.count_params(params)
        table.add_row("parameters", f"{sum(counts.values()):,}")
        for name, count in counts.items():
            table.add_row(f"  {name}", f"{count:,}")
        flop, full = (x / self.work.units for x in (self.work.flop, self.work.flop_full))
        several = f"{flop:.4g} causal, {full:.4g} full attention"
        table.add_row(f"FLOP per {unit}", f"{flop:.4g}" if flop == full else several)
        table.add_row(f"{self.work.unit} per step", f"{run.batch_size * self.work.units:,}")
        total = run.steps * run.batch_size
        epochs = ", ".join(f"{n:.3g} x {k}" for k, n in run.data.epochs(total).items())
        table.add_row("data", f"{total * self.work.units:,} {self.work.unit} in all: {epochs}")
        memory = "  ".join(f"{k} {v / 1e6:,.1f} MB" for k, v in self.program.memory.items())
        table.add_row("memory per device", f"{memory or 'unknown'} (the compiler's estimate)")
        axes = " ".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "one device"
        kind = mesh.devices.flat[0].device_kind
        table.add_row("mesh", f"{axes} ({mesh.size} x {kind}, {jax.process_count()} process(es))")
        peak = f"{self.chip.flop_per_s / 1e12:,.0f} TFLOP/s" if self.chip else "unknown, so is MFU"
        table.add_row("peak per device", peak)
        table.add_row("ready after", f"{setup_s:.1f} s")
        return table

    def _warnings(self) -> list[str]:
        run, notes = self.run, []
        for name, epochs in run.data.epochs(run.steps * run.batch_size).items():
            if epochs > MANY_EPOCHS:
                notes.append(
                    f"{name} is read {epochs:.0f} times: the model will learn it by heart. "
                    "Add data, or lower steps or batch_size."
                )
        if not run.evals:
            notes.append("no evals: nothing will tell learning from memorising. Set config.evals.")
        if jax.default_backend() == "cpu" and self.work.flop * run.batch_size > 1e13:
            notes.append(
                "a step is over 10 TFLOP, minutes on a CPU: lower batch_size, or use a GPU."
            )
        return notes


def _plain_table(title: str) -> Table:
    table = Table(show_header=False, title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
