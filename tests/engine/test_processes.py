"""Which processes run together, which rows each of them reads, and flags that do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.engine.distributed import local_rows
from lmjax.engine.processes import Processes, one_process_a_node, processes_from
from lmjax.errors import UserError
from lmjax.sharding import Layout

ROOT = Path(__file__).parents[2]
LIMIT_S = 120

# A mesh axis of 2 between the halves of 8 devices, that is between two processes of 4, and so on.
PROCESS_OF = {
    "2 x 4": lambda device: device.id // 4,
    "4 x 2": lambda device: device.id // 2,
    "8 x 1": lambda device: device.id,
    "1 x 8": lambda device: 0,
}


@pytest.mark.parametrize(
    ("fields", "processes", "expected"),
    [
        ({"data": 8}, "2 x 4", [(0, 2), (1, 2)]),
        ({"data": 8}, "4 x 2", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 8}, "1 x 8", [(0, 1)]),
        ({"data": 1, "tensor": 8}, "2 x 4", [(0, 1), (0, 1)]),
        ({"data": 2, "tensor": 4}, "4 x 2", [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "2 x 4", [(0, 2), (1, 2)]),
        ({"data": 1, "context": 4, "expert": 2}, "4 x 2", [(0, 1)] * 4),
        ({"data": 2, "stage": 4}, "8 x 1", [(0, 2)] * 4 + [(1, 2)] * 4),
    ],
)
def test_rows_of_a_process(fields, processes, expected, devices):
    mesh = Layout(**fields).mesh(devices)
    process_of = PROCESS_OF[processes]
    found = [local_rows(mesh, i, process_of) for i in range(len(expected))]
    assert found == expected


def test_rows_that_are_not_consecutive_are_refused(devices):
    mesh = Layout(data=2, context=2, expert=2).mesh(devices)  # each process: one of two experts
    with pytest.raises(UserError, match=r"would hold rows \{0, 2\} and \{1, 3\} of 4"):
        local_rows(mesh, 0, lambda device: device.id % 2)
    assert local_rows(mesh, 1, lambda device: device.id // 4) == (1, 2)


HOST = "first.example:1234"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({}, {}, None),
        ({"coordinator": HOST, "num_processes": 2, "process_id": 1}, {}, (HOST, 2, 1)),
        (
            {"process_id": 0},
            {
                "LMJAX_COORDINATOR": HOST,
                "LMJAX_NUM_PROCESSES": "2",
                "LMJAX_PROCESS_ID": "1",
            },
            (HOST, 2, 0),
        ),
        ({"coordinator": HOST, "num_processes": 1, "process_id": 0}, {}, None),
        ({"detect": True}, {}, (None, None, None)),
        ({}, SLURM, (None, None, None)),
        ({"detect": False}, SLURM, None),
        ({}, {**SLURM, "SLURM_NTASKS": "1"}, None),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a batch script before srun
        (
            {},
            {"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "4"},
            (None, None, None),
        ),
        ({}, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({}, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_where_the_processes_come_from(flags, environ, expected):
    found = processes_from(**flags, environ=environ)
    if expected is not None:
        coordinator, num_processes, process_id = expected
        expected = Processes(
            coordinator=coordinator, num_processes=num_processes, process_id=process_id
        )
    assert found == expected


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"process_id": 0}, {}, r"--coordinator \(or LMJAX_COORDINATOR\) and --num_processes "),
        ({"detect": True, "num_processes": 2}, {}, "--coordinator .* not given"),
        ({}, {"LMJAX_PROCESS_ID": "0"}, "--coordinator .* not given"),
        ({}, {"LMJAX_PROCESS_ID": "zero"}, "LMJAX_PROCESS_ID is 'zero': give a number"),
        ({"detect": False, "process_id": 0}, {}, "--nodistributed contradicts --process_id"),
        ({"coordinator": HOST, "num_processes": 2, "process_id": 2}, {}, "--process_id 2 of "),
        ({"coordinator": HOST, "num_processes": 0, "process_id": 0}, {}, "at least one process"),
        ({"coordinator": "first", "num_processes": 2, "process_id": 0}, {}, "give HOST:PORT"),
        ({"coordinator": "first:x", "num_processes": 2, "process_id": 0}, {}, "give HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, environ, message):
    with pytest.raises(UserError, match=message):
        processes_from(**flags, environ=environ)


def test_a_node_with_one_process_shows_it_all_devices():
    assert one_process_a_node({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    assert one_process_a_node({"SLURM_STEP_TASKS_PER_NODE": "1"})
    assert not one_process_a_node({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"})
    assert one_process_a_node({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert not one_process_a_node({})


def test_partial_flags_end_the_launcher_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "lmjax.train", "--config=configs/char.py", "--process_id=0"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("LMJAX_")},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2, done.stderr
    assert "--coordinator (or LMJAX_COORDINATOR) and --num_processes" in done.stderr
    assert "Traceback" not in done.stderr
