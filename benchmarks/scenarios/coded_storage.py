"""Compressed storage: trained networks as one coded file, beside general compressors on the same ONNX file."""

import copy
import io
import lzma
import math
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.checkpoints import lenet_mnist, resnet20_cifar10
from benchmarks.comparison import goal, kept
from torch import nn

from trimpoint.coding import code_model, read_coded
from trimpoint.compress import compress
from trimpoint.graph import baked
from trimpoint.measure.quality import evaluate
from trimpoint.measure.static import count_params
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Formats
from trimpoint.runtimes.export import export
from trimpoint.task import Task

QUESTION = "How small is a trained network as one coded file, graph included, and how far below general compressors?"
SPARSE = Plan(seed=0).then(
    PruneWeights(ratio=0.92, scope="global", normalize="lamp", schedule="cubic", steps=400),
    Finetune(epochs=2.0, optimizer="sgd", lr=0.05),
)

Row = dict[str, Any]


def clustered(module: nn.Module, values: int) -> nn.Module:
    """Return a copy in which the non-zero weights of each layer take so many values: one-dimensional k-means."""
    from sklearn.cluster import KMeans

    made = copy.deepcopy(module)
    for parameter in made.parameters():
        if parameter.dim() >= 2:
            weight = parameter.data.numpy()
            filled = weight[weight != 0].reshape(-1, 1)
            start = np.linspace(filled.min(), filled.max(), values).reshape(-1, 1)
            found = KMeans(values, init=start, n_init=1, max_iter=50).fit(filled)
            weight[weight != 0] = found.cluster_centers_[found.labels_, 0].astype(np.float32)
    return made


def measured(module: nn.Module, task: Task, formats: Formats | None = None) -> Row:
    """Lower a module and return the sizes of its file, coded and by general compressors, and what coding takes."""
    runtime = get_runtime("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
        out = Path(name) / "files"
        out.mkdir()
        calibration = [np.asarray(task.example_batch(128))] if formats else []
        exported = export(module, task.example_batch(2), task.dynamic_dims())
        lowered = runtime.lower(exported, out, formats=formats, calibration=calibration)
        score = evaluate(runtime.open(out, lowered), task, "select").value
        data = b"".join((out / file).read_bytes() for files in lowered.files.values() for file in files)
        coded = Path(name) / "model.tpz"
        begun = time.process_time()
        code_model(coded, out, lowered)
        written = time.process_time()
        read_coded(coded, None)
        read = time.process_time()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            file.writestr("model.onnx", data)
        return {
            f"{task.score.name}_select": score,
            "file_bytes": len(data),
            "coded_bytes": coded.stat().st_size,
            "zip_bytes": len(archive.getvalue()),
            "xz_bytes": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
            "pack_cpu_seconds": written - begun,
            "unpack_cpu_seconds": read - written,
        }


def run(resume_dir: Path) -> dict[str, Any]:
    """Make each network and code it."""
    lenet, digits = lenet_mnist.model(), lenet_mnist.task().with_(batch_size=128)
    resnet, images = resnet20_cifar10.model(), resnet20_cifar10.task()
    sparse = baked(compress(lenet, SPARSE, digits).module)
    quantised = compress(resnet, Plan().then(QuantizeStatic()), images)
    made: dict[str, tuple[nn.Module, Task, Formats | None]] = {
        "LeNet-300-100": (lenet, digits, None),
        "LeNet-300-100, 92 % zeros": (sparse, digits, None),
        "LeNet-300-100, 92 % zeros, 32 values a layer": (clustered(sparse, 32), digits, None),
        "LeNet-300-100, 92 % zeros, 8 values a layer": (clustered(sparse, 8), digits, None),
        "ResNet-20": (resnet, images, None),
        "ResNet-20, int8": (quantised.module, images, quantised.formats),
    }
    rows = [
        {"system": name, "params": count_params(module).total}
        | kept(resume_dir / f"{index}.json", lambda given=(module, task, formats): measured(*given))
        for index, (name, (module, task, formats)) in enumerate(made.items())
    ]
    smallest = {row["system"]: min(row["zip_bytes"], row["xz_bytes"]) / row["coded_bytes"] for row in rows}
    raw = 4 * rows[3]["params"] / rows[3]["coded_bytes"]
    return {
        "rows": rows,
        "goals": [
            goal("times smaller than raw float32, 92 % zeros and 8 values a layer", raw, 50.0, 65.0),
            goal("times smaller than zip or xz there", smallest[rows[3]["system"]], 1.3, 1.5),
            goal("times smaller than zip or xz, geometric mean", math.prod(smallest.values()) ** (1 / 6), 1.0, 1.2),
        ],
    }
