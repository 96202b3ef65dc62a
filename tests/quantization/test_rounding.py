"""Rounding of weights: against plain implementations, brute force, and identities that must hold."""

import itertools

import pytest
import torch

from trimpoint.quantization.rounding import adaround, best_scale, gptq, nearest, widest_scale

TOP = 7


def problem(outputs=12, inputs=40, samples=400, seed=0):
    """Weights, and XᵀX of inputs that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ (mix + torch.eye(inputs))
    x *= torch.linspace(0.2, 3.0, inputs, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x.T @ x


def error(wrong, products):
    return ((wrong @ products) * wrong).sum(1)


def on_grid(values, scale, top=TOP):
    codes = values / scale[:, None]
    return bool((codes - codes.round()).abs().max() < 1e-9) and float(codes.abs().max()) <= top + 1e-9


def plain_gptq(weight, scale, products, damping=0.01):
    """One column at a time, the inverse updated as the optimal brain surgeon does, without factors or blocks."""
    order = products.diagonal().argsort(descending=True, stable=True)
    hessian = products[order][:, order] + damping * products.diagonal().mean() * torch.eye(len(order))
    left, result = weight[:, order].clone(), torch.zeros_like(weight)
    inverse = torch.linalg.inv(hessian)
    for j in range(len(order)):
        result[:, j] = nearest(left[:, j : j + 1], scale, TOP)[:, 0]
        left -= ((left[:, j] - result[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result[:, order.argsort()]


@pytest.mark.parametrize("inputs", [5, 40, 150])
def test_gptq_is_the_plain_recursion(inputs):
    weight, products = problem(inputs=inputs)
    scale = widest_scale(weight, TOP)
    torch.testing.assert_close(gptq(weight, scale, TOP, products), plain_gptq(weight, scale, products))


@pytest.mark.parametrize("rule", [gptq, adaround])
def test_inputs_without_correlation_are_rounded_to_nearest(rule):
    weight, _ = problem()
    scale = widest_scale(weight, TOP)
    products = torch.diag(torch.linspace(1.0, 9.0, 40, dtype=torch.float64))
    torch.testing.assert_close(rule(weight, scale, TOP, products), nearest(weight, scale, TOP))


@pytest.mark.parametrize("rule", [gptq, adaround])
def test_zeros_that_are_held_stay_zero_and_the_others_make_up_for_it(rule):
    weight, products = problem()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    weight = weight * keep
    scale = widest_scale(weight, TOP)
    found = rule(weight, scale, TOP, products, keep)
    assert bool((found[~keep] == 0).all())
    assert on_grid(found, scale)
    assert error(found - weight, products).sum() < 0.9 * error(nearest(weight, scale, TOP) - weight, products).sum()


@pytest.mark.parametrize("seed", range(3))
def test_looking_at_the_inputs_lowers_the_error_of_the_layer(seed):
    weight, products = problem(seed=seed)
    scale = best_scale(weight, TOP, products)
    plain = nearest(weight, scale, TOP)
    before = error(plain - weight, products)
    compensated, learned = gptq(weight, scale, TOP, products), adaround(weight, scale, TOP, products)
    assert on_grid(compensated, scale)
    assert on_grid(learned, scale)
    assert error(compensated - weight, products).sum() < 0.8 * before.sum()
    assert error(learned - weight, products).sum() < 0.8 * before.sum()
    inside = torch.minimum(torch.maximum(weight, -TOP * scale[:, None]), TOP * scale[:, None])
    assert ((learned - inside).abs() <= scale[:, None] + 1e-9).all()


def test_adaptive_rounding_comes_close_to_the_best_of_all_ways_up_or_down():
    weight, products = problem(outputs=6, inputs=8)
    scale = widest_scale(weight, TOP)
    down = (weight / scale[:, None]).floor()
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)
    best = torch.stack(
        [
            min(error(((row + up).clamp(-TOP, TOP) * size - full)[None], products)[0] for up in ways)
            for row, size, full in zip(down, scale, weight, strict=True)
        ]
    )
    plain = error(nearest(weight, scale, TOP) - weight, products)
    found = error(adaround(weight, scale, TOP, products) - weight, products)
    assert (found >= best - 1e-9).all()
    assert float((plain - found).sum() / (plain - best).sum()) > 0.85


def test_the_best_scale_is_the_best_of_those_tried():
    weight, products = problem()
    for matrix in (None, products):
        eye = torch.eye(40, dtype=torch.float64) if matrix is None else matrix
        found = error(nearest(weight, best_scale(weight, TOP, matrix), TOP) - weight, eye)
        for share in torch.linspace(0.3, 1.0, 71, dtype=torch.float64):
            tried = error(nearest(weight, share * widest_scale(weight, TOP), TOP) - weight, eye)
            assert (found <= tried + 1e-9).all()


def test_scales_of_denormal_weights_are_no_zero_in_float32():
    weight, products = problem()
    weight[2] *= 1e-44
    for scale in (widest_scale(weight, TOP), best_scale(weight, TOP), best_scale(weight, TOP, products)):
        assert (scale.float() > 0).all()


@pytest.mark.parametrize("rule", [gptq, adaround])
@pytest.mark.parametrize("top", [1, 7, 127])
def test_rows_of_zeros_and_inputs_that_are_always_zero(rule, top):
    weight, products = problem()
    weight[3] = 0.0
    products[:, 5] = products[5] = 0.0
    scale = best_scale(weight, top, products)
    rounded = rule(weight, scale, top, products)
    assert bool(torch.isfinite(rounded).all())
    assert scale[3] == 1.0
    assert (rounded[3] == 0.0).all()
    assert on_grid(rounded, scale, top)
