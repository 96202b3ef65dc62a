"""Truncation against NumPy, the closed form against everything that might do better."""

import numpy as np
import pytest
import torch

from trimpoint.low_rank import decompose, regression


@pytest.fixture
def weight():
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 12)
    return torch.randn(400, 12, generator=generator, dtype=torch.float64) @ mix + 0.3


def product(factors):
    return factors[1] @ factors[0]


def output_error(weight, other, inputs):
    return float((inputs @ (weight - other).T).norm())


@pytest.mark.parametrize("rank", [1, 3, 6, 7])
def test_plain_truncation_leaves_the_tail_of_the_singular_values(weight, rank):
    tail = np.linalg.norm(np.linalg.svd(weight.numpy(), compute_uv=False)[rank:])
    found = decompose(weight)
    assert np.linalg.norm(weight.numpy() - product(found.at(rank)).numpy()) == pytest.approx(tail, abs=1e-12)
    assert found.error(rank) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_whitened_truncation_leaves_the_tail_of_the_whitened_singular_values(weight, inputs, rank):
    tail = np.linalg.norm(np.linalg.svd(weight.numpy() @ inputs.numpy().T, compute_uv=False)[rank:])
    found = decompose(weight, inputs.T @ inputs / len(inputs))
    assert output_error(weight, product(found.at(rank)), inputs) == pytest.approx(tail, rel=1e-4)
    assert found.error(rank) * len(inputs) ** 0.5 == pytest.approx(tail, rel=1e-4)


def test_whitened_truncation_is_that_of_the_cholesky_factor(weight, inputs):
    second_moment = (inputs.T @ inputs).numpy()
    lower = np.linalg.cholesky(second_moment)
    left, values, right = np.linalg.svd(weight.numpy() @ lower, full_matrices=False)
    expected = left[:, :3] * values[:3] @ right[:3] @ np.linalg.inv(lower)
    found = product(decompose(weight, torch.from_numpy(second_moment)).at(3))
    assert output_error(torch.from_numpy(expected), found, inputs) < 1e-3 * output_error(weight, found, inputs)


def test_nothing_near_it_is_better(weight, inputs):
    first, second = decompose(weight, inputs.T @ inputs / len(inputs)).at(3)
    best = output_error(weight, second @ first, inputs)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            noise = [
                torch.randn(part.shape, generator=generator, dtype=torch.float64) * size for part in (first, second)
            ]
            assert output_error(weight, (second + noise[1]) @ (first + noise[0]), inputs) > best * (1 - 1e-6)


@pytest.mark.parametrize("seed", [None, 3])
def test_gradient_descent_does_not_get_below_it(weight, inputs, seed):
    found = decompose(weight, inputs.T @ inputs / len(inputs)).at(3)
    best = output_error(weight, product(found), inputs)
    if seed is None:
        parts = [part.contiguous().clone().requires_grad_() for part in found]
    else:
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.randn(part.shape, generator=generator, dtype=torch.float64, requires_grad=True) for part in found
        ]
    optimizer = torch.optim.LBFGS(parts, max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        value = (inputs @ (weight - parts[1] @ parts[0]).T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert float(loss().detach()) ** 0.5 >= best * (1 - 1e-5)


def test_a_singular_covariance_is_no_trouble(weight):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(4, 12, generator=generator, dtype=torch.float64)
    second_moment = inputs.T @ inputs / len(inputs)
    scale = output_error(weight, 0 * weight, inputs)
    for rank in (4, 6):
        factors = decompose(weight, second_moment).at(rank)
        assert all(bool(torch.isfinite(part).all()) for part in factors)
        assert output_error(weight, product(factors), inputs) < 1e-6 * scale
    tail = np.linalg.norm(np.linalg.svd(weight.numpy() @ inputs.numpy().T, compute_uv=False)[2:])
    assert output_error(weight, product(decompose(weight, second_moment).at(2)), inputs) == pytest.approx(
        tail, rel=1e-4
    )


def test_what_the_data_does_not_reach_is_fitted_as_plainly(weight):
    only = torch.diag(torch.tensor([1.0, 1.0] + [0.0] * 10, dtype=torch.float64))
    found = product(decompose(weight, only).at(5))
    assert torch.allclose(found[:, :2], weight[:, :2], atol=1e-5)
    left = weight - weight[:, :2] @ torch.linalg.pinv(weight[:, :2]) @ weight
    tail = torch.linalg.svdvals(left)[3:].norm()
    assert float((weight - found).norm()) == pytest.approx(float(tail), rel=1e-4)


@pytest.mark.parametrize("metric", [None, torch.zeros(12, 12), torch.eye(12), torch.ones(12), torch.zeros(12)])
def test_a_metric_that_says_nothing_is_plain(weight, metric):
    assert torch.allclose(product(decompose(weight, metric).at(3)), product(decompose(weight).at(3)), atol=1e-9)


def test_weights_for_inputs_are_those_of_a_diagonal_metric(weight):
    counts = torch.linspace(0.1, 5, 12, dtype=torch.float64)
    one, other = decompose(weight, counts), decompose(weight, torch.diag(counts))
    assert torch.allclose(one.values, other.values, atol=1e-9)
    assert torch.allclose(product(one.at(3)), product(other.at(3)), atol=1e-9)
    scaled = np.linalg.svd(weight.numpy() * counts.sqrt().numpy(), compute_uv=False)
    assert np.allclose(one.values.numpy(), scaled, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_factors_are_of_equal_size_at_any_scale(weight, scale):
    first, second = decompose(weight * scale).at(4)
    assert torch.allclose(first.norm(dim=1), second.norm(dim=0), rtol=1e-9)
    assert torch.allclose(product((first, second)), scale * product(decompose(weight).at(4)), rtol=1e-9)


def test_a_weight_of_zero_gives_factors_of_zero():
    assert not product(decompose(torch.zeros(4, 5)).at(2)).any()


def test_regression_finds_the_map_that_made_the_targets(weight, inputs):
    centred = inputs - inputs.mean(0)
    true = weight + 0.5
    covariance = centred.T @ centred / len(centred)
    cross = true @ covariance
    assert torch.allclose(regression(weight, covariance, cross, 1e-12), true, atol=1e-3)
    assert torch.allclose(regression(weight, covariance, cross, 1e9), weight, atol=1e-6)
    nothing = torch.zeros_like(covariance)
    assert torch.equal(regression(weight, nothing, torch.zeros_like(weight), 1e-3), weight)


def test_regression_agrees_with_ridge_regression_towards_the_weight(weight, inputs):
    generator = torch.Generator().manual_seed(5)
    targets = inputs @ weight.T + torch.randn(len(inputs), 7, generator=generator, dtype=torch.float64)
    second_moment, ridge = inputs.T @ inputs / len(inputs), 1e-2
    damping = ridge * float(second_moment.diagonal().mean())
    stacked = np.concatenate([inputs.numpy(), np.sqrt(damping * len(inputs)) * np.eye(12)])
    wanted = np.concatenate([targets.numpy(), np.sqrt(damping * len(inputs)) * weight.numpy().T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    found = regression(weight, second_moment, targets.T @ inputs / len(inputs), ridge)
    assert np.allclose(found.numpy(), expected, atol=1e-8)
