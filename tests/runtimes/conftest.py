"""Exports that several tests read; each costs seconds."""

from functools import cache

import pytest
import torch

from tests.runtimes import networks
from trimpoint.data import as_numpy
from trimpoint.runtimes import get_runtime
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
        "resnet8": (networks.random_resnet(), lambda n=4: torch.randn(n, 1, 28, 28), {"input": networks.BATCH}, {}),
        "transformer": (
            networks.Transformer().eval(),
            networks.tokens,
            {"attention_mask": networks.OPEN, "input_ids": networks.OPEN},
            {"length": (3, 7, 20)},
        ),
        "lstm": (networks.Recurrent().eval(), lambda n=4: torch.randn(n, 2, 8), {"input": networks.OPEN}, {}),
        "pair": (
            networks.Pair().eval(),
            lambda n=4: (torch.randn(n, 4), torch.randn(n, 4)),
            {"input_0": networks.BATCH, "input_1": networks.BATCH},
            {},
        ),
    }
    return {
        name: (module, inputs, export(module, inputs(), dims, sources=("onnx", "program")), lengths)
        for name, (module, inputs, dims, lengths) in made.items()
    }


@pytest.fixture(scope="session")
def lowering(cases, tmp_path_factory):
    """Name of a runtime, case, whether in int8 → directory and what was lowered into it, once; not to be changed."""

    @cache
    def lower(runtime, case, int8=False):
        torch.manual_seed(0)
        module, inputs, exported, _ = cases[case]
        directory = tmp_path_factory.mktemp(f"{runtime}-{case}")
        calibration = [as_numpy(inputs(8)) for _ in range(4)] if int8 else ()
        formats = networks.int8(module) if int8 else None
        return directory, get_runtime(runtime).lower(exported, directory, formats=formats, calibration=calibration)

    return lower
