"""A folder of Hugging Face's (or another library's file) as arrays of ours, read block by block."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.convert import gguf_llama, pickles, shards
from lmjax.convert import parts as table
from lmjax.convert.bert import BERT
from lmjax.convert.family import Family
from lmjax.convert.gemma import GEMMA2, GEMMA3
from lmjax.convert.gpt2 import GPT2
from lmjax.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from lmjax.convert.mixtures import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from lmjax.convert.parts import Part, Tensor
from lmjax.convert.settings import Settings
from lmjax.convert.t5 import T5
from lmjax.convert.vocabulary import tokenizer_of
from lmjax.core import Tokenizer
from lmjax.errors import UserError

log = logging.getLogger("lmjax")

FAMILIES = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN2_MOE,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3,
        T5,
        BERT,
    )
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights as they lie in files, by our names, their names and shapes checked.

    Args:
      source: the folder or file.
      family: what they are.
      settings: of the model.
      tensors: by their names.
      arrays: our path -> the parts that it is made of.
      shapes: our path -> its shape; tables of the vocabulary may have more rows than the tensor.
    """

    source: Path
    family: Family
    settings: Settings
    tensors: Mapping[str, Tensor]
    arrays: Mapping[str, Sequence[Part]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, path: str) -> tuple[int, ...]:
        """Of an array of ours."""
        return self.shapes.get(path) or table.shapes(self.arrays[path])[path]

    def dtype(self, path: str) -> np.dtype[Any]:
        """Of an array of ours: that of its tensors, float32 where they have several."""
        found = {self.tensors[p.tensor].dtype for p in self.arrays[path]}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    def blocks(
        self, path: str, dtype: np.dtype[Any] | None = None, **arguments: Any
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """An array of ours, as `parts.blocks` gives it."""
        wanted = self.dtype(path) if dtype is None else dtype
        return table.blocks(self.shape(path), wanted, self.arrays[path], self.tensors, **arguments)

    def products_dtype(self) -> str:
        """Which dtype the products are recorded with: bfloat16 where all weights are."""
        kinds = {self.dtype(path).name for path in self.arrays}
        return "bfloat16" if kinds == {"bfloat16"} else "float32"


def open_folder(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Weights:
    """A folder with config.json and *.safetensors, or else *.bin; reads no more than headers.

    Args:
      folder: written by `save_pretrained`, or downloaded.
      shapes: of the arrays that are wanted, by our path, where tables of the vocabulary are padded.

    Raises:
      UserError: for an architecture that is not known, and for a tensor that is missing, not
        expected, of another shape or no float, each by its name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that save_pretrained(DIR) wrote.")
    settings = Settings.read(folder / "config.json")
    if any(folder.glob("*.safetensors*")) or not any(folder.glob("*.bin*")):
        tensors = shards.read_folder(folder)
    else:
        tensors = shards.read_folder(
            folder,
            single="pytorch_model.bin",
            index="pytorch_model.bin.index.json",
            read=pickles.read_bin,
        )
    return checked(folder, family_of(settings), settings, tensors, shapes or {})


def open_weights(
    source: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Weights, Callable[[], Tokenizer]]:
    """A folder, or a .gguf file, and what reads the tokenizer that it came with."""
    if source.suffix != ".gguf":
        found = open_folder(source, shapes)
        return found, lambda: tokenizer_of(source, found.settings)
    settings, tensors, fields = gguf_llama.open_gguf(source)
    family = replace(LLAMA, parts=gguf_llama.parts, tied="token_embd.weight", prefix="")
    found = checked(source, family, settings, tensors, shapes or {})
    return found, lambda: gguf_llama.read_vocabulary(str(source), fields)


def family_of(settings: Settings) -> Family:
    """The family that a config.json names."""
    model_type = settings.get("model_type", "")
    if model_type not in FAMILIES:
        way = f" There are: {', '.join(FAMILIES)}."
        if "text_config" in settings.fields:
            way = " Save its text model alone, with a config.json of its own."
        raise UserError(
            f"{settings.source}: model_type is {model_type!r}, an architecture that lmjax cannot "
            f"convert.{way}"
        )
    family = FAMILIES[model_type]
    named = settings.get("architectures", [family.architecture])
    known = (family.architecture, *family.others)
    if not isinstance(named, list) or not any(name in named for name in known):
        raise UserError(
            f"{settings.source}: architectures is {named!r}, and of {model_type} only "
            f"{', '.join(known)} can be converted."
        )
    return family


def checked(
    source: Path,
    family: Family,
    settings: Settings,
    found: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> Weights:
    """Weights whose tensors are those of the family's table, by name, shape and dtype."""
    tensors = {n: t for n, t in found.items() if not re.search(family.buffers, n)}
    if family.arranged is not None:
        settings, tensors = family.arranged(settings, tensors)
    parts = family.parts(settings)
    if not any(name.startswith(family.prefix) for name in tensors):  # saved without its head
        bare = [name for name in tensors if not name.startswith("lm_head.")]
        tensors |= {f"{family.prefix}{name}": tensors.pop(name) for name in bare}
    wanted = {p.tensor: p for p in parts}
    mend = "Download it again."
    if source.is_dir():
        mend = "Download the folder again, or correct config.json."
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(
            f"{source} lacks {_some(missing)}: {settings.source} asks for {missing[0]!r} of shape "
            f"{list(wanted[missing[0]].shape)}. {mend}"
        )
    for name in (*family.copies, "lm_head.weight"):
        if name in tensors and name not in wanted:
            _check_tied(source, name, tensors.pop(name), tensors[family.tied])
    if extra := [name for name in tensors if name not in wanted]:
        raise UserError(
            f"{source} has {_some(extra)}, which no {family.model_type} of {settings.source} has: "
            f"weights would be lost. {mend}"
        )
    for name, p in wanted.items():
        if tuple(tensors[name].shape) != p.shape:
            raise UserError(
                f"{source}: {name!r} has the shape {list(tensors[name].shape)}, and "
                f"{settings.source} asks for {list(p.shape)}. {mend}"
            )
        _ = tensors[name].dtype
    arrays: dict[str, list[Part]] = {}
    for p in parts:
        arrays.setdefault(p.path, []).append(p)
    padded = {}
    for path, shape in shapes.items():
        has = table.shapes(arrays[path])[path] if path in arrays else ()
        if (
            path.endswith(("embed/table", "head/bias"))
            and shape[1:] == has[1:]
            and shape[0] > has[0]
        ):
            padded[path] = tuple(shape)
            log.info("%s has %d rows there and %d here: the others are 0", path, has[0], shape[0])
    return Weights(
        source=source,
        family=family,
        settings=settings,
        tensors=tensors,
        arrays=arrays,
        shapes=padded,
    )


def _check_tied(source: Path, name: str, head: Tensor, tied: Tensor) -> None:
    """Raises UserError where a tied output layer is stored, and is another table."""
    if not table.same(head, tied):
        raise UserError(
            f"{source}: its {name} is another table than the token embedding, and config.json "
            f"ties the two (tie_word_embeddings). Set that to false, or leave {name} out."
        )


@dataclass(frozen=True)
class Source:
    """Weights as `engine.warm_start` reads a checkpoint: a manifest and arrays on their devices."""

    weights: Weights
    tokenizer: Callable[[], Tokenizer]

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.weights.source

    def manifest(self) -> dict[str, Any]:
        """What they are, without checksums, which the files do not have."""
        try:
            tokenizer = self.tokenizer().to_json()
        except UserError:
            tokenizer = None
        arrays = {
            f"params/{path}": {
                "shape": list(self.weights.shape(path)),
                "dtype": self.weights.dtype(path).name,
            }
            for path in self.weights.arrays
        }
        return {"step": 0, "tokenizer": tokenizer, "arrays": arrays}

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by 'params/PATH' with the shardings of `wanted`, each block straight to them."""
        return {
            name: place(self.weights, name.removeprefix("params/"), x) for name, x in wanted.items()
        }


def open_source(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """What `init_from='hf:DIR'` names, for a model whose arrays have these shapes."""
    return Source(*open_weights(Path(path).expanduser(), shapes))


LOADERS = {"hf": open_source}  # for `engine.warm_start`


def place(weights: Weights, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of ours on the devices of `like.sharding`; the host holds a block of it at a time.

    Each process reads what its devices hold.
    """
    assert like.sharding is not None
    regions: dict[jax.Device, tuple[slice, ...]] = {
        device: tuple(slice(*cut.indices(n)[:2]) for cut, n in zip(index, like.shape, strict=True))
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
    }
    buffers = {
        device: jax.device_put(
            jax.numpy.zeros([c.stop - c.start for c in region], like.dtype, device=device), device
        )
        for device, region in regions.items()
    }

    def needed(start: Sequence[int], shape: Sequence[int]) -> bool:
        return any(_overlap(region, start, shape) for region in regions.values())

    for start, block in weights.blocks(path, np.dtype(like.dtype), needed=needed):
        for device, region in regions.items():
            if (both := _overlap(region, start, block.shape)) is None:
                continue
            inside = tuple(slice(c.start - s, c.stop - s) for c, s in zip(both, start, strict=True))
            to = [c.start - r.start for c, r in zip(both, region, strict=True)]
            piece = jax.device_put(block[inside].copy(), device)  # jax may hold on to it
            buffers[device] = _update(buffers[device], piece, to)
            jax.block_until_ready(buffers[device])  # the block is let go of only then
        del block
    return jax.make_array_from_single_device_arrays(
        like.shape, like.sharding, list(buffers.values())
    )


def _overlap(
    region: Sequence[slice], start: Sequence[int], shape: Sequence[int]
) -> tuple[slice, ...] | None:
    both = tuple(
        slice(max(r.start, s), min(r.stop, s + n))
        for r, s, n in zip(region, start, shape, strict=True)
    )
    return both if all(c.start < c.stop for c in both) else None


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, piece: jax.Array, start: list[Any]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, start)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more
