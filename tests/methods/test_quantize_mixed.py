"""Bits by layer: the knapsack against brute force, and what it gains over one number of bits for all."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.graph import grids_of, mask_
from trimpoint.methods.quantize_mixed import QuantizeMixed, allocated
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.task import Task

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sizes = {f"layer{index}": int(size) for index, size in enumerate(rng.integers(10, 5000, 5))}
    costs = {(path, bits): float(rng.lognormal(0, 2) * 4.0**-bits) for path in sizes for bits in BITS}
    limit = float(rng.uniform(2.2, 7))
    found = allocated(costs, sizes, limit)

    def size(each):
        return sum(bits * sizes[path] for path, bits in each.items()) / sum(sizes.values())

    every = (dict(zip(sizes, bits, strict=True)) for bits in itertools.product(BITS, repeat=len(sizes)))
    best = min(sum(costs[item] for item in each.items()) for each in every if size(each) <= limit)
    assert size(found) <= limit + 1e-9
    assert sum(costs[item] for item in found.items()) == pytest.approx(best, rel=1e-6)


class Uneven(nn.Module):
    """A small layer on which everything depends, and a large one that hardly counts."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.back = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(x + 0.01 * self.back(self.wide(x).relu()))


@pytest.fixture
def given():
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    return Uneven().eval(), Task(calibrate=TensorDataset(inputs, torch.zeros(256))), inputs


def error(module, model, inputs):
    with torch.no_grad():
        return float((module(inputs) - model(inputs)).square().mean())


def test_layers_that_count_get_more_bits(given):
    model, task, inputs = given
    made = compress(model, Plan().then(QuantizeMixed(mean_bits=4.0)), task)
    bits = {path: grid.bits for path, grid in grids_of(made.module).items()}
    assert bits["first"] > bits["wide"]
    assert bits["head"] > bits["back"]
    weights = {path: model.get_submodule(path).weight.numel() for path in bits}
    assert sum(bits[path] * weights[path] for path in bits) <= 4.0 * sum(weights.values())
    uniform = compress(model, Plan().then(QuantizeStatic(bits=4, rounding="gptq")), task)
    assert error(made.module, model, inputs) < 0.3 * error(uniform.module, model, inputs)
    assert made.formats["wide"]["weight"].bits == bits["wide"]
    assert all("of their variance" in change.reason for change in made.changes if change.kind == "assigned")
    assert error(model, model, inputs) == 0


def test_one_number_of_bits_is_that_of_quantize_static(given):
    model, task, _ = given
    mixed = compress(model, Plan().then(QuantizeMixed(mean_bits=4.0, fewest_bits=4, most_bits=4)), task)
    uniform = compress(model, Plan().then(QuantizeStatic(bits=4, rounding="gptq")), task)
    first, second = grids_of(mixed.module), grids_of(uniform.module)
    assert all((first[path].codes == second[path].codes).all() for path in second)


@pytest.mark.parametrize(("reduced", "most"), [(True, 7), (False, 8)])
def test_eight_bits_are_only_given_where_sums_of_sixteen_bits_need_not_hold_them(given, reduced, most):
    model, task, _ = given
    made = compress(model, Plan().then(QuantizeMixed(mean_bits=8.0, reduce_range=reduced)), task)
    assert max(grid.bits for grid in grids_of(made.module).values()) == most


def test_zeros_that_are_held_stay(given):
    model, task, _ = given
    keep = torch.rand(64, 8) > 0.5
    mask_(model.wide, "weight", keep)
    made = compress(model, Plan().then(QuantizeMixed(mean_bits=4.0)), task)
    assert bool((made.module.wide.weight[~keep] == 0).all())


@pytest.mark.parametrize(
    ("params", "words"),
    [({"most_bits": 9}, "range"), ({"fewest_bits": 4, "mean_bits": 3.0}, "at most"), ({"most_bits": 1}, "range")],
)
def test_parameters_that_cannot_be(params, words):
    with pytest.raises(InvalidParameterError, match=words):
        QuantizeMixed(**params)


def test_needs_calibration_data(given):
    with pytest.raises(DataError, match="calibrat"):
        compress(given[0], Plan().then(QuantizeMixed()), Task())


class Logarithm(nn.Module):
    """Rounding its first layer to two bits makes arguments of the logarithm negative."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4) - 0.6 * torch.eye(4).roll(1, 0))

    def forward(self, x):
        return self.head(self.first(x).log())


def test_bits_that_lead_to_answers_that_are_not_finite_are_not_chosen():
    torch.manual_seed(0)
    inputs = 0.8 + 0.4 * torch.rand(16, 4)
    model, task = Logarithm().eval(), Task(calibrate=TensorDataset(inputs, torch.zeros(16)))
    for method in (QuantizeMixed(mean_bits=6.0, rounding="nearest"), QuantizeStatic(bits=2, keep_float=1)):
        module = compress(model, Plan().then(method), task).module
        with torch.no_grad():
            assert torch.isfinite(module(inputs)).all(), method
