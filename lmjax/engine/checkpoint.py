"""Checkpoints: asynchronous, atomic, and restored from the newest that is what was saved.

Each holds the arrays of the state and a manifest (`engine.manifest`), with which every restore is
compared, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from lmjax.engine import distributed, manifest
from lmjax.engine.manifest import Damaged
from lmjax.engine.state import TrainState
from lmjax.engine.stored import REASON, UNREADABLE, Stored, first_line, variables
from lmjax.errors import Exit, UserError

log = logging.getLogger("lmjax")

CHUNK_BYTES = 2**26  # of an array in a file: what another layout reads at least to get a part
_POLL_S, _PATIENCE_S = 0.02, 1.0


class SaveFailed(UserError):
    """A save failed for a reason that may pass, such as a full disk."""

    code = Exit.ERROR


class SaveHangs(SaveFailed):
    """A save does not end: neither does its thread, for which the interpreter would wait."""


class Checkpoints:
    """The checkpoints under `directory`, by step.

    Args:
      directory: made if it is not there.
      keep_last: how many of the newest are kept.
      keep_every: every checkpoint whose step is a multiple of it is kept for good; 0 keeps none so.
      slow_s: how long `save` waits for the one before to end.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        slow_s: float = 600.0,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.slow_s = slow_s
        self._last: int | None = None  # the step of the save that may be under way
        self._lost = False  # whether it never ended
        # What this process could not write. Orbax would tell of it after all processes have met,
        # for which those that could write wait in another place.
        self._failed: list[BaseException] = []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            lightweight_initialize=True,  # a damaged one must not keep the others from being read
        )
        with self._explained("open"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    "state": _noting(ocp.PyTreeCheckpointHandler(), self._failed),
                    "about": _noting(ocp.JsonCheckpointHandler(), self._failed),
                },
            )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, or are being saved, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, about: Mapping[str, Any]) -> None:
        """Starts saving; the state may be consumed once this returns.

        Raises SaveFailed if this save cannot start, or an earlier one has failed or does not end.
        """
        if step in self._manager.all_steps():
            return
        with self._explained(f"save step {step} to"):
            self._end_last()
            if self._last is None:
                self._sweep()
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(
                    state,
                    jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state),
                ),
                about=ocp.args.JsonSave(manifest.describe(about, step, state)),
            )
            # Not forced, it would leave out in silence what is older than the newest.
            self._manager.save(step, args=args, force=True)
        self._last = step

    def wait(self) -> None:
        """Returns when every save has ended; raises SaveFailed if one failed."""
        with self._explained("finish a save to"):
            while self._manager.is_saving_in_progress():
                self._check_failed()
                time.sleep(_POLL_S)
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def about(self, step: int) -> Mapping[str, Any]:
        """The manifest of a checkpoint; raises `manifest.Damaged`."""
        return manifest.read(self.directory / str(step))

    def restore(
        self,
        abstract_state: TrainState,
        check: Callable[[Mapping[str, Any]], None],
        *,
        at_most: int | None = None,
    ) -> tuple[int, TrainState, Mapping[str, Any]] | None:
        """Reads the newest whole checkpoint: (step, state, manifest); None where there is none.

        `check` sees the manifest before any array is read, and may raise. The arrays' checksums are
        made on the devices that hold them, and must be those of the manifest. Where a checkpoint is
        damaged, be it as one of many processes sees it, the one before it is tried; once one has
        been read, those that could not are set aside (renamed `STEP.unreadable`, with the reason
        in `reason.txt`) with a warning.

        Args:
          abstract_state: shapes, dtypes and shardings; each process reads what its devices hold.
          check: raises UserError where the checkpoint is of another run.
          at_most: the last step that may be restored; later ones are left alone.

        Raises:
          UserError: where the checkpoint is of another model or format; or where there are
            checkpoints and none is whole: then nothing is renamed, as the cause may pass.
        """
        self.wait()
        found: dict[int, str] = {}
        for step in reversed(distributed.exchange(self.steps())[0]):
            if at_most is not None and step > at_most:
                continue
            saved: Mapping[str, Any] = {}
            state, reason = None, ""
            try:
                saved = self.about(step)
                check(saved)
                if others := manifest.differences(saved, abstract_state):
                    raise UserError(
                        f"checkpoint {self.directory / str(step)} holds another model: "
                        + _some(others)
                    )
                state = self._read(step, abstract_state)
            except (UserError, MemoryError, PermissionError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = first_line(error)
            reasons = distributed.exchange(reason)
            if not any(reasons) and (bad := manifest.damaged(saved, state)):
                reasons = [_changed(bad)]
            if reasons := [text for text in reasons if text]:
                found[step] = reasons[0]
                continue
            assert state is not None
            for bad_step, reason in found.items():
                log.warning(
                    "the checkpoint of step %d cannot be read and is set aside: %s",
                    bad_step,
                    reason,
                )
                self.set_aside(bad_step, reason)
            return step, state, saved
        if found:
            why = "; ".join(f"step {step}: {reason}" for step, reason in found.items())
            raise UserError(
                f"no checkpoint in {self.directory} can be read ({why}). If the cause does not "
                "pass, start again with another --workdir."
            )
        return None

    def restore_for_inference(
        self, step: int | None = None
    ) -> tuple[int, dict[str, Any], Mapping[str, Any]]:
        """Reads what inference needs, as host arrays: (step, variables, about).

        Of the parameters that were averaged in training, the average is read. Raises UserError
        where there is no such checkpoint, or it cannot be read.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{self.directory} has no checkpoint"
                + (f" of step {step}" if step else "")
                + f"; there are: {', '.join(map(str, steps)) or 'none'}."
            )
        step = steps[-1] if step is None else step
        try:
            saved = self.about(step)
            lie = variables(saved["arrays"])
            wanted = {path: manifest.abstract(saved, path) for path in lie.values()}
            arrays = self._read(step, wanted)
            if bad := manifest.damaged(saved, arrays):
                raise Damaged(_changed(bad))
            found = {name: arrays[path] for name, path in lie.items()}
            return step, unflatten_dict(found, sep="/"), saved
        except UserError:
            raise
        except Exception as error:
            others = ", ".join(str(s) for s in steps if s != step) or "none"
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} cannot be read: "
                f"{first_line(error)}. Other steps: {others}."
            ) from error

    def set_aside(self, step: int, reason: str) -> None:
        """Renames a checkpoint to `STEP.unreadable`, with the reason in it; all processes call."""
        source = self.directory / str(step)
        target = self.directory / f"{step}{UNREADABLE}"
        if jax.process_index() == 0:
            if target.exists():
                shutil.rmtree(target)
            source.rename(target)
            with contextlib.suppress(OSError):  # a full disk: the name says enough
                (target / REASON).write_text(reason + "\n")
        distributed.barrier()
        self._manager.reload()

    def close(self) -> None:
        """Ends every save and frees the threads; after a save that does not end, nothing."""
        if self._lost:
            return
        self.wait()
        self._manager.close()

    def _read(self, step: int, abstract: Any) -> Any:
        """A checkpoint's arrays as `abstract` has them: sharded if it says so, else on the host."""
        wanted = manifest.flat(abstract)
        found = Stored(self.directory / str(step)).read(wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[path] for path in wanted])

    def _end_last(self) -> None:
        """Returns when the save before this one has ended; raises where it failed, or goes on."""
        began, warned = time.monotonic(), False
        while self._manager.is_saving_in_progress():
            self._check_failed()
            waited = time.monotonic() - began
            if waited > self.slow_s:
                self._lost = True
                raise SaveHangs(
                    f"the save of step {self._last} to {self.directory} did not end in "
                    f"{self.slow_s:.0f} s more after the next was due: the disk is too slow, or "
                    "hangs. Earlier checkpoints are untouched. Mend it or raise save_every, and "
                    "run the same command again."
                )
            if waited > min(_PATIENCE_S, self.slow_s / 2) and not warned:
                warned = True
                log.warning(
                    "the save of step %s has not ended, and the next is due: waiting up to %.0f s "
                    "for it. Is the disk slow? Else save less often (save_every).",
                    self._last,
                    self.slow_s,
                )
            time.sleep(_POLL_S)
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _check_failed(self) -> None:
        """Raises what this process could not write, where there are others that wait for it."""
        if self._failed and jax.process_count() > 1:
            self._lost = True
            raise self._failed[0]

    def _sweep(self) -> None:
        """Removes what a killed launch had begun to save: it has no name, and nobody reads it."""
        if jax.process_index() == 0:
            for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
                log.info("removing what is there of an unfinished save: %s", folder.name)
                shutil.rmtree(folder)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failure to write into a message that says where, why and what room is left."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            parent = next(p for p in (self.directory, *self.directory.parents) if p.exists())
            free = shutil.disk_usage(parent).free
            raise SaveFailed(
                f"could not {what} {self.directory}: {first_line(error)} "
                f"({free / 1e9:.2f} GB free). "
                "Earlier checkpoints are untouched; make room and run the same command again."
            ) from error


@dataclass(frozen=True)
class _Noted:
    """A future of orbax that keeps its error as soon as it has one."""

    future: Any
    failed: list[BaseException]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future, name)

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout=timeout)
        except BaseException as error:
            self.failed.append(error)
            raise


def _noting(handler: Any, failed: list[BaseException]) -> Any:
    """An orbax handler whose failures to save are also appended to `failed`."""
    save = handler.async_save

    async def async_save(*args: Any, **arguments: Any) -> list[_Noted]:
        return [_Noted(f, failed) for f in await save(*args, **arguments) or ()]

    handler.async_save = async_save
    return handler


def _changed(paths: list[str]) -> str:
    return f"not what was saved, by their checksums: {_some(paths)}"


def _some(texts: list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return "; ".join(texts[:4]) + more
