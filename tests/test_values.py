"""The frozen values and their JSON form."""

import json
import math

import pytest

from trimpoint.errors import TrimpointError
from trimpoint.parts import Block, Group, Member
from trimpoint.values import (
    Certificate,
    Change,
    Format,
    Measurement,
    Profile,
    Quality,
    Trial,
    dumps,
    from_data,
    to_data,
)

LATENCY = Measurement(value=2.5, unit="ms", n=30, low=2.4, high=2.6, how="median", where="here")
CERTIFICATE = Certificate(
    status="passed", score="accuracy", margin=0.01, drop=0.001, upper=0.004, level=0.95, n=10_000, baseline=0.93,
    value=0.929, lost=60, gained=50,
)  # fmt: skip
TRIAL = Trial(
    number=3,
    plan={"seed": 0, "steps": [{"method": "drop-blocks", "ratio": 0.5}]},
    plan_hash="ab",
    rung=1,
    state="complete",
    profile=Profile({"latency_ms": LATENCY}, {"energy_mj": "no counter"}, ("one note",)),
    quality=Quality(name="accuracy", value=0.9, n=100, split="select", drop=0.01, drop_upper=0.02),
    changes=(Change(method="drop-blocks", origin="stages.0", kind="bypassed", before="BasicBlock"),),
    certificate=CERTIFICATE,
)
GROUP = Group(members=(Member(path="a", parameter="weight", dim=0, indices=((0,), (1, 2)), role="out"),), size=2)
VALUES = [
    LATENCY,
    CERTIFICATE,
    TRIAL,
    GROUP,
    Block(path="b", shape=(1, 2), params=3, family="f"),
    Format(dtype="int8", granularity="channel"),
    Measurement(value=math.inf, unit="1", better="neither"),
    Trial(number=0, plan={}, plan_hash="", rung=0, state="failed", error="it broke"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_json_there_and_back(value):
    text = dumps(value)
    assert text.endswith("}\n")
    assert from_data(type(value), json.loads(text)) == value


def test_numbers_that_are_not_finite_are_strings():
    assert to_data({"a": [math.nan, -math.inf, 1.0]}) == {"a": ["nan", "-inf", 1.0]}
    assert math.isnan(from_data(Measurement, {"value": "nan", "unit": "1"}).value)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Measurement, {"value": 1, "unit": "ms", "colour": "red"}, "no field 'colour'"),
        (Measurement, {"value": 1}, "incomplete"),
        (Measurement, {"value": "much", "unit": "ms"}, r"Measurement\.value must be a number"),
        (Measurement, {"value": True, "unit": "ms"}, "must be a number"),
        (Measurement, {"value": 1, "unit": "ms", "n": True}, "must be a int"),
        (Measurement, {"value": 1, "unit": "ms", "n": 1.5}, "must be a int"),
        (Measurement, {"value": 1, "unit": 3}, "must be a str"),
        (Measurement, {"value": 1, "unit": "ms", "better": "more"}, "must be one of 'lower', 'higher', 'neither'"),
        (Block, {"path": "a", "shape": [1, "b"], "params": 0, "family": ""}, "must be a int"),
        (Block, {"path": "a", "shape": 3, "params": 0, "family": ""}, "must be a list"),
        (Profile, {"metrics": []}, "must be a dict"),
        (Trial, {"certificate": 3}, r"Trial\.certificate must be a dict"),
        (Format, [1], "must be a dict"),
    ],
)
def test_data_that_is_no_such_value(kind, data, message):
    with pytest.raises(TrimpointError, match=message):
        from_data(kind, data)


def test_profile_is_a_mapping():
    one = Profile(
        {"params": Measurement(value=5, unit="1")}, {"latency_ms": "not yet", "energy_mj": "no counter"}, ("x",)
    )
    two = Profile({"latency_ms": LATENCY}, notes=("x", "y"))
    both = one | two
    assert list(both) == ["params", "latency_ms"]
    assert len(both) == 2
    assert both["latency_ms"] is LATENCY
    assert both.missing == {"energy_mj": "no counter"}
    assert both.notes == ("x", "y")
    assert "macs" not in both


def test_measurements_print_their_spread():
    assert str(LATENCY) == "2.5 [2.4, 2.6] ms"
    assert str(Measurement(value=3, unit="1")) == "3"


def test_a_group_is_named_after_what_produces_it():
    through = Member(path="norm", parameter="weight", dim=0, indices=((0,),), role="through")
    out = Member(path="conv", parameter="weight", dim=0, indices=((0,),), role="out")
    assert Group(members=(through, out), size=1).name == "conv"
    assert Group(members=(through,), size=1).name == "norm"
