"""`python -m lmjax.generate --workdir=DIR --prompt="ROMEO:"`: text from a trained run.

With --chat each prompt is a message, and what is printed the assistant's answer to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import app, flags
from absl import logging as absl_logging

from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags
from lmjax.hardware import prepare

if TYPE_CHECKING:
    from lmjax.generate.language_model import LanguageModel

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "text to continue; several are decoded together", required=True
)
CHAT = flags.DEFINE_bool(
    "chat", False, "each prompt is what a user says: answer it by the tokenizer's chat template"
)
SYSTEM = flags.DEFINE_string("system", None, "with --chat: what the assistant is told before")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 200, "how many tokens to add at most", lower_bound=0
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 50, "draw from so many tokens; 0 for all", lower_bound=0)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draw from the likeliest tokens that reach this probability; 1 for all"
)
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "draw from tokens of this share of the likeliest's probability; 0 for all"
)
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "above 1 makes tokens that the text holds less likely"
)
STOP = flags.DEFINE_multi_string("stop", [], "end before this string; may be given again")
SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same text", lower_bound=0)
NUM_BEAMS = flags.DEFINE_integer(
    "num_beams", 0, "search so many beams for likely texts instead of drawing one", lower_bound=0
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "with --num_beams: above 0 favours long texts, below 0 short ones"
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
AVERAGE = flags.DEFINE_integer(
    "average", 1, "take the mean of so many newest checkpoints", lower_bound=1
)
DRAWING = (TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, SEED)


def main(argv: list[str]) -> None:
    """Prints each prompt and its continuation; that of one prompt as it comes.

    Of an encoder-decoder it prints what the model makes of the prompts, and not the prompts.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    prepare()
    from lmjax.generate.language_model import load

    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        _check()
        _speak(load(WORKDIR.value, step=STEP.value, average=AVERAGE.value))
    except UserError as error:
        fail(error, error.code)
    except OSError as error:  # what it prints to is closed, or the disk fails
        fail(error, Exit.ERROR)


def _check() -> None:
    """Raises UserError for flags that mean nothing beside each other, or are out of range."""
    from lmjax.generate.sample import Sampling

    Sampling(**_settings())
    given = [flag.name for flag in DRAWING if flags.FLAGS[flag.name].present]
    if NUM_BEAMS.value and given:
        raise UserError(
            f"--num_beams searches and draws nothing: leave out --{', --'.join(given)}, or "
            "--num_beams."
        )
    if SYSTEM.value is not None and not CHAT.value:
        raise UserError("--system is told to an assistant: give --chat too.")
    if not NUM_BEAMS.value and flags.FLAGS[LENGTH_PENALTY.name].present:
        raise UserError("--length_penalty is for a search: give --num_beams too.")


def _settings() -> dict[str, Any]:
    return {flag.name: flag.value for flag in DRAWING if flag is not SEED}


def _speak(lm: LanguageModel) -> None:
    """Prints what is asked for."""
    prompts = [_conversation(prompt) if CHAT.value else prompt for prompt in PROMPT.value]
    echoed = [""] * len(prompts) if lm.reads_source or CHAT.value else PROMPT.value
    how: dict[str, Any] = {"max_tokens": MAX_TOKENS.value, "stop": STOP.value}
    if NUM_BEAMS.value:
        for number, prompt in enumerate(prompts):
            found = lm.search(
                prompt, num_beams=NUM_BEAMS.value, length_penalty=LENGTH_PENALTY.value, **how
            )
            texts = [f"{echoed[number]}{text}\n[score {score:.3f}]" for text, score in found]
            print("\n" * (number > 0) + "\n\n".join(texts))
        return
    how |= {"seed": SEED.value, **_settings()}
    if len(prompts) == 1:
        print(echoed[0], end="", flush=True)
        for piece in lm.stream(prompts[0], **how):
            print(piece, end="", flush=True)
        print()
        return
    texts = lm.generate_batch(prompts, **how)
    print("\n\n".join(said + text for said, text in zip(echoed, texts, strict=True)))


def _conversation(prompt: str) -> list[dict[str, str]]:
    told = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return [*told, {"role": "user", "content": prompt}]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
