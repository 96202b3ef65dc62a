"""A network of depthwise convolutions whose channels differ by orders of magnitude, quantised without any data.

The checkpoint is scaled channel by channel, by factors from 1/16 to 16 drawn at random, wherever that leaves what the
network computes as it is. Int8 with one scale per tensor then has no levels left for the small ones. Calibration inputs
are made from the statistics of the batch norms: nothing here sees an image but the measurement of quality.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import mobilenet_cifar10
from benchmarks.comparison import Comparison, goal
from benchmarks.peers import nncf_by, quantize_static_by
from torch.utils.data import TensorDataset

from trimpoint.graph import trace
from trimpoint.graph.scalings import find_scalings, rescale_
from trimpoint.methods.equalize_layers import EqualizeLayers
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.quantization.distilled import distilled_inputs

QUESTION = "Does equalisation bring back what int8 per tensor loses where channels differ, without data?"
PLAIN, OURS = "int8 per tensor", "equalised, int8 per tensor"
PER_TENSOR = QuantizeStatic(granularity="tensor", observer="mse")
FACTOR, INPUTS = 16.0, 128
PLANS = {
    PLAIN: Plan().then(PER_TENSOR),
    OURS: Plan().then(EqualizeLayers(), PER_TENSOR),
    "int8 per channel": Plan().then(QuantizeStatic(observer="mse")),
    "equalised, int8 per channel": Plan().then(EqualizeLayers(), QuantizeStatic(observer="mse")),
}


def run(resume_dir: Path) -> dict[str, Any]:
    """Scale the checkpoint, quantise it in each way, and score the files; ours and the plain one are certified."""
    task = mobilenet_cifar10.task()
    example = task.example_batch(2)
    model = imbalanced(mobilenet_cifar10.model(), example)
    inputs = distilled_inputs(model, example, INPUTS)
    task = task.with_(calibrate=TensorDataset(inputs, torch.zeros(INPUTS, dtype=torch.int64)))
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    comparison.add_lowered("quantize_static, per channel, 7 bits", quantize_static_by())
    comparison.add_lowered("NNCF, its defaults", nncf_by())
    for name, plan in PLANS.items():
        comparison.add(name, plan)
    certificates = comparison.certify([OURS, PLAIN], 0.01, "depthwise-imbalance")
    rows = comparison.rows({}, certificates)
    lost, left = (certificates[name].drop for name in (PLAIN, OURS))
    return {
        "rows": rows,
        "goals": [
            goal("share of the lost accuracy recovered", 1 - left / lost, 0.95, None, unit="1"),
            goal("drop against float32 after equalisation", 100 * left, None, 0.3, better="lower", unit="points"),
        ],
    }


def imbalanced(model: torch.nn.Module, example: torch.Tensor) -> torch.nn.Module:
    """Return a network that computes the same, and whose channels differ by up to `FACTOR` squared."""
    model = copy.deepcopy(model).eval()
    groups = [group for group in find_scalings(trace(model, example)).groups if not group.reason]
    generator = torch.Generator().manual_seed(0)
    exponents = {group: torch.empty(group.size).uniform_(-1, 1, generator=generator) for group in groups}
    rescale_(model, {group: FACTOR**found for group, found in exponents.items()}, example)
    return model
