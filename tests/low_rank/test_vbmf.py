"""Variational Bayes finds a planted rank, and its threshold is the published one."""

import math

import numpy as np
import pytest
import torch

from trimpoint.low_rank import noise_variance, vbmf_rank, vbmf_threshold


def planted(rows, columns, rank, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, max(rank, 1), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, max(rank, 1), generator=generator, dtype=torch.float64))[0]
    sizes = strength * (math.sqrt(rows) + math.sqrt(columns)) * torch.linspace(1, 2, max(rank, 1), dtype=torch.float64)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return noise + (left * sizes @ right.T if rank else 0)


@pytest.mark.parametrize("shape", [(40, 40), (40, 160), (160, 40), (64, 96)])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_a_planted_rank_is_found(shape, rank):
    for seed in range(3):
        assert vbmf_rank(planted(*shape, rank, 1.5, seed)) == rank


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_does_not_matter(scale):
    assert vbmf_rank(scale * planted(40, 80, 5, 1.5, 0)) == 5


def test_the_noise_is_estimated():
    squares = torch.linalg.svdvals(3 * planted(100, 200, 6, 1.5, 0)).square().numpy()
    assert noise_variance(squares, 200) == pytest.approx(9.0, rel=0.05)


def test_the_matrix_of_zeros_has_rank_zero():
    assert vbmf_rank(torch.zeros(5, 8)) == 0


def test_a_matrix_without_noise_keeps_its_rank():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    assert vbmf_rank(matrix) == 4


@pytest.mark.parametrize("ratio", [1e-3, 0.01, 0.1, 0.5, 1.0])
def test_the_threshold_is_the_published_one(ratio):
    """Nakajima et al. (2013) approximate its only implicit part by 2.5129 √α, and show it to be above the noise."""
    tau = 2.5129 * math.sqrt(ratio)
    assert vbmf_threshold(ratio) == pytest.approx((1 + tau) * (1 + ratio / tau), rel=0.05)
    assert vbmf_threshold(ratio) > (1 + math.sqrt(ratio)) ** 2


def test_the_threshold_of_a_square_matrix_is_exactly_that_of_the_approximation():
    assert vbmf_threshold(1.0) == pytest.approx((1 + 2.5129) * (1 + 1 / 2.5129), rel=1e-4)


def test_the_free_energy_is_least_where_scipy_finds_it():
    from scipy.optimize import minimize_scalar

    from trimpoint.low_rank.vbmf import _free_energy

    squares = torch.linalg.svdvals(planted(30, 60, 4, 1.5, 1)).square().numpy()
    threshold = vbmf_threshold(0.5)
    values = [
        minimize_scalar(
            lambda log: _free_energy(squares / (60 * math.exp(log)), 0.5, threshold),
            bounds=(low, low + 1),
            method="bounded",
        )
        for low in np.arange(-1.5, 1.5, 0.5)
    ]
    best = min(values, key=lambda found: found.fun)
    assert noise_variance(squares, 60) == pytest.approx(math.exp(best.x), rel=1e-3)
