"""`python -m lmjax.data`: what it prints is the batch that a run reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.core import Batch
from lmjax.data.describe import describe, digest, spell
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mixture(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    file = tmp_path_factory.mktemp("other") / "b.txt"
    file.write_text("b\n" * 300)
    text = Text(path=folder, length=16, vocabulary=Bytes(), valid_fraction=0.3)
    other = dataclasses.replace(text, path=str(file), valid_fraction=0)
    return Mixture(sources={"many": text, "few": other}, weights={"many": 2, "few": 1})


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where jax has no device: it must need none."""
    return subprocess.run(
        [sys.executable, "-m", "lmjax.data", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_batch_is_the_one_that_a_run_reads(mixture: Mixture) -> None:
    run = mixture.batches(batch_size=6, seed=4)
    for number, batch in enumerate(itertools.islice(run, 8)):
        found = describe(mixture, number, batch_size=6, seed=4)
        assert found["sha256"] == digest(batch)
        assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, sort_keys=True))
        for name, value in batch.items():
            told = np.array([row["arrays"][name] for row in found["rows"]], value.dtype)
            assert told.tobytes() == value.tobytes()
        assert found["num_weightless"] == (batch["weights"] == 0).sum()
        for row, shown in enumerate(found["rows"]):
            assert shown["example"] == 6 * number + row
            weightless = np.zeros(16, bool)
            for begin, end in shown["weightless"]:
                weightless[begin:end] = True
            np.testing.assert_array_equal(weightless, batch["weights"][row] == 0)
            text = "".join(piece["text"] for piece in shown["pieces"])
            assert (text.strip("b\n") == "") == (shown["source"] == "few")
    run.close()


def test_nothing_but_the_batch_is_read(mixture: Mixture) -> None:
    read: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(Mixture):
        def batches(self, *, start: int = 0, **options: Any) -> Iterator[Batch]:  # type: ignore[override]
            read.append(start)
            return super().batches(start=start, **options)

    watched = Watched(sources=mixture.sources, weights=mixture.weights, workers=2)
    far = describe(watched, 10**11, batch_size=4, seed=0, rows=1)
    assert read == [10**11]
    assert len(far["rows"]) == 1 and far["rows"][0]["example"] == 4 * 10**11
    assert "(3 more rows)" in list(spell(far))


def test_the_digest_sees_every_bit() -> None:
    batch = {"a": np.zeros((2, 2), np.int32), "b": np.zeros((2,), np.float32)}
    digests = {digest(batch), digest({k: batch[k] for k in "ba"})}
    assert len(digests) == 1
    negative = batch["b"].copy()
    negative[1] = -0.0
    for name, value in (
        ("b", negative),
        ("a", batch["a"].astype("u4")),
        ("a", np.zeros((4, 1), "i4")),
    ):
        digests.add(digest(batch | {name: value}))
    digests.add(digest({"a": batch["a"], "c": batch["b"]}))
    assert len(digests) == 5


def test_lines_say_what_is_padding_and_what_has_no_weight(tmp_path: Path) -> None:
    for name, size in (("a", 5), ("b", 8)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    halves = Text(
        path=str(tmp_path), length=6, vocabulary=Bytes(), valid_fraction=0.5, split_by="tail"
    )
    lines = list(spell({"step": 1, **describe(validation(halves), 0, batch_size=2, seed=0)}))
    assert lines[0] == "step 1 trains on batch 0: examples 0 to 1 of seed 0"
    assert lines[4:] == [  # aaa, end, bb | bb; the target of the last token, an end, is not there
        "targets of weight 0: 5 of 12",
        "row 0, example 0",
        f"  columns 0:4: document 0, characters 2:5, tokens 0:4, of {tmp_path}/a.txt",
        "    text 'aaa'",
        "    ids 97 97 97 256",
        f"  columns 4:6: document 1, characters 4:6, tokens 0:2, of {tmp_path}/b.txt",
        "    text 'bb'",
        "    ids 98 98",
        "  weight 0: columns 3:4",
        "row 1, example 1",
        f"  columns 0:2: document 1, characters 6:8, tokens 2:4, of {tmp_path}/b.txt",
        "    text 'bb'",
        "    ids 98 98",
        "  weight 0: columns 2:6",
        "  padding: columns 2:6",
    ]


def test_a_data_set_that_tells_no_origins_is_shown_all_the_same(mixture: Mixture) -> None:
    class Plain:
        tokenizer = mixture.tokenizer
        check = mixture.check
        batches = mixture.batches

    found = describe(Plain(), 3, batch_size=4, seed=0)  # type: ignore[arg-type]
    known = describe(mixture, 3, batch_size=4, seed=0)
    assert found["sha256"] == known["sha256"]
    for row, other in zip(found["rows"], known["rows"], strict=True):
        assert row["pieces"] is row["source"] is row["padding"] is None
        assert row["text"] == "".join(piece["text"] for piece in other["pieces"])
        assert f"  text {row['text']!r}" in list(spell(found))


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be: that is the question.\n" * 40)
    config = ["--config=configs/shakespeare.py:smoke", f"--config.data.path={file}"]
    config += ["--config.data.split_by=tail", "--config.data.vocabulary.vocab_size=260"]
    done = command(*config, "--step=3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["step"], found["batch"], found["batch_size"]) == (3, 2, 16)
    for row in found["rows"]:
        for piece in row["pieces"]:
            assert piece["name"] == str(file)
            assert file.read_text()[slice(*piece["characters"])] == piece["text"]
    (tmp_path / "incidents.jsonl").write_text(
        '{"step": 2, "batch": 1, "policy": "rollback", "left_out": []}\n'
        '{"step": 1, "batch": 0, "policy": "skip", "left_out": []}\n'
    )
    again = command(*config, "--step=2", f"--workdir={tmp_path}", "--rows=2")
    assert again.returncode == 0, again.stderr
    assert f"sha256: {found['sha256']}" in again.stdout  # batch 1 is left out: step 2 has batch 2
    assert "(14 more rows)" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=1", "--workdir=nowhere"], "there is no folder 'nowhere'"),
        (["--step=9"], "past the run's 8 steps; --batch=8 shows"),
    ],
)
def test_mistakes_are_said_in_a_sentence(arguments: list[str], message: str) -> None:
    done = command("--config=configs/shakespeare.py:smoke", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
