"""`python -m lmjax.train --config=configs/shakespeare.py --workdir=DIR [--config.steps=500]`.

Exit codes: 0 done; 1 an error of lmjax itself, or of the machine; 2 a bad config, file or flag; 3
the loss is not finite; 4 replicas of a parameter differ; 75 another process was lost, or nothing
moved for too long; 130 and 143 stopped by Ctrl-C and SIGTERM, saved. After 75 and 143 the same
command goes on from the last checkpoint, and `scripts/supervise` starts it.

For a run of many processes each starts this same command, with `--coordinator`, `--num_processes`
and `--process_id`, or with `--distributed` on a cluster that jax knows: docs/many_hosts.md.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags

from lmjax.config import build_and_resolve, explain, load_config
from lmjax.errors import Exit, UserError
from lmjax.flags import OVERRIDES, define_config, fail, parse_flags, speak
from lmjax.hardware import prepare

if TYPE_CHECKING:
    from lmjax.engine.processes import Processes

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "where the run lies; an existing one is continued")
EXPLAIN = flags.DEFINE_bool("explain", False, "print every value and where it comes from, and stop")
DEVICES = flags.DEFINE_integer(
    "devices",
    0,
    "how many devices the CPU shows as, to each process; 0 for one",
    lower_bound=0,
    upper_bound=4096,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 of many listens, the same for all of them"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes run together")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
HEARTBEAT_S = flags.DEFINE_float(
    "heartbeat_s",
    20.0,
    "of many processes: how long a host may give no answer before it counts as lost",
    lower_bound=1.0,
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "ask the cluster (SLURM, Open MPI, TPU, Kubernetes) which processes run together; "
    "--nodistributed runs alone, whatever the environment says",
)


def main(argv: list[str]) -> None:
    """Builds the run from config and flags, and trains it."""
    speak()
    end: Callable[[Exception, int], NoReturn] = fail
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        if not CONFIG.value:
            raise UserError("--config is not given: name a file, as --config=configs/char.py.")
        processes = None if EXPLAIN.value else _processes()
        if processes is not None:  # before all else: what one of them does not find ends them all
            prepare(devices=DEVICES.value)
            end = _connect(processes)
        config = load_config(CONFIG.value, OVERRIDES)
        run, tree = build_and_resolve(config)
        if EXPLAIN.value:
            for field, value, source in explain(config):
                print(f"{field} = {value!r}  ({source})")
            return
        if not WORKDIR.value:
            raise UserError("--workdir is not given: name a folder for the run.")
    except (UserError, OSError) as error:
        end(error, Exit.USAGE)
    if processes is None:
        prepare(devices=DEVICES.value)
    import jax

    from lmjax.convert.weights import LOADERS
    from lmjax.engine import distributed
    from lmjax.engine.checkpoint import SaveHangs
    from lmjax.engine.loop import Interrupted, train

    try:
        train(run, WORKDIR.value, config=tree, loaders=LOADERS)
        distributed.disconnect()
    except SaveHangs as error:
        if processes is None:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.code)
        end(error, error.code)
    except UserError as error:
        end(error, error.code)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = (
            "there is too little memory: lower batch_size, or raise microbatches or the layout's "
        )
        text += f"fsdp, or set task.model.remat ({str(error).splitlines()[0]})."
        end(MemoryError(text), Exit.ERROR)
    except OSError as error:
        text = f"{error}. Is the disk full or read-only? What was saved before is untouched; "
        end(OSError(text + "mend it and run the same command again."), Exit.ERROR)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        end(RuntimeError("stopped at once; what was saved before is untouched."), Exit.INTERRUPTED)
    except Interrupted as stop:
        command = f"{sys.executable} -m lmjax.train {shlex.join(sys.argv[1:])}"
        if processes is None or not jax.process_index():
            print(f"{stop}. To continue: {command}")
        distributed.disconnect()
        sys.exit(stop.exit_code)


def _processes() -> Processes | None:
    """The processes that flags and environment ask for."""
    from lmjax.engine.processes import processes_from

    return processes_from(
        coordinator=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
        detect=DISTRIBUTED.value,
    )


def _connect(processes: Processes) -> Callable[[Exception, int], NoReturn]:
    """Joins the other processes; returns what ends all of them with an error."""
    import jax

    from lmjax.engine import distributed

    distributed.connect(processes, heartbeat_s=HEARTBEAT_S.value)
    if jax.process_index():
        logging.getLogger("lmjax").setLevel(logging.ERROR)  # the first one speaks for all
    return distributed.fail


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
