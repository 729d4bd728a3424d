"""lmjax: train, evaluate and run language models with JAX, the same on a laptop and on a pod.

The notebook's way in; importing it touches no device and defines no flag:

    config = lmjax.load_config("configs/shakespeare.py:smoke")
    lmjax.train(config, "runs/first")
    lm = lmjax.load("runs/first")
    print(lm.generate("ROMEO:"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmjax.config import build, call, load_config, ref
from lmjax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from lmjax.engine.program import Program
    from lmjax.engine.state import TrainState
    from lmjax.generate.language_model import LanguageModel

__all__ = ["UserError", "build", "call", "compile", "load", "load_config", "ref", "train"]


def compile(config: ConfigDict) -> Program:
    """Compiles a config's `init`, `train_step`, `eval_step` and `put`, for one's own loop."""
    from lmjax.engine.run import compile_run

    return compile_run(build(config))


def train(config: ConfigDict, workdir: str, **options: Any) -> TrainState:
    """Trains a config to its last step; an existing run in `workdir` is continued.

    `options` are those of `lmjax.engine.loop.train`.
    """
    from lmjax.config import build_and_resolve
    from lmjax.convert.weights import LOADERS
    from lmjax.engine import loop

    run, tree = build_and_resolve(config)
    return loop.train(run, workdir, config=tree, **{"loaders": LOADERS, **options})


def load(workdir: str, *, step: int | None = None) -> LanguageModel:
    """The trained model of a run, ready to `generate`."""
    from lmjax.generate.language_model import load

    return load(workdir, step=step)
