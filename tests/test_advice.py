"""Advice before work, from a plan, and after it, from what was measured."""

import pytest
import torch
from torch import nn

from trimpoint.advice import measured_advice, trial_advice, warnings_of
from trimpoint.compress import compress
from trimpoint.errors import UnknownNameError
from trimpoint.filters import parse
from trimpoint.plan import Plan, Step
from trimpoint.registry import all_methods, make_method
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.values import Measurement, Profile


def plan(name, where=None, **params):
    method = make_method(name, params)
    return Plan((Step(method) if where is None else Step(method, parse(where)),))


def warned(one, target=None, model=None):
    return warnings_of(one, target or Target(), model, "avx2")


def test_a_step_that_only_a_coded_file_shows_is_warned_of():
    for name in ("prune-weights", "share-weights"):
        (text,) = warned(plan(name))
        assert text.startswith(f"`{name}` makes nothing faster")
        assert "trimpoint pack" in text


def test_few_bits_are_warned_of_with_runtime_and_processor():
    (text,) = warned(plan("quantize-weights", bits=3))
    assert text.startswith("`quantize-weights` with weights of 3 bits is no faster than with 4 bits")
    assert text.endswith("(onnxruntime, avx2)")
    (text,) = warned(plan("quantize-mixed", mean_bits=5.0))
    assert "with weights of 5 bits" in text
    (text,) = warned(plan("quantize-weights"), Target(batch=16))
    assert "at a batch of 16" in text


def test_what_pays_and_what_is_no_format_is_not_warned_of():
    quiet = Plan().then(*(make_method(name, {}) for name in ("drop-blocks", "distill", "quantize-static")))
    assert warned(quiet) == []
    assert warned(quiet, Target(runtime="openvino")) == []
    assert warned(Plan()) == []


def test_layers_are_told_apart_where_there_is_a_model():
    model = nn.ModuleDict({"memory": nn.GRU(4, 4), "head": nn.Linear(4, 2)})
    (text,) = warned(plan("quantize-dynamic"), model=model)
    assert "GRU" in text
    assert warned(plan("quantize-dynamic", "head"), model=model) == []
    assert warned(plan("quantize-dynamic")) == []


def test_an_unknown_runtime_is_an_error():
    with pytest.raises(UnknownNameError):
        warned(plan("quantize-static"), Target(runtime="onnxruntim"))


@pytest.mark.parametrize("name", [name for name, kind in all_methods().items() if kind().formats])
def test_declared_formats_are_those_that_are_assigned(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(torch.rand(16), torch.tensor(0)) for _ in range(8)]
    method = all_methods()[name]()
    made = compress(model, Plan().then(method), Task(calibrate=data, example=torch.rand(2, 16)))
    assert made.formats
    for tensors in made.formats.values():
        assert set(tensors) == set(method.formats)
        for tensor, given in tensors.items():
            declared = method.formats[tensor]
            assert (given.granularity, given.dynamic) == (declared.granularity, declared.dynamic)
            assert name == "quantize-mixed" or given == declared


def speed(value, low=None, high=None, notes=()):
    return Profile({"latency_ratio": Measurement(value=value, unit="1", low=low, high=high)}, notes=notes)


@pytest.mark.parametrize(
    ("measured", "pays"),
    [
        (speed(0.97, 0.95, 0.99), False),
        (speed(1.02, 1.01, 1.03), False),
        (speed(1.10, 0.98, 1.30), False),
        (speed(1.10, 1.05, 1.20), True),
        (speed(1.53, 1.50, 1.55), True),
        (speed(0.5), False),
        (Profile(), True),
    ],
)
def test_int8_pays_where_it_is_surely_and_notably_faster(measured, pays):
    assert (measured_advice(measured) == "") == pays


def test_advice_states_the_interval_and_a_busy_machine():
    text = measured_advice(speed(0.97, 0.95, 0.99, ("timed on a busy machine: …",)))
    assert text.startswith("int8 does not pay here: 0.97× (0.95 – 0.99) of float32's speed; keep float32")
    assert "measure again" in text


def test_only_number_formats_are_judged():
    slow = speed(0.9, 0.8, 0.95)
    assert trial_advice(plan("quantize-static").to_data(), slow).startswith("int8 does not pay")
    assert trial_advice(plan("quantize-weights").to_data(), slow).startswith("weights of 4 bits do not pay")
    assert trial_advice(plan("drop-blocks").then(make_method("quantize-static", {})).to_data(), slow) == ""
    assert trial_advice(Plan().to_data(), slow) == ""
