"""A run of lmjax as a folder that transformers loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.adapt.adapted import Adapted
from lmjax.adapt.quantized import Quantized
from lmjax.config import build, from_dict
from lmjax.convert import gguf_llama, shards
from lmjax.convert.family import Family, Fields, numbers
from lmjax.convert.gguf import write_gguf
from lmjax.convert.imports import DTYPES, KEPT, ORIGINAL, VOCABULARIES
from lmjax.convert.parts import Part, rows_of
from lmjax.convert.settings import Settings
from lmjax.convert.shards import Out
from lmjax.convert.vocabulary import write_tokenizer
from lmjax.convert.weights import FAMILIES
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.engine.manifest import Damaged
from lmjax.engine.stored import Stored, find, variables, verify
from lmjax.errors import UserError, did_you_mean
from lmjax.models.bert import Bert
from lmjax.models.decoder import DecoderLM
from lmjax.models.encoder_decoder import EncoderDecoderLM
from lmjax.ops.rope import RopeScaling

log = logging.getLogger("lmjax")

SHARD_BYTES = 5 * 10**9
Model = DecoderLM | EncoderDecoderLM | Bert


def export_folder(
    workdir: Path,
    to: Path,
    *,
    step: int | None = None,
    dtype: str = "same",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes config.json, safetensors and tokenizer of a run's checkpoint; returns the shards.

    The averaged parameters are taken where the checkpoint has them. What the run was imported with
    (config.json, chat template) is written back, but for what says how the model computes. The
    host holds one tensor at a time.

    Args:
      workdir: of a run, be it trained or imported, of a language model.
      to: the folder; may not hold weights. A name that ends in .gguf: see `export_gguf`.
      step: which checkpoint; the newest if not given.
      dtype: 'same' as in the checkpoint, 'float32' or 'bfloat16'.
      shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
      UserError: where no family describes the model, the checkpoint is damaged, or `to` is in use.
    """
    if to.suffix == ".gguf":
        return [export_gguf(workdir, to, step=step, dtype=dtype)]
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}." + did_you_mean(dtype, DTYPES))
    if any(to.glob("*.safetensors")) or (to / "config.json").exists():
        raise UserError(f"{to} holds a model already: give another --to.")
    stored, held, model = _whole(workdir, step)
    original = _original(workdir)
    family, fields = described(model, like=original.get("model_type", ""))
    parts = family.parts(Settings("the model", fields))
    tensors = outs(stored, held, parts, DTYPES[dtype])
    to.mkdir(parents=True, exist_ok=True)
    paths = shards.write_folder(to, tensors, shard_bytes=shard_bytes)
    kinds = {t.dtype.name for t in tensors}
    _write_around(
        workdir, to, original, fields, held, kinds.pop() if len(kinds) == 1 else "float32"
    )
    return paths


def export_gguf(
    workdir: Path, to: Path, *, step: int | None = None, dtype: str = "float32"
) -> Path:
    """Writes a .gguf file that llama.cpp loads, of a Llama; see `export_folder`.

    Args:
      workdir: of a run.
      to: the file; may not exist.
      step: which checkpoint; the newest if not given.
      dtype: 'float32' ('same' is that too), or 'q8_0', which quantises the matrices.

    Raises:
      UserError: where the model is no Llama, and as `export_folder`.
    """
    if dtype not in (kinds := ("same", "float32", "q8_0")):
        raise UserError(f"dtype of a .gguf file is {dtype!r}." + did_you_mean(dtype, kinds))
    if to.exists():
        raise UserError(f"{to} exists already: give another --to.")
    stored, held, model = _whole(workdir, step)
    family, fields = described(model)
    if family.model_type != "llama":
        raise UserError(f"the model is a {family.model_type}, and only llama is written as GGUF.")
    assert isinstance(model, DecoderLM)  # as every Llama
    tokenizer = tokenizer_from_json(held["tokenizer"])
    about = gguf_llama.metadata(fields)
    words = gguf_llama.vocabulary_fields(tokenizer, fields["vocab_size"])
    if not words:
        log.warning("its tokenizer is of a kind that is not written as GGUF: the file has none")
    about |= words or {"tokenizer.ggml.model": "no_vocab"}
    parts = gguf_llama.parts(Settings("the model", fields))
    tensors = outs(stored, held, parts, np.dtype(np.float32))
    rope = model.stacks[0].block.attention.rope
    if isinstance(rope.scaling, RopeScaling):
        factors = gguf_llama.rope_factors(rope, fields["head_dim"])
        kind = np.dtype(np.float32)
        tensors.append(Out(gguf_llama.ROPE, factors.shape, kind, lambda: iter([factors])))
    to.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(to, about, tensors, q8_0=dtype == "q8_0")
    return to


def _whole(workdir: Path, step: int | None) -> tuple[Stored, Mapping[str, Any], Model]:
    """A checkpoint that is what was saved, its manifest and its model."""
    stored = find(workdir, step)[-1]
    if problems := verify(stored):
        raise UserError(f"the checkpoint {stored.folder} is damaged: {problems[0]}.")
    held = stored.manifest()
    return stored, held, built(workdir, held)


