"""`python -m lmjax.generate --workdir=DIR --prompt="ROMEO:"`: text from a trained run."""

from __future__ import annotations

from absl import app, flags
from absl import logging as absl_logging

from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags
from lmjax.hardware import prepare

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "text to continue", required=True)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 200, "how many tokens to add at most", lower_bound=0
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 50, "draw from so many tokens; 0 for all", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same text", lower_bound=0)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")


def main(argv: list[str]) -> None:
    """Prints the prompt and, as it comes, its continuation."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    prepare()
    from lmjax.generate.language_model import load

    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        lm = load(WORKDIR.value, step=STEP.value)
        print(PROMPT.value, end="", flush=True)
        for piece in lm.stream(
            PROMPT.value,
            max_tokens=MAX_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            seed=SEED.value,
        ):
            print(piece, end="", flush=True)
        print()
    except UserError as error:
        fail(error, error.code)
    except OSError as error:  # what it prints to is closed, or the disk fails
        fail(error, Exit.ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
