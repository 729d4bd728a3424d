"""`python -m lmjax.evaluate.translate --workdir=DIR [--data=FILE] [--out=FILE]`: translates.

Without --data it translates what the run held out, and prints BLEU beside that of copying the
source and of a word dictionary. --data names a text file, of which each line is translated; the
lines go to --out or are printed. An --out that ends in .jsonl gets pairs, {"source": LINE,
"target": TRANSLATION}, and with --back the other way round: a run that translates from B to A so
makes pairs from A to B of texts in B, to be trained on (back-translation: Sennrich et al.,
arXiv:1511.06709).

Exit codes: 0; 1 where a file cannot be written; 2 for a bad folder, flag or text.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from absl import logging as absl_logging

from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags
from lmjax.hardware import prepare

if TYPE_CHECKING:
    from lmjax.generate.translator import Translator

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
DATA = flags.DEFINE_string("data", None, "a text file, a line a text; else what was held out")
OUT = flags.DEFINE_string("out", None, "write the translations to this file")
BACK = flags.DEFINE_bool("back", False, "with an --out of pairs: the translations are the sources")
NUM_BEAMS = flags.DEFINE_integer(
    "num_beams", 1, "search so many beams; 1 takes the likeliest token each time", lower_bound=1
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "with --num_beams: above 0 favours long texts, below 0 short ones"
)
AVERAGE = flags.DEFINE_integer(
    "average", 1, "take the mean of so many newest checkpoints", lower_bound=1
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
NUM_PAIRS = flags.DEFINE_integer(
    "num_pairs", 0, "of what was held out: only so many; 0 for all", lower_bound=0
)
BY_CHARACTER = flags.DEFINE_bool(
    "by_character", False, "BLEU of Chinese and Japanese: every character is a token"
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "texts translated together", lower_bound=1)


def main(argv: list[str]) -> None:
    """Translates, and prints or writes it."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    prepare()
    from lmjax.generate.translator import Translator

    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        pairs = OUT.value is not None and OUT.value.endswith(".jsonl")
        if BACK.value and not pairs:
            raise UserError("--back turns pairs round: give an --out that ends in .jsonl too.")
        translator = Translator(
            workdir=WORKDIR.value,
            step=STEP.value,
            average=AVERAGE.value,
            num_beams=NUM_BEAMS.value,
            length_penalty=LENGTH_PENALTY.value,
            batch_size=BATCH_SIZE.value,
        )
        if DATA.value is None:
            texts, made = _held_out(translator)
        else:
            texts = _lines(DATA.value)
            made = translator.translate(texts)
        _write(texts, made, pairs=pairs)
    except UserError as error:
        fail(error, error.code)
    except OSError as error:  # what it prints to is closed, or the disk fails
        fail(error, Exit.ERROR)


def _held_out(translator: Translator) -> tuple[list[str], list[str]]:
    """Translates what the run held out, and prints how well; (sources, translations)."""
    from lmjax.evaluate.bleu import SIGNATURE, corpus_bleu
    from lmjax.evaluate.translation import baselines, held_out_pairs, shown

    data = held_out_pairs(WORKDIR.value)
    pairs = list(data.pairs)
    if NUM_PAIRS.value:
        wanted = min(NUM_PAIRS.value, len(pairs))
        pairs = [pairs[index * len(pairs) // wanted] for index in range(wanted)]
    sources, references = [p.source for p in pairs], [p.target for p in pairs]
    began = time.monotonic()
    made = translator.translate(sources)
    seconds = time.monotonic() - began
    found = baselines(data, pairs, by_character=BY_CHARACTER.value)
    found["this run"] = corpus_bleu(made, references, by_character=BY_CHARACTER.value)
    print(shown(pairs, made, 5), end="\n\n")
    by = ", by character" if BY_CHARACTER.value else ""
    print(f"BLEU of {len(pairs)} held-out pairs ({SIGNATURE}{by}), translated in {seconds:.0f} s")
    for name, bleu in found.items():
        print(f"  {name:<12} {bleu}")
    return sources, made


def _lines(path: str) -> list[str]:
    from lmjax.data.source import find_files, text_of_file

    lines = [line for file in find_files(path) for line in text_of_file(file).splitlines()]
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} holds no text to translate.")
    return lines


def _write(texts: list[str], made: list[str], *, pairs: bool) -> None:
    """To --out, or where there is none and the texts were given, to the terminal."""
    lines = made
    if pairs:
        names = ("target", "source") if BACK.value else ("source", "target")
        lines = [
            json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False)
            for pair in zip(texts, made, strict=True)
            if all(side.strip() for side in pair)
        ]
    text = "".join(f"{line}\n" for line in lines)
    if OUT.value is not None:
        Path(OUT.value).write_text(text, "utf-8")
    elif DATA.value is not None:
        print(text, end="")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
