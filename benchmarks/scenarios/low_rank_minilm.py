"""Activation-aware low rank against plain SVD on MiniLM's feed-forward layers, at 30 % fewer parameters.

Each layer's output error `‖(WX + b) − (W'X + b')‖` is measured on the inputs that the unmodified network gives it, over
the tokens of 9,500 queries of Banking77 to calibrate on and of 500 others. Padding does not count. The optimum of the
calibration data is computed here, apart from the package: with the Cholesky factor of the inputs' covariance, as
SVD-LLM does with the second moment. No time is measured.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.comparison import goal, kept
from torch import Tensor, nn
from torch.utils.data import Subset

from trimpoint.compress import compress
from trimpoint.filters import parse
from trimpoint.methods.factorize_linear import FactorizeLinear
from trimpoint.plan import Plan, Step
from trimpoint.task import Task

QUESTION = "How much nearer to a layer's outputs than plain SVD is a low-rank layer that was weighted by its inputs?"
CALIBRATE, HELD_OUT, RATIO, BATCH = 9_500, 500, 0.7, 32
SIDES = {"up": "intermediate", "down": "output"}
PATHS = {f"{side} {i}": f"bert.encoder.layer.{i}.{name}.dense" for side, name in SIDES.items() for i in range(6)}
SYSTEMS: dict[str, dict[str, Any]] = {
    "plain SVD": {"weighting": "none"},
    "weighted by the inputs": {"weighting": "activation"},
}
PLAIN, WEIGHTED = SYSTEMS
OPTIMUM = "closed-form optimum of the calibration data, bias included"


def run(resume_dir: Path) -> dict[str, Any]:
    """Compare the errors of all layers; what is done is kept in `resume_dir`."""
    torch.set_num_threads(1)
    example = banking77()
    network, data = example.pretrained(), example.Queries(example.read_banking77("train"))
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    roles = {
        "calibration": Subset(data, order[:CALIBRATE]),
        "held out": Subset(data, order[CALIBRATE : CALIBRATE + HELD_OUT]),
    }
    task = Task(calibrate=roles["calibration"], collate=example.pad, batch_size=BATCH)
    moments = {role: second_moments(network, samples) for role, samples in roles.items()}
    rows = {}
    for name, settings in SYSTEMS.items():
        rows[name] = kept(
            resume_dir / f"{name}.json", lambda s=settings: measured(network, task, s, moments, roles["held out"])
        )
    rows[OPTIMUM] = kept(resume_dir / "optimum.json", lambda: optimum(network, moments))
    return {"rows": [row(name, found, rows) for name, found in rows.items()], "goals": goals(rows)}


def measured(network: nn.Module, task: Task, settings: dict[str, Any], moments: Any, held_out: Any) -> dict[str, Any]:
    """Compress with one setting and return its errors, layer by layer and in the network as it then is."""
    plan = Plan((Step(FactorizeLinear(rank_ratio=RATIO, **settings), parse(" | ".join(PATHS.values()))),))
    module = compress(network, plan, task).module
    pairs = {
        layer: (affine(network.get_submodule(path)), affine(module.get_submodule(path)))
        for layer, path in PATHS.items()
    }
    params = [
        sum(p.numel() for p in m.get_submodule(path).parameters()) for path in PATHS.values() for m in (module, network)
    ]
    return {
        "rank": module.get_submodule(PATHS["up 0"])[0].out_features,
        "share of parameters": sum(params[0::2]) / sum(params[1::2]),
        "errors": errors(pairs, moments),
        "in the network": in_network(network, module, held_out),
    }


def optimum(network: nn.Module, moments: Any) -> dict[str, Any]:
    """Return the errors of the best layers of the same rank for the calibration data, by Cholesky's factor.

    The best bias takes over the mean of the inputs, so the matrix is the best for their covariance.
    """
    pairs = {}
    rank = int(RATIO * 384 * 1536 / (384 + 1536))
    for layer, path in PATHS.items():
        whole = affine(network.get_submodule(path)).numpy()
        weight, sums = whole[:, :-1], moments["calibration"][layer].numpy()
        mean = sums[:-1, -1] / sums[-1, -1]
        centred = sums[:-1, :-1] - np.outer(mean, mean) * sums[-1, -1]
        lower = np.linalg.cholesky(centred + 1e-9 * np.trace(centred) / len(centred) * np.eye(len(centred)))
        left, values, right = np.linalg.svd(weight @ lower, full_matrices=False)
        best = np.linalg.solve(lower.T, (left[:, :rank] * values[:rank] @ right[:rank]).T).T
        bias = whole[:, -1] + (weight - best) @ mean
        pairs[layer] = torch.from_numpy(whole), torch.from_numpy(np.concatenate([best, bias[:, None]], 1))
    return {"rank": rank, "errors": errors(pairs, moments)}


def banking77() -> Any:
    """Return the example that makes the network and reads the data."""
    examples = str(Path(__file__).parents[2] / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    return importlib.import_module("banking77_model")


def affine(layer: nn.Module) -> Tensor:
    """Return weight and bias of a linear layer as one matrix, `[out, in + 1]`, float64."""
    weight, bias = layer.weight, layer.bias
    return torch.cat([weight.detach().double(), bias.detach().double()[:, None]], 1)


def errors(pairs: dict[str, tuple[Tensor, Tensor]], moments: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Return the output errors of layers: role → layer → error."""
    return {
        role: {
            layer: float((((one - other) @ second[layer]) * (one - other)).sum().sqrt())
            for layer, (one, other) in pairs.items()
        }
        for role, second in moments.items()
    }


