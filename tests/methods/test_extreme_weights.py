"""Weights of one value, of all sizes, of hardly any: methods of few values and bits stay finite, no worse than zero."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.graph import baked
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.methods.share_weights import ShareWeights
from trimpoint.methods.ternarize_weights import TernarizeWeights
from trimpoint.plan import Plan
from trimpoint.task import Task

NORMAL = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
WEIGHTS = {
    "one value": torch.full((8, 20), -0.3),
    "one weight": torch.zeros(8, 20).index_fill(1, torch.tensor([3]), 2.0) * torch.eye(8)[:, :1],
    "denormal": NORMAL * 1e-41,
    "huge": NORMAL * 1e37,
    "rows of all sizes": NORMAL * torch.logspace(-38, 37, 8)[:, None],
    "rows of zeros": NORMAL * (torch.arange(8) > 3)[:, None],
    "of one sign": NORMAL.abs() + 1,
    "an outlier": NORMAL.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e30)),
    "one input": NORMAL[:, :1],
    "one output": NORMAL[:1],
}
METHODS = (
    ShareWeights(clusters=255, init="density"),
    ShareWeights(importance="inputs", entropy=0.1),
    ShareWeights(entropy=10.0),
    TernarizeWeights(keep_ends=False),
    TernarizeWeights(keep_ends=False, values=2, granularity="channel"),
    TernarizeWeights(keep_ends=False, scales="learned", granularity="channel"),
    *(QuantizeWeights(bits=2, group=16, rounding=rule) for rule in ("nearest", "gptq", "awq", "hqq")),
)


@pytest.mark.parametrize("inputs", [1.0, 0.0], ids=["inputs", "inputs of zeros"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_extreme_weights(method, inputs):
    for name, weight in WEIGHTS.items():
        model = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False)).eval()
        with torch.no_grad():
            model[0].weight.copy_(weight)
        data = inputs * torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
        made = compress(model, Plan().then(method), Task(calibrate=TensorDataset(data, torch.zeros(64))))
        found = baked(made.module)[0].weight.detach().double()
        assert bool(torch.isfinite(found).all()), name
        assert float((found - weight).norm()) <= 1.001 * float(weight.double().norm()), name
