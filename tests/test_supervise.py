"""scripts/supervise with commands of one line: when it restarts, what it passes on, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUPERVISE = Path(__file__).parents[1] / "scripts" / "supervise"
QUICK = ("--backoff=0.01", "--backoff_max=0.05")
LIMIT_S = 60

# Counts its attempts in a file; ends with the code that the list gives for this attempt.
ATTEMPTS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
path, codes = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
attempt = len(path.read_text()) if path.exists() else 0
path.write_text("x" * (attempt + 1))
code = int(codes[min(attempt, len(codes) - 1)])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""

# Says which process it is; the one with the fatal id fails once, the others wait to be ended.
RANKS = """
import json, os, pathlib, signal, sys, time
names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
values = [os.environ["LMJAX_" + name] for name in names]
folder, me = pathlib.Path(sys.argv[1]), values[2]
print(json.dumps(values), flush=True)
(folder / me).touch()
while len(list(folder.glob("[0-9]"))) < int(values[1]):
    time.sleep(0.01)
first = not (folder / "failed").exists()
if not first:
    sys.exit(0)
if me == "1":
    time.sleep(0.2)
    (folder / "failed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "failed").exists():
    time.sleep(0.01)
sys.exit(75)
"""

# Ends with 143 soon after SIGTERM, or never.
PATIENT = """
import pathlib, signal, sys, time
def on_signal(signum, frame):
    pathlib.Path(sys.argv[1], "signal").write_text(str(signum))
    sys.exit(128 + signum)
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, signal.SIG_IGN if sys.argv[2] == "deaf" else on_signal)
pathlib.Path(sys.argv[1], "ready").touch()
while True:
    time.sleep(0.01)
