"""The model of a run, or of imported weights, as its config.json records it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from ml_collections import ConfigDict

from lmjax.config import from_dict, override
from lmjax.errors import UserError


def recorded_model(workdir: str | Path) -> ConfigDict:
    """The recorded call of a run's model.

    Raises UserError where the folder holds no run, or one that was not trained from a config.
    """
    config = Path(workdir).expanduser() / "config.json"
    if not config.exists():
        raise UserError(f"{workdir} holds no run: there is no {config}.")
    try:
        node = json.loads(config.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{config} cannot be read ({error}): it is damaged. The checkpoints hold copies of it."
        ) from error
    for name in ("task", "model"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(
            f"{config} has no task.model: it was not trained from a config of a language model."
        )
    return from_dict(node)


def saved(
    *,
    workdir: str,
    max_length: int = 0,
    dtype: Literal["", "float32", "bfloat16"] = "",
    remat: str = "",
    unroll: int = 0,
    vocab_multiple: int = 0,
) -> ConfigDict:
    """Stands for the model of a run, or of imported weights, in a config that goes on from it.

    The config that the new run keeps holds that model itself: it needs the folder no more. Of a
    model with adapters or quantised weights the changes are those of the model within.

    Args:
      workdir: of the run, or as `python -m lmjax.convert import` wrote it.
      max_length: the longest context; 0 for the model's own.
      dtype: of the products' operands; "" for the model's own.
      remat: see `layers.transformer.Stack`; "" for the model's own.
      unroll: likewise; 0 for the model's own.
      vocab_multiple: the tables of the vocabulary are padded to a multiple of it, so that devices
        can share them; 0 for the model's own.

    Raises UserError as `recorded_model`, and where the model has no such field.
    """
    if not workdir:
        raise UserError("no workdir is named: give the folder of a run, or of imported weights.")
    model = recorded_model(workdir)
    changes = {
        "max_length": max_length,
        "dtype": dtype,
        "remat": remat,
        "unroll": unroll,
        "vocab_multiple": vocab_multiple,
    }
    inner = model
    while isinstance(inner.get("model"), ConfigDict):  # adapters, or quantised weights, around it
        inner = inner.model
    for name, value in changes.items():
        if value:
            override(inner, name, value)
    return model
