"""What makes a stage another one: its fields, its code, the code that it imports, its files."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from lmjax.errors import UserError
from lmjax.prepare import identity as identities
from lmjax.prepare.identity import describe, identity
from lmjax.prepare.stages.exact import Exact


@dataclass(frozen=True)
class Reads:
    path: str

    def files(self) -> Sequence[str]:
        return [self.path]


def test_fields():
    assert identity(Exact()) == identity(Exact()) != identity(Exact(unit="line"))
    tree = describe({"a": Exact(), "b": (1, None, len)})
    assert tree["a"]["_call"] == "lmjax.prepare.stages.exact:Exact"
    assert tree["a"]["unit"] == "document" and tree["b"] == [1, None, {"_ref": "builtins:len"}]


@pytest.mark.parametrize(
    "module, follows", [("stages.exact", True), ("stage", True), ("stages.near", False)]
)
def test_code(monkeypatch, tmp_path, module, follows):
    """A changed line of the stage, or of what it imports, is another stage; others are not."""
    name = f"lmjax.prepare.{module}"
    __import__(name)
    before = identity(Exact())
    changed = tmp_path / "changed.py"
    changed.write_text(inspect.getsource(sys.modules[name]) + "\n# another line\n")
    monkeypatch.setattr(sys.modules[name], "__file__", str(changed))
    identities._module.cache_clear()
    assert (identity(Exact()) != before) == follows
    monkeypatch.undo()
    identities._module.cache_clear()
    assert identity(Exact()) == before


def test_files(tmp_path):
    path = tmp_path / "x"
    path.write_text("a")
    before = identity(Reads(str(path)))
    path.write_text("b")
    assert identity(Reads(str(path))) != before
    with pytest.raises(UserError, match="cannot be read"):
        identity(Reads(str(tmp_path / "gone")))


def test_files_elsewhere():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/identity/x", b"a")
    before = identity(Reads("memory://identity/x"))
    memory.pipe_file("/identity/x", b"b")
    assert identity(Reads("memory://identity/x")) != before
    memory.rm_file("/identity/x")
    with pytest.raises(UserError, match=r"memory://identity/x cannot be read.*A stage needs it"):
        identity(Reads("memory://identity/x"))


def test_what_cannot_be_recorded_is_told():
    with pytest.raises(UserError, match=r"stage\.x\.0 is .* make its class a frozen dataclass"):
        describe({"x": [object()]})
