"""Memory does not grow with the input, nor with how many records resemble each other."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import resource, sys
from lmjax.data.vocabulary import Bytes
from lmjax.prepare.backends.inline import Inline
from lmjax.prepare.pipeline import Prepare, run
from lmjax.prepare.read.source import Source
from lmjax.prepare.stages.exact import Exact
from lmjax.prepare.stages.near import Near
from lmjax.prepare.tokenise import Tokenise

prepare = Prepare(
    sources={"x": Source(path=sys.argv[1])},
    stages={"exact": Exact(), "near": Near()},
    tokens=Tokenise(vocabulary=Bytes()),
    shard_bytes=16 << 20,
)
manifest = run(prepare, sys.argv[2], engine=Inline())
print(manifest["stages"][2]["kept"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
"""


def write(folder: Path, *, megabytes: int, copies: int) -> None:
    """Documents of 4 KB in groups of near-duplicates, each group in one file."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdfgst", k=rng.randint(2, 9))) for _ in range(5000)]
    folder.mkdir()
    for number in range(megabytes // 8):
        with (folder / f"{number:03d}.jsonl").open("w") as file:
            while file.tell() < 8e6:
                document = rng.choices(words, k=600)
                for _ in range(copies):
                    document[rng.randrange(600)] = rng.choice(words)
                    file.write(json.dumps({"text": " ".join(document)}) + "\n")


@pytest.mark.slow
def test_the_peak_is_bounded(tmp_path):
    """Groups of 12: each document is compared with 11 others, whose shingles meet in pairs."""
    peaks = {}
    for megabytes in (24, 80):
        source, out = tmp_path / f"in{megabytes}", tmp_path / f"out{megabytes}"
        write(source, megabytes=megabytes, copies=12)
        command = [sys.executable, "-c", RUN, str(source), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        kept, peaks[megabytes] = map(int, done.stdout.split())
        assert kept == pytest.approx(megabytes * 1e6 / 12 / 4000, rel=0.3)
    assert peaks[80] < 1000 and peaks[80] < 1.25 * peaks[24], peaks
