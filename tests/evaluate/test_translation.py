"""The evaluator and the command: BLEU of held-out pairs beside baselines, pairs turned round."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmjax.config import call, to_dict
from lmjax.data.pairs import Pair
from lmjax.data.parallel import Parallel, validation
from lmjax.data.vocabulary import Bytes, Characters
from lmjax.errors import UserError
from lmjax.evaluate.bleu import corpus_bleu
from lmjax.evaluate.translation import Translations, baselines, held_out_pairs
from lmjax.generate.language_model import load
from lmjax.tasks.translate import Translate
from tests.generate.translating import CHARACTERS, ROOM, write_run

ROOT = Path(__file__).parents[2]
AT = {"document": "", "name": ""}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs in the characters of the run: the target is the source, each letter the next one."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words, draw = [a + b for a in "abcd" for b in "efg"], random.Random(0)
    sources = [" ".join(draw.sample(words, 4)) + "." for _ in range(120)]
    shift = str.maketrans("abcdefgh", "bcdefgha")
    rows = [{"source": s, "target": s.translate(shift)} for s in sources]
    rows.append({"source": CHARACTERS, "target": CHARACTERS})
    path.write_text("\n".join(map(json.dumps, rows)))
    return Parallel(path=str(path), length=ROOM, vocabulary=Characters(), valid_fraction=0.3)


def test_baselines_are_copies_and_words(data):
    found = baselines(validation(data), [Pair(source="ae bf cg de.", target="bf cg dh ef.", **AT)])
    assert found["copy"].score == corpus_bleu(["ae bf cg de."], ["bf cg dh ef."]).score < 50
    assert found["dictionary"].score == pytest.approx(100)


@pytest.mark.slow
def test_evaluator_is_the_runs_own_greedy_translation(data, tmp_path):
    run = load(write_run(tmp_path))
    assert validation(data).tokenizer.to_json() == run.tokenizer.to_json()
    evaluator = Translations(model=run.model, data=validation(data), num_pairs=5, batch_size=3)
    evaluator.check(Translate(model=run.model), data, ways=1)
    found = evaluator(SimpleNamespace(variables=lambda: run.variables))
    pairs = evaluator._pairs
    assert len(pairs) == 5
    made = [run.generate(p.source, max_tokens=ROOM, temperature=0.0) for p in pairs]
    expected = corpus_bleu(made, [p.target for p in pairs]).score
    assert found["bleu"] == pytest.approx(expected)
    assert all(f"made:      {text}" in found["text"] for text in made[:1])
    assert {"bleu_copy", "bleu_dictionary"} < set(found)
    other = dataclasses.replace(data, vocabulary=Bytes())
    with pytest.raises(UserError, match=r"another tokenizer|vocab_size"):
        evaluator.check(Translate(model=run.model), other, ways=1)


@pytest.mark.slow
def test_command_scores_what_was_held_out_and_writes_pairs(data, tmp_path):
    """In a process of its own; --back turns the pairs of a text file round."""
    workdir = Path(write_run(tmp_path / "run"))
    held = json.loads((workdir / "config.json").read_text())
    fields = {"path": data.path, "length": ROOM, "valid_fraction": 0.3}
    held["data"] = to_dict(call(Parallel, vocabulary=call(Characters), **fields))
    (workdir / "config.json").write_text(json.dumps(held))
    assert list(held_out_pairs(workdir).pairs) == list(validation(data).pairs)

    def run(*flags):
        command = [sys.executable, "-m", "lmjax.evaluate.translate", f"--workdir={workdir}"]
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)

    done = run("--average=3", "--num_pairs=4")
    assert done.returncode == 0, done.stderr
    for name in ("BLEU of 4 held-out pairs", "copy", "dictionary", "this run"):
        assert name in done.stdout
    (tmp_path / "mono.txt").write_text("abc\n\nhgf\n")
    out = tmp_path / "pairs.jsonl"
    done = run(f"--data={tmp_path / 'mono.txt'}", f"--out={out}", "--back")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["target"] for row in rows] == ["abc", "hgf"]
    assert all(row["source"].strip() for row in rows)
    done = run("--back")
    assert done.returncode == 2 and "give an --out that ends in .jsonl" in done.stderr


def test_runs_without_pairs_are_named(tmp_path):
    with pytest.raises(UserError, match="leads to no pairs that were held out"):
        held_out_pairs(tmp_path)
