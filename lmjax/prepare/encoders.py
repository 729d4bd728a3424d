"""Texts to token ids, many at a time and fast: other implementations of the same tokenizer.

`tokenizers` is the reference. tiktoken encodes byte-level BPE some 4 to 8 times as fast, gigatoken
(young) 14 to 20 times; each is made from the same tokenizer.json, and used only while it gives the
reference's ids for the first documents of every shard. What it cannot encode (tiktoken's regular
expressions overflow on endless words) the reference does.
"""

from __future__ import annotations

import functools
import json
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmjax.data.pieces import byte_level_piece, byte_of_character, explained
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tiktoken import encoding as published
from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError

Engine = Literal["auto", "tokenizers", "tiktoken", "gigatoken"]
ENGINES = ("auto", "tokenizers", "tiktoken", "gigatoken")
NormalForm = Literal["", "NFC", "NFD", "NFKC", "NFKD"]
log = logging.getLogger("lmjax")

Encode = Callable[[Sequence[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Encoder:
    """Encodes documents as `tokenizer.encode` does, by an engine that is held to it.

    Args:
      tokenizer: the reference.
      engine: "auto" is the first of gigatoken, tiktoken and tokenizers that is installed, can read
        the vocabulary, and errs on no document that is checked; gigatoken only where the bytes of
        all documents can be counted. One that was named and cannot read the vocabulary is an error;
        if it errs, the reference goes on.
      checked_documents: of every call, so many documents are encoded by the reference as well. Of
        the others it is checked that their ids spell as many bytes as they have, where ids of the
        vocabulary spell bytes (byte-level BPE without a normal form).
    """

    tokenizer: TextTokenizer
    engine: Engine = "auto"
    checked_documents: int = 32

    def __call__(self, texts: Sequence[str]) -> tuple[list[np.ndarray], str]:
        """Ids of each text, unsigned or int32, without an end, and the name of the engine."""
        expected: list[np.ndarray] | None = None
        for name in self._names:
            if (encode := self._made(name)) is None:
                continue
            if expected is None:
                expected = self._reference(texts[: self.checked_documents])
            found = encode(texts)
            number = self._first_wrong(texts, found, expected)
            if number is None:
                return found, name
            log.warning(
                "%s and tokenizers give different ids to document %d of a shard (%r...): another "
                "engine encodes that shard",
                name,
                number,
                texts[number][:60],
            )
        return self._reference(texts), "tokenizers"

    def _first_wrong(
        self, texts: Sequence[str], found: list[np.ndarray], expected: list[np.ndarray]
    ) -> int | None:
        """The first document whose ids are not the reference's, or do not spell all of its bytes.

        The latter can be known of byte-level vocabularies without a normal form alone.
        """
        for number, (fast, own) in enumerate(zip(found, expected, strict=False)):
            if not np.array_equal(fast, own):
                return number
        if isinstance(self.tokenizer, SubwordTokenizer) and self.tokenizer.exact:
            size = self.tokenizer.token_bytes()
            for number, (text, ids) in enumerate(zip(texts, found, strict=True)):
                if int(size[ids].sum(dtype=np.int64)) != len(text.encode()):
                    return number
        return None

    def _reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not isinstance(self.tokenizer, SubwordTokenizer):
            return [self.tokenizer.encode(text) for text in texts]
        return self.tokenizer.encode_batch(texts)

    @property
    def _names(self) -> Sequence[str]:
        """Engines, the one to try first first; none where the reference alone encodes."""
        if self.engine == "tokenizers" or not isinstance(self.tokenizer, SubwordTokenizer):
            return ()
        if self.engine != "auto":
            return (self.engine,)
        # of a vocabulary that is not exact only the first documents could be checked
        return ("gigatoken", "tiktoken") if self.tokenizer.exact else ("tiktoken",)

    def _made(self, name: str) -> Encode | None:
        """An engine's function, made when it is first asked for; None where "auto" does without."""
        if name not in self._engines:
            assert isinstance(self.tokenizer, SubwordTokenizer)
            make = {"gigatoken": _gigatoken, "tiktoken": _tiktoken}[name]
            try:
                self._engines[name] = make(self.tokenizer)
            except UserError as error:
                if self.engine != "auto":
                    raise
                log.info("%s does not encode: %s", name, error)
                self._engines[name] = None
        return self._engines[name]

    @functools.cached_property
    def _engines(self) -> dict[str, Encode | None]:
        return {}


def _tiktoken(tokenizer: SubwordTokenizer) -> Encode:
    """tiktoken with the tokenizer's own merges; raises UserError where it cannot spell the same."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"engine 'tiktoken' needs `pip install tiktoken`: {error}.") from error
    tree = json.loads(tokenizer.tokenizer_json)
    pattern, normal_form = _words(tree), _normal_form(tree)
    ranks, id_of = _ranks(tree["model"])
    added = _added(tree, special=False)
    # Without any special token its search for them stops at every character. None is ever allowed.
    special = {"<|special|>": len(ranks)}
    with explained("tiktoken cannot be made of this tokenizer"):
        encoding = tiktoken.Encoding(
            "lmjax", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = []
        for text in texts:
            plain = unicodedata.normalize(normal_form, text) if normal_form else text
            if any(token in text for token in added):
                found.append(tokenizer.encode(text))
                continue
            try:
                ids = id_of[encoding.encode_to_numpy(plain, disallowed_special=())]
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException:  # a panic of Rust's regular expressions on endless words
                ids = tokenizer.encode(text)
            found.append(ids)
        return found

    return encode


def _words(tree: Mapping[str, Any]) -> str:
    """The one pattern that cuts a text into words; raises UserError where there are more."""
    steps = tree.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return published("gpt2").pattern
        first = steps[0]
        if (
            len(steps) == 2
            and not last.get("use_regex", True)
            and first.get("type") == "Split"
            and first.get("behavior") == "Isolated"
            and not first.get("invert")
            and "Regex" in first.get("pattern", {})
        ):
            return str(first["pattern"]["Regex"])
    raise UserError("its words are not cut by one pattern and then spelled in bytes.")


def _normal_form(tree: Mapping[str, Any]) -> NormalForm:
    kind = (tree.get("normalizer") or {"type": ""})["type"]
    if kind not in ("", "NFC", "NFD", "NFKC", "NFKD"):
        raise UserError(f"its normalizer is {kind}, and not a normal form of Unicode.")
    found: NormalForm = kind
    return found


def _ranks(model: Mapping[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """Bytes and merged tokens by their rank, and the id of each rank."""
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in plain):
        raise UserError("it is not byte-level BPE.")
    ids: Mapping[str, int] = model["vocab"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = dict.fromkeys([t for t in ids if len(byte_level_piece(t)) == 1 and len(t) == 1])
    if len(tokens) != 256:
        raise UserError(f"it spells {len(tokens)} of the 256 bytes.")
    for left, right in pairs:
        tokens.setdefault(left + right)
    if model.get("ignore_merges"):  # words that are tokens, though no merge makes them
        for token in ids:
            if all(c in byte_of_character() for c in token):
                tokens.setdefault(token)
    if missing := [token for token in tokens if token not in ids]:
        raise UserError(f"a merge makes {missing[0]!r}, which is no token.")
    ranks = {byte_level_piece(token): rank for rank, token in enumerate(tokens)}
    return ranks, np.array([ids[token] for token in tokens], np.uint32)


def _gigatoken(tokenizer: SubwordTokenizer) -> Encode:
    """gigatoken made from the same file; texts that spell a special token are not its own."""
    try:
        import gigatoken
    except ImportError as error:
        raise UserError(f"engine 'gigatoken' needs `pip install gigatoken`: {error}.") from error
    special = _added(json.loads(tokenizer.tokenizer_json), special=True)
    with explained("gigatoken cannot be made of this tokenizer"):
        made = gigatoken.Tokenizer.from_json(tokenizer.tokenizer_json)

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        with explained("gigatoken cannot spell a text"):
            # one by one: a batch comes as an array of a package that takes 0.3 s to import
            found = [np.asarray(made.encode(text), np.uint32) for text in texts]
        for number, text in enumerate(texts):
            if any(token in text for token in special):
                found[number] = tokenizer.encode(text)
        return found

    return encode


def _added(tree: Mapping[str, Any], *, special: bool) -> list[str]:
    """Tokens that are found in a text before it is cut into words; special ones never are."""
    return [t["content"] for t in tree.get("added_tokens", ()) if bool(t.get("special")) == special]
