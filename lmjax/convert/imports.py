"""A Hugging Face folder as a workdir of lmjax: the model's recorded call, checkpoint, tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import build, call, to_dict
from lmjax.convert.vocabulary import tokenizer_of, within
from lmjax.convert.weights import Weights, open_weights
from lmjax.engine.state import paths_of
from lmjax.engine.streamed import write_checkpoint
from lmjax.errors import UserError, did_you_mean
from lmjax.models.bert import Bert
from lmjax.models.decoder import DecoderLM
from lmjax.models.encoder_decoder import EncoderDecoderLM
from lmjax.sharding import unbox

log = logging.getLogger("lmjax")

ORIGINAL = "huggingface"  # a folder of the workdir: what the weights came with
OTHERS = ("config.json", "generation_config.json", "LICENSE")
VOCABULARIES = (  # of any of which transformers makes a tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
KEPT = (
    *OTHERS,
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
DTYPES = {"same": None, "float32": np.dtype(np.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


def import_folder(
    source: Path, workdir: Path, *, dtype: str = "same", tokenizer: Path | None = None
) -> Weights:
    """Writes a workdir that `lmjax.load`, `lmjax.generate` and `init_from` read.

    Its checkpoint is of step 0. No array is whole in memory: of each, a block or a layer at a time.

    Args:
      source: a folder with config.json, *.safetensors and a tokenizer; or a .gguf file.
      workdir: is made; may not hold a run.
      dtype: of the parameters: 'same' as in the files, 'float32' or 'bfloat16'.
      tokenizer: a folder or tokenizer.json to take in the place of the source's.

    Raises:
      UserError: as `weights.open_weights`; where the workdir holds a run; where there is no
        tokenizer, or it is another model's.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}." + did_you_mean(dtype, DTYPES))
    weights, own_tokenizer = open_weights(source)
    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already: give another --workdir.")
    settings = weights.settings
    vocabulary = tokenizer_of(tokenizer, settings) if tokenizer else own_tokenizer()
    recorded = weights.family.recorded(settings, weights.products_dtype())
    model = build(recorded)
    vocabulary = within(vocabulary, model.vocab_size)
    check(model, weights)
    task = weights.family.task
    config = to_dict({"model": recorded} if task is None else call(task, model=recorded))
    about: dict[str, Any] = {
        "config": {"task": config},
        "tokenizer": vocabulary.to_json(),
        "fingerprint": "",
        "data": {"next_batch": 0, "left_out": []},
        "source": {"family": weights.family.model_type, "name": source.absolute().name},
    }
    kind = DTYPES[dtype]
    arrays = {
        path: jax.ShapeDtypeStruct(weights.shape(path), kind or weights.dtype(path))
        for path in weights.arrays
    }

    def blocks(path: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        path = path.removeprefix("params/")
        return weights.blocks(path, np.dtype(arrays[path].dtype))

    write_checkpoint(
        workdir / "checkpoints",
        0,
        {f"params/{path}": x for path, x in arrays.items()},
        blocks,
        about,
    )
    if source.is_dir():
        _keep(source, workdir / ORIGINAL, OTHERS if tokenizer else KEPT)
    (workdir / "tokenizer.json").write_text(about["tokenizer"], "utf-8")
    (workdir / "config.json").write_text(json.dumps(about["config"], indent=1) + "\n", "utf-8")
    return weights


def check(model: DecoderLM | EncoderDecoderLM | Bert, weights: Weights) -> None:
    """Raises UserError where the arrays are not those of the model, by path and shape."""
    wanted = abstract_params(model)
    made = {path: weights.shape(path) for path in weights.arrays}
    wrong = {p for p in wanted.keys() | made.keys() if wanted.get(p) != made.get(p)}
    if wrong:
        path = min(wrong)
        raise UserError(
            f"{weights.source}: the model of its config.json has {path} {wanted.get(path)}, and "
            f"its tensors make {made.get(path)}: this config.json cannot be converted."
        )


def abstract_params(model: DecoderLM | EncoderDecoderLM | Bert) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    made: Any = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)
    return {path: tuple(x.shape) for path, x in paths_of(unbox(made)["params"]).items()}


def _keep(source: Path, to: Path, names: Sequence[str]) -> None:
    to.mkdir()
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)
