"""Subwords of Hugging Face `tokenizers`: the one kind that every published vocabulary becomes."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.chat import ChatTemplate, Rendered
from lmjax.data.pieces import (
    LARGEST_VOCABULARY,
    byte_level_piece,
    explained,
    join,
    sentencepiece_piece,
    sha256,
)
from lmjax.errors import UserError


class ChatTokens(NamedTuple):
    """A conversation as ids, int32 [T], and which of them the assistant said, bool [T]."""

    ids: np.ndarray
    assistant: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SubwordTokenizer:
    """Any tokenizer of Hugging Face `tokenizers`, given as the text of its tokenizer.json.

    Special tokens that occur literally in a text are spelled out by `encode`, never taken for
    control; in prompts and in conversations they are control.
    Departure: `token_bytes` is exact for byte-level vocabularies (GPT-2, Llama 3, Qwen); where the
    tokenizer drops or adds characters (lower-casing, SentencePiece's leading space), it counts the
    characters of the token and not of the text.

    Attributes:
      special_tokens: (role, token), roles as transformers names them: bos_token, pad_token, ...
      chat_templates: (name, Jinja text) of the conversations that the model was trained on.
    """

    tokenizer_json: str
    vocab_size: int
    end_id: int
    special_tokens: tuple[tuple[str, str], ...] = ()
    chat_templates: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def _tree(self) -> dict[str, Any]:
        with explained("the tokenizer cannot be read"):
            return dict(json.loads(self.tokenizer_json))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._make()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _controlled(self) -> Any:
        """The same, but special tokens in a text are control."""
        return self._make()

    def _make(self) -> Any:
        import tokenizers

        with explained("the tokenizer cannot be read"):
            text = self.tokenizer_json
            if cut := _cut_of_controls(self._tree):
                steps = [step for step in (self._tree.get("pre_tokenizer"), cut) if step]
                both = {"type": "Sequence", "pretokenizers": steps}
                text = json.dumps(self._tree | {"pre_tokenizer": both}, ensure_ascii=False)
            tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _decoder(self) -> str:
        return json.dumps(self._tree.get("decoder"))

    @functools.cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in self._decoder

    def _ids_of(self, text: str) -> np.ndarray:
        with explained("the tokenizer cannot spell the text"):
            encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoded.ids, np.int32)

    @functools.cached_property
    def exact(self) -> bool:
        """Whether the tokens of a text hold all of its bytes."""
        return self._byte_level and self._tokenizer.normalizer is None

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes that each id stands for."""
        pieces = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if self._byte_level:
                pieces[index] = byte_level_piece(token)
            else:
                word = token.removeprefix("##") if '"WordPiece"' in self._decoder else token
                pieces[index] = sentencepiece_piece(word)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            text = (
                added.content.encode() if self._byte_level else sentencepiece_piece(added.content)
            )
            pieces[index] = b"" if added.special else text
        pieces[self.end_id] = b""
        return pieces

    def encode(self, text: str) -> np.ndarray:
        """Ids without any special token, int32 [tokens]; raises UserError for what it cannot spell.

        A byte-level vocabulary that lacks bytes drops them, which is an error here.
        """
        ids = self._ids_of(text)
        lost = len(text.encode()) - int(self.token_bytes()[ids].sum()) if self.exact else 0
        if lost > 0 or (text.strip() and not len(ids)):
            raise UserError(
                f"the tokenizer drops {lost or len(text)} bytes of the text, for which it has no "
                "token. Give a tokenizer that spells any text."
            )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` gives for each text, on all cores."""
        with explained("the tokenizer cannot spell the texts"):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(row.ids, np.int32) for row in encoded]
        for text, ids in zip(texts, rows, strict=True):
            if self.exact and len(text.encode()) > int(self.token_bytes()[ids].sum()):
                self.encode(text)  # which says what is wrong
            elif text.strip() and not len(ids):
                self.encode(text)
        return rows

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids as `transformers` gives them to the model, int32 [tokens].

        The special tokens that the file's post-processor adds are there (Llama's bos, BERT's [CLS]
        and [SEP]), and those written in the text are control.
        """
        with explained("the tokenizer cannot spell the text"):
            return np.array(self._controlled.encode(text).ids, np.int32)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatTokens:
        """A conversation as the model was trained to read it; see `ChatTemplate.render`.

        Special tokens are control wherever they stand, in the messages too, as in `transformers`:
        strip them from what strangers wrote.
        """
        rendered = self.chat.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return self.encode_rendered(rendered)

    def encode_rendered(self, rendered: Rendered) -> ChatTokens:
        """The ids of what a template made, and which of them lie in the assistant's spans."""
        with explained("the tokenizer cannot spell the conversation"):
            encoded = self._controlled.encode(rendered.text, add_special_tokens=False)
        said = np.zeros(len(encoded.ids), bool)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        for start, end in rendered.assistant:
            said |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return ChatTokens(np.array(encoded.ids, np.int32), said)

    @property
    def chat(self) -> ChatTemplate:
        """The template of conversations; raises UserError where the tokenizer came without."""
        if not self.chat_templates:
            raise UserError(
                "the tokenizer has no chat template: its folder had no chat_template.jinja, and no "
                "chat_template in tokenizer_config.json. Put one there and read it again."
            )
        return ChatTemplate(templates=self.chat_templates, special_tokens=self.special_tokens)

    def special_id(self, role: str) -> int | None:
        """The id of "bos_token", "pad_token", ...; None where there is no such token."""
        token = dict(self.special_tokens).get(role)
        return None if token is None else self.token_id(token)

    def token_id(self, token: str) -> int | None:
        """The id of a token as its file spells it; None where there is no such token."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def decode(self, ids: Any) -> str:
        """The text of the ids, special tokens left out."""
        if self._byte_level:
            return join(ids, self._pieces)
        known = [i for i in np.asarray(ids).reshape(-1).tolist() if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def token_bytes(self) -> np.ndarray:
        """Bytes of each token's own text; special tokens have none."""
        return self._lengths

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.float32)

    def check(self) -> None:
        """Raises UserError where ids are ambiguous, out of range, or differ from call to call."""
        if not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(f"vocab_size is {self.vocab_size}: give 1 to {LARGEST_VOCABULARY}.")
        if not 0 <= self.end_id < self.vocab_size:
            raise UserError(f"end_id is {self.end_id}, beyond the {self.vocab_size} ids.")
        token_of: dict[int, str] = {}
        for token, index in sorted(self._tokenizer.get_vocab(with_added_tokens=True).items()):
            if index >= self.vocab_size:
                raise UserError(
                    f"the token {token!r} has the id {index}, beyond the {self.vocab_size} ids."
                )
            if index in token_of:
                raise UserError(
                    f"the tokens {token_of[index]!r} and {token!r} have one id, {index}."
                )
            token_of[index] = token
        if getattr(self._tokenizer.model, "dropout", None):
            raise UserError(
                "its dropout is not 0: the same text would give other ids each time. Set "
                "model.dropout to null in the file."
            )
        end, spelled = token_of.get(self.end_id, ""), np.zeros(0, np.int32)
        with contextlib.suppress(UserError):  # what cannot be spelled is what is wanted
            spelled = self._ids_of(end)
        if self.end_id in spelled:
            raise UserError(
                f"a text can spell the token {end!r}, which is to end documents: give a special "
                "token, that no text spells."
            )

    def to_json(self) -> str:
        """See `tokenizer_from_json`."""
        named = {
            "special_tokens": dict(self.special_tokens),
            "chat_templates": dict(self.chat_templates),
        }
        return json.dumps(
            {
                "kind": "subword",
                "vocab_size": self.vocab_size,
                "end_id": self.end_id,
                **{name: held for name, held in named.items() if held},
                "tokenizer": json.loads(self.tokenizer_json),
            }
        )

    @functools.cached_property
    def hash(self) -> str:
        """Sha256 of `to_json()`."""
        return sha256(self.to_json())


def _cut_of_controls(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """A step that cuts control tokens which a text spells, before their last character.

    A Unigram model holds its control tokens among its pieces and would take "</s>" in a text for
    the end; SentencePiece itself never does.
    """
    model = tree.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "Unigram":
        return None
    tokens = [str(t["content"]) for t in tree.get("added_tokens", ()) if t.get("special")]
    cuts = [f"{re.escape(t[:-1])}(?={re.escape(t[-1])})" for t in tokens if len(t) > 1]
    if model.get("byte_fallback"):
        cuts.append("<0x[0-9A-F]{2}(?=>)")
    if not cuts:
        return None
    pattern = {"Regex": "|".join(cuts)}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
