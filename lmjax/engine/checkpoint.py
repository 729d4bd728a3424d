"""Checkpoints: asynchronous, atomic, and restored from the newest that can be read.

Each holds the arrays of the state, and as JSON the data position, the config and the tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lmjax.engine import distributed
from lmjax.engine.state import TrainState, merge
from lmjax.errors import UserError

log = logging.getLogger("lmjax")

UNREADABLE = ".unreadable"  # ends the name of a checkpoint that was set aside


class Checkpoints:
    """The checkpoints under `directory`, by step.

    Args:
      directory: made if it is not there.
      keep_last: how many of the newest are kept.
      keep_every: every checkpoint whose step is a multiple of it is kept for good; 0 keeps none so.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        with self._explained("open"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "about": ocp.JsonCheckpointHandler(),
                },
            )

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, about: Mapping[str, Any]) -> None:
        """Starts saving; the state may be consumed once this returns.

        Raises UserError if this save cannot start or an earlier one did not end well.
        """
        if step in self._manager.all_steps():
            return
        with self._explained(f"save step {step} to"):
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(dict(about))
                ),
            )

    def wait(self) -> None:
        """Returns when every save has ended; raises UserError if one failed."""
        with self._explained("finish a save to"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def about(self, step: int) -> Mapping[str, Any]:
        """The JSON part of a checkpoint."""
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
        return self._restore(step, "about", handler, ocp.args.JsonRestore())

    def restore(
        self, abstract_state: TrainState, check: Callable[[Mapping[str, Any]], None]
    ) -> tuple[int, TrainState, Mapping[str, Any]] | None:
        """Reads the newest whole checkpoint: (step, state, about); None where there is none.

        `check` sees the JSON part before any array is read, and may raise. Where a checkpoint
        cannot be read, be it by one of many processes, the one before it is tried; once one has
        been read, those that could not are set aside (renamed `STEP.unreadable`) with a warning.
        Raises UserError, and renames nothing, when there are checkpoints and none can be read: the
        cause may pass.
        """
        damaged: dict[int, str] = {}
        for step in reversed(distributed.exchange(self.steps())[0]):
            reason = ""
            try:
                about = self.about(step)
                check(about)
                state = self._read(step, abstract_state, whole=True)
            except (UserError, MemoryError, PermissionError):
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                if mismatch := _mismatch(error):
                    raise UserError(
                        f"checkpoint {self.directory / str(step)} holds another model: {mismatch}"
                    ) from error
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = _first_line(error)
            if reasons := [text for text in distributed.exchange(reason) if text]:
                damaged[step] = reasons[0]
                continue
            for bad, reason in damaged.items():
                log.warning(
                    "the checkpoint of step %d cannot be read and is set aside: %s", bad, reason
                )
                self._set_aside(bad)
            return step, state, about
        if damaged:
            why = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
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
            return step, self._read_variables(step), self.about(step)
        except Exception as error:  # as above
            others = ", ".join(str(s) for s in steps if s != step) or "none"
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} cannot be read: "
                f"{_first_line(error)}. Other steps: {others}."
            ) from error

    def close(self) -> None:
        """Ends every save and frees the threads."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, abstract: Any, *, whole: bool) -> Any:
        """A checkpoint's arrays as `abstract` has them: sharded if it says so, else on the host."""
        restore_args = jax.tree.map(
            lambda x: (
                ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
                if x.sharding
                else ocp.RestoreArgs(restore_type=np.ndarray)
            ),
            abstract,
        )
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=restore_args, partial_restore=not whole
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        return self._restore(step, "state", handler, args)

    def _restore(self, step: int, item: str, handler: Any, args: Any) -> Any:
        # The manager's `restore` has all processes meet: for ever, where one of them cannot read.
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            return reader.restore(self.directory / str(step) / item, args=args)

    def _read_variables(self, step: int) -> dict[str, Any]:
        stored = self._manager.item_metadata(step)["state"].tree
        path = _find(stored["opt_state"], "averaged_params")
        names = ["frozen", "model_state"] + ([] if path else ["params"])
        wanted = {name: stored[name] for name in names}
        if path:
            wanted["opt_state"] = _nest(stored["opt_state"], path)
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)
        state = self._read(step, abstract, whole=False)
        params = functools.reduce(_get, path, state["opt_state"]) if path else state["params"]
        return {"params": merge(params, state["frozen"]), **state["model_state"]}

    def _set_aside(self, step: int) -> None:
        source = self.directory / str(step)
        target = self.directory / f"{step}{UNREADABLE}"
        if jax.process_index() == 0:
            if target.exists():
                shutil.rmtree(target)
            source.rename(target)
        distributed.barrier()
        self._manager.reload()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failure to write into a message that says where, why and what room is left."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            parent = next(p for p in (self.directory, *self.directory.parents) if p.exists())
            free = shutil.disk_usage(parent).free
            raise UserError(
                f"could not {what} {self.directory}: {_first_line(error)} "
                f"({free / 1e9:.2f} GB free). "
                "Earlier checkpoints are untouched; make room and run the same command again."
            ) from error


def _alone() -> ocp.options.MultiprocessingOptions:
    """Has orbax wait for no other process."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def _find(tree: Any, name: str) -> tuple[Any, ...] | None:
    """The path of the first node of this name in a tree of mappings and sequences."""
    if not isinstance(tree, Mapping | list | tuple):
        return None
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if key == name:
            return (key,)
        if (path := _find(value, name)) is not None:
            return (key, *path)
    return None


def _get(tree: Any, key: Any) -> Any:
    return tree[key]


def _nest(tree: Any, path: tuple[Any, ...]) -> Any:
    """The tree pruned to what lies on the path, the other entries of sequences empty."""
    if not path:
        return tree
    inner = _nest(tree[path[0]], path[1:])
    if isinstance(tree, Mapping):
        return {path[0]: inner}
    return [inner if i == path[0] else None for i in range(len(tree))]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _mismatch(error: BaseException) -> str:
    """What of the message says that the file is sound but its arrays are others; '' if nothing."""
    text = str(error)
    signs = (
        "not compatible with the stored shape",
        "tree structures do not match",
        "Dict key mismatch",
    )
    return text.splitlines()[0][:300] if any(sign in text for sign in signs) else ""
