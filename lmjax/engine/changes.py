"""What a resume with another config changes, in plain words, and whether the run can go on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import UserError

log = logging.getLogger("lmjax")

# What a changed field breaks on resume, by regex over its path: the first that matches speaks.
_HARMLESS, _CURVE, _BREAKS = "harmless", "curve", "breaks"
_CHANGES = [
    (
        r"^(log_every|eval_every|save_every|keep_last|keep_every|wandb_project|init_from|evals\.|watch\.)",
        _HARMLESS,
        "",
    ),
    (r"(^|\.)(workers|remat(\.\w+)?|unroll|vocab_chunk)$", _HARMLESS, ""),
    (
        r"^(layout\.|microbatches$|precision\.(products|quantized)$)",
        _CURVE,
        "losses agree to rounding from here on, not bit for bit",
    ),
    (
        r"(^|\.)(steps|decay_steps|warmup_steps)$",
        _CURVE,
        "the learning rate from here on is that of another schedule",
    ),
    (
        r"^guard\.(policy|loss_spike|norm_spike|limit)$",
        _CURVE,
        "from here on other steps count as bad, or other things follow",
    ),
    (
        r"^optimizer",
        _BREAKS,
        "the optimizer's state and the learning rate no longer fit the run so far",
    ),
    (
        r"^(data|batch_size|seed)",
        _BREAKS,
        "batches come in another order: some would repeat, some be lost",
    ),
    (r"^(task|trainable)", _BREAKS, "the parameters or the loss are another model's"),
    (r"", _BREAKS, "this is another run"),
]


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lists what differs between two configs, as plain trees: (kind, field, what it breaks)."""
    before, after = dict(_flat(old)), dict(_flat(new))
    rows = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now:
            _, kind, meaning = next(rule for rule in _CHANGES if re.search(rule[0], name))
            rows.append((kind, f"{name}: {was!r} -> {now!r}", meaning))
    return rows


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def check_changes(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Says what differs from the checkpoint's config; raises UserError if that breaks the run."""
    changes = config_changes(old, json.loads(json.dumps(new)))
    lines = [f"  {field}" + (f"  ({meaning})" if meaning else "") for _, field, meaning in changes]
    if any(kind == _BREAKS for kind, _, _ in changes):
        raise UserError(
            f"{workdir} holds a run with another config:\n" + "\n".join(lines) + "\n"
            "Give back the old values to continue it, or use another --workdir."
        )
    for line in lines:
        log.warning("the config differs from the run's so far:%s", line)
