"""Recorded calls: what is refused when recorded and when overridden; who shares what."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import FieldReference

from lmjax.config import (
    build,
    call,
    override,
    ref,
    to_dict,
)
from lmjax.errors import UserError
from tests.config_targets import Part, count, whole

ROOT = Path(__file__).parents[1]


# Recording


def test_call_records_scalar_defaults_and_no_others():
    assert to_dict(call(Part, width=8)) == {
        "_call": "tests.config_targets:Part",
        "width": 8,
        "rate": 0.5,
        "name": "part",
    }


def test_ref_records_the_function_itself():
    assert build(ref(count)) is count


@pytest.mark.parametrize("name", ["lambda", "local"])
def test_call_refuses_what_cannot_be_imported_again(name):
    def local():
        return 0

    with pytest.raises(UserError, match="module-level names"):
        call(local if name == "local" else lambda: 0)


def test_misspelt_field_raises_when_recorded():
    with pytest.raises(UserError, match=r"no field 'widht'\. Did you mean 'width'\? Allowed: "):
        call(Part, widht=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 3.0}, "size: expected int, got 3.0"),
        ({"size": True}, "size: expected int, got True"),
        ({"size": "3"}, "size: expected int, got '3'"),
        ({"size": FieldReference("3")}, "size: expected int, got '3'"),
        ({"size": None}, "size: expected int, got None"),
        ({"fast": 1}, "fast: expected bool, got 1"),
        ({"rate": "1"}, "rate: expected float, got '1'"),
        ({"rate": math.nan}, "rate: expected float, got nan"),
        ({"kind": "bgi"}, "kind: expected one of 'big', 'small', got 'bgi'"),
        ({"level": True}, "level: expected one of 1, 2, got True"),
        ({"limit": 1.5}, "limit: expected int or None, got 1.5"),
        ({"shape": 3}, "shape: expected tuple"),
        ({"shape": (3, 0.5)}, "shape: expected tuple"),
        ({"shape": {"a": 1}}, "shape: expected tuple"),
        ({"pair": ("a", 1)}, "pair: expected tuple"),
        ({"pair": (1, "a", "b")}, "pair: expected tuple"),
        ({"names": "ab"}, "names: expected .*Sequence"),
        ({"part": 5}, "part: expected Part, got 5"),
        ({"part": "x"}, "part: expected Part, got 'x'"),
        ({"other": object}, "other: a config cannot hold .*; record it by call\\(\\) or ref\\(\\)"),
    ],
)
def test_wrong_type_raises_when_recorded(fields, message):
    with pytest.raises(UserError, match=message):
        whole(**fields)


def test_right_types_are_recorded():
    fields = {
        "rate": 2,
        "limit": 5,
        "label": "x",
        "shape": [1],
        "axes": ("embed", None),
        "names": ["a"],
        "level": 2,
        "size": FieldReference(7),
    }
    built = build(whole(**fields))
    assert (built.rate, built.limit, built.label, built.size) == (2, 5, "x", 7)
    assert (built.shape, built.axes, built.names) == ((1,), ("embed", None), ("a",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 2**63}, "size: expected int of at most 64 bits, got 9223372036854775808"),
        ({"size": 10**5000}, "got a value of type int that is too large to show"),
        ({"shape": (1, 2**70)}, "shape: expected .* of at most 64 bits"),
        ({"weights": {"a": "x"}}, r"weights: expected .*Mapping\[str, float\], got {'a': 'x'}"),
        ({"weights": {"a.b": 1.0}}, "no member can be named 'a.b'"),
        ({"weights": {"items": 1.0}}, "no member can be named 'items'"),
        ({"other": {1: 2}}, "no member can be named 1"),
        ({"other": (FieldReference(1), 2)}, "a FieldReference may be a field, not a member"),
        ({"other": 100 // FieldReference(0)}, "other cannot be computed from .* division"),
    ],
)
def test_what_no_file_could_hold_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        whole(**fields)


def test_long_values_are_cut_in_messages():
    with pytest.raises(UserError) as raised:
        whole(kind="x" * 5000)
    assert len(str(raised.value)) < 400


# Overriding


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("size", "1e6", 1_000_000),
        ("size", "1_000", 1000),
        ("size", "9_007_199_254_740_993", 2**53 + 1),
        ("limit", "-2", -2),
        ("rate", "3e-4", 3e-4),
        ("rate", "2", 2.0),
        ("fast", "true", True),
        ("fast", "False", False),
        ("fast", "1", True),
        ("fast", "no", False),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("label", "None", None),
        ("label", "5", "5"),
        ("kind", "small", "small"),
        ("level", "2", 2),
        ("shape", "(4, 5)", (4, 5)),
        ("shape", "4,5", (4, 5)),
        ("shape", "[4]", (4,)),
        ("shape", "4", (4,)),
        ("pair", "2,'b'", (2, "b")),
        ("axes", "('embed', None)", ("embed", None)),
        ("axes", "embed,none", ("embed", None)),
        ("names", "a,b", ("a", "b")),
        ("names", "1,2", ("1", "2")),
        ("part.rate", "1", 1.0),
        ("part.name", "1", "1"),
    ],
)
def test_flag_is_read_by_the_type_of_its_field(name, text, value):
    config = whole(label="l", axes=())
    override(config, name, text)
    built = build(config)
    for key in name.split("."):
        built = getattr(built, key)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", "1.5", "config.size: expected int, got '1.5'"),
        ("size", "three", "config.size: expected int, got 'three'"),
        ("size", 1.5, "config.size: expected int, got 1.5"),
        ("rate", "nan", "config.rate: expected float, got nan"),
        ("rate", "fast", "config.rate: expected float, got 'fast'"),
        ("fast", "maybe", "config.fast: expected bool, got 'maybe'"),
        ("limit", "x", "config.limit: expected int or None, got 'x'"),
        ("kind", "bgi", "config.kind: expected one of 'big', 'small', got 'bgi'"),
        ("shape", "1,x", "config.shape: expected int, got 'x'"),
        ("shape", "{[]: 1}", "config.shape: expected int"),
        ("pair", "1", "config.pair: expected tuple"),
        ("part.width", "x", "config.part.width: expected int, got 'x'"),
        ("szie", "1", "config has no field 'szie'. Did you mean 'size'"),
        ("part.widht", "1", "config.part has no field 'widht'. Did you mean 'width'"),
        ("size.x", "1", "config.size is the value 3; it has no field 'x'"),
        ("_call", "x", "config has no field '_call'"),
        ("", "1", "config has no field ''"),
        (
            "part",
            "1",
            "config.part is not a single value; set one of its fields: name, rate, width",
        ),
        ("weights", "1", "config.weights is not a single value; set one of its fields: a, b"),
        ("weights.c", "1", "config.weights has no field 'c'. Allowed: a, b."),
        ("weights.a", "x", "config.weights.a: expected int or float, got 'x'"),
        ("shape.2", "1", "config.shape has no field '2'. Allowed: 0, 1."),
        ("parts.1.width", "1", "config.parts has no field '1'"),
    ],
)
def test_bad_override_is_refused(name, value, message):
    config = whole(weights={"a": 1, "b": 2}, parts=[call(Part)], shape=(2, 3))
    before = to_dict(config)
    with pytest.raises(UserError, match=message):
        override(config, name, value)
    assert to_dict(config) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (5, "1", "5 names no field"),
        ("size", "1e300", "config.size: expected int of at most 64 bits"),
        ("rate", 10**400, "config.rate: expected float of at most 64 bits"),
        ("other", object(), "config.other: a config cannot hold"),
    ],
)
def test_values_beyond_a_config_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        override(whole(), name, value)


def test_override_reaches_members_of_sequences_and_mappings():
    config = whole(
        weights={"a": 1, "b": 2}, parts=[call(Part), call(Part)], shape=(2, 3), axes=("x", None)
    )
    for name, text in {
        "weights.a": "0.5",
        "parts.1.width": "9",
        "shape.0": "7",
        "axes.1": "y",
    }.items():
        override(config, name, text)
    built = build(config)
    assert built.weights == {"a": 0.5, "b": 2}
    assert [p.width for p in built.parts] == [4, 9]
    assert (built.shape, built.axes) == ((7, 3), ("x", "y"))


def test_shared_node_is_built_once_and_overridden_everywhere():
    part = call(Part)
    config = whole(part=part, parts=[part], other={"inner": {"part": part}})
    override(config, "part.width", "6")
    built = build(config)
    assert built.part is built.parts[0] is built.other["inner"]["part"]
    assert built.part.width == 6


def test_equal_nodes_that_are_not_shared_stay_apart():
    built = build(whole(parts=[call(Part), call(Part)]))
    assert built.parts[0] == built.parts[1]
    assert built.parts[0] is not built.parts[1]


@pytest.mark.parametrize("name", ["size", "part.width", "other.width"])
def test_field_reference_is_shared_by_its_leaves(name):
    size = FieldReference(5)
    config = whole(size=size, part=call(Part, width=size), other={"width": size})
    override(config, name, "8")
    built = build(config)
    assert (built.size, built.part.width, built.other["width"]) == (8, 8, 8)


# Properties: whatever is typed, a field gets a value of its type or the person a UserError.

ANNOTATIONS = {
    "size": lambda v: type(v) is int,
    "fast": lambda v: type(v) is bool,
    "rate": lambda v: type(v) is float and not math.isnan(v),
    "limit": lambda v: v is None or type(v) is int,
    "label": lambda v: v is None or type(v) is str,
    "kind": lambda v: v in ("big", "small"),
    "level": lambda v: type(v) is int and v in (1, 2),
    "shape": lambda v: type(v) is tuple and all(type(i) is int for i in v),
    "pair": lambda v: type(v) is tuple and [type(i) for i in v] == [int, str],
    "axes": lambda v: type(v) is tuple and all(i is None or type(i) is str for i in v),
    "names": lambda v: type(v) is tuple and all(type(i) is str for i in v),
    "other": lambda v: isinstance(v, bool | int | float | str | tuple | list | None),
}
FRAGMENTS = st.sampled_from([*"0123456789-+._,:()[]{}'\"\\ eEjx\0", "1e6", "None", "nan", "inf"])


@settings(deadline=None, max_examples=80)
@given(
    text=st.text()
    | st.lists(FRAGMENTS).map("".join)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.recursive(st.integers() | st.none() | st.text(), st.lists).map(repr)
)
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_any_text_gives_the_annotated_type_or_a_user_error(name, text):
    config = whole()
    try:
        override(config, name, text)
    except UserError as error:
        assert str(error).startswith(f"config.{name}: expected ")
    else:
        assert ANNOTATIONS[name](config[name])


@pytest.mark.parametrize("text", ["0" * 5000, "9" * 5000, "(" * 5000, "[" * 50_000, "-" * 9000])
@pytest.mark.parametrize("name", ["size", "shape", "other"])
def test_monstrous_text_gives_no_other_exception(name, text):
    config = whole()
    try:
        override(config, name, text)
    except UserError:
        return
    assert ANNOTATIONS[name](config[name])


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_are_read_exactly(number):
    config = whole()
    for text in (str(number), f"{number:_}"):
        override(config, "size", text)
        assert config.size == number
