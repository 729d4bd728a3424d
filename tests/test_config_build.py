"""Building recorded calls: what is refused, what stands for what, and back to plain trees."""

from pathlib import Path

import pytest

from lmjax.config import (
    build,
    build_and_resolve,
    call,
    from_dict,
    load_config,
    to_dict,
)
from lmjax.engine.run import Run
from lmjax.errors import UserError
from tests.config_targets import Part, Whole, count, whole

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: whole(size=0), "^config: size is 0: must be at least 1"),
        (
            lambda: whole(size=99),
            "^config: tests.config_targets:Whole refused its values: 99 is too",
        ),
        (lambda: whole(other={"x": whole(size=0)}), "^config.other.x: size is 0"),
        (lambda: whole(parts=[call(Part), whole(size=0)]), "^config.parts.1: size is 0"),
        (
            lambda: call(Whole, size=3),
            "^config needs the field 'part' of tests.config_targets:Whole",
        ),
        (lambda: whole(size=call(Part)), "^config.size: expected int, got Part"),
        (
            lambda: whole(part=from_dict({"_call": "tests.config_targets:Prat"})),
            "^config.part: cannot import 'tests.config_targets:Prat'",
        ),
        (
            lambda: whole(part=from_dict({"_call": "tests.config_targets:Part", "widht": 3})),
            "^config.part has no field 'widht'. Did you mean 'width'",
        ),
    ],
)
def test_build_error_carries_the_path(config, message):
    with pytest.raises(UserError, match=message):
        build(config())


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"x": tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"_call": 5}, "^config: 5 names no target"),
        ({"_call": ""}, "^config: cannot import ''"),
        ({"_call": ".json:loads"}, "^config: cannot import '.json:loads'"),
        ({"_call": "math:pi"}, "^config: 'math:pi' is nothing that a config can call"),
        ({"_ref": None}, "^config: None names no target"),
        ({"a.b": 1}, "^config: no member can be named 'a.b'"),
        (nested(100), "is nested deeper than the 64 levels"),
        (nested(3000), "^config is nested deeper than the 64 levels"),
    ],
)
def test_damaged_tree_is_refused(tree, message):
    with pytest.raises(UserError, match=message):
        build(from_dict(tree))


def test_node_that_holds_itself_is_refused():
    part = call(Part)
    config = whole(other={"part": part})
    part["made"] = config
    with pytest.raises(UserError, match=r"^config\.other\.part\.made holds itself"):
        build(config)


def test_what_is_built_must_be_of_the_fields_class_or_protocol(char):
    config = char()
    config.layout = config.precision
    with pytest.raises(UserError, match=r"^config\.layout: expected Layout, got Precision"):
        build(config)
    config = char()
    config.task = config.layout
    with pytest.raises(UserError, match=r"^config\.task: expected Task, got Layout"):
        build(config)


def test_a_bug_in_a_target_is_not_dressed_up_as_the_users_mistake():
    with pytest.raises(ZeroDivisionError):
        build(whole(size=13))


@pytest.fixture
def char(tmp_path):
    """configs/char.py:smoke on a small file."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return lambda **flags: load_config(
        str(ROOT / "configs" / "char.py:smoke"), {"data.path": str(path)} | flags
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_every": "750"}, "config: keep_every 750 is no multiple of save_every 500"),
        ({"microbatches": "3"}, "config: batch_size 16 is no multiple of microbatches 3"),
        ({"steps": "2"}, "config.optimizer.learning_rate: warmup_steps 2 is not below steps 2"),
        ({"steps": "0"}, "warmup_steps 2 is not below steps 0"),
        ({"seed": "-1"}, "config: seed is -1"),
        ({"trainable": "("}, "config: trainable: "),
        ({"optimizer.decay": "("}, "config.optimizer: decay is '\\(', which is no regular expr"),
        ({"optimizer.b2": "1"}, "config.optimizer: b2 is 1.0: must be at least 0 and below 1"),
        ({"layout.fsdp": "0"}, "config.layout: fsdp is 0"),
        ({"layout.fsdp": "-1"}, "config.layout: data and fsdp are -1"),
        ({"task.model.max_length": "32", "data.length": "64"}, None),
        ({"data.length": "0"}, "config.data: length is 0"),
        ({"task.model.num_heads": "5"}, "config.task.model: dim 32 is no multiple of num_heads 5"),
    ],
)
def test_contradictory_fields_fail_in_build(char, flags, message):
    if message is None:  # one FieldReference: the later flag holds for both
        assert build(char(**flags)).task.model.max_length == 64
        return
    with pytest.raises(UserError, match=message):
        build(char(**flags))


def recorded(*, width: int, times: int = 2):
    """Stands for a part that is found out when it is built."""
    return call(Part, width=width * times, name="found")


def chosen(*, width: int):
    return call(recorded, width=width, times=3)


@pytest.mark.parametrize("target", [recorded, chosen])
def test_a_call_that_gives_a_recorded_call_stands_for_it(target):
    shared = call(target, width=5)
    config = call(Whole, part=shared, other={"part": shared}, size=1)
    built, tree = build_and_resolve(config)
    width = 15 if target is chosen else 10
    assert built.part == Part(width=width, name="found")
    assert built.other["part"] is built.part
    assert tree["part"] == to_dict(call(Part, width=width, name="found"))
    assert build(from_dict(tree)) == built == build(config)


def wrong(*, width: int):
    return call(Whole, part=call(Part), size=width)


def test_a_mistake_in_what_a_call_stands_for_is_named_by_the_call():
    config = call(Whole, part=call(Part), other={"inner": call(wrong, width=0)}, size=1)
    with pytest.raises(UserError, match=r"^config\.other\.inner: size is 0: must be at least 1"):
        build(config)


def test_build_and_resolve_replaces_calls_that_gave_a_scalar():
    part = call(Part, width=3)
    config = whole(size=call(count, of=part), part=part)
    built, tree = build_and_resolve(config)
    assert built.size == tree["size"] == 30
    assert tree["part"]["_call"] == "tests.config_targets:Part"
    assert build(from_dict(tree)) == built


def test_to_dict_and_back_builds_equal_things_and_keeps_sharing(char):
    tree = to_dict(char())
    run = build(from_dict(tree))
    assert to_dict(from_dict(tree)) == tree
    assert isinstance(run, Run)
    assert (run.task, run.data, run.evals, run.layout) == tuple(
        getattr(build(char()), name) for name in ("task", "data", "evals", "layout")
    )
    part = call(Part)
    built = build(from_dict(to_dict(whole(part=part, parts=[part]))))
    assert built.part is built.parts[0]
