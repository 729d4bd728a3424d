"""Scripts: lint, and what the launchers for TPU, SLURM and Kubernetes would do and hand on."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmjax.engine.processes import Processes, processes_from

ROOT = Path(__file__).parents[1]
SHELL = sorted(
    path
    for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]
    if path.is_file() and path.read_text().startswith("#!/usr/bin/env bash")
)


def test_shell_scripts_pass_shellcheck():
    assert {path.name for path in SHELL} >= {"run", "setup", "test", "tpu_vm.sh", "slurm.sh"}
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *SHELL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_stop_at_the_first_error(path):
    assert "set -euo pipefail" in path.read_text().splitlines()
    assert os.access(path, os.X_OK)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder of the tools that the scripts need, and no other: no gcloud that may be installed.

    It is the whole PATH of a script under test, which can then reach nobody's cloud.
    """
    folder = tmp_path_factory.mktemp("tools")
    for name in ("bash", "dirname", "mktemp", "rm", "sed"):
        (folder / name).symlink_to(shutil.which(name))
    assert shutil.which("gcloud", path=str(folder)) is None
    return folder


@pytest.fixture
def tpu_vm(tools):
    """Runs tpu_vm.sh, with `stand_in` for gcloud if given."""

    def run(*arguments, stand_in=None):
        path = str(tools) if stand_in is None else f"{stand_in}:{tools}"
        return subprocess.run(
            [ROOT / "scripts" / "tpu_vm.sh", *arguments],
            env={"PATH": path},
            capture_output=True,
            text=True,
        )

    return run


SLICE = ("--name=pod", "--zone=us-east5-a", "--dry-run")


@pytest.fixture
def planned(tpu_vm):
    """The commands that a dry run prints, as lists of words."""

    def run(*arguments):
        done = tpu_vm(*arguments)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines()]

    return run


def test_tpu_vm_creates_and_deletes(planned):
    kind = ("--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--project=mine")
    (command,) = planned("create", *SLICE, *kind)
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {"--accelerator-type=v5litepod-16", "--spot", "--zone=us-east5-a"} <= {*command}
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--project=mine"} <= {*command}
    assert "--spot" not in planned("create", *SLICE, *kind[:2])[0]
    (command,) = planned("delete", *SLICE)
    assert command[4:6] == ["delete", "pod"] and "--quiet" in command


def test_tpu_vm_installs_on_all_workers(planned):
    archive, copy, unpack, mount = planned("install", *SLICE, "--nfs=filer:/runs")
    assert archive[:2] == ["git", "archive"]
    assert copy[4:6] == ["scp", archive[3].partition("=")[2]]
    assert all("--worker=all" in command for command in (copy, unpack, mount))
    (remote,) = [word for word in unpack if word.startswith("--command=")]
    assert remote.endswith("lmjax/scripts/setup tpu")
    assert "filer:/runs lmjax/shared" in " ".join(mount)
    assert len(planned("install", *SLICE)) == 3


def test_tpu_vm_hands_flags_on_word_for_word(planned):
    """Through the local shell and the worker's: what it would run is run here, with `echo`."""
    flags = [
        "--config=a b.py",
        "--config.evals.sample.prompt=it's $HOME; 1 > 0",
        "--workdir=shared",
    ]
    (command,) = planned("run", *SLICE, "--", *flags)
    assert "--worker=all" in command
    (remote,) = [word.partition("=")[2] for word in command if word.startswith("--command=")]
    prefix, _, rest = remote.partition(".venv/bin/python -m lmjax.train")
    assert prefix == "cd lmjax && nohup "
    words = rest.partition("> ../lmjax.log 2>&1 < /dev/null &")[0]
    printed = subprocess.run(
        ["bash", "-c", rf"printf '%s\n' {words}"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == ["--distributed", *flags]


def test_tpu_vm_follows_and_stops(planned):
    (command,) = planned("tail", *SLICE, "--worker=3")
    assert "--worker=3" in command and "--command=tail -n 100 -F lmjax.log" in command
    (command,) = planned("stop", *SLICE)
    assert "--worker=all" in command and any("pkill -TERM" in word for word in command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--name=pod"), "--zone is not given (or TPU_ZONE)"),
        (("create", *SLICE), "--type is not given (or TPU_TYPE)"),
        (("run", *SLICE), "give the run's flags after a --"),
        (("run", *SLICE, "--config=a.py"), "unknown flag '--config=a.py'"),
        (("launch", *SLICE), "unknown command 'launch'"),
        (("delete", "--name=pod", "--zone=z"), "gcloud is not installed"),
    ],
)
def test_tpu_vm_refuses(tpu_vm, arguments, message):
    done = tpu_vm(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert done.stdout == ""


def test_tpu_vm_does_what_a_dry_run_prints(tpu_vm, planned, tmp_path):
    stand_in = tmp_path / "gcloud"
    stand_in.write_text(f"""#!{shutil.which("bash")}
printf '%q ' gcloud "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls
if [ "$4" = describe ]; then echo ACTIVE; fi
""")
    stand_in.chmod(0o755)
    flags = ("--name=pod", "--zone=us-east5-a")
    for arguments in (
        ("create", *flags, "--type=v5litepod-16", "--version=V"),
        ("stop", *flags),
        ("delete", *flags),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = tpu_vm(*arguments, stand_in=tmp_path)
        assert done.returncode == 0, done.stderr
        calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
        assert [c for c in calls if "describe" not in c] == planned(*arguments, "--dry-run")


@pytest.fixture
def slurm(tools, tmp_path):
    """Runs slurm.sh with stand-ins for SLURM's commands: (result, what they were called with)."""

    def run(code):
        for name, end in (("srun", code), ("scontrol", 0)):
            stand_in = tmp_path / name
            stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\nexit {end}\n')
            stand_in.chmod(0o755)
        done = subprocess.run(
            [ROOT / "scripts" / "slurm.sh", "--config=a.py", "--config.note=two words"],
            env={
                "PATH": f"{tmp_path}:{tools}",
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "SLURM_JOB_ID": "77",
            },
            capture_output=True,
            text=True,
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (3, False), (143, True)])
def test_slurm_queues_again_what_was_stopped(slurm, code, again):
    done, calls = slurm(code)
    assert done.returncode == code, done.stderr
    assert "-m lmjax.train --distributed --config=a.py --config.note=two words" in calls[0]
    assert calls[1:] == (["scontrol requeue 77"] if again else [])


def test_slurm_asks_for_one_process_a_node_and_a_signal_in_time():
    lines = (ROOT / "scripts" / "slurm.sh").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "TERM@120"  # to the processes: B: would be the script alone
    assert "requeue" in asked


def test_kubernetes_gives_every_pod_its_place():
    jobset = yaml.safe_load((ROOT / "scripts" / "kubernetes.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environ = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    (index,) = [e for e in container["env"] if "valueFrom" in e]
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    assert spec["completionMode"] == "Indexed"
    count = spec["completions"]
    assert spec["parallelism"] == count and job["replicas"] == 1
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    coordinator = f"{name}-{job['name']}-0-0.{subdomain}:{container['ports'][0]['containerPort']}"
    for process in range(count):
        assert processes_from(environ={**environ, index["name"]: str(process)}) == Processes(
            coordinator=coordinator, num_processes=count, process_id=process
        )
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
