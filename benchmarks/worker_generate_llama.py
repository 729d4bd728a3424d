"""The side of llama.cpp, by the package xllamacpp: its server on a GGUF file, without lmjax."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from benchmarks.worker import Generation, prompts, serve_generation

CONTEXT = 576
ROWS = 8


def main(file: str) -> None:
    import xllamacpp

    began = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = CONTEXT * ROWS, ROWS, False
    params.n_gpu_layers, params.verbosity, params.cache_prompt = 0, 0, False
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], num_tokens: int) -> dict[str, Any]:
        return server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "timings_per_token": True,
            }
        )

    def run(rows: int, length: int, num_tokens: int) -> Generation:
        """Rows go together; its own clock says what decoding took, which is the slowest row's."""
        with ThreadPoolExecutor(rows) as pool:
            answers = list(pool.map(lambda one: ask(one, num_tokens), prompts(rows, length)))
        took = max(answer["timings"]["predicted_ms"] for answer in answers) / 1e3
        return Generation([0.0, took], [])

    ready = {
        "ready_s": time.perf_counter() - began,
        "versions": f"xllamacpp {version('xllamacpp')}",
    }
    serve_generation(ready, run)


if __name__ == "__main__":
    main(sys.argv[1])
