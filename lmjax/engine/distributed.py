"""Many processes as one run: how they find each other, agree, stop together and end together.

Each function does what its name says in a run of one process too, where there is nobody to ask.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lmjax import sharding
from lmjax.engine import liveness
from lmjax.engine.processes import Processes, one_process_a_node
from lmjax.errors import Exit, UserError

log = logging.getLogger("lmjax")

PATIENCE_MS = 3_600_000  # processes may compile, or read a corpus, at very different speeds
GRACE_S = 2.0  # for a process that fails like another one to say so itself
FAILED = "lmjax/failed"
LIVENESS = "lmjax/liveness"
HEARTBEAT_S = 20.0

# What errors say that may come of another process's end, and not of what this one did.
_SIGNS = re.compile(
    r"gloo|nccl|connection (closed|reset)|socket closed|unavailable|deadline_exceeded|barrier|"
    r"coordination ?service|heartbeat",
    re.IGNORECASE,
)

_count = itertools.count()
_ended = threading.Event()
_speaking = threading.Lock()
_watching: list[threading.Thread] = []
_liveness: list[liveness.Liveness] = []


def connect(
    processes: Processes, *, timeout_s: int = 300, heartbeat_s: float = HEARTBEAT_S
) -> None:
    """Joins the run's processes; to be called before jax meets a device.

    From here on SIGTERM does not end this process: `stop_agreed` tells of it. An exception that
    nobody catches ends all processes, each with a message. So does the loss of a process, which
    the others notice at once where it died, and after `heartbeat_s` where its host did; they end
    with `Exit.AGAIN`.

    Args:
      processes: from `processes_from`.
      timeout_s: how long to wait for the others.
      heartbeat_s: how long a host may leave the first one without any answer.

    Raises:
      UserError: where no cluster is found, or not all processes come together in time.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = processes.coordinator is not None
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            # jax would show a SLURM or Open MPI task one GPU only; [] shows all of the node.
            local_device_ids=[] if explicit or one_process_a_node(os.environ) else None,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=timeout_s,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: jax finds no cluster here ({error}) It knows SLURM, Open MPI, Cloud "
            "TPU and, with jax[k8s], Kubernetes. Else give --coordinator, --num_processes and "
            "--process_id."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"process {processes.process_id} of {processes.num_processes} did not meet the others "
            f"at {processes.coordinator or 'the first of them'} within {timeout_s} s: "
            f"{str(error).splitlines()[0]} Is every process running, with the same --coordinator?"
        ) from error
    _ended.clear()
    sys.excepthook = _on_exception
    _meet(heartbeat_s)
    _watching.append(threading.Thread(target=_watch, name="other processes", daemon=True))
    _watching[0].start()


def disconnect() -> None:
    """Waits for the other processes to come as far, and leaves them."""
    if jax.distributed.is_initialized():
        barrier()
        _farewell()
        jax.distributed.shutdown()
        _ended.set()
        for thread in _watching:
            thread.join()
        _watching.clear()


def fail(error: Exception, code: int) -> NoReturn:
    """Prints the error in one line, and ends this and all other processes with exit code `code`.

    Where the error comes of another process's end, that one is named instead: `Exit.AGAIN`.
    """
    _await_cause(error)
    _say(f"error: {error}")
    _end(str(error), code)


def exchange(value: Any) -> list[Any]:
    """The JSON values that all processes give, by process; none goes on before all have come."""
    if jax.process_count() == 1:
        return [value]
    name = f"lmjax/exchange/{next(_count)}"
    client = _client()
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(name, PATIENCE_MS)
    found = {key.rsplit("/", 1)[1]: text for key, text in client.key_value_dir_get(f"{name}/")}
    return [json.loads(found[str(index)]) for index in range(jax.process_count())]


def barrier() -> None:
    """Returns when all processes have called it.

    The processes' first collective over a group of devices must begin within half a minute (gloo
    on CPU): what takes one of them longer, as compiling does, goes before.
    """
    exchange(None)


def check_shared(folder: Path) -> None:
    """Raises UserError unless all processes see the same files in `folder`."""
    if jax.process_count() == 1:
        return
    mark = folder / f".shared-{exchange(uuid.uuid4().hex)[0]}"
    if jax.process_index() == 0:
        mark.touch()
    barrier()
    deadline = time.monotonic() + 10  # a network's file system may show it late
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [index for index, sees in enumerate(exchange(seen)) if not sees]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise UserError(
            f"process {blind[0]} does not see what process 0 writes to {folder}: the --workdir "
            "of many processes must be a folder that all of them share."
        )


def stop_agreed(times: int) -> bool:
    """Whether all processes stop here, because one of them got SIGTERM.

    To be called by every process equally often, `times` counting up by one. True everywhere at
    the same call, and at that one only, a second or more after the signal.
    """
    return multihost_utils.reached_preemption_sync_point(times)


