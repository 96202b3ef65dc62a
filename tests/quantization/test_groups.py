"""Scales and zero points in groups: against plain loops, and the solvers against what their papers minimise."""

import pytest
import torch

from trimpoint.quantization.groups import awq, gptq_groups, hqq, searched, widest
from trimpoint.quantization.rounding import error_of


@pytest.fixture
def weight():
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3


@pytest.fixture
def products():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 40, generator=generator, dtype=torch.float64) @ mix * torch.linspace(0.1, 5, 40)
    return x.T @ x / 300


@pytest.mark.parametrize("symmetric", [False, True])
def test_nearest_against_loops(weight, symmetric):
    groups = widest(weight, 16, 3, symmetric)
    assert groups.scale.shape == (6, 3)
    rounded = groups.nearest(weight)
    for row in range(6):
        for start in range(0, 40, 16):
            part = weight[row, start : start + 16].tolist()
            low, high = min(0.0, *part), max(0.0, *part)
            scale = max(high / 3, -low / 4) if symmetric else (high - low) / 7
            zero = 4 if symmetric else round(-low / scale)
            want = [(min(7, max(0, round(w / scale + zero))) - zero) * scale for w in part]
            assert torch.allclose(rounded[row, start : start + 16], torch.tensor(want).double(), rtol=1e-6)


def test_searched_is_no_worse_than_the_widest_in_any_group(weight):
    wide, best = (f(weight, 8, 2, False).nearest(weight) for f in (widest, searched))
    errors = [(each - weight).square().reshape(6, 5, 8).sum(2) for each in (wide, best)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_groups_of_zeros_stay_zero():
    groups = widest(torch.zeros(2, 20), 16, 4, False)
    assert (groups.scale == 1).all()
    assert not groups.nearest(torch.zeros(2, 20)).any()


def test_gptq_in_groups_against_a_plain_recursion(weight, products):
    groups = searched(weight, 16, 3, False)
    hessian = products.clone()
    hessian.diagonal().add_(0.01 * products.diagonal().mean())
    order = products.diagonal().argsort(descending=True, stable=True).tolist()
    left, want, rest = weight.clone(), torch.zeros_like(weight), list(order)
    for column in order:
        # The optimal brain surgeon's step, its inverse taken anew over what is left.
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        scale, zero = groups.scale[:, column // 16], groups.zero[:, column // 16]
        want[:, column] = ((left[:, column] / scale + zero).round().clamp(0, 7) - zero) * scale
        wrong = (left[:, column] - want[:, column]) / inverse[0, 0]
        left[:, rest] -= wrong[:, None] * inverse[0]
        rest.remove(column)
    found = gptq_groups(weight, groups, products)
    assert torch.allclose(found, want, atol=1e-9)
    assert error_of(found - weight, products).sum() < 0.7 * error_of(groups.nearest(weight) - weight, products).sum()


def test_gptq_keeps_zeros(weight, products):
    keep = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) > 0.5
    found = gptq_groups(weight * keep, widest(weight, 16, 3, False), products, keep)
    assert not found[~keep].any()


def test_hqq_is_the_iteration_of_its_authors(weight):
    groups = widest(weight, 8, 2, False)
    # Their code, in their terms: W·scale + zero rounds to Wq, (Wq − zero)/scale comes back.
    rows, scale, zero, beta = weight.reshape(-1, 8), 1 / groups.scale.reshape(-1, 1), groups.zero.reshape(-1, 1), 10.0
    for _ in range(20):
        codes = torch.round(rows * scale + zero).clamp(0, 3)
        back = (codes - zero) / scale
        x = rows - back
        error = torch.sign(x) * torch.nn.functional.relu(x.abs() - (1.0 / beta) * x.abs().pow(0.7 - 1))
        zero = torch.mean(codes - (rows - error) * scale, dim=1, keepdim=True)
        beta *= 1.01
    assert torch.allclose(hqq(weight, groups, whole=False).zero.reshape(-1, 1), zero, atol=1e-6)


def test_hqq_with_whole_zero_points_lowers_its_norm(weight):
    groups = widest(weight, 8, 2, False)
    found = hqq(weight, groups)
    assert torch.equal(found.zero, found.zero.round())
    far = [(each.nearest(weight) - weight).abs().pow(0.7).reshape(6, 5, 8).sum(2) for each in (groups, found)]
    assert (far[1] <= far[0]).all()
    assert far[1].sum() < 0.95 * far[0].sum()


def test_awq_finds_the_best_of_its_powers(weight, products):
    sizes = products.diagonal().sqrt()
    factor, groups, values = awq(weight, products, sizes, lambda rows: widest(rows, 16, 3, False))
    assert torch.allclose(values, groups.nearest(weight / factor) * factor)
    errors = []
    for power in range(21):
        s = sizes.pow(power / 20)
        s = s / (s.max() * s.min()).sqrt()
        rounded = widest(weight * s, 16, 3, False).nearest(weight * s) / s
        errors.append(float(error_of(rounded - weight, products).sum()))
    assert float(error_of(values - weight, products).sum()) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < 0.8 * errors[0]
