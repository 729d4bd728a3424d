"""Which of how many processes this is: from flags, from variables, or from a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmjax.errors import UserError

VARIABLES = {
    "coordinator": "LMJAX_COORDINATOR",
    "num_processes": "LMJAX_NUM_PROCESSES",
    "process_id": "LMJAX_PROCESS_ID",
}


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


def _integer(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable} is {text!r}: give a number.") from None


def _many(text: str | None) -> bool:
    return text is not None and text.isdigit() and int(text) > 1
