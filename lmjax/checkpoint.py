"""`python -m lmjax.checkpoint ls|verify|diff DIR [DIR2] [--step=S]`: what checkpoints hold.

A DIR is a workdir, its `checkpoints` folder or one checkpoint. `ls` lists all of them, those that
were set aside too. `verify` reads every array and compares it with the checksum that it was saved
with. `diff` says in what the newest checkpoint (or that of --step) of DIR2 differs from that of
DIR. None of them needs the run's devices, or more memory than a few blocks of an array.

Exit codes: 0; 1 where `verify` finds damage, or `diff` a difference; 2 for a bad folder or flag.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from rich.console import Console
from rich.table import Table

from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags

STEP = flags.DEFINE_integer("step", None, "which checkpoint, by its step", lower_bound=0)
RECORD = "verified.jsonl"  # beside the checkpoints: a line for each that `verify` has read


def main(argv: list[str]) -> None:
    """Runs one of the commands."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    command, *folders = argv[1:] or [""]
    try:
        if command not in COMMANDS:
            raise UserError(
                f"{command or 'nothing'} is no command: give ls, verify or diff, and a folder."
            )
        if len(folders) != (wanted := 1 + (command == "diff")):
            raise UserError(f"{command} takes {wanted} folder(s), and {len(folders)} are given.")
        import jax

        jax.config.update("jax_platforms", "cpu")  # not to take the devices of a run
        same = COMMANDS[command](*folders)
    except (UserError, OSError) as error:
        fail(error, Exit.USAGE)
    sys.stdout.flush()
    sys.exit(Exit.DONE if same else Exit.ERROR)


def _ls(folder: str) -> bool:
    from lmjax.engine.manifest import Damaged
    from lmjax.engine.stored import find, root_of, set_aside

    root = root_of(folder)
    aside = set_aside(root)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "size", "saved (UTC)", "mesh", "lmjax", "verified"):
        table.add_column(name, overflow="fold")
    records = _records(root)
    for stored in find(folder, STEP.value, none=bool(aside)):
        size = _bytes(stored.size_bytes())
        try:
            held = stored.manifest()
        except Damaged as error:
            table.add_row(stored.name, size, "", "", "", f"DAMAGED: {error}")
            continue
        except UserError:
            table.add_row(stored.name, size, "", "", "", "another format: it has no manifest")
            continue
        record = records.get(held["sha256"])
        verified = "not yet"
        if record:
            verdict = "DAMAGED" if record["problems"] else "whole"
            verified = f"{verdict}, {record['time']}"
        lmjax = held["versions"]["lmjax"]
        table.add_row(stored.name, size, held["time"], _mesh(held), lmjax, verified)
    for name, reason in aside:
        table.add_row(name, "", "", "", "", f"set aside: {reason}")
    _console().print(table)
    return True


def _verify(folder: str) -> bool:
    from lmjax.engine.stored import find, verify

    whole = True
    for stored in find(folder, STEP.value):
        began = time.monotonic()
        problems = verify(stored)
        whole &= not problems
        if problems:
            print(f"step {stored.name}: DAMAGED")
            for problem in problems:
                print(f"  {problem}")
        else:
            held = stored.manifest()
            seconds = time.monotonic() - began
            what = f"{len(held['arrays'])} arrays, {_bytes(stored.size_bytes())}"
            print(f"step {stored.name}: whole ({what}, {seconds:.1f} s)")
        _record(stored, problems)
    return whole


def _diff(one: str, other: str) -> bool:
    from lmjax.engine.changes import config_changes
    from lmjax.engine.manifest import Damaged
    from lmjax.engine.stored import difference, find

    first, second = find(one, STEP.value)[-1], find(other, STEP.value)[-1]
    try:
        a, b = first.manifest(), second.manifest()
    except Damaged as error:
        raise UserError(f"a checkpoint is damaged, and cannot be compared: {error}.") from error
    lines = []
    for part in ("step", "config", "data", "versions", "mesh"):
        changes = config_changes({part: a.get(part)}, {part: b.get(part)})
        lines += [field for _, field, _ in changes]
    for name in sorted({*a.get("fitted", ()), *b.get("fitted", ()), "tokenizer"}):
        if a.get(name) != b.get(name):
            lines.append(f"{name}: {_named(a.get(name))} -> {_named(b.get(name))}")
    equal = 0
    for path in sorted(a["arrays"].keys() | b["arrays"].keys()):
        x, y = (held["arrays"].get(path) for held in (a, b))
        if x == y:
            equal += 1
        elif x is None or y is None:
            lines.append(f"{path}: only in {second.folder if x is None else first.folder}")
        elif (x["shape"], x["dtype"]) != (y["shape"], y["dtype"]):
            lines.append(f"{path}: {_kind(x)} -> {_kind(y)}")
        else:
            try:
                apart = f"max |a - b| = {difference(first, second, path):.6g}"
            except Damaged as error:
                apart = f"cannot be compared: {error}"
            lines.append(f"{path}: {apart}")
    print(f"{first.folder} -> {second.folder}")
    for line in lines:
        print(f"  {line}")
    print(f"{equal} arrays are the same, bit for bit by their checksums")
    return not lines


def _record(stored: Any, problems: list[str]) -> None:
    """Notes for `ls` what was found; in a folder that cannot be written, it does not."""
    from lmjax.engine.manifest import Damaged

    try:
        line = {
            "step": stored.name,
            "sha256": stored.manifest()["sha256"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "problems": problems,
        }
        with (stored.folder.parent / RECORD).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except (OSError, Damaged, UserError):
        return


def _records(root: Any) -> dict[str, Mapping[str, Any]]:
    """The last line of each manifest."""
    found: dict[str, Mapping[str, Any]] = {}
    path = root / RECORD
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            found[line["sha256"]] = {"time": line["time"], "problems": line["problems"]}
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _named(text: str | None) -> str:
    """What was fitted to the data, by its hash."""
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()[:12]


def _kind(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"


def _mesh(held: Mapping[str, Any]) -> str:
    mesh = held["mesh"]
    axes = " ".join(f"{axis}={n}" for axis, n in mesh["axes"].items() if n > 1) or "one device"
    return f"{axes} ({mesh['devices']} x {mesh['kind']}, {mesh['processes']} process(es))"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size > 1e8 else f"{size / 1e6:,.2f} MB"


def _console() -> Console:
    width = None if sys.stdout.isatty() else 240  # a file has room for a row
    return Console(highlight=False, markup=False, width=width)


COMMANDS: dict[str, Callable[..., bool]] = {"ls": _ls, "verify": _verify, "diff": _diff}

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
