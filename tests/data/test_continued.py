"""Text in the order that carries a state, against the tokens it is cut from."""

import dataclasses
import itertools

import numpy as np
import pytest

from lmjax.data.describe import describe
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Bytes
from lmjax.errors import UserError

LENGTH, ROWS = 16, 4


@pytest.fixture(scope="module")
def data(folder):
    return Text(
        path=folder,
        length=LENGTH,
        vocabulary=Bytes(),
        valid_fraction=0.3,
        packing="stream",
        order="continued",
    )


def batches(data, count, **arguments):
    options = {"batch_size": ROWS, "seed": 7, **arguments}
    return list(itertools.islice(data.batches(**options), count))


def test_rows_go_on_where_they_ended_through_two_epochs(data):
    tokens = data._windows.tokens.ids
    steps = (len(tokens) - 1) // (ROWS * LENGTH)
    assert steps > 2
    found = batches(data, 2 * steps + 1)
    offsets = []
    for step, batch in enumerate(found):
        assert batch["continues"].dtype == np.int32
        np.testing.assert_array_equal(batch["continues"], [step % steps > 0] * ROWS)
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        if step % steps:
            np.testing.assert_array_equal(batch["tokens"][:, 0], found[step - 1]["targets"][:, -1])
    for first in (0, steps):
        rows = np.concatenate([batch["tokens"] for batch in found[first : first + steps]], axis=1)
        text = rows.reshape(-1)  # the rows are parts of one text, one behind the other
        places = [
            at
            for at in range(len(tokens) - len(text))
            if np.array_equal(tokens[at : at + len(text)], text)
        ]
        assert len(places) == 1
        offsets += places
    assert len(set(offsets)) == 2  # another cut in each epoch


def test_rows_begin_anew_one_after_the_other(data):
    again = dataclasses.replace(data, restart_every=3)
    found = batches(again, 7)
    for step, (batch, other) in enumerate(zip(found, batches(data, 7), strict=True)):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])
        expected = [step > 0 and (step + row) % 3 > 0 for row in range(ROWS)]
        np.testing.assert_array_equal(batch["continues"], expected)
    assert again.fingerprint != data.fingerprint


def test_a_batch_is_a_function_of_seed_and_step(data):
    whole = batches(data, 6)
    later = batches(data, 2, start=4)
    halves = [batches(data, 6, shard=shard, num_shards=2) for shard in range(2)]
    for name in data.example:
        for one, other in zip(whole[4:], later, strict=True):
            np.testing.assert_array_equal(one[name], other[name])
        for batch, *parts in zip(whole, *halves, strict=True):
            np.testing.assert_array_equal(batch[name], np.concatenate([p[name] for p in parts]))
    assert {name: x.shape[1:] for name, x in whole[0].items()} == {
        name: x.shape for name, x in data.example.items()
    }


def test_a_document_that_begins_with_a_window_goes_on_from_nothing(folder):
    text = Text(path=folder, length=1, vocabulary=Bytes(), valid_fraction=0.3, order="continued")
    starts = set(text._windows.tokens.starts.tolist())
    continued = text._continued(0, 2)
    found = {"begins": 0, "goes on": 0}
    for index in range(2, 2 * continued.steps):
        example, begins = continued.at(index), continued.start(index) in starts
        assert int(example["continues"]) == (not begins)
        found["begins" if begins else "goes on"] += 1
    assert all(found.values())


def test_the_validation_split_is_each_window_for_itself(data):
    longer = validation(data, length=32)
    found = list(longer.epoch_batches(batch_size=2))
    shuffled = list(
        Text(
            path=data.path,
            length=32,
            vocabulary=Bytes(),
            valid_fraction=0.3,
            packing="stream",
            split="valid",
        ).epoch_batches(batch_size=2)
    )
    for batch, other in zip(found, shuffled, strict=True):
        np.testing.assert_array_equal(batch["continues"], np.zeros(2))
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_a_batch_is_described_with_where_its_tokens_come_from(data):
    told = describe(data, 3, batch_size=ROWS, seed=7)
    batch = batches(data, 1, start=3)[0]
    for row in told["rows"]:
        text = "".join(piece["text"] for piece in row["pieces"])
        assert text == data.tokenizer.decode(batch["tokens"][row["row"]])


def test_what_it_cannot_do_is_refused(data):
    with pytest.raises(UserError, match="each of the 100000 rows of a batch reads a part"):
        batches(data, 1, batch_size=100_000)
    with pytest.raises(UserError, match="cannot be mixed"):
        mixed = Mixture(sources={"a": data}, weights={"a": 1.0})
        next(iter(mixed.batches(batch_size=2, seed=0)))
    with pytest.raises(UserError, match='more than 0 in the order "continued" only'):
        Text(path=data.path, restart_every=2)
    with pytest.raises(UserError, match="Did you mean 'continued'"):
        Text(path=data.path, order="continue")


def test_the_order_is_in_the_fingerprint(data):
    shuffled = Text(
        path=data.path, length=LENGTH, vocabulary=Bytes(), valid_fraction=0.3, packing="stream"
    )
    assert data.fingerprint != shuffled.fingerprint