"""


def command(*flags, code, arguments):
    # -S -E: a Python that starts in no time
    return [SUPERVISE, *flags, "--", sys.executable, "-S", "-E", "-c", code, *map(str, arguments)]


def supervise(*flags, code, arguments):
    return subprocess.run(
        command(*flags, code=code, arguments=arguments),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    ("codes", "attempts", "end"),
    [
        ("0", 1, 0),
        ("1,75,-9,143,0", 5, 0),  # an error, a lost peer, kill -9 and a spot machine: all may pass
        ("2", 1, 2),
        ("3", 1, 3),
        ("4", 1, 4),
        ("130", 1, 130),
        ("-2", 1, 130),
        ("75,2", 2, 2),
        ("-11,3", 2, 3),
    ],
)
def test_what_is_restarted(codes, attempts, end, tmp_path):
    done = supervise(*QUICK, code=ATTEMPTS, arguments=[tmp_path / "count", codes])
    assert (done.returncode, len((tmp_path / "count").read_text())) == (end, attempts), done.stderr
    lines = done.stderr.splitlines()
    assert len([line for line in lines if " restart " in line]) == attempts - 1
    assert lines[-1] == f"supervise: exit code {end} after {attempts} attempt(s)"
    assert all(line.startswith("supervise: ") for line in lines)


def test_it_says_how_each_attempt_ended(tmp_path):
    done = supervise(*QUICK, code=ATTEMPTS, arguments=[tmp_path / "count", "-9,75,143,0"])
    ends = re.findall(r"process 0 (.*) after [\d.]+ s", done.stderr)
    assert ends == [
        "was ended by SIGKILL",
        "ended with 75 (another process was lost, or nothing moved)",
        "ended with 143 (SIGTERM, saved)",
        "ended with 0 (done)",
    ]


def test_it_waits_ever_longer_and_gives_up(tmp_path):
    flags = ("--restarts=4", "--backoff=0.01", "--backoff_max=0.05")
    done = supervise(*flags, code=ATTEMPTS, arguments=[tmp_path / "count", "1"])
    assert done.returncode == 1
    assert len((tmp_path / "count").read_text()) == 5
    assert re.findall(r"restart (\d of 4 in [\d.]+) s", done.stderr) == [
        "1 of 4 in 0.0",
        "2 of 4 in 0.0",
        "3 of 4 in 0.0",
        "4 of 4 in 0.1",
    ]
    assert "gave up after 4 restart(s) in a row: exit code 1" in done.stderr


def test_a_long_attempt_sets_the_restarts_back(tmp_path):
    """Six failures with at most two in a row, as each attempt counts as long."""
    flags = (*QUICK, "--restarts=2", "--reset_after=0")
    done = supervise(*flags, code=ATTEMPTS, arguments=[tmp_path / "count", "1,1,1,1,1,1,0"])
    assert done.returncode == 0
    assert re.findall(r"restart (\d) of 2", done.stderr) == ["1"] * 6


def test_many_processes_restart_together_on_another_port(tmp_path):
    done = supervise(*QUICK, "--processes=3", code=RANKS, arguments=[tmp_path])
    assert done.returncode == 0, done.stderr
    told = sorted(json.loads(line) for line in done.stdout.splitlines())
    ports = {coordinator for coordinator, _, _ in told}
    assert len(ports) == 2 and all(port.startswith("localhost:") for port in ports)
    for port in ports:
        assert [rest for first, *rest in told if first == port] == [["3", x] for x in "012"]
    assert "process 1 was ended by SIGKILL" in done.stderr
    assert "exit code 0 after 2 attempt(s)" in done.stderr


@pytest.mark.slow  # they are given five seconds to notice by themselves
def test_those_who_do_not_notice_that_one_failed_are_ended(tmp_path):
    script = (
        "import os, pathlib, signal, sys, time\n"
        "if os.environ['LMJAX_PROCESS_ID'] == '1': sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(1000)"
    )
    done = supervise("--processes=2", "--grace=0.5", code=script, arguments=[])
    assert done.returncode == 3
    assert "supervise: ending process 0" in done.stderr
    assert "killing process 0, which did not end within 0.5 s" in done.stderr
    assert "process 0 was ended by SIGKILL" in done.stderr


def test_one_process_is_told_nothing(tmp_path):
    script = "import os; print([name for name in os.environ if name.startswith('LMJAX_PROCESS')])"
    assert supervise(code=script, arguments=[]).stdout == "[]\n"


def running(tmp_path, *flags, kind):
    """A supervisor whose command is ready for signals."""
    process = subprocess.Popen(
        command(*flags, code=PATIENT, arguments=[tmp_path, kind]),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_it(signum, tmp_path):
    process = running(tmp_path, kind="obedient")
    process.send_signal(signum)
    errors = process.communicate(timeout=LIMIT_S)[1]
    assert (tmp_path / "signal").read_text() == str(int(signum))
    assert process.returncode == 128 + signum
    assert f"{signum.name}: passed on; no restart after it" in errors


def test_what_ignores_the_signal_is_killed_after_the_grace(tmp_path):
    process = running(tmp_path, "--grace=0.2", kind="deaf")
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 137
    assert "killing process 0, which did not end within 0.2 s" in errors


def test_its_command_does_not_outlive_it(tmp_path):
    """Else a second supervisor would start a second run in the same folder."""
    process = running(tmp_path, kind="obedient")
    process.kill()
    process.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "signal").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "no command: give it after --"),
        (["--processes=0", "--", "true"], "--processes is 0: give at least 1"),
        (["--grace=-1", "--", "true"], "--grace is -1.0: must not be negative"),
        (["--proceses=2", "--", "true"], "unrecognized arguments: --proceses=2"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    done = subprocess.run([SUPERVISE, *arguments], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_command_that_is_not_there():
    done = subprocess.run(
        [SUPERVISE, "--", "no-such-command"], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 127
    assert "'no-such-command' cannot be started: No such file or directory" in done.stderr


def test_it_is_executable():
    assert os.access(SUPERVISE, os.X_OK)
