"""Config files as the Python code that they are: found, imported, their errors told by line."""

from __future__ import annotations

import functools
import importlib.util
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmjax.annotations import shown
from lmjax.errors import UserError, did_you_mean


def import_file(path: str) -> types.ModuleType:
    """Imports the file at `path`; raises UserError where there is none, or its code fails."""
    try:
        there = Path(path).is_file()
        near = [] if there else [str(p) for p in Path(path).parent.glob("*.py")]
    except (OSError, ValueError) as error:  # a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"no config file {shown(path)}: {why}.") from error
    if not there:
        raise UserError(f"no config file {path!r}." + did_you_mean(path, near))
    spec = importlib.util.spec_from_file_location(f"lmjax_config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: give a config file, as configs/char.py.")
    module = importlib.util.module_from_spec(spec)
    run_file(path, functools.partial(spec.loader.exec_module, module))
    return module


def run_file(path: str, run: Callable[[], Any]) -> Any:
    """Runs the code of a config file; what it raises becomes a UserError that names its line."""
    try:
        return run()
    except UserError as error:
        raise UserError(f"{_where(path, error)}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{_where(path, error)}: {type(error).__name__}: {error}.") from error


def _where(path: str, error: Exception) -> str:
    """The file, and its line that led to the error."""
    trace = traceback.extract_tb(error.__traceback__)
    lines = [at.lineno for at in trace if at.filename == path]
    return f"{path}, line {lines[-1]}" if lines else path
