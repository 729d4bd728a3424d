"""Weights of a run in few bits, as a workdir of their own, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lmjax.adapt.adapted import Adapted
from lmjax.adapt.quantized import Quantized, quantized
from lmjax.config import build, call, from_dict, to_dict
from lmjax.convert.held_out import Measured, measure, windows_of
from lmjax.convert.places import EXAMPLE
from lmjax.convert.workdirs import check_empty, read_all, tree, whole, with_model, write_arrays
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.errors import UserError
from lmjax.models.saved import recorded_model
from lmjax.ops import blockwise
from lmjax.ops.blockwise import BLOCK

_WINDOWS = 128


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What became of a model.

    Args:
      bits: of a quantised weight, its share of a scale included.
      share: of all numbers that are quantised.
      bytes_before: of all parameters.
      bytes_after: likewise.
      before: of held-out text; None without text.
      after: the same of what was written.
    """

    bits: float
    share: float
    bytes_before: int
    bytes_after: int
    before: Measured | None
    after: Measured | None


def quantize(
    workdir: Path,
    to: Path,
    *,
    kind: str = "",
    block: int = 0,
    targets: Sequence[str] = (),
    text: str = "",
    length: int = 256,
    num_windows: int = _WINDOWS,
    step: int | None = None,
) -> Quantization:
    """Writes a workdir whose model is `adapt.quantized.quantized` around a run's.

    A model that was trained with `aware=True` gets what it was trained for, and loses nothing.

    Args:
      workdir: a run, or imported weights. Of one that is no model of text alone the data that it
        records is built, for the shapes of an example.
      to: is made.
      kind: see `ops.blockwise`; "" for int4, or what the model was trained for.
      block: weights that share a scale; 0 for 64, or likewise.
      targets: products, see `adapt.quantized`; none for all, or likewise.
      text: see `data.source.read_documents`; a decoder is measured on `num_windows` windows of its
        last tenth.
      length: of a window; at most the model's context.

    Raises:
      UserError: where the run has adapters, is quantised, was trained for other weights, or is
        damaged; for a kind, a block or targets that there are not; where `to` holds a run; for a
        text that is too short, or of a model that is no decoder.
    """
    check_empty(to)
    stored, held, lie = whole(workdir, step)
    node = recorded_model(workdir)
    model = build(node)
    if isinstance(model, Adapted):
        raise UserError(f"{workdir} has adapters: merge them first.")
    wanted = {"kind": kind, "block": block, "targets": tuple(targets)}
    if isinstance(model, Quantized):
        if not model.aware:
            raise UserError(
                f"{workdir} is quantised already, as {model.kind}: dequantize it first."
            )
        for name, value in wanted.items():
            if value and value != (trained := getattr(model, name)):
                raise UserError(
                    f"{workdir} was trained for {name}={trained!r}, not {value!r}: leave it out."
                )
        recorded = call(quantized, **{**_arguments(node), "aware": False})
    else:
        wanted = {
            "kind": kind or "int4",
            "block": block or BLOCK,
            "targets": wanted["targets"] or ("*",),
        }
        blockwise.check(str(wanted["kind"]), int(str(wanted["block"])))
        recorded = call(quantized, model=from_dict(to_dict(node)), **wanted)
    small = build(recorded)
    if text and (not hasattr(model, "init_cache") or hasattr(model, "encode")):
        raise UserError(
            f"{workdir} is no decoder: its numbers on text cannot be told. Leave it out."
        )
    windows = None
    if text:
        tokenizer = tokenizer_from_json(held["tokenizer"])
        windows = windows_of(text, tokenizer, min(length, model.max_length - 1))[1][:num_windows]
    flat = read_all(stored, lie)
    example = _example(model, held)
    params = tree(flat)
    made = small.quantised(params, example)
    new = {k: np.asarray(x) for k, x in flatten_dict(made, sep="/").items()}
    write_arrays(workdir, to, held, _config(held, to_dict(recorded), f"kernel_{small.kind}"), new)
    gone = [x for k, x in flat.items() if k not in new]
    few = [x for k, x in new.items() if k not in flat]
    weights = sum(x.size for x in gone)
    return Quantization(
        bits=8 * _bytes(few) / weights,
        share=weights / sum(x.size for x in flat.values()),
        bytes_before=_bytes(flat.values()),
        bytes_after=_bytes(new.values()),
        before=None if windows is None else measure(model, params, windows),
        after=None if windows is None else measure(small, made, windows),
    )


def dequantize(workdir: Path, to: Path, *, step: int | None = None) -> None:
    """Writes a workdir of a quantised run's plain model, in float32, that computes the same.

    Raises UserError where the model is not quantised, or has adapters; where `to` holds a run.
    """
    check_empty(to)
    stored, held, lie = whole(workdir, step)
    node = recorded_model(workdir)
    model = build(node)
    if isinstance(model, Adapted):
        raise UserError(f"{workdir} has adapters: merge makes it plain.")
    if not isinstance(model, Quantized):
        raise UserError(f"{workdir} is not quantised: its model is a {type(model).__name__}.")
    plain = model.plain(tree(read_all(stored, lie)), _example(model, held))
    flat = {k: np.asarray(x) for k, x in flatten_dict(plain, sep="/").items()}
    write_arrays(workdir, to, held, _config(held, to_dict(node)["model"], ""), flat)


def _arguments(node: Any) -> dict[str, Any]:
    """Those of a recorded call."""
    return {name: node[name] for name in node if not name.startswith("_")}


def _bytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _example(model: Any, held: Mapping[str, Any]) -> Any:
    """What the model is traced with."""
    if not hasattr(model, "num_outputs"):
        return EXAMPLE
    data = held["config"].get("data")
    if data is None:
        raise UserError("the run records no data, and its model reads more than text alone.")
    example = build(from_dict(data)).example
    return {name: jnp.zeros((1, *x.shape), x.dtype) for name, x in example.items()}


def _config(held: Mapping[str, Any], model: Any, quantised: str) -> dict[str, Any]:
    """What the new workdir records: of a model of text its task, else all that the run recorded.

    Evaluations that hold the model get the new one too, and what is quantised does not train.
    """
    old = held["config"]["task"]["model"]
    if "data" not in held["config"] or not _is_network(old):
        return with_model(held, model)

    def changed(node: Any) -> Any:
        if node == old:
            return model
        if isinstance(node, Mapping):
            return {name: changed(item) for name, item in node.items()}
        return [changed(item) for item in node] if isinstance(node, list) else node

    config: dict[str, Any] = changed(held["config"])
    if quantised:
        config["trainable"] = f"^(?!.*/({re.escape(quantised)}|kernel_scale)$)"
    return json.loads(json.dumps(config))


def _is_network(node: Any) -> bool:
    return hasattr(build(from_dict(node)), "num_outputs")
