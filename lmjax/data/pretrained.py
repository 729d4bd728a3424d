"""Published tokenizers as they lie in folders: which file it is, and what lies beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.data.pieces import explained
from lmjax.data.remote import localised
from lmjax.data.sentencepiece import read_sentencepiece
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tiktoken import (
    ENCODINGS,
    Encoding,
    encoding,
    prefix,
    read_ranks,
    tekken_json,
    tiktoken_json,
)
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.errors import UserError, did_you_mean

_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SUFFIXES = (".json", ".model", ".tiktoken", ".jinja")
_MORE = ("tekken.json", "*.model", "*.model.v*", "*.tiktoken")
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@functools.lru_cache(maxsize=4)
def read_tokenizer(path: str, end: str | None = None) -> SubwordTokenizer:
    """Reads tokenizer.json, SentencePiece's .model, .tiktoken, tekken.json, or a run's tokenizer.

    Beside the file it reads tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    the folder additional_chat_templates, as `transformers` writes them.

    Args:
      path: the file, or a folder that holds one, here or at an address (s3://bucket/folder). A
        .tiktoken file must be named like its encoding.
      end: the token that ends a document; None for the eos_token that the files name (BERT's
        sep_token), or "<|endoftext|>" where they name none.

    Raises UserError where there is none, it is damaged, or does not say what ends a document.
    """
    file = _file(Path(localised(path, _SUFFIXES)).expanduser())
    try:
        data = file.read_bytes()
        if data.startswith(b'{"kind":') and isinstance(
            made := tokenizer_from_json(data.decode()), SubwordTokenizer
        ):
            return made  # the tokenizer of a run, with the end of its own
        text, named = _as_json(file, data)
        config = _config(file.parent)
        text = _with_added(text, config) if file.suffix != ".json" else text
        if "tokenizer_config" in config and file.suffix != ".json":
            text = _with_bos(text, config["tokenizer_config"], named)
        named |= _special_tokens(config)
        ids = _ids(text)
    except (OSError, ValueError) as error:  # UserErrors and broken UTF-8 among them
        raise UserError(
            f"{file} is no {_kind(file)}: {error} Save a tokenizer.json with tokenizer.save(path)."
        ) from error
    own = named.get("eos_token") or named.get("sep_token") or "<|endoftext|>"
    chosen = own if end is None else end
    if chosen not in ids:
        special = [t["content"] for t in json.loads(text).get("added_tokens", ())]
        raise UserError(
            f"{file} has no token {chosen!r}: set `end`." + did_you_mean(chosen, special)
        )
    return _checked(
        file,
        SubwordTokenizer(
            tokenizer_json=text,
            vocab_size=max(ids.values()) + 1,
            end_id=ids[chosen],
            special_tokens=tuple(sorted(named.items())),
            chat_templates=_chat_templates(file.parent, config),
        ),
        chosen,
    )


def read_tiktoken(path: str, known: Encoding) -> SubwordTokenizer:
    """Reads a rank file of tiktoken, of any name, with the encoding that belongs to it."""
    file = Path(localised(path, ())).expanduser()
    if not file.is_file():
        raise _missing(file)
    try:
        text = tiktoken_json(read_ranks(file.read_bytes()), known)
        ids = _ids(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no rank file of tiktoken: {error}") from error
    if known.end not in ids:
        raise UserError(f"{file}: the end {known.end!r} is not among the special tokens.")
    named = {"eos_token": known.end} | ({"bos_token": known.bos} if known.bos else {})
    made = SubwordTokenizer(
        tokenizer_json=text,
        vocab_size=max(ids.values()) + 1,
        end_id=ids[known.end],
        special_tokens=tuple(sorted(named.items())),
    )
    return _checked(file, made, known.end)


def _checked(file: Path, made: SubwordTokenizer, end: str) -> SubwordTokenizer:
    try:
        made.check()
    except UserError as error:
        raise UserError(f"{file}, its end {end!r}: {error}") from error
    return made


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _NAMES if (path / name).is_file()]
        found += [file for pattern in _MORE for file in sorted(path.glob(pattern))]
        path = found[0] if found else path / "tokenizer.json"
    if not path.is_file():
        raise _missing(path)
    return path


def _missing(file: Path) -> UserError:
    near = [f.as_posix() for f in file.parent.glob("*.json")]
    near += [f.as_posix() for pattern in _MORE[1:] for f in file.parent.glob(pattern)]
    return UserError(f"no tokenizer at {file.as_posix()!r}." + did_you_mean(str(file), near))


def _kind(file: Path) -> str:
    if file.name.startswith("tekken") and file.suffix == ".json":
        return "tekken.json of Mistral"
    if file.suffix == ".tiktoken":
        return "rank file of tiktoken"
    if file.suffix == ".json":
        return "tokenizer.json of Hugging Face `tokenizers`"
    return "SentencePiece model"


def _as_json(file: Path, data: bytes) -> tuple[str, dict[str, str]]:
    """The text of its tokenizer.json, and the special tokens that the file itself names."""
    kind = _kind(file)
    if kind == "tekken.json of Mistral":
        text, found = tekken_json(data)
        return text, {"eos_token": found.end, "bos_token": found.bos}
    if kind == "rank file of tiktoken":
        if file.stem not in ENCODINGS:
            raise UserError(
                f"it does not say how words are cut: there is no encoding {file.stem!r}. Read it "
                "with Tiktoken(path=..., encoding=...)." + did_you_mean(file.stem, ENCODINGS)
            )
        found = encoding(file.stem)
        named = {"eos_token": found.end} | ({"bos_token": found.bos} if found.bos else {})
        return tiktoken_json(read_ranks(data), found), named
    if kind == "SentencePiece model":
        model = read_sentencepiece(data)
        return model.to_json(), dict(model.special_tokens)
    return data.decode(), {}


def _ids(text: str) -> dict[str, int]:
    import tokenizers

    with explained("it cannot be read"):
        return dict(tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True))


def _config(folder: Path) -> dict[str, dict[str, Any]]:
    """The files beside a tokenizer that say more of it, by name."""
    found = {}
    for name in ("tokenizer_config", "special_tokens_map"):
        file = folder / f"{name}.json"
        if file.is_file():
            try:
                held = json.loads(file.read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file} beside it is damaged: {error}.") from error
            if not isinstance(held, dict):
                raise UserError(f"{file} beside it is damaged: it holds no names.")
            found[name] = held
    return found


def _content(token: Any) -> str | None:
    """A special token is written as itself or as a dict that says how it is found."""
    held = token.get("content") if isinstance(token, Mapping) else token
    return held if isinstance(held, str) else None


def _special_tokens(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    named = {}
    for name in ("special_tokens_map", "tokenizer_config"):  # the latter has the last word
        for role in _ROLES:
            if (token := _content(config.get(name, {}).get(role))) is not None:
                named[role] = token
    return named


def _chat_templates(
    folder: Path, config: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, str], ...]:
    """Files go before tokenizer_config.json, as in `transformers`."""
    held = config.get("tokenizer_config", {}).get("chat_template")
    named: dict[str, str] = {}
    if isinstance(held, str):
        named["default"] = held
    for entry in held if isinstance(held, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            named[str(entry.get("name"))] = entry["template"]
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    for name, file in files.items():
        if file.is_file():
            named[name] = file.read_text("utf-8")
    return tuple(sorted(named.items()))


def _with_added(text: str, config: Mapping[str, Mapping[str, Any]]) -> str:
    """Adds the tokens that tokenizer_config.json adds to a vocabulary file."""
    added = config.get("tokenizer_config", {}).get("added_tokens_decoder", {})
    tree = json.loads(text)
    known = {token["id"]: token for token in tree["added_tokens"]}
    model = tree["model"]["vocab"]
    size = len(model) + sum(index >= len(model) for index in known)
    for index, token in sorted((int(index), token) for index, token in dict(added).items()):
        if index < size:  # of the vocabulary; the config says how it is found in a text
            continue
        if index > size:
            raise UserError(f"tokenizer_config.json adds the id {index}, and none before it.")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        tree["added_tokens"].append(
            {"id": index, "content": token["content"]}
            | {flag: bool(token.get(flag, False)) for flag in flags}
        )
        size += 1
    return json.dumps(tree, ensure_ascii=False)


def _with_bos(text: str, config: Mapping[str, Any], named: Mapping[str, str]) -> str:
    """Begins a prompt with bos where tokenizer_config.json says so."""
    tree = json.loads(text)
    bos = _content(config.get("bos_token")) or named.get("bos_token")
    if config.get("add_bos_token") and bos:
        ids = {token["content"]: token["id"] for token in tree["added_tokens"]}
        if bos not in ids:
            raise UserError(f"tokenizer_config.json names {bos!r}, which is no special token.")
        tree["post_processor"] = prefix(bos, ids[bos])
    return json.dumps(tree, ensure_ascii=False)
