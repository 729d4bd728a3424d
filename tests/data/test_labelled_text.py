"""Texts with labels: what is read, set aside, split, cut and padded; batches by (seed, step)."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from lmjax.data import labelled_rows
from lmjax.data.encoded import encode_texts
from lmjax.data.labelled_rows import Row, read_rows
from lmjax.data.labelled_text import LabelledText, validation, vocab_size
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.data.vocabulary import BPE, Bytes
from lmjax.errors import UserError

ROWS = [(f"text number {n}", ("good", "bad")[n % 2]) for n in range(40)]


@pytest.fixture
def table(tmp_path):
    lines = ["label,text,part", *(f'{label},"{text}",train' for text, label in ROWS)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_of_every_kind_of_file(tmp_path, table):
    expected = [(text, label) for text, label in ROWS]
    good, bad = read_rows(str(table))
    assert [(row.text, row.label) for row in good] == expected and not bad
    assert good[0].name == f"{table}:2"
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps({"t": t, "y": y}) + "\n" for t, y in ROWS))
    good, _ = read_rows(str(jsonl), text_field="t", label_field="y")
    assert [(row.text, row.label) for row in good] == expected
    for name in ("good", "bad"):
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "folders" / name).mkdir(parents=True)
        mine = [text for text, label in ROWS if label == name]
        (tmp_path / "lines" / f"{name}.txt").write_text("\n".join(mine) + "\n")
        for n, text in enumerate(mine):
            (tmp_path / "folders" / name / f"{n}.txt").write_text(text)
    for kind, where in (("file", "lines"), ("folder", "folders")):
        good, _ = read_rows(str(tmp_path / where), label_from=kind)
        assert {(row.text, row.label) for row in good} == set(expected)


def test_bad_rows_are_set_aside_with_reason_and_count(tmp_path, cache, caplog):
    path = tmp_path / "dirt.csv"
    path.write_bytes(
        b"label,text\ngood,fine\nbad,poor\n,no label\ngood,\nugly,odd\ngood,caf\xe9\nbad,a,b\n"
    )
    data = LabelledText(path=str(path), labels=("bad", "good"), valid_fraction=0, length=8)
    data.check()
    assert [row.text for row in data.rows] == ["fine", "poor"]
    (line,) = [r.getMessage() for r in caplog.records if "set aside" in r.getMessage()]
    assert "2 rows are read and 5 set aside" in line
    for reason in ("no label", "no text", "not utf-8", "another number of cells than of columns"):
        assert f"{reason}: 1" in line
    assert "the label 'ugly' is no class: 1" in line
    text = pathlib.Path(line.rpartition(" ")[2]).read_text("utf-8")
    listed = [json.loads(row) for row in text.splitlines()]
    assert {row["name"].rpartition(":")[2] for row in listed} == {"4", "5", "6", "7", "8"}
    latin = LabelledText(
        path=str(path), labels=("bad", "good"), valid_fraction=0, length=8, encoding="latin-1"
    )
    assert "café" in [row.text for row in latin.rows]


def test_jsonl_that_is_no_object_is_set_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n[1]\nnonsense\n{"text": "b", "label": true}\n')
    good, bad = read_rows(str(path))
    assert [row.label for row in good] == ["1", "true"]
    assert [row.reason for row in bad] == ["no JSON object"] * 2


def test_what_cannot_be_learned_from_is_an_error(tmp_path, table):
    with pytest.raises(UserError, match=r"no column 'txt': set text_field\. Did you mean 'text'"):
        read_rows(str(table), text_field="txt")
    with pytest.raises(UserError, match="has none of the labels"):
        LabelledText(path=str(table), labels=("x", "y")).check()
    with pytest.raises(UserError, match="Set label_from='folder'"):
        (tmp_path / "a.txt").write_text("a")
        read_rows(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"pip install --no-deps nowhere"):
        read_rows("package:nowhere/a.csv")
    one = tmp_path / "one.csv"
    one.write_text("label,text\ngood,a\ngood,b\n")
    with pytest.raises(UserError, match="one class only, 'good'"):
        LabelledText(path=str(one)).check()
    with pytest.raises(UserError, match="one class only, 'good'"):
        LabelledText(path=str(one), labels=("good", "bad"), valid_fraction=0).check()
    with pytest.raises(UserError, match="no row with a text and a label"):
        one.write_text("label,text\ngood,\n")
        read_rows(str(one))
    with pytest.raises(UserError, match=r"valid split of .* is empty"):
        LabelledText(path=str(table), split="valid", valid_fraction=0).check()
    with pytest.raises(UserError, match="give each class once"):
        LabelledText(path=str(table), labels=("a", "a"))


def test_splits_share_no_text_and_hold_all(table):
    train = LabelledText(path=str(table), valid_fraction=0.3, length=24)
    texts = [{row.text for row in part.rows} for part in (train, validation(train))]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == {text for text, _ in ROWS}
    few = LabelledText(path=str(table), valid_fraction=0.3, max_rows=12)
    assert len(few.rows) == 12 and {row.text for row in few.rows} < texts[0]
    assert train.fingerprint != few.fingerprint


def test_a_column_may_say_which_split(tmp_path):
    path = tmp_path / "parts.csv"
    path.write_text("label,text,part\ng,a,train\nb,b,train\ng,c,dev\nb,d,test\n")
    data = LabelledText(path=str(path), split_field="part", valid_value="dev")
    assert [[r.text for r in d.rows] for d in (data, validation(data))] == [["a", "b"], ["c"]]


def test_examples_hold_tokens_segments_and_labels(table):
    data = LabelledText(path=str(table), valid_fraction=0, length=13, vocabulary=Bytes())
    (batch,) = data.epoch_batches(batch_size=40)
    assert data.classes == ("bad", "good") and vocab_size(data) == 257
    for n, (text, label) in enumerate(ROWS):
        size = min(len(text), 13)
        assert bytes(batch["tokens"][n, :size].astype("u1")).decode() == text[:13]
        np.testing.assert_array_equal(batch["segments"][n], np.arange(13) < size)
        assert data.classes[batch["labels"][n]] == label and batch["weights"][n] == 1
    assert json.loads(data.fitted["classes"]) == ["bad", "good"]
    example = {k: (v.shape, v.dtype) for k, v in data.example.items()}
    assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == example
    (padded,) = data.epoch_batches(batch_size=48)
    np.testing.assert_array_equal(padded["weights"], np.arange(48) < 40)


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(table):
    data = LabelledText(path=str(table), valid_fraction=0, length=16)

    def texts(**arguments):
        batches = data.batches(batch_size=10, **arguments)
        read = np.concatenate([b["tokens"] for b in itertools.islice(batches, 4)])
        return [bytes(row.astype("u1")) for row in read]

    first, second, other = texts(seed=0), texts(seed=0, start=4), texts(seed=1)
    assert sorted(first) == sorted(second) == sorted(other)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    halves = [texts(seed=0, shard=s, num_shards=2) for s in (0, 1)]
    joined = [row for i in range(4) for h in halves for row in h[5 * i : 5 * i + 5]]
    assert joined == first


def test_what_stands_around_a_text_stays_when_it_is_cut():
    cut = encode_texts(ByteTokenizer(), ["abcdef", "ab"], length=4)
    assert (cut.ids.tolist(), cut.starts.tolist(), cut.num_cut) == ([*b"abcdab"], [0, 4, 6], 1)


def test_special_tokens_around_and_spelled(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from lmjax.data.pretrained import read_tokenizer

    vocab = {t: i for i, t in enumerate(("[CLS]", "[SEP]", "[UNK]", "a", "b", "[", "]", "SEP"))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(str(tmp_path), "[SEP]")
    found = encode_texts(tokenizer, ["a b a b", "a [SEP]"], length=5)
    rows = np.split(found.ids, found.starts[1:-1])
    assert [row.tolist() for row in rows] == [[0, 3, 4, 3, 1], [0, 3, 5, 7, 1]]
    with pytest.raises(UserError, match="2 tokens stand around each text"):
        encode_texts(tokenizer, ["a"], length=2)


def test_made_rows_and_learned_vocabularies():
    rows = labelled_rows.made()
    assert len(rows) == len({row.text for row in rows}) == 288
    assert all(isinstance(row, Row) for row in rows)
    data = LabelledText(path="made", vocabulary=BPE(vocab_size=300), length=16)
    data.check()
    assert validation(data).tokenizer.hash == data.tokenizer.hash
    assert data.epochs(2 * data.num_examples) == {"made": 2.0}
