"""Decompositions of kernels: exact at full rank, bounded and optimal below it."""

import pytest
import torch

from trimpoint.low_rank import Tucker, lost_share, spatial, tucker2
from trimpoint.low_rank.convolution import channel_moment, side_by_side, unfolded


@pytest.fixture
def kernel():
    return torch.randn(8, 6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def metric_of(kernel, singular=False):
    size = kernel[0].numel()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3 * size if not singular else 5, size, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -2, size) + 0.2
    return rows.T @ rows / len(rows)


def weighted(difference, metric):
    matrix = difference.flatten(1)
    return float((matrix @ metric @ matrix.T).trace().clamp_min(0).sqrt())


def test_tucker_is_exact_at_full_rank(kernel):
    assert torch.allclose(tucker2(kernel, 6, 8).kernel(), kernel, atol=1e-12)
    assert torch.allclose(tucker2(kernel, 6, 8, metric=metric_of(kernel)).kernel(), kernel, atol=1e-9)


def test_tucker_is_exact_at_the_rank_that_was_planted():
    generator = torch.Generator().manual_seed(0)
    planted = torch.einsum(
        "or,rsk,si->oik",
        *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 3), (3, 2, 9), (2, 6))),
    )
    found = tucker2(planted, 2, 3)
    assert torch.allclose(found.kernel(), planted, atol=1e-10)
    assert (found.inlet.shape, found.core.shape, found.outlet.shape) == ((2, 6), (3, 2, 9), (8, 3))


@pytest.mark.parametrize(("rank_in", "rank_out"), [(3, 4), (1, 2), (6, 3), (2, 8)])
def test_the_error_is_within_its_bounds(kernel, rank_in, rank_out):
    tails = [
        float(torch.linalg.svdvals(unfolded(kernel, dim))[rank:].norm()) for dim, rank in ((1, rank_in), (0, rank_out))
    ]
    error = float((kernel - tucker2(kernel, rank_in, rank_out).kernel()).norm())
    assert max(tails) <= error * (1 + 1e-9)
    assert error**2 <= tails[0] ** 2 + tails[1] ** 2 + 1e-9


def test_no_more_channels_are_made_than_there_is_use_for():
    kernel = torch.randn(16, 4, 1, 3, generator=torch.Generator().manual_seed(0))
    found = tucker2(kernel, 1, 12)
    assert found.core.shape == (3, 1, 1, 3)


def test_one_sided_tucker_with_a_metric_is_the_closed_form(kernel):
    metric = metric_of(kernel)
    found = tucker2(kernel, 6, 3, metric=metric).kernel()
    lower = torch.linalg.cholesky(metric)
    tail = float(torch.linalg.svdvals(kernel.flatten(1) @ lower)[3:].norm())
    assert weighted(kernel - found, metric) == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("make", [lambda k, m: tucker2(k, 3, 4, m), lambda k, m: spatial(k, 5, m)])
@pytest.mark.parametrize("singular", [False, True])
def test_a_metric_lowers_the_error_of_the_outputs(kernel, make, singular):
    metric = metric_of(kernel, singular)
    plain, observed = make(kernel, None).kernel(), make(kernel, metric).kernel()
    assert bool(torch.isfinite(observed).all())
    assert weighted(kernel - observed, metric) < 0.8 * weighted(kernel - plain, metric)


def test_spatial_is_exact_at_full_rank(kernel):
    rank = int(torch.linalg.matrix_rank(side_by_side(kernel)))
    assert torch.allclose(spatial(kernel, rank).kernel(), kernel, atol=1e-12)
    assert torch.allclose(spatial(kernel, rank, metric_of(kernel)).kernel(), kernel, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_spatial_leaves_the_tail_of_the_singular_values(kernel, rank):
    tail = torch.linalg.svdvals(side_by_side(kernel))[rank:].norm()
    assert float((kernel - spatial(kernel, rank).kernel()).norm()) == pytest.approx(float(tail))


def test_the_moment_of_the_channels_is_the_mean_over_positions():
    rows = torch.randn(50, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = rows.flatten(1)
    expected = torch.einsum("nik,njk->ij", rows, rows) / 50 / 9
    assert torch.allclose(channel_moment(flat.T @ flat / 50, 4), expected)


def test_the_core_is_the_least_squares_solution(kernel):
    metric = metric_of(kernel)
    found = tucker2(kernel, 3, 4, metric)
    generator = torch.Generator().manual_seed(2)
    best = weighted(kernel - found.kernel(), metric)
    for size in (1e-1, 1e-3):
        noise = size * torch.randn(found.core.shape, generator=generator, dtype=torch.float64)
        other = type(found)(found.inlet, found.core + noise, found.outlet)
        assert weighted(kernel - other.kernel(), metric) > best


def test_ranks_of_one_decomposition_are_those_of_each(kernel):
    metric = metric_of(kernel)
    found = Tucker(kernel, metric)
    for ranks in ((3, 4), (6, 2), (1, 8)):
        assert torch.allclose(found.at(*ranks).kernel(), tucker2(kernel, *ranks, metric).kernel())


def test_the_share_that_is_lost(kernel):
    metric, other = metric_of(kernel), kernel + 0.1
    expected = (weighted(kernel - other, metric) / weighted(kernel, metric)) ** 2
    assert lost_share(kernel - other, kernel, metric) == pytest.approx(expected)
    assert lost_share(kernel - other, kernel) == pytest.approx(
        float((0.1 * torch.ones_like(kernel)).norm() / kernel.norm()) ** 2
    )
    assert lost_share(0 * kernel, 0 * kernel) == 0
