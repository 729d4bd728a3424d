"""Many processes as one run: how they find each other, agree, stop together and end together.

Each function does what its name says in a run of one process too, where there is nobody to ask.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lmjax import sharding
from lmjax.errors import UserError

VARIABLES = {
    "coordinator": "LMJAX_COORDINATOR",
    "num_processes": "LMJAX_NUM_PROCESSES",
    "process_id": "LMJAX_PROCESS_ID",
}
PATIENCE_MS = 3_600_000  # processes may compile, or read a corpus, at very different speeds
GRACE_S = 2.0  # for a process that fails like another one to say so itself
FAILED = "lmjax/failed"

_count = itertools.count()
_ended = threading.Event()
_watching: list[threading.Thread] = []


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process of how many this is; None leaves all three to the cluster that jax detects.

    Args:
      coordinator: HOST:PORT at which process 0 listens and the others find it.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def processes_from(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    detect: bool | None = None,
    environ: Mapping[str, str] | None = None,
) -> Processes | None:
    """Which processes a run has: from flags, else LMJAX_ variables, else the cluster; None for one.

    A flag goes before its variable. The cluster is asked where `detect` is True, or where it is
    None and the environment itself says that this is one task of several (`cluster_of_many`).

    Raises:
      UserError: where only some of the three values are given, or they contradict each other.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, Any] = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    from_flags = [f"--{name}" for name, value in given.items() if value is not None]
    for name, variable in VARIABLES.items():
        if given[name] is None and environ.get(variable):
            text = environ[variable]
            given[name] = text if name == "coordinator" else _integer(variable, text)
    missing = [name for name, value in given.items() if value is None]
    if detect is False:
        if from_flags:
            raise UserError(f"--nodistributed contradicts {from_flags[0]}: give one of them.")
        return None
    if len(missing) == 3:
        if detect or cluster_of_many(environ):
            return Processes()
        return None
    if missing:
        lacking = " and ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise UserError(
            f"{lacking} not given: a run of many processes needs all of --coordinator, "
            "--num_processes and --process_id, or --distributed alone on a cluster."
        )
    host, colon, port = given["coordinator"].rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator is {given['coordinator']!r}: give HOST:PORT.")
    if given["num_processes"] < 1 or not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(
            f"--process_id {given['process_id']} of --num_processes {given['num_processes']}: "
            "give at least one process, and an id from 0 to one below their number."
        )
    return Processes(**given) if given["num_processes"] > 1 else None


def cluster_of_many(environ: Mapping[str, str]) -> str:
    """The cluster whose variables say that this process is one task of several; '' for none.

    Nothing is asked over a network, and what a mere allocation sets does not count: a shell or a
    batch script within it is one process.
    """
    step = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"}
    if step <= environ.keys() and _many(environ.get("SLURM_NTASKS")):
        return "slurm"
    if "OMPI_MCA_orte_hnp_uri" in environ and _many(environ.get("OMPI_COMM_WORLD_SIZE")):
        return "ompi"
    if "TPU_WORKER_ID" in environ and "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return "gketpu"
    return ""


def one_process_a_node(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that can start a process for each GPU says that it started one a node."""
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return slurm == "1" or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def connect(processes: Processes, *, timeout_s: int = 300) -> None:
    """Joins the run's processes; to be called before jax meets a device.

    From here on SIGTERM does not end this process: `stop_agreed` tells of it. An exception that
    nobody catches ends all processes, each with a message.

    Args:
      processes: from `processes_from`.
      timeout_s: how long to wait for the others.

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
    _watching.append(threading.Thread(target=_watch, name="other processes", daemon=True))
    _watching[0].start()


def disconnect() -> None:
    """Waits for the other processes to come as far, and leaves them."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
        _ended.set()
        for thread in _watching:
            thread.join()
        _watching.clear()


def fail(error: Exception, code: int) -> NoReturn:
    """Prints the error in one line, and ends this and all other processes with exit code `code`."""
    print(f"error: {error}", file=sys.stderr)
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


def stop_agreed(step: int) -> bool:
    """Whether all processes stop after this step, because one of them got SIGTERM.

    To be called by every process after each of its steps, the same on all. True everywhere at the
    same step, a second or more after the signal.
    """
    return multihost_utils.reached_preemption_sync_point(step)


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
        if _ended.is_set():
            return
        _ended.set()
        print(f"error: process {failed['process']} failed: {failed['error']}", file=sys.stderr)
        sys.stderr.flush()
        _leave()
        os._exit(failed["code"])


def _end(error: str, code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        _ended.set()
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
    traceback.print_exception(kind, error, trace)
    _end(f"{kind.__name__}: {error}", 1)


def _integer(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable} is {text!r}: give a number.") from None


def _many(text: str | None) -> bool:
    return text is not None and text.isdigit() and int(text) > 1


def _in_words(parts: Sequence[Sequence[int]]) -> str:
    return " and ".join("{" + ", ".join(map(str, part)) + "}" for part in parts)
