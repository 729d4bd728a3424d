"""Daft: all cores of this machine, or a Ray cluster, by one plan and without a service.

On a cluster tasks run in Daft's own processes. On this machine Daft would start new ones for every
plan, and a run has a plan for each of its steps: there they run in processes that stay.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmjax.errors import UserError
from lmjax.prepare.backends import Failed, pack, run_packed, unpacked
from lmjax.prepare.backends.processes import Processes
from lmjax.prepare.tasks import Done, Task

# Neither engine reports to its makers: they ask when they are imported.
_SILENT = {
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Daft:
    """Runs tasks as rows of a Daft plan, each in a process of its own kind.

    Args:
      workers: how many at once; 0 for as many as there are cores, here or in the cluster.
      ray: on Ray instead of this machine alone.
      address: of a Ray cluster; "" for one that is started here.
    """

    def __init__(self, *, workers: int, ray: bool, address: str) -> None:
        os.environ.update(_SILENT)
        try:
            import daft
        except ImportError as error:
            raise UserError(
                "the runners native and ray need `pip install 'lmjax[prepare]'`: no daft. "
                "--runner=inline needs neither, and runs in this process."
            ) from error
        self._daft: Any = daft
        self._workers, self._ray = workers, ray
        if not ray:
            daft.set_runner_native()
            self._workers = workers or os.cpu_count() or 1
            return
        try:
            import ray as cluster
        except ImportError as error:
            raise UserError("the runner ray needs `pip install ray`.") from error
        if not cluster.is_initialized():
            cores = {"num_cpus": workers} if workers and not address else {}
            cluster.init(address=address or None, log_to_driver=False, **cores)
        daft.set_runner_ray(address or None)
        self._workers = workers or int(cluster.cluster_resources().get("CPU", 1))

    def map(self, tasks: Sequence[Task]) -> list[Done]:
        """Runs them; one alone in this process, which saves the start of another."""
        if len(tasks) < 2 and not self._ray:
            return [task.run() for task in tasks]
        daft, limit = self._daft, min(self._workers, len(tasks))
        column = [pack(task) for task in tasks]
        plan = daft.from_pydict({"number": list(range(len(tasks))), "task": column})
        if self._ray:
            plan = plan.into_partitions(limit)
        worker = (self._remote if self._ray else self._local)(limit)
        done = plan.select(plan["number"], worker(plan["task"]).alias("done")).to_pydict()
        ordered = sorted(zip(done["number"], done["done"], strict=True))
        return unpacked([result for _, result in ordered])

    def _remote(self, limit: int) -> Any:
        """A function of a plan's column that runs tasks in processes of Daft's own."""
        daft = self._daft

        @daft.cls(use_process=True, max_concurrency=limit)
        class Worker:
            @daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)
            def __call__(self, packed: Any) -> list[bytes]:
                return [run_packed(task) for task in packed.to_pylist()]

        return Worker()

    def _local(self, limit: int) -> Any:
        """A function of a plan's column that runs tasks in processes that stay."""
        daft, workers = self._daft, self._workers

        @daft.cls(max_concurrency=limit)
        class Worker:
            @daft.method(return_dtype=daft.DataType.binary())
            async def __call__(self, packed: bytes) -> bytes:
                return await run_in_process(packed, workers)

        return Worker()


async def run_in_process(packed: bytes, workers: int) -> bytes:
    """Runs a packed task in one of the processes that stay; the threads of Daft go on meanwhile."""
    processes, threads = _processes(workers)
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, processes.run, packed)
    except RuntimeError as error:  # told as what a task raises is, which Daft leaves alone
        return pickle.dumps(Failed("a task", str(error), "machine"))


@functools.lru_cache(maxsize=1)
def _processes(workers: int) -> tuple[Processes, ThreadPoolExecutor]:
    processes = Processes(workers)
    atexit.register(processes.close)
    return processes, ThreadPoolExecutor(workers, thread_name_prefix="lmjax-prepare")
