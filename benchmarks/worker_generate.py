"""Our side: a run as `python -m lmjax.convert import` makes it, and what decodes its texts."""

from __future__ import annotations

import sys
import time

from benchmarks.worker import Generation, prompts, serve_generation


def main(workdir: str) -> None:
    import jax

    from lmjax.generate.language_model import load
    from lmjax.hardware import prepare

    prepare()  # as the command does
    began = time.perf_counter()
    lm = load(workdir)

    def run(rows: int, length: int, num_tokens: int) -> Generation:
        times: list[float] = []
        tokens: list[list[int]] = [[] for _ in range(rows)]
        made = lm.decoding.batch(
            lm.weights(rows),
            prompts(rows, length),
            max_tokens=num_tokens + 1,  # a token is told when the step after it is under way
            seeds=[0] * rows,
            temperature=0.0,
        )
        for row, token in made:
            if row == 0:
                times.append(time.perf_counter())
            tokens[row].append(token)
        return Generation(times[:num_tokens], [one[:num_tokens] for one in tokens])

    ready = {
        "ready_s": time.perf_counter() - began,
        "versions": f"jax {jax.__version__}",
    }
    serve_generation(ready, run)


if __name__ == "__main__":
    main(sys.argv[1])
