"""Exports that several tests read; each costs seconds."""

import pytest
import torch

from tests.runtimes import networks
from trimpoint.runtimes.export import export


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cases():
    """Name → (module, function that makes inputs, export, lengths to check)."""
    torch.manual_seed(0)
    made = {
        "cnn": (networks.convolutional(), lambda n=4: networks.quadrants(n)[0], {"input": networks.BATCH}, {}),
        "resnet20": (networks.random_resnet(), lambda n=4: torch.randn(n, 1, 28, 28), {"input": networks.BATCH}, {}),
        "transformer": (
            networks.Transformer().eval(),
            networks.tokens,
            {"attention_mask": networks.OPEN, "input_ids": networks.OPEN},
            {"length": (3, 7, 20)},
        ),
        "lstm": (networks.Recurrent().eval(), lambda n=4: torch.randn(n, 5, 8), {"input": networks.OPEN}, {}),
        "pair": (
            networks.Pair().eval(),
            lambda n=4: (torch.randn(n, 4), torch.randn(n, 4)),
            {"input_0": networks.BATCH, "input_1": networks.BATCH},
            {},
        ),
    }
    return {
        name: (module, inputs, export(module, inputs(), dims), lengths)
        for name, (module, inputs, dims, lengths) in made.items()
    }
