"""Flags, and whole commands on folders that are no runs: an exit code, and one line of reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.outcome import check_message, examples, few_and_many

ROOT = Path(__file__).parents[2]
CONFIG = "configs/char.py:smoke"
NAMES = st.sampled_from(
    [
        *(
            "config",
            "workdir",
            "devices",
            "coordinator",
            "num_processes",
            "process_id",
            "distributed",
        ),
        *("config.steps", "config.", "config..", "config.data.path", "config.task.model.dim"),
        *("config.evals.valid", "config.layout.data", "config.optimizer.learning_rate.peak"),
        *(
            "confg",
            "nodistributed",
            "flagfile",
            "undefok",
            "config.steps.x",
            "steps",
            "",
            "-",
            "no",
        ),
    ]
)
VALUES = (
    st.sampled_from([*("", "0", "-1", "1e400", "9" * 5000, "none", "true", "=", "configs/char.py")])
    | st.sampled_from([CONFIG, "README.md", "configs", "configs/char.py:", "/dev/null", "nowhere"])
    | st.text(max_size=5)
)
ARGUMENTS = (
    st.tuples(
        st.sampled_from(["-", "--", "---", ""]), NAMES, st.sampled_from(["=", "", " "]), VALUES
    )
    .map("".join)
    .filter(lambda text: "help" not in text and "explain" not in text)
)


def environment(cache):
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "LMJAX_CACHE": str(cache),
    }


@few_and_many(80, 1500)
def test_flags(count, corpus, cache):
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.many_flags"],
        cwd=ROOT,
        env=environment(cache),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(arguments):
        child.stdin.write(json.dumps(arguments) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        assert line, f"the launcher died of {arguments}"
        return json.loads(line)

    @examples(count)
    @given(st.lists(ARGUMENTS, max_size=4), st.booleans())
    def check(arguments, configured):
        # A folder that a flag names by chance is not read as a corpus.
        given_ = [f"--config={CONFIG}", f"--config.data.path={corpus}"] if configured else []
        code, said = run([*arguments, *given_])
        if code:
            assert code == 2 and said.startswith("error: "), (arguments, said)
            check_message(said.removeprefix("error: "))

    try:
        assert run([f"--config={CONFIG}", f"--config.data.path={corpus}"]) == [0, ""]
        check()
    finally:
        child.stdin.close()
        child.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders that look like runs."""
    root = tmp_path_factory.mktemp("folders")
    for name, text in {
        "cut": '{"task": {"model": {"_call": "lmja',
        "empty": "",
        "list": "[]",
        "foreign": '{"task": {"model": {"_call": "json:loads", "s": "5"}}}',
        "misspelt": '{"task": {"model": {"_call": "lmjax.models.gpt:gtp"}}}',
        "deep": '{"task": ' * 5000,
        "zeros": "\0" * 10,
    }.items():
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(text.encode())
    (root / "plan.json").write_text("{}")
    (root / "file").write_text("")
    return root


COMMANDS = {
    "train": [
        "train --config=README.md --workdir={0}/x",
        f"train --config={CONFIG} --workdir={{0}}/file",
    ],
    "generate": [
        *(
            f"generate --workdir={{0}}/{name} --prompt=x"
            for name in ("cut", "empty", "list", "foreign")
        ),
        *(f"generate --workdir={{0}}/{name} --prompt=x" for name in ("misspelt", "deep", "zeros")),
        "generate --workdir={0}/nowhere --prompt=x",
        "generate --workdir={0}/file --prompt=x",
        "generate --workdir={0} --prompt=x --seed=-1",
        "generate --prompt=x",
        "generate --workdir={0} --prompt=x surplus",
    ],
    "plan": [
        f"plan --config={CONFIG} --topology=cpu:99999999999",
        f"plan --config={CONFIG} --topology=v5e:{'9' * 5000}",
        f"plan --config={CONFIG} --topology=cpu:0",
        f"plan --config={CONFIG} --topology=cpu:1 --compare={{0}}/plan.json",
        f"plan --config={CONFIG} --topology=cpu:1 --compare={{0}}",
        "plan --config=configs --topology=cpu:1",
    ],
    "data": [
        f"data --config={CONFIG} --step=0",
        f"data --config={CONFIG} --step={'9' * 30}",
        f"data --config={CONFIG} --step=1 --workdir={{0}}/cut --config.data.path=",
    ],
    "checkpoint": [
        "checkpoint",
        "checkpoint ls {0}/nowhere",
        "checkpoint verify {0}/cut",
        "checkpoint diff {0}/cut {0}/file",
        "checkpoint verify {0}/file --step=-1",
    ],
    "replay": [
        *(f"replay --workdir={{0}}/{name} --step=1" for name in ("cut", "list", "deep", "nowhere")),
        "replay --workdir={0}/misspelt --step=0",
        "replay --workdir={0}/foreign --step=2",
    ],
}
FEW = [COMMANDS[name][0] for name in ("train", "generate", "checkpoint")]
EVERY = [command for commands in COMMANDS.values() for command in commands]


@pytest.mark.parametrize(
    "command", [*FEW, *(pytest.param(c, marks=pytest.mark.slow) for c in EVERY if c not in FEW)]
)
def test_commands(command, folder, cache):
    module, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", f"lmjax.{module}", *(a.format(folder) for a in arguments)],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    check_message(last)
