"""Small artifacts that the tests of measuring share."""

from pathlib import Path

import pytest
import torch
from torch import nn

from trimpoint.measure.process import ArtifactFiles
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.signature import BATCH


def perceptron(width, depth):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def lower(module, inputs, directory: Path) -> ArtifactFiles:
    directory.mkdir()
    exported = export(module, inputs, {"input": {0: BATCH}})
    return ArtifactFiles(directory=directory, lowered=get_runtime("onnxruntime").lower(exported, directory))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Two layers of width 64."""
    return lower(perceptron(64, 2), torch.randn(2, 64), tmp_path_factory.mktemp("small") / "files")


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """Thirty layers of width 64: the interface of `small`, about fifteen times its work."""
    return lower(perceptron(64, 30), torch.randn(2, 64), tmp_path_factory.mktemp("large") / "files")


@pytest.fixture(scope="session")
def heavy(tmp_path_factory):
    """Four layers of width 2,048: 64 MB of weights."""
    return lower(perceptron(2_048, 4), torch.randn(2, 2_048), tmp_path_factory.mktemp("heavy") / "files")
