"""Streamed moments against NumPy on everything at once."""

import numpy as np
import pytest
import torch

from trimpoint.low_rank import Moments, shrunk


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator) * torch.tensor([1, 2, 3, 1e-3, 10, 1]) + 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_give_what_numpy_gives_at_once(rows, dtype):
    moments = Moments(6)
    for batch in rows.to(dtype).split(37):
        moments.update(batch)
    whole = rows.double().numpy()
    assert moments.count == 300
    assert np.allclose(moments.mean.numpy(), whole.mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance.numpy(), np.cov(whole.T, bias=True), rtol=1e-4, atol=1e-7)
    assert np.allclose(moments.second_moment.numpy(), whole.T @ whole / 300, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_no_size_overflows(rows, scale):
    moments = Moments(6)
    moments.update(rows.double() * scale)
    assert torch.allclose(
        moments.covariance / scale**2,
        torch.from_numpy(np.cov(rows.double().numpy().T, bias=True)),
        rtol=1e-3,
        atol=1e-6,
    )


def test_bfloat16_and_empty_batches(rows):
    moments = Moments(6)
    moments.update(rows[:0])
    assert moments.count == 0
    assert not moments.covariance.any()
    moments.update(rows.bfloat16())
    assert torch.allclose(moments.mean, rows.bfloat16().double().mean(0))


def test_inputs_that_do_not_vary_say_nothing():
    moments = Moments(6)
    for _ in range(3):
        moments.update(torch.full((7, 6), 0.1))
    assert moments.metric(centred=True) is None
    assert torch.allclose(moments.metric(centred=False), torch.full((6, 6), 0.01, dtype=torch.float64))
    moments.update(torch.full((1, 6), 0.2))
    assert moments.metric(centred=True) is not None
    assert Moments(6).metric(centred=False) is None


@pytest.mark.parametrize("count", [2, 10, 300])
def test_shrinkage_is_the_limit_of_the_oracles_iteration(rows, count):
    """As Chen et al. (2010) derive it: the oracle's share, with the last estimate in the place of the truth."""
    sample = np.cov(rows.double().numpy().T, bias=True)
    size = len(sample)
    target, found = np.trace(sample) / size * np.eye(size), sample
    for _ in range(2000):
        product, total = np.trace(found @ sample), np.trace(found) ** 2
        share = ((1 - 2 / size) * product + total) / ((count + 1 - 2 / size) * product + (1 - count / size) * total)
        found = (1 - min(share, 1)) * sample + min(share, 1) * target
    assert np.allclose(shrunk(torch.from_numpy(sample), count).numpy(), found, rtol=1e-3, atol=1e-6)


def test_shrinkage_by_hand_and_at_its_ends():
    moment = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    share = (0.5 * 10 + 16) / ((100 + 0.5) * (10 - 4))
    assert torch.allclose(shrunk(moment, 100), (1 - share) * moment + share * torch.eye(4, dtype=torch.float64))
    assert torch.equal(shrunk(moment, 1), torch.eye(4, dtype=torch.float64))
    assert torch.allclose(shrunk(moment, 1e12), moment, atol=1e-9)
    assert not shrunk(torch.zeros(4, 4), 5).any()
    assert torch.equal(shrunk(torch.ones(1, 1), 5), torch.ones(1, 1, dtype=torch.float64))
