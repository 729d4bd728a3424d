"""What a family is to the converter: its settings, translated both ways, and a table of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from lmjax.convert.parts import Part
from lmjax.convert.settings import Settings
from lmjax.models.decoder import DecoderLM

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face's.

    Args:
      model_type: in config.json.
      architecture: the class that loads it there.
      prefix: of the names of all tensors but the output layer's, absent in files of the model
        without its output layer.
      tied: the tensor that is also the output layer where that is tied.
      buffers: regex over names of tensors that hold no weights.
      recorded: (settings, dtype of products) -> the recorded call of our model; raises UserError
        for what ours cannot compute.
      fields: model -> what config.json says of it, if it is one of this family: what `recorded`
        makes of them is compared with it.
      parts: settings -> where each tensor lies in our arrays.
    """

    model_type: str
    architecture: str
    prefix: str
    tied: str
    buffers: str
    recorded: Callable[[Settings, Any], ConfigDict]
    fields: Callable[[DecoderLM], Fields]
    parts: Callable[[Settings], Sequence[Part]]


# What says nothing of the function that trained parameters compute, or only how fast.
_NO_MATTER = {
    "parent", "name", "dtype", "init_std", "out_std", "dropout", "remat", "unroll",
    "vocab_multiple", "routing", "capacity_factor",
}  # fmt: skip


def numbers(module: Any, path: str = "") -> dict[str, Any]:
    """What a model computes, as leaves: kinds and numbers of its modules, by their paths."""
    if isinstance(module, tuple | list):
        return {k: v for i, x in enumerate(module) for k, v in numbers(x, f"{path}.{i}").items()}
    if not dataclasses.is_dataclass(module):
        return {path.lstrip("."): module}
    found: dict[str, Any] = {f"{path}.kind".lstrip("."): type(module).__name__}
    for f in dataclasses.fields(module):
        if f.name not in _NO_MATTER:
            found |= numbers(getattr(module, f.name), f"{path}.{f.name}")
    return found
