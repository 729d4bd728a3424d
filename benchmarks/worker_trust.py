"""One arm of `benchmarks.trust` on configs/gpt2.py:124m, short enough for a CPU.

'guarded' is `engine.loop.train` with all that guards a run; 'bare' dispatches a step that applies
every update, reads its loss one step late, and does nothing else. Speaks as `worker.serve` does;
the batches set the pace, as the loop asks for one when it has dispatched the step before.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.worker import Turn, say

STEPS = 1_000_000  # more than will run, so that no save or evaluation comes between
REPLICAS_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Paced:
    """A data set that times how long the next batches take to be asked for, as it is told to."""

    data: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batches(self, **arguments: Any) -> Iterator[Any]:
        batches = self.data.batches(**arguments)
        yield from itertools.islice(batches, 2)
        say({})
        for line in sys.stdin:
            turn = Turn()
            yield next(batches)  # untimed: see `serve`
            turn.begin()
            yield from itertools.islice(batches, int(line.split()[1]))
            say(turn.end())
        raise KeyboardInterrupt  # nobody asks for more


def main(arm: str) -> None:
    import jax

    from lmjax.config import build_and_resolve, load_config
    from lmjax.hardware import prepare_cpu

    prepare_cpu()
    changes = {"batch_size": 4, "data.length": 256, "steps": STEPS, "save_every": STEPS}
    changes |= {"eval_every": 0, "log_every": 10, "watch.replicas_every": REPLICAS_EVERY}
    config = load_config("configs/gpt2.py:124m", {k: str(v) for k, v in changes.items()})
    run, tree = build_and_resolve(config)
    run = dataclasses.replace(run, data=Paced(run.data))
    if arm == "bare":
        _bare(run)
        return
    from lmjax.engine.loop import train

    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder), config=tree, devices=jax.devices()[:1], quiet=True)


def _bare(run: Any) -> None:
    import jax
    import jax.numpy as jnp

    from lmjax.engine.guard import Guard
    from lmjax.engine.run import compile_run

    class Unguarded(Guard):
        def judge(self, memory: Any, loss: Any, norm: Any) -> Any:
            return True, jnp.zeros((), bool), dict(memory)

    run = dataclasses.replace(run, guard=Unguarded())
    program = compile_run(run, devices=jax.devices()[:1])
    state, unread = program.init(), None
    for batch in run.data.batches(batch_size=run.batch_size, seed=run.seed):
        state, metrics = program.train_step(state, program.put(batch))
        if unread is not None:
            float(unread["loss"].value)
        unread = metrics


if __name__ == "__main__":
    main(sys.argv[1])
