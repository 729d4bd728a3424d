"""What a family is to the converter: its settings, translated both ways, and a table of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from lmjax.convert.parts import Part, Tensor
from lmjax.convert.settings import Settings
from lmjax.tasks.causal_lm import CausalLM

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
      copies: tensors that are the same once more, if a file has them.
      buffers: regex over names of tensors that hold no weights.
      recorded: (settings, dtype of products) -> the recorded call of our model; raises UserError
        for what ours cannot compute.
      fields: model -> what config.json says of it, if it is one of this family: what `recorded`
        makes of them is compared with it.
      parts: settings -> where each tensor lies in our arrays.
      others: more of its classes, whose files are read too.
      task: what trains the model; None where the workdir names the model alone.
      arranged: (settings, tensors) -> the settings with what the tensors say beside config.json,
        and the tensors by the names of `parts`, where files have several.
    """

    model_type: str
    architecture: str
    prefix: str
    tied: str
    buffers: str
    recorded: Callable[[Settings, Any], ConfigDict]
    fields: Callable[[Any], Fields]
    parts: Callable[[Settings], Sequence[Part]]
    copies: Sequence[str] = ()
    others: Sequence[str] = ()
    task: Callable[..., Any] | None = CausalLM
    arranged: (
        Callable[[Settings, Mapping[str, Tensor]], tuple[Settings, dict[str, Tensor]]] | None
    ) = None


# What says nothing of the function that trained parameters compute, or only how fast.
_NO_MATTER = {
    "parent", "name", "dtype", "init_std", "out_std", "query_std", "dropout", "remat", "unroll",
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
            found |= numbers(_resolved(module, f.name), f"{path}.{f.name}")
    return found


def _resolved(module: Any, name: str) -> Any:
    """A field, its default spelled out where another value says the same."""
    value = getattr(module, name)
    if name == "query_scale" and value is None:
        return module.head_dim**-0.5
    return None if name == "window_layers" and value is not None and all(value) else value
