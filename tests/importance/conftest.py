"""A network and data to take the importance of its units on."""

import pytest
import torch
from torch import nn

from tests.importance.cases import Plain, data_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Plain().eval()
    nn.init.normal_(model.norm.weight)
    return model


@pytest.fixture(scope="session")
def task():
    return data_of((1, 6, 6))


@pytest.fixture(scope="session")
def sequences():
    return data_of((5, 8))
