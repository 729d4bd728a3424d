"""Configs: every field of every target with values of every kind; damaged trees and files."""

import json
import math
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import (
    build,
    build_and_resolve,
    explain,
    from_dict,
    leaves,
    load_config,
    override,
    to_dict,
)
from lmjax.engine.run import draft_run
from tests.fuzz.damage import JSON, mutate
from tests.fuzz.experiment import CHOICES, get_config
from tests.fuzz.outcome import examples, few_and_many, outcome

VALUES = [
    *(None, True, False, 0, 1, -1, 3, 7, 10**9, 10**9 + 7, 2**24, 2**31 - 1, 2**31, 2**62, 2**63),
    *(10**30, 10**5000, 0.0, -0.0, 0.5, -0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan),
    *("", "x", "(", ".*", "a{99999999999}", "none", "nan", "inf", "1e300", "1e9", "-5", "1_0"),
    *("\0", "\ud800", "é", "9" * 5000, "0x" + "f" * 5000, "[" * 3000, "(1, 2)", "1,2", "{'a': 1}"),
    *([], ["x"], [None], [[1]], {}, {"a": 1}, (1, 2), object(), b"x", print),
]
ANY = (
    st.sampled_from(VALUES)
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4)
)


def fields_of(config):
    """Every leaf, and every node above one."""
    names = [name for name, _ in leaves(config) if not name.endswith("_call")]
    above = {name.rsplit(".", depth)[0] for name in names for depth in (1, 2)}
    return sorted({*names, *above})


PART = {
    "model": "task.model",
    "schedule": "optimizer.learning_rate",
    "optimizer": "optimizer",
    "vocabulary": "data.vocabulary",
    "mixed": "data",
}
# (which choice, field): all of the first choice, and of the others what they choose.
FIELDS = [
    (index, name)
    for index, choice in enumerate(CHOICES)
    for name in fields_of(get_config(**choice))
    if index == 0 or name.startswith(PART[next(iter(choice))])
]


def attempt(config):
    """All that is done with a config before a device is touched."""
    explain(config)
    run, tree = build_and_resolve(config)
    assert build(from_dict(json.loads(json.dumps(tree)))).task == run.task
    run.data.check()
    for evaluator in run.evals.values():
        evaluator.check(run.task, run.data, ways=1)
    run.layout.sizes(1)
    return run


def attempt_with(index, changes, corpus):
    def run():
        config = get_config(**CHOICES[index], path=corpus)
        for name, value in changes:
            override(config, name, value)
        return attempt(config)

    return outcome(run)


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=str)
def test_every_choice_works_as_it_is(index, corpus):
    run, message = attempt_with(index, [], corpus)
    assert message is None and run.steps == 10


@few_and_many(400, 4000)
def test_fields(count, corpus):
    """Up to three fields of one config, each with any value."""

    @examples(count)
    @given(st.data())
    def check(data):
        index, name = data.draw(st.sampled_from(FIELDS))
        names = [name for i, name in FIELDS if i == index]
        changes = [(name, data.draw(ANY))]
        for _ in range(data.draw(st.integers(0, 2))):
            changes.append((data.draw(st.sampled_from(names)), data.draw(ANY)))
        attempt_with(index, changes, corpus)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CHOICES)), ids=str)
def test_every_field_with_every_value(index, corpus):
    for number, name in FIELDS:
        if number == index:
            for value in VALUES:
                attempt_with(index, [(name, value)], corpus)


@few_and_many(150, 2000)
def test_names_of_fields(count, corpus):
    """Misspelt, cut, or nothing like a name."""
    names = st.sampled_from([name for _, name in FIELDS])
    cut = st.tuples(names, st.integers(0, 20), st.text(max_size=2)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
    )

    @examples(count)
    @given(st.text() | cut | st.none() | st.integers())
    def check(name):
        config = get_config(path=corpus)
        before = to_dict(config)
        _, message = outcome(lambda: override(config, name, "1"))
        assert message is None or to_dict(config) == before

    check()


@few_and_many(300, 2000)
def test_damaged_trees(count, corpus):
    """config.json with members gone, replaced, renamed or repeated."""
    trees = [json.loads(json.dumps(to_dict(get_config(**c, path=corpus)))) for c in CHOICES]
    targets = sorted({v for tree in trees for name, v in leaves(tree) if name.endswith("_call")})
    values = JSON | st.sampled_from(targets) | st.sampled_from(trees)

    @examples(count)
    @given(st.data())
    def check(data):
        tree = mutate(data, data.draw(st.sampled_from(trees)), values=values)
        outcome(lambda: build(from_dict(tree)))

    check()


@few_and_many(150, 1000)
def test_damaged_files(count, tmp_path, corpus):
    """A config file cut short, with lines gone or characters lost, loads or names its line."""
    source = Path(__file__).with_name("experiment.py").read_bytes()
    path = tmp_path / "config.py"

    @examples(count)
    @given(st.data())
    def check(data):
        lines = source.splitlines(keepends=True)
        first = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                text = source[: data.draw(st.integers(0, len(source)))]
            case 1:
                text = b"".join(lines[:first] + lines[first + data.draw(st.integers(1, 3)) :])
            case 2:
                text = b"".join([*lines[:first], data.draw(st.binary(max_size=8)), *lines[first:]])
            case _:
                at = data.draw(st.integers(0, len(source)))
                text = source[:at] + source[at + data.draw(st.integers(1, 4)) :]
        path.write_bytes(text)
        _, message = outcome(lambda: load_config(str(path), {"data.path": corpus}))
        assert message is None or str(path) in message or message.startswith("config")

    check()


@pytest.mark.slow
def test_what_builds_also_compiles_or_explains_itself(corpus):
    """One value of each field of the model, the optimizer and the layout, traced for a device."""
    parts = ("task.", "optimizer.", "precision.", "layout.", "batch_size", "microbatches", "guard.")
    seen = set()
    for index, name in FIELDS:
        if name in seen or not name.startswith(parts):
            continue
        seen.add(name)
        for value in (0, 1, 3, 7, 2**24, 0.5, 1e300, "x", "", None, True):
            run, message = attempt_with(index, [(name, value)], corpus)
            if message is None:
                outcome(lambda run=run: draft_run(run, devices=jax.devices()[:1]))
