"""Config files: variants and flags over them, what each bad file is answered with, explaining."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.config import build, call, explain, leaves, load_config, to_dict
from lmjax.errors import UserError
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine

ROOT = Path(__file__).parents[1]


def write(path: Path, body: str) -> str:
    path.write_text(
        "from lmjax.config import call\nfrom ml_collections import FieldReference\n"
        "from tests.config_targets import Part, Whole\n" + body
    )
    return str(path)


CONFIG = """
VARIANTS = {"tiny": {"part.width": 1, "rate": "0.25"}, "bad": {"part.widht": 1}}
def get_config():
    size = FieldReference(5)
    part = call(Part, rate=0.5)
    return call(Whole, part=part, size=size, other=part, weights={"a": size}, shape=(1, 2))
"""


def test_field_that_cannot_be_computed_is_refused(tmp_path):
    body = "def get_config():\n    n = FieldReference(5)\n"
    body += "    return call(Whole, part=call(Part), size=n, limit=100 // n)\n"
    path = write(tmp_path / "c.py", body)
    assert build(load_config(path, {"size": 2})).limit == 50
    with pytest.raises(UserError, match=r"^config\.limit cannot be computed .*: integer division"):
        load_config(path, {"size": 0})


def test_variant_then_flags_override_the_file(tmp_path):
    path = write(tmp_path / "c.py", CONFIG)
    built = build(load_config(f"{path}:tiny", {"rate": "4", "size": 6}))
    assert (built.part.width, built.rate, built.size) == (1, 4.0, 6)
    assert build(load_config(path)).part.width == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("c.py:tinny", "c.py has no variant 'tinny'. Did you mean 'tiny'\\? Allowed: bad, tiny."),
        ("c.py:bad", "config.part has no field 'widht'. Did you mean 'width'"),
        ("d.py:tiny", "no config file '.*d.py'. Did you mean '.*c.py'"),
        ("nowhere/c.py", "no config file '.*nowhere/c.py'. Allowed: none."),
        ("empty.py", "empty.py defines no get_config\\(\\)"),
        ("none.py", "none.py: get_config\\(\\) must return call\\(...\\), and returned None"),
        ("c.txt", "c.txt is no Python file"),
        ("syntax.py", "syntax.py, line 5: invalid syntax"),
        ("misspelt.py", "misspelt.py, line 5: .*:Part has no field 'widht'. Did you mean 'width'"),
        ("fails.py", "fails.py, line 6: ZeroDivisionError: division by zero"),
        ("list.py:x", "VARIANTS of .*list.py is \\['x'\\]: write a mapping"),
        ("x" * 5000, "no config file .*: File name too long"),
        ("a\0b.py", "no config file"),
    ],
)
def test_bad_file_or_variant(tmp_path, spec, message):
    write(tmp_path / "c.txt", CONFIG)
    write(tmp_path / "syntax.py", "x = = 1\n".replace("x", "\nx"))
    write(tmp_path / "misspelt.py", "def get_config():\n    return call(Part, widht=1)\n")
    write(tmp_path / "fails.py", "def get_config():\n\n    return 1 / 0\n")
    write(tmp_path / "list.py", "VARIANTS = ['x']\ndef get_config(): pass\n")
    write(tmp_path / "c.py", CONFIG)
    write(tmp_path / "empty.py", "")
    write(tmp_path / "none.py", "def get_config(): pass")
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / spec))


def test_explain_says_default_file_or_flag(tmp_path):
    """A flag's value stands wherever its node, FieldReference or sequence does."""
    path = write(tmp_path / "c.py", CONFIG)
    flags = {"size": "6", "shape": "1,3", "part.name": "p", "fast": "false"}
    rows = explain(load_config(f"{path}:tiny", flags))
    found = {field: (value, source) for field, value, source in rows}
    assert found == {
        "config": ("tests.config_targets:Whole", "file"),
        "part": ("tests.config_targets:Part", "file"),
        "part.width": (1, "file"),
        "part.rate": (0.5, "file"),
        "part.name": ("p", "flag"),
        "other": ("tests.config_targets:Part", "file"),
        "other.width": (1, "file"),
        "other.rate": (0.5, "file"),
        "other.name": ("p", "flag"),
        "size": (6, "flag"),
        "weights.a": (6, "flag"),
        "kind": ("big", "default"),
        "level": (1, "default"),
        "fast": (False, "flag"),
        "limit": (None, "default"),
        "rate": (0.25, "file"),
        "label": (None, "default"),
        "shape.0": (1, "flag"),
        "shape.1": (3, "flag"),
    }


def test_leaves_of_empty_containers():
    assert dict(leaves({"a": {}, "b": [], "c": [1]})) == {"a": {}, "b": [], "c.0": 1}


def test_load_and_build_touch_no_device(tmp_path):
    """With a platform that does not exist, whatever asks jax for a device raises."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    script = f"""
import jax
from lmjax.config import build, load_config
for name in ("gpt2", "char", "shakespeare"):
    build(load_config(f"configs/{{name}}.py:smoke", {{"data.path": {str(text)!r}}}))
try:
    jax.devices()
except RuntimeError:
    print("no device")
"""
    environment = os.environ | {"JAX_PLATFORMS": "nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "no device\n"), done.stderr


def test_decay_and_schedule_are_recorded_by_name():
    tree = to_dict(call(adamw, learning_rate=call(cosine, peak=1e-3, steps=10)))
    assert tree["_call"] == "lmjax.optim.presets:adamw"
    assert tree["learning_rate"]["_call"] == "lmjax.optim.schedules:cosine"
    assert ast.literal_eval(repr(tree)) == tree  # plain