def second_moments(network: nn.Module, samples: Any) -> dict[str, Tensor]:
    """Return the sum of outer products of each layer's inputs, with a 1 behind them, `[in + 1, in + 1]`."""
    found: dict[str, Tensor] = {}

    def see(layer: str, mask: Tensor, inputs: Tensor, _output: Tensor) -> None:
        rows = torch.cat([inputs[mask], torch.ones(int(mask.sum()), 1)], 1).double()
        product = rows.T @ rows
        found[layer] = found[layer] + product if layer in found else product

    for _ in watched([(network, see)], samples):
        pass
    return found


def in_network(network: nn.Module, module: nn.Module, samples: Any) -> dict[str, float]:
    """Return the relative errors of the layers' outputs, and of the mean token vector, with all layers replaced."""
    before: dict[str, Tensor] = {}
    sums: dict[str, list[float]] = {}

    def add(key: str, new: Tensor, old: Tensor) -> None:
        pair = sums.setdefault(key, [0.0, 0.0])
        pair[0] += float((new - old).double().square().sum())
        pair[1] += float(old.double().square().sum())

    def keep(layer: str, mask: Tensor, _inputs: Tensor, output: Tensor) -> None:
        before[layer] = output[mask]

    def compare(layer: str, mask: Tensor, _inputs: Tensor, output: Tensor) -> None:
        add(layer, output[mask], before[layer])

    for mask, (old, new) in watched([(network, keep), (module, compare)], samples):
        share = mask[..., None].float() / mask.sum(1)[:, None, None]
        add("mean token vector", (new * share).sum(1), (old * share).sum(1))
    return {key: (lost / whole) ** 0.5 for key, (lost, whole) in sums.items()}


@torch.no_grad()
def watched(
    networks: list[tuple[nn.Module, Callable[[str, Tensor, Tensor, Tensor], None]]], samples: Any
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Run samples through networks in turn, with what watches their layers; yield masks and last hidden states."""
    mask = torch.empty(0)
    handles = [
        network.get_submodule(path).register_forward_hook(
            lambda _module, inputs, output, layer=layer, see=see: see(layer, mask, inputs[0], output)
        )
        for network, see in networks
        for layer, path in PATHS.items()
    ]
    try:
        for start in range(0, len(samples), BATCH):
            inputs, _ = banking77().pad([samples[i] for i in range(start, min(start + BATCH, len(samples)))])
            mask = inputs["attention_mask"].bool()
            yield mask, [network.bert(**inputs).last_hidden_state for network, _ in networks]
    finally:
        for handle in handles:
            handle.remove()


def ratios(one: dict[str, Any], other: dict[str, Any], role: str, side: str = "") -> list[float]:
    """Return the errors of one system over those of another, of the layers of a side."""
    pairs = zip(one["errors"][role].items(), other["errors"][role].values(), strict=True)
    return [error / whole for (layer, error), whole in pairs if layer.startswith(side)]


def row(name: str, found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a system: medians, then layer by layer."""
    figures: dict[str, Any] = {
        "system": name,
        "rank": found["rank"],
        "share_of_parameters": found.get("share of parameters"),
    }
    for role in found["errors"]:
        for side in SIDES:
            figures[f"error ÷ plain SVD's, median, {side}, {role}"] = median(ratios(found, rows[PLAIN], role, side))
    figures["largest error ÷ optimum, calibration"] = max(ratios(found, rows[OPTIMUM], "calibration"))
    figures["relative errors in the network, held out"] = found.get("in the network")
    for role in found["errors"]:
        figures[f"error ÷ plain SVD's, {role}"] = dict(zip(PATHS, ratios(found, rows[PLAIN], role), strict=True))
    return figures


def goals(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what had to be shown."""
    plain, weighted, best = (rows[name] for name in (PLAIN, WEIGHTED, OPTIMUM))

    ups, downs = (median(ratios(weighted, plain, "held out", side)) for side in SIDES)
    nearest = max(ratios(weighted, best, "calibration"))
    return [
        goal("largest error ÷ closed-form optimum, calibration data", nearest, 1.02, 1.0, better="lower", unit=""),
        goal("error ÷ plain SVD's, held out, median of the up-projections", ups, 0.30, None, better="lower", unit=""),
        goal(
            "error ÷ plain SVD's, held out, median of the down-projections", downs, 0.55, None, better="lower", unit=""
        ),
    ]
