"""Contexts as methods get them; one thread: the networks here are too small for two."""

import pytest
import torch
from torch import nn

from tests.importance.cases import Plain, data_of


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
