"""Structures of inputs and outputs, there and back; and inputs that do not fit."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimpoint.errors import DataError
from trimpoint.signature import TensorSpec, check_inputs, flatten, leaf_names, structure_of, unflatten

values = st.recursive(
    st.one_of(st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_flatten_and_unflatten_are_inverse(value):
    assert unflatten(structure_of(value), flatten(value)) == value
    assert len(leaf_names(value, "input")) == len(flatten(value))


def test_lists_come_back_as_tuples():
    assert unflatten(structure_of([1, [2]]), [1, 2]) == (1, (2,))


@pytest.mark.parametrize(("leaves", "message"), [([1], "Too few"), ([1, 2, 3], "Too many")])
def test_a_wrong_number_of_tensors(leaves, message):
    with pytest.raises(DataError, match=message):
        unflatten({"tuple": ["tensor", "tensor"]}, leaves)


def test_names():
    assert leaf_names(1, "output") == ["output"]
    assert leaf_names((1, 2), "output") == ["output_0", "output_1"]
    assert leaf_names({"ids": 1, "more": (2, {"mask": 3})}, "input") == ["ids", "more_0", "mask"]


SPECS = (
    TensorSpec(name="ids", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="mask", dtype="float32", shape=("batch", "length", 2)),
)


def arrays(ids=(4, 7), mask=(4, 7, 2), dtype=np.int64):
    return [np.zeros(ids, dtype), np.zeros(mask, np.float32)]


def test_inputs_that_fit():
    check_inputs(SPECS, arrays())
    check_inputs(SPECS, arrays((1, 1), (1, 1, 2)))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (arrays()[:1], "takes 2 inputs"),
        (arrays(dtype=np.int32), "'ids' must be int64"),
        (arrays(mask=(4, 7, 3)), "'mask' must be float32 of shape"),
        (arrays(mask=(4, 8, 2)), "'mask' must be"),  # one name, two sizes
        (arrays(mask=(4, 7)), "'mask' must be"),
    ],
)
def test_inputs_that_do_not_fit(given_, message):
    with pytest.raises(DataError, match=message):
        check_inputs(SPECS, given_)


def test_it_needs_no_torch():
    code = "import sys, trimpoint.signature, trimpoint.values, trimpoint.filters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
