"""Streamed moments against NumPy on everything at once."""

import numpy as np
import pytest
import torch

from trimpoint.low_rank import Moments


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