def local_rows(
    mesh: Mesh,
    process: int | None = None,
    process_of: Callable[[jax.Device], int] = lambda device: device.process_index,
) -> tuple[int, int]:
    """(shard, num_shards): which part of a global batch's rows the devices of a process hold.

    Processes share a part where the axis between them does not split the batch (tensor, context,
    stage): both then read the same rows.

    Raises:
      UserError: where the parts are not consecutive rows, as many for each process.
    """
    process = jax.process_index() if process is None else process
    ways = sharding.batch_ways(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.batch_sharding(mesh).devices_indices_map((ways,)).items():
        held.setdefault(process_of(device), set()).update(np.arange(ways)[rows].tolist())
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    size = len(parts[0])
    if parts != [tuple(range(i, i + size)) for i in range(0, ways, size)]:
        raise UserError(
            f"with this layout processes would hold rows {_in_words(parts)} of {ways}: each must "
            "hold as many, one after the other. Give the axes that split the batch (slices, data, "
            "fsdp, expert) a product that the processes' devices divide or are divided by."
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def _state() -> Any:
    # The coordinator's barriers and keys have no public name; `multihost_utils` has only
    # collectives, which on CPU are what must not begin before all are ready.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client


def _watch() -> None:
    """Ends this process soon after another one has failed: a collective would wait for it.

    It asks again and again, as a call that waits cannot be ended when this process ends.
    """
    while not _ended.wait(GRACE_S):
        try:
            failed = json.loads(_client().key_value_try_get(FAILED))
        except Exception:  # there is no such key yet, or no coordinator
            continue
        time.sleep(GRACE_S)
        if _ended.is_set() or not _speaking.acquire(blocking=False):
            return
        _ended.set()
        _farewell()
        _say(f"error: process {failed['process']} failed: {failed['error']}")
        _leave()
        os._exit(failed["code"])


def _meet(heartbeat_s: float) -> None:
    """Has each process notice the end of any other."""
    state, client = _state(), _client()
    _liveness.clear()
    if state.process_id == 0:
        token = uuid.uuid4().hex
        here = liveness.first(token, lost=_on_lost, silent_s=heartbeat_s)
        client.key_value_set(LIVENESS, json.dumps([here.port, token]), allow_overwrite=True)
        _liveness.append(here)
        return
    liveness.hold_aborts()
    port, token = json.loads(client.blocking_key_value_get(LIVENESS, PATIENCE_MS))
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        _liveness.append(
            liveness.other(
                state.process_id, (host, port), token, lost=_on_lost, silent_s=heartbeat_s
            )
        )
    except OSError as error:
        log.error(
            "process %d cannot reach process 0 at %s:%d (%s): that one of them is lost will only "
            "be noticed by jax, after up to 100 s",
            *(state.process_id, host, port, error),
        )


def _farewell() -> None:
    for here in _liveness:
        here.farewell()


def _on_lost(lost: Mapping[int, str]) -> None:
    """Ends this process, as no collective will end without those that are lost."""
    if _ended.is_set() or not _speaking.acquire(blocking=False):
        return
    _ended.set()
    state = _state()
    who = " and ".join(f"process {index} ({why})" for index, why in sorted(lost.items()))
    _say(
        f"error: lost {who}. It was killed, ran out of memory or crashed: see what it said last. "
        f"Without it, process {state.process_id} of {state.num_processes} ends too. The same "
        "command, with as many processes or others, goes on from the last checkpoint."
    )
    if state.process_id == 0:
        time.sleep(GRACE_S / 2)  # its end kills the others, who have yet to say this
    os._exit(Exit.AGAIN)


def _await_cause(error: BaseException) -> None:
    """Gives `_on_lost` and `_watch` the time to end this process with the cause of its error."""
    if not jax.distributed.is_initialized() or not _liveness:
        return
    texts = " ".join(str(link) for link in _chain(error))
    wait_s = GRACE_S / 2
    if "RESOURCE_EXHAUSTED" not in texts and (
        isinstance(error, jax.errors.JaxRuntimeError) or _SIGNS.search(texts)
    ):
        wait_s += GRACE_S + _liveness[0].silent_s
    time.sleep(wait_s)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those of which it came."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _say(text: str) -> None:
    """Prints; on a full disk, where a log cannot grow, nothing, as the process must yet end."""
    for stream, what in ((sys.stdout, ""), (sys.stderr, f"{text}\n" if text else "")):
        with contextlib.suppress(OSError, ValueError):
            stream.write(what)
            stream.flush()


def _end(error: str, code: int) -> NoReturn:
    _say("")
    if jax.distributed.is_initialized():
        _ended.set()
        _farewell()
        process = _state().process_id  # asking jax would wait for devices
        try:
            text = json.dumps({"process": process, "error": error, "code": code})
            _client().key_value_set(FAILED, text, allow_overwrite=True)
            _leave()
        finally:
            os._exit(code)
    sys.exit(code)


def _leave() -> None:
    """Before an end without farewell: the coordinator, whose end kills the others, goes last."""
    try:
        _client().wait_at_barrier("lmjax/leave", int(5 * GRACE_S * 1000))
    except Exception:  # a process that was killed never comes
        return
    if _state().process_id == 0:
        time.sleep(GRACE_S / 4)  # the others have yet to hear that all are here


def _on_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _await_cause(error)
    _say("".join(traceback.format_exception(kind, error, trace)).rstrip())
    _end(f"{kind.__name__}: {error}", 1)


def _in_words(parts: Sequence[Sequence[int]]) -> str:
    return " and ".join("{" + ", ".join(map(str, part)) + "}" for part in parts)
