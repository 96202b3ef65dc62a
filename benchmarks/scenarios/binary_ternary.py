"""LeNet-300-100 on MNIST with weights of two or three values: rounded, and trained with the float weights behind.

Every plan is trained alike, by distillation from the unmodified network; the original is given the same training. Bytes
are those of one coded file, graph and signature included. The checkpoint's weights are half-precision numbers, so what
stays in float and is not trained takes half as much there.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import lenet_mnist
from benchmarks.comparison import goal, kept

from trimpoint.coding import code_model
from trimpoint.compress import compress
from trimpoint.measure.quality import evaluate
from trimpoint.methods.distill import Distill
from trimpoint.methods.ternarize_weights import TernarizeWeights
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.task import Task

QUESTION = "What do binary and ternary weights keep of LeNet-300-100 on MNIST after training, and in how many bytes?"
TRAINING = Distill(epochs=10.0, optimizer="adamw", lr=1e-3)
BATCH = 128
METHODS = {
    "BWN": TernarizeWeights(values=2, granularity="channel", keep_ends=False),
    "BWN, one scale a layer": TernarizeWeights(values=2, keep_ends=False),
    "TWN": TernarizeWeights(keep_ends=False),
    "TTQ": TernarizeWeights(scales="learned", keep_ends=False),
    "TWN, first and last layer float": TernarizeWeights(),
    "TTQ, first and last layer float": TernarizeWeights(scales="learned"),
}
UNMODIFIED, EXTRA = "unmodified", "unmodified, the same training"


def plans() -> dict[str, Plan]:
    """Return all plans by name."""
    rounded = {f"{name}, not trained": Plan().then(method) for name, method in METHODS.items()}
    trained = {name: Plan().then(method, TRAINING) for name, method in METHODS.items()}
    return {UNMODIFIED: Plan(), EXTRA: Plan().then(TRAINING)} | rounded | trained


def measured(plan: Plan, task: Task) -> dict[str, Any]:
    """Make a network and return accuracies and sizes of the file that ONNX Runtime runs."""
    runtime, made = get_runtime("onnxruntime"), compress(lenet_mnist.model(), plan, task)
    with tempfile.TemporaryDirectory(prefix="trimpoint-", ignore_cleanup_errors=True) as name:
        out = Path(name) / "files"
        out.mkdir()
        lowered = runtime.lower(export(made.module, task.example_batch(2), task.dynamic_dims()), out)
        code_model(Path(name) / "model.tpz", out, lowered)
        session = runtime.open(out, lowered, threads=1)
        scores = {f"accuracy_{role}": evaluate(session, task, role).value for role in ("select", "certify")}
        sizes = {"file_bytes": sum((out / file).stat().st_size for files in lowered.files.values() for file in files)}
        return scores | sizes | {"coded_bytes": (Path(name) / "model.tpz").stat().st_size}


def run(resume_dir: Path) -> dict[str, Any]:
    """Make and measure each network; goals are on the official test set, which chose nothing."""
    task = lenet_mnist.task().with_(batch_size=BATCH)
    rows = {
        name: {"system": name, **kept(resume_dir / f"{plan.hash}.json", lambda plan=plan: measured(plan, task))}
        for name, plan in plans().items()
    }
    best = max(rows[name]["accuracy_certify"] for name in (UNMODIFIED, EXTRA))
    drops = {name: 100 * (best - row["accuracy_certify"]) for name, row in rows.items()}
    smaller = rows[UNMODIFIED]["file_bytes"] / rows["TTQ"]["coded_bytes"]
    return {
        "rows": list(rows.values()),
        "goals": [
            goal("drop of TWN, all layers", drops["TWN"], 0.5, 0.06, better="lower", unit="points"),
            goal("drop of TTQ, all layers", drops["TTQ"], 0.5, 0.06, better="lower", unit="points"),
            goal("drop of BWN, all layers", drops["BWN"], 1.0, 0.1, better="lower", unit="points"),
            goal("times smaller than the float32 file, TTQ, all layers, coded", smaller, 16.0, 20.0),
        ],
    }
