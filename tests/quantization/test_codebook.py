"""One-dimensional k-means, and with a price on the entropy of the codes."""

import pytest
import torch

from trimpoint.quantization.codebook import cluster, initial_values


def of(codes, values):
    return torch.cat([values.new_zeros(1), values])[codes.long()]


@pytest.mark.parametrize("init", ["linear", "density"])
def test_values_are_the_means_of_their_weights_and_the_nearest(init):
    weights = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes, values = cluster(weights, initial_values(weights, 4, init))
    for code, value in enumerate(values, 1):
        torch.testing.assert_close(weights[codes == code].mean(), value)
    nearest = (weights[:, None] - values).abs().argmin(1) + 1
    assert torch.equal(nearest, codes.long())


def test_four_levels_of_a_normal_distribution_have_the_known_error():
    weights = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes, values = cluster(weights, initial_values(weights, 4, "density"))
    assert float((of(codes, values) - weights).square().mean()) == pytest.approx(0.1175, abs=2e-3)  # Max (1960)


def test_important_weights_pull_the_value():
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    _, values = cluster(weights, torch.tensor([1.4], dtype=torch.float64), torch.tensor([3.0, 1.0]))
    assert values.tolist() == pytest.approx([1.25])


def test_a_price_lowers_the_entropy_below_that_of_k_means_of_the_same_error():
    weights = torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def figures(clusters, price):
        codes, values = cluster(weights, initial_values(weights, clusters, "linear"), price=price, zero=price > 0)
        share = torch.bincount(codes.long()).double() / len(codes)
        bits = -float((share * share.clamp_min(1e-300).log2()).sum())
        return bits, float((of(codes, values) - weights).square().mean())

    priced, plain = figures(16, 0.045), figures(8, 0.0)
    assert priced[1] < plain[1]
    assert priced[0] < plain[0]
