"""datatrove's side of `benchmarks.prepare`: its own blocks with FineWeb's settings, without lmjax.

python worker_prepare_datatrove.py CORPUS TOKENIZER OUT WORKERS

The last line that it prints is JSON: documents and seconds of the clock by stage, and versions.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
BANDS, ROWS = 14, 8


def content(document: Any) -> str:
    """What exact duplicates have in common: the text, without regard to white space."""
    return " ".join(document.text.split())


def steps(corpus: str, tokenizer: str, out: Path, tasks: int) -> list[tuple[int, list[Any]]]:
    """Pipelines in their order: each one's number of tasks, and (stage, block) of its blocks."""
    from datatrove.pipeline.dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    def at(name: str) -> str:
        return str(out / name)

    near = MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=ROWS)
    exact = ExactDedupConfig(content_getter=content)
    # FineWeb's own order and settings, as datatrove's examples have them.
    filters = [
        ("repetition", GopherRepetitionFilter()),
        ("gopher", GopherQualityFilter()),
        ("c4", C4QualityFilter(filter_no_terminal_punct=False)),
        ("fineweb", FineWebQualityFilter()),
        ("anonymise", PIIFormatter()),
    ]
    tokens = DocumentTokenizer(
        at("tokens"), tokenizer, eos_token=END, shuffle_documents=False, batch_size=1000
    )

    def write(name: str) -> tuple[str, Any]:
        return "between", JsonlWriter(at(name), compression=None)

    def read(name: str) -> tuple[str, Any]:
        return "between", JsonlReader(at(name))

    return [
        (tasks, [("read", JsonlReader(corpus)), *filters, write("filtered")]),
        (tasks, [read("filtered"), ("near", MinhashDedupSignature(at("hashes"), config=near))]),
        (BANDS, [("near", MinhashDedupBuckets(at("hashes"), at("pairs"), config=near))]),
        (1, [("near", MinhashDedupCluster(at("pairs"), at("removed"), config=near))]),
        (tasks, [read("filtered"), ("near", MinhashDedupFilter(at("removed"))), write("near")]),
        (tasks, [read("near"), ("exact", ExactDedupSignature(at("exact"), config=exact))]),
        (1, [("exact", ExactFindDedups(at("exact"), at("same"), config=exact))]),
        (
            tasks,
            [read("near"), ("exact", ExactDedupFilter(at("same"), config=exact)), write("kept")],
        ),
        (tasks, [read("kept"), ("tokens", tokens)]),
    ]


def main(corpus: str, tokenizer: str, given: str, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor

    out = Path(given)
    tasks = len(list(Path(corpus).glob("*.jsonl")))
    stages: dict[str, dict[str, float]] = {}
    for number, (count, blocks) in enumerate(steps(corpus, tokenizer, out, tasks)):
        logs = out / "logs" / str(number)
        LocalPipelineExecutor(
            pipeline=[block for _, block in blocks],
            tasks=count,
            workers=min(workers, count),
            logging_dir=str(logs),
        ).run()
        told = json.loads((logs / "stats.json").read_text())
        for (stage, _), block in zip(blocks, told, strict=True):
            row = stages.setdefault(stage, {"seconds": 0.0})
            row["seconds"] += block["time_stats"]["total"]
            for name, keys in (("in", ("total", "documents")), ("kept", ("forwarded",))):
                for key in keys:
                    if (value := block["stats"].get(key)) is not None and stage != "between":
                        row[name] = value if isinstance(value, int | float) else value["total"]
    stages["tokens"]["in"] = stages["tokens"]["kept"] = stages["exact"]["kept"]
    names = ("datatrove", "tokenizers", "spacy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(json.dumps({"stages": stages, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
