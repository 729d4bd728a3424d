"""`python -m lmjax.convert`, as it is typed, and what follows it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import folders
from tests.convert.test_convert import read_shards

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    command = [sys.executable, "-m", f"lmjax.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_import_generate_export(tmp_path):
    weights = folders.drawn(folders.LLAMA)
    source = folders.write(tmp_path / "in", folders.LLAMA, weights)
    workdir = f"--workdir={tmp_path / 'run'}"
    done = run("convert", "import", f"--from={source}", workdir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "30 tensors of llama are now" in done.stdout
    done = run("generate", workdir, "--prompt=To be", "--max_tokens=4", "--temperature=0")
    assert done.returncode == 0 and done.stdout.startswith("To be"), done.stderr
    done = run("convert", "export", workdir, f"--to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    again = read_shards(tmp_path / "out")
    assert all(again[name].tobytes() == weights[name].tobytes() for name in weights)
    done = run("convert", "export", workdir, f"--to={tmp_path / 'out.gguf'}", "--dtype=q8_0")
    assert done.returncode == 0 and (tmp_path / "out.gguf").exists(), done.stderr
    for arguments, message in (
        (("import", workdir), "import needs --from=DIR"),
        (("import", f"--from={source}", workdir), "holds a run already"),
        (("inport", workdir), "Did you mean 'import'"),
        (("export", workdir, f"--to={tmp_path / 'x'}", "--dtype=int8"), "dtype is 'int8'"),
    ):
        done = run("convert", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
