"""How well a run translates: BLEU on held-out pairs, beside two baselines."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmjax.config import build, from_dict
from lmjax.core import Dataset, EncoderDecoder, Session, Task
from lmjax.data.pairs import Pair
from lmjax.data.parallel import Parallel, validation
from lmjax.errors import UserError
from lmjax.evaluate.bleu import Bleu, corpus_bleu
from lmjax.evaluate.dictionary import learn_dictionary
from lmjax.generate.decode import Decoding
from lmjax.generate.translator import in_batches


@dataclass(frozen=True, kw_only=True)
class Translations:
    """BLEU of greedy translations of held-out pairs, with some of them to read.

    Reports `bleu`, beside it `bleu_copy` of the sources themselves and `bleu_dictionary` of their
    words one by one (`dictionary.learn_dictionary` on the training split), and `text`.

    Args:
      model: the task's.
      data: the validation split.
      num_pairs: so many, spread evenly over the split; 0 for all.
      show: how many are shown.
      batch_size: sources that are translated together.
      by_character: see `bleu.corpus_bleu`.
    """

    model: EncoderDecoder
    data: Parallel
    num_pairs: int = 200
    show: int = 3
    batch_size: int = 64
    by_character: bool = False

    def __post_init__(self) -> None:
        if self.num_pairs < 0 or self.show < 0 or self.batch_size < 1:
            raise UserError(
                f"num_pairs is {self.num_pairs}, show {self.show} and batch_size "
                f"{self.batch_size}: give at least 0, 0 and 1."
            )

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """The task must be able to read this data too, in the same tokens."""
        del ways
        task.check(self.data)
        self.data.check()
        if dict(data.fitted) != dict(self.data.fitted):
            raise UserError("the evaluation's data has another tokenizer than the training's.")

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """Translates, and compares."""
        pairs, tokenizer = self._pairs, self.data.tokenizer
        sources = [tokenizer.encode_prompt(pair.source) for pair in pairs]
        made = [""] * len(pairs)
        variables = session.variables()
        for batch in in_batches([len(source) for source in sources], self.batch_size):
            texts: list[list[int]] = [[] for _ in batch]
            for row, token in self._decoding.batch(
                variables,
                [sources[number] for number in batch],
                max_tokens=self.data.length,
                seeds=[0] * len(batch),
                end_ids=[tokenizer.end_id],
                temperature=0.0,
            ):
                texts[row].append(token)
            for number, text in zip(batch, texts, strict=True):
                made[number] = tokenizer.decode(text)
        references = [pair.target for pair in pairs]
        found = corpus_bleu(made, references, by_character=self.by_character).score
        baselines = {f"bleu_{name}": bleu.score for name, bleu in self._baselines.items()}
        return {"bleu": found, **baselines, "text": shown(pairs, made, self.show)}

    @functools.cached_property
    def _pairs(self) -> Sequence[Pair]:
        encode, room = self.data.tokenizer.encode_prompt, self.data.example["source"].shape[0]
        pairs = [pair for pair in self.data.pairs if len(encode(pair.source)) <= room]
        wanted = min(self.num_pairs or len(pairs), len(pairs))
        return [pairs[index * len(pairs) // wanted] for index in range(wanted)]

    @functools.cached_property
    def _baselines(self) -> Mapping[str, Bleu]:
        return baselines(self.data, self._pairs, by_character=self.by_character)

    @functools.cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self.model)


def baselines(
    data: Parallel, pairs: Sequence[Pair], *, by_character: bool = False
) -> dict[str, Bleu]:
    """BLEU of the sources as they are ("copy"), and of their words one by one ("dictionary").

    Args:
      data: whose training split the dictionary is learned on.
      pairs: what is translated.
    """
    train = replace(data, split="train").pairs
    dictionary = learn_dictionary((pair.source, pair.target) for pair in train)
    sources, references = [p.source for p in pairs], [p.target for p in pairs]
    by_word = [dictionary.translate(source) for source in sources]
    return {
        name: corpus_bleu(made, references, by_character=by_character)
        for name, made in (("copy", sources), ("dictionary", by_word))
    }


def shown(pairs: Sequence[Pair], made: Sequence[str], count: int) -> str:
    """Some pairs with what was made of them, for people."""
    step = max(1, len(pairs) // max(count, 1))
    return "\n\n".join(
        f"source:    {pair.source}\nreference: {pair.target}\nmade:      {text}"
        for pair, text in list(zip(pairs, made, strict=True))[::step][:count]
    )


def held_out_pairs(workdir: str | Path) -> Parallel:
    """The validation split of the run's data.

    Raises UserError where the config names no pairs, or its files are gone.
    """
    config = Path(workdir) / "config.json"
    try:
        data = build(from_dict(json.loads(config.read_text())["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} " if isinstance(error, UserError) else ""
        raise UserError(
            f"{reason}The config of {workdir} leads to no pairs that were held out: name texts to "
            "translate, as --data=FILE."
        ) from error
    if not isinstance(data, Parallel):
        raise UserError(
            f"the run's data is a {type(data).__name__}, not pairs of texts: name texts to "
            "translate, as --data=FILE."
        )
    return validation(data)
