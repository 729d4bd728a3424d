"""The tokenizer beside weights, and the files from which transformers makes it again."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmjax.convert.settings import Settings
from lmjax.core import Tokenizer
from lmjax.data.pretrained import read_tokenizer
from lmjax.data.subword import SubwordTokenizer
from lmjax.errors import UserError

log = logging.getLogger("lmjax")


def tokenizer_of(path: Path, settings: Settings) -> Tokenizer:
    """The tokenizer of a folder (or file), with what its files say ends a document.

    Where the tokenizer's own files do not, `eos_token_id` of config.json does. Raises UserError
    where there is none.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    end = None
    if not _names_end(folder) and file.suffix == ".json" and file.is_file():
        names = _names(file)
        end = next((names[i] for i in settings.end_ids() if i in names), None)
    return read_tokenizer(str(path), end)


def within(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """A tokenizer without the added tokens that a model of so many ids has no rows for.

    Some are published so (Gemma 3's <image_soft_token>); in a text they are then text. Raises
    UserError where the vocabulary itself, or what ends a document, is beyond.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    tree = json.loads(getattr(tokenizer, "tokenizer_json", "{}"))
    added = {token["id"]: token["content"] for token in tree.get("added_tokens", ())}
    beyond = [added.get(i) for i in range(vocab_size, tokenizer.vocab_size)]
    other = UserError(
        f"the tokenizer has {tokenizer.vocab_size} ids, and the model only {vocab_size}: it "
        "belongs to another model. Give its own by --tokenizer."
    )
    if not isinstance(tokenizer, SubwordTokenizer):
        raise other
    if None in beyond or tokenizer.end_id >= vocab_size:
        raise other
    log.warning("left out of the tokenizer, as the model has no rows for them: %s", beyond)
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["id"] < vocab_size]
    made = replace(
        tokenizer,
        tokenizer_json=json.dumps(tree, ensure_ascii=False),
        vocab_size=vocab_size,
        special_tokens=tuple((k, v) for k, v in tokenizer.special_tokens if v not in beyond),
    )
    made.check()
    return made


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat templates of a subword tokenizer.

    Another one, of bytes or characters, has no such files.
    """
    import tokenizers

    if (text := getattr(tokenizer, "tokenizer_json", None)) is None:
        return
    made: Any = tokenizers.Tokenizer.from_str(text)
    named = dict(getattr(tokenizer, "special_tokens", ()))
    if made.id_to_token(tokenizer.end_id) is None and made.get_vocab_size() == tokenizer.end_id:
        made.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    if (end := made.id_to_token(tokenizer.end_id)) is not None:
        named["eos_token"] = end
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    text = json.dumps({**about, **named}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
    templates = dict(getattr(tokenizer, "chat_templates", ()))
    if (default := templates.pop("default", None)) is not None:
        (folder / "chat_template.jinja").write_text(default, "utf-8")
    for name, template in templates.items():
        more = folder / "additional_chat_templates"
        more.mkdir(exist_ok=True)
        (more / f"{name}.jinja").write_text(template, "utf-8")


def _names_end(folder: Path) -> bool:
    files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    return any(Settings.read(file).get("eos_token") for file in files if file.is_file())


def _names(file: Path) -> dict[int, str]:
    """Token by id, of a tokenizer.json."""
    try:
        tree = json.loads(file.read_text("utf-8"))
        vocab = tree["model"]["vocab"]
        if isinstance(vocab, list):  # unigram: [token, score] in the order of ids
            named = {index: token for index, (token, _) in enumerate(vocab)}
        else:
            named = {index: token for token, index in vocab.items()}
        return named | {token["id"]: token["content"] for token in tree.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no tokenizer.json: {error!r}.") from error
