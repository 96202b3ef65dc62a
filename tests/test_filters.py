"""Filters: what they match, and that their text reads back as themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimpoint.errors import InvalidParameterError
from trimpoint.filters import EVERYTHING, And, Filter, Glob, Not, Or, Type, parse

PATHS = ["stem", "stages.0.conv1", "stages.0.norm1", "stages.1.conv1", "head"]
TYPES = [("Conv2d", "_ConvNd", "Module"), ("BatchNorm2d", "Module"), ("Linear", "Module")]

atoms = st.sampled_from([Glob("*"), Glob("stages.*"), Glob("*.conv1"), Glob("head"), Type("Conv2d"), Type("Module")])
filters = st.recursive(
    atoms, lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner))
)


@given(filters)
def test_text_reads_back_with_the_same_meaning(condition: Filter):
    again = parse(str(condition))
    assert str(again) == str(condition)
    for path in PATHS:
        for types in TYPES:
            assert again.matches(path, types) == condition.matches(path, types)


@given(filters, filters)
def test_operators_are_boolean(left: Filter, right: Filter):
    for path in PATHS:
        for types in TYPES:
            one, two = left.matches(path, types), right.matches(path, types)
            assert (left & right).matches(path, types) == (one and two)
            assert (left | right).matches(path, types) == (one or two)
            assert (~left).matches(path, types) == (not one)


@pytest.mark.parametrize(
    ("text", "path", "meant"),
    [
        ("stages.0", "stages.0.conv1", True),
        ("stages.0", "stages.01", False),
        ("stages.?.conv1", "stages.1.conv1", True),
        ("*.conv1", "conv1", False),
        ("encoder", "decoder.encoder", False),
        ("*", "", True),
        ("stem | head", "head", True),
        ("!(stem | head)", "head", False),
        ("!stem & !head", "body", True),
        ("stem | head & !head", "stem", True),
        ("(stem | head) & !head", "head", False),
        ("Stem", "stem", False),
    ],
)
def test_meaning(text, path, meant):
    assert parse(text).matches(path, ("Module",)) is meant


def test_types_match_by_class_and_base_class():
    assert parse("type:Module").matches("anything", ("Linear", "Module"))
    assert not parse("type:Line").matches("anything", ("Linear", "Module"))


def test_repr_can_be_evaluated():
    condition = Glob("a.*") & ~(Type("Linear") | Glob("b"))
    assert repr(condition) == "parse('a.* & !(type:Linear | b)')"
    assert parse("a.* & !(type:Linear | b)") == condition
    assert parse("*") == EVERYTHING


@pytest.mark.parametrize(
    ("text", "at"),
    [("a &", "the end"), ("& a", "&"), ("(a", "the end"), ("a)", r"\)"), ("a b", "b"), ("!", "the end"), ("()", r"\)")],
)
def test_text_that_is_no_filter(text, at):
    with pytest.raises(InvalidParameterError, match=f"cannot be read at '{at}'") as caught:
        parse(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text(text):
    with pytest.raises(InvalidParameterError, match="must not be empty"):
        parse(text)
