"""The shape of the code base: who imports whom, how long files are, what an import costs."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]

# Files over 400 lines, each with its reason; none may pass 600.
LONG: dict[str, str] = {}

# Libraries that one part of lmjax alone may name, so that one part alone changes with them.
# `sharding` says how arrays are cut; `engine` puts them so, and compares what it is given.
HOMES = {"jax.sharding": {"sharding", "engine"}, "orbax": {"engine"}, "grain": {"data"}}


def names_in(path: Path) -> set[str]:
    """Dotted names that a file imports or reads ('jax.sharding.Mesh')."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def part_of(path: Path) -> str:
    """The package or single module directly below lmjax."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_import_contract():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_contract_names_every_part():
    (layers,) = [c["layers"] for c in CONTRACTS if c["type"] == "layers"]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    assert named == {part_of(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("library", HOMES)
def test_library_has_one_home(library):
    def uses(path):
        return any(f"{name}.".startswith(f"{library}.") for name in names_in(path))

    assert {part_of(path) for path in MODULES if uses(path)} == HOMES[library]


def test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("lmjax", "tests", "configs", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name, n in lengths.items() if n > 400 and name.startswith("lmjax")} == set(
        LONG
    )
    assert {name: n for name, n in lengths.items() if n > 600} == {}


def test_every_module_has_a_docstring():
    assert [str(p) for p in MODULES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_no_host_and_no_machines_path():
    """Code, configs and tests name no address and no folder of somebody's machine."""
    foreign = re.compile(
        r"(?<![\w.~])/(home|root|work|Users|mnt|scratch|data|opt)/\w|\b\d{1,3}(\.\d{1,3}){3}\b"
    )
    about_addresses = {Path(__file__), ROOT / "tests/prepare/stages/test_anonymise.py"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("lmjax", "configs", "tests", "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in ("", ".py", ".sh", ".json", ".toml")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if foreign.search(line) and path not in about_addresses
    ]
    assert found == []


def test_import_takes_no_device_defines_no_flag_and_stays_light():
    """With a platform that does not exist, whatever asks jax for a device raises."""
    script = """
import sys
import lmjax
from absl import flags
defined = flags.FLAGS.flags_by_module_dict()
assert not [name for name in defined if "lmjax" in name], defined
heavy = {"torch", "tensorflow", "transformers", "orbax", "grain"} & set(sys.modules)
assert not heavy, heavy
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
"""
    environment = os.environ | {"JAX_PLATFORMS": "nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_training_needs_no_torch_and_no_tensorflow():
    script = """
import sys
import lmjax.train, lmjax.engine.loop, lmjax.data.text, lmjax.generate.language_model
assert not {"torch", "tensorflow"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
