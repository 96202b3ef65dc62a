"""Two networks of MLPerf Tiny that int8 hardly makes faster: does trimpoint advise against it, and rightly?

The autoencoder is trained for some epochs on log-mel energies of spoken digits, 16 frames of 40 in a row; the MobileNet
of a quarter of its width at 96 pixels is the checkpoint on CIFAR-10, with ten classes instead of two. A ResNet-20,
which int8 does make faster, is there to see that it is not advised against too. What is judged is the advice that
`trimpoint compress` prints, which rests on the artifact timed beside float32; beside it stands a second measurement of
the same files. What pays depends on the processor: with 8-bit dot products int8 gains more.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import mobilenet_cifar10, resnet20_cifar10
from benchmarks.comparison import Comparison, goal, kept
from benchmarks.datasets import SPEAKERS, fsdd
from benchmarks.models import Autoencoder
from benchmarks.training import share
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.advice import PAYS, trial_advice
from trimpoint.cli.build import build_artifact
from trimpoint.measure.environment import instruction_set
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.progress import SILENT
from trimpoint.score import MeanSquaredError
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.values import to_data

QUESTION = "Is int8 advised against where it does not make a network faster, by a measurement of the int8 artifact?"
PLAN = Plan().then(QuantizeStatic())
FEATURES, EPOCHS, BATCH = 640, 6, 128
NETWORKS = ("autoencoder", "MobileNet 0.25 at 96", "ResNet-20")


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress each network by int8 alone, note the advice, time the files again, and compare."""
    rows = []
    for network in NETWORKS:
        directory = resume_dir / network.lower().replace(" ", "-")
        model, task = _network(network)
        told = kept(resume_dir / f"{directory.name}.json", lambda: _told(model, task, directory))  # noqa: B023
        comparison = Comparison(directory / "again", model, task)
        comparison.add("int8", PLAN)
        again = comparison.timed(rounds=25)["int8"]
        pays = again.ratio_low > 1 and again.ratio >= PAYS
        rows.append(
            {
                "system": network,
                **told,
                "again_ratio": again.ratio,
                "again_ratio_ci": [again.ratio_low, again.ratio_high],
                "pays_again": pays,
                "agrees": pays == (told["advice"] == ""),
                "instruction_set": instruction_set(),
            }
        )
    by_name = {row["system"]: row for row in rows}
    doubtful = [by_name[name] for name in NETWORKS[:2]]
    return {
        "rows": rows,
        "goals": [
            goal("networks whose advice a second measurement confirms", sum(row["agrees"] for row in rows), 3, None,
                 unit="of 3"),
            *(goal(f"int8 times as fast as float32, {row['system']}", row["latency_ratio"], None, None)
              for row in doubtful),
            goal("doubtful networks that are advised against", sum(row["advice"] != "" for row in doubtful), None, 2,
                 unit="of 2"),
            goal("ResNet-20 advised against", float(by_name["ResNet-20"]["advice"] != ""), 0.0, None, better="lower",
                 unit="of 1"),
        ],
    }  # fmt: skip


def _told(model: nn.Module, task: Task, directory: Path) -> dict[str, Any]:
    """Return what `trimpoint compress` measures and says."""
    built = build_artifact(model, task, PLAN, Target(), directory / "artifact", SILENT)
    profile = built.trial.profile
    ratio = profile["latency_ratio"]
    quality = {"unmodified": built.baseline.quality, "int8": built.trial.quality}
    found = {
        "advice": trial_advice(PLAN.to_data(), profile),
        "latency_ratio": ratio.value,
        "latency_ratio_ci": [ratio.low, ratio.high],
        "latency_ms": built.baseline.profile["latency_ms"].value,
        "file_bytes": profile["file_bytes"].value,
        "file_ratio": built.baseline.profile["file_bytes"].value / profile["file_bytes"].value,
        "select": {name: None if each is None else each.value for name, each in quality.items()},
        "notes": list(profile.notes),
    }
    return dict(json.loads(json.dumps(to_data(found))))


def _network(name: str) -> tuple[nn.Module, Task]:
    if name == "autoencoder":
        return autoencoder()
    checkpoint = mobilenet_cifar10 if name.startswith("MobileNet") else resnet20_cifar10
    return checkpoint.model(), checkpoint.task()


def autoencoder() -> tuple[nn.Module, Task]:
    """Return the autoencoder, trained on all speakers but one, and the task of reconstructing."""
    roles = fsdd(SPEAKERS[0])
    parts = {name: _frames(getattr(roles, name)) for name in ("train", "calibrate", "select", "certify")}
    torch.manual_seed(0)
    model, x = Autoencoder(FEATURES), parts["train"]
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=3e-3), -(-len(x) // BATCH)
    for epoch in range(EPOCHS):
        for step, index in enumerate(torch.randperm(len(x)).split(BATCH)):
            optimizer.param_groups[0]["lr"] = 3e-3 * share(epoch * steps + step, EPOCHS * steps)
            loss = F.mse_loss(model(x[index]), x[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    data = {name: TensorDataset(values, values) for name, values in parts.items()}
    return copy.deepcopy(model).eval(), Task(**data, loss=F.mse_loss, score=MeanSquaredError())


def _frames(data: TensorDataset) -> Tensor:
    """Return `[4 · recordings, 640]`: each recording `[64, 40]` cut into four."""
    return data.tensors[0].reshape(-1, FEATURES)
