"""The benchmarks' networks: shapes, numbers of parameters and of multiplications."""

import pytest
import torch
from benchmarks.models import LeNet5, LeNet300, LstmClassifier, MobileNet
from torch import nn

from trimpoint.measure.static import count_macs


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_lenet5_has_the_parameters_of_the_literature() -> None:
    network = LeNet5()
    assert parameters(network) == 431_080
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_lenet_has_the_parameters_of_the_literature() -> None:
    network = LeNet300()
    assert parameters(network) == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10 == 266_610
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("hidden", [16, 256])
def test_the_lstm_has_the_parameters_of_its_formula(hidden: int) -> None:
    network = LstmClassifier(hidden=hidden)
    layers = 4 * hidden * (40 + hidden + 2) + 4 * hidden * (2 * hidden + 2)
    assert parameters(network) == layers + 10 * hidden + 10
    assert network(torch.zeros(2, 9, 40)).shape == (2, 10)


def test_the_lstm_averages_over_time() -> None:
    torch.manual_seed(0)
    network = LstmClassifier(hidden=8).eval()
    x = torch.randn(2, 7, 40)
    states, _ = network.lstm(x)
    expected = network.head(states).mean(1)
    assert torch.allclose(network(x), expected, atol=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(1.0, 4_231_976), (0.5, 1_331_592), (0.25, 470_072)])
def test_mobilenet_has_the_parameters_of_the_paper(width: float, expected: int) -> None:
    """4.2, 1.3 and 0.5 million in tables 6 and 7 of the paper, with 1,000 classes."""
    assert parameters(MobileNet(width, classes=1_000)) == expected


def test_mobilenet_has_the_multiplications_of_the_paper() -> None:
    """569 million at width 1 and 224 pixels, in table 4."""
    macs = count_macs(MobileNet(1.0, classes=1_000).eval(), torch.zeros(1, 3, 224, 224)).total
    assert macs / 1e6 == pytest.approx(569, abs=1)


def test_mobilenet_takes_images_of_96_pixels() -> None:
    network = MobileNet(0.25).eval()
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 10)
    assert network.layers(network.stem(torch.zeros(1, 3, 96, 96))).shape == (1, 256, 3, 3)