def built(workdir: Path, held: Mapping[str, Any]) -> Model:
    """The model of a checkpoint's config; raises UserError where it has none."""
    node: Any = held.get("config")
    for name in ("task", "model"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{workdir} has no task.model: it is no run of a language model.")
    model = build(from_dict(node))
    if isinstance(model, Adapted):
        raise UserError(
            f"{workdir} has adapters: merge them first (python -m lmjax.convert merge), or write "
            "them alone (export-adapter)."
        )
    if isinstance(model, Quantized):
        raise UserError(
            f"{workdir} is quantised: make it plain first (python -m lmjax.convert dequantize)."
        )
    if not isinstance(model, Model):
        raise UserError(
            f"{workdir}: task.model is a {type(model).__name__}, and no language model."
        )
    return model


def described(model: Model, *, like: str = "") -> tuple[Family, Fields]:
    """The family of a model, `like` where several compute the same, and its config.json.

    Raises UserError where the model that config.json means computes another function, with what is
    different to the family that comes nearest.
    """
    own, nearest = numbers(model), (10**9, "", "")
    for family in sorted(FAMILIES.values(), key=lambda f: f.model_type != like):
        try:
            fields = {"model_type": family.model_type, **family.fields(model)}
            made = numbers(build(family.recorded(Settings("the model", fields), "float32")))
        except (AttributeError, UserError):  # it has parts that this family does not know
            continue
        other = [k for k in own.keys() | made.keys() if own.get(k, ...) != made.get(k, ...)]
        if not other:
            return family, {"architectures": [family.architecture], **fields}
        name = min(other)
        what = f"{name} is {own.get(name)!r}, and there {made.get(name)!r}"
        nearest = min(nearest, (len(other), family.model_type, what))
    near = f" The nearest is {nearest[1]}: {nearest[2]}." if nearest[1] else ""
    raise UserError(
        f"no architecture of Hugging Face that lmjax knows computes this model.{near} "
        f"There are: {', '.join(FAMILIES)}."
    )


def outs(
    stored: Stored,
    held: Mapping[str, Any],
    parts: Sequence[Part],
    dtype: np.dtype[Any] | None,
) -> list[Out]:
    """The tensors of a checkpoint, by their names, to be read when they are written."""
    lie = variables(held["arrays"])
    paths = {f"params/{p.path}" for p in parts}
    if lacks := sorted(paths - lie.keys()) or sorted(lie.keys() - paths):
        raise UserError(
            f"the checkpoint {stored.folder} and its model do not agree on {lacks[0]}: "
            "it cannot be exported."
        )
    found = []
    for p in parts:
        path = lie[f"params/{p.path}"]
        kind = dtype or np.dtype(_numpy(held["arrays"][path]["dtype"]))
        found.append(Out(p.tensor, p.shape, kind, partial(_rows, stored, path, p)))
    return found


def _numpy(name: str) -> np.dtype[Any]:
    kinds = {kind.name: kind for kind in shards.FLOATS.values()}
    if name not in kinds:
        raise UserError(f"the checkpoint holds {name}, and only {', '.join(kinds)} are exported.")
    return kinds[name]


def _rows(stored: Stored, path: str, p: Part) -> Iterator[np.ndarray]:
    """A tensor in blocks of its rows; a straight one is read block by block."""
    try:
        array = stored.array(path)
        if not p.straight or p.extent[-len(p.shape) :] != p.shape:
            cut = tuple(slice(*ends) for ends in p.where)
            yield from rows_of(p, np.asarray(array[cut].read().result()))
            return
        at, size = p.where[: -len(p.shape)], p.extent[-len(p.shape) :]
        for start, stop, _ in p.cuts(array.dtype.numpy_dtype.itemsize):
            ends = (*at, (start, stop), *((0, n) for n in size[1:]))
            yield np.asarray(array[tuple(slice(*e) for e in ends)].read().result())
    except (Damaged, ValueError) as error:
        raise UserError(f"{path} of {stored.folder} cannot be read: {error}.") from error


def _original(workdir: Path) -> Fields:
    """The config.json that a run was imported with; empty where it was not."""
    path = workdir / ORIGINAL / "config.json"
    return dict(Settings.read(path).fields) if path.is_file() else {}


def _write_around(
    workdir: Path, to: Path, original: Fields, fields: Fields, held: Mapping[str, Any], dtype: str
) -> None:
    """Writes config.json and the tokenizer, beside what the run was imported with."""
    settings = original if original.get("model_type") == fields["model_type"] else {}
    for name in ("torch_dtype", "rope_parameters"):
        settings.pop(name, None)
    for name in KEPT if original else ():
        if (workdir / ORIGINAL / name).is_file():
            shutil.copyfile(workdir / ORIGINAL / name, to / name)
    tokenizer = tokenizer_from_json(held["tokenizer"])
    if not any((to / name).is_file() for name in VOCABULARIES):
        write_tokenizer(tokenizer, to)
    settings.setdefault("eos_token_id", tokenizer.end_id)
    settings |= {**fields, "dtype": dtype, "torch_dtype": dtype}
    text = json.dumps(settings, indent=2, sort_keys=True)
    (to / "config.json").write_text(text + "\n", "utf-8")
