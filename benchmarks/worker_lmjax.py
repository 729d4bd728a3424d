"""Our side: the program that the launcher runs."""

from __future__ import annotations

import sys
import time

from benchmarks.cases import CASES, Case
from benchmarks.worker import serve


def main(name: str) -> None:
    import jax
    import numpy as np

    from lmjax.engine.program import compile_program
    from lmjax.hardware import chip, prepare_cpu
    from lmjax.models.gpt import gpt
    from lmjax.optim.presets import adamw
    from lmjax.optim.schedules import constant
    from lmjax.sharding import Layout
    from lmjax.tasks.causal_lm import CausalLM

    prepare_cpu()  # as the launcher does
    case: Case = CASES[name]
    model = gpt(
        num_layers=case.num_layers,
        dim=case.dim,
        num_heads=case.num_heads,
        vocab_size=case.vocab_size,
        max_length=case.length,
        dtype=case.dtype,
        remat=case.remat,
        unroll=case.num_layers,
        vocab_multiple=1 if jax.default_backend() == "cpu" else 128,
    )
    task = CausalLM(model=model)
    example = {
        "tokens": jax.ShapeDtypeStruct((case.length,), np.int32),
        "targets": jax.ShapeDtypeStruct((case.length,), np.int32),
        "weights": jax.ShapeDtypeStruct((case.length,), np.float32),
    }
    began = time.perf_counter()
    program = compile_program(
        task,
        adamw(learning_rate=constant(peak=1e-4)),
        Layout(),
        example,
        batch_size=case.batch_size,
        devices=jax.devices()[:1],
    )
    random = np.random.default_rng(0)
    rows = random.integers(0, case.vocab_size, (case.batch_size, case.length + 1), np.int32)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "weights": np.ones(rows[:, 1:].shape, "f4"),
    }
    state = program.init()

    def run(steps: int) -> None:
        nonlocal state
        unread = None
        for _ in range(steps):  # reads one step late, as the loop does
            state, metrics = program.train_step(state, program.put(batch))
            if unread is not None:
                assert np.isfinite(float(unread["loss"].value))
            unread = metrics
        jax.block_until_ready(state)

    run(2)
    compile_s = time.perf_counter() - began
    device = jax.devices()[0].device_kind
    work, known = task.work(example), chip(device)
    ready = {
        "compile_s": compile_s,
        "device": device,
        "versions": f"jax {jax.__version__}",
        "flop_causal": work.flop * case.batch_size,
        "flop_full": work.flop_full * case.batch_size,
        "peak_flop_per_s": known.flop_per_s if known else None,
    }
    serve(ready, run)


if __name__ == "__main__":
    main(sys.argv[1])
