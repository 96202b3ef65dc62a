"""Static int8 of a ResNet-20 in ONNX Runtime, and weights of 4 bits without training, beside the runtime's quantiser.

The peers are `quantize_static` of ONNX Runtime: in one line, and with the settings that are best for a convolutional
network (a scale per channel, 7 bits) and each of its calibrators. All see the same 512 images. The finalist in int8 is
the one whose answers on `select` differ least from float32, among those no worse there than the best peer; it is
certified by itself, before the others.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.checkpoints import resnet20_cifar10
from benchmarks.comparison import Comparison, goal
from benchmarks.peers import CALIBRATORS, quantize_static_by

from trimpoint.compress import compress
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered
from trimpoint.runtimes.export import export

QUESTION = "What does int8 cost and bring on a ResNet-20, and how well do weights of 4 bits do without training?"
OURS, DEFAULT = "int8, ranges of 99.99 %, GPTQ", "int8"
PLAIN, BEST = "4 bits, to nearest, scale by the largest", "4 bits, adaptive rounding"
PLANS = {
    DEFAULT: QuantizeStatic(),
    "int8, ranges of 99.99 %": QuantizeStatic(observer="percentile"),
    "int8, ranges of 99.99 %, biases corrected": QuantizeStatic(observer="percentile", correct_bias=True),
    OURS: QuantizeStatic(observer="percentile", rounding="gptq"),
    "int8, ranges by squared error": QuantizeStatic(observer="mse"),
    "int8, GPTQ": QuantizeStatic(rounding="gptq"),
    PLAIN: QuantizeStatic(bits=4, weights="largest"),
    "4 bits, to nearest": QuantizeStatic(bits=4),
    "4 bits, GPTQ": QuantizeStatic(bits=4, rounding="gptq"),
    BEST: QuantizeStatic(bits=4, rounding="adaround"),
}
MARGIN, IMAGES, ROUNDS = 0.0025, 1000, 3


def run(resume_dir: Path) -> dict[str, Any]:
    """Make, time and score all; certify int8, then its default and 4 bits with and without a choice of the integers."""
    model, task = resnet20_cifar10.model(), resnet20_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    peers = ["one-line int8"]
    for observer in CALIBRATORS:
        peers.append(f"quantize_static, per channel, 7 bits, {observer}")
        comparison.add_lowered(peers[-1], quantize_static_by(observer), observer)
    for name, method in PLANS.items():
        comparison.add(name, Plan().then(method))
    timed = comparison.timed(rounds=60)
    certificates = comparison.certify([OURS], MARGIN, "int8-resnet20-closest-as-good")
    certificates |= comparison.certify([DEFAULT, PLAIN, BEST], MARGIN, "int8-resnet20")
    rows = comparison.rows(timed, certificates)
    select = {row["system"]: row["select"] for row in rows}
    calibration = _calibration(resume_dir)
    rows += [{"system": f"calibration on {IMAGES:,} images, {name}", **found} for name, found in calibration.items()]
    return {
        "rows": rows,
        "goals": [
            goal(
                "upper bound of the drop of int8",
                100 * certificates[OURS].upper,
                0.25,
                None,
                better="lower",
                unit="points",
            ),
            goal(
                "speed of int8 ÷ that of the fastest peer",
                timed[OURS].ratio / max(timed[p].ratio for p in peers),
                1.0,
                None,
            ),
            goal(
                "accuracy of int8 on select above that of the best peer",
                100 * (select[OURS] - max(select[name] for name in peers)),
                0.0,
                None,
                unit="points",
            ),
            goal("int8 times faster than float32", timed[OURS].ratio, None, 2.5),
            goal(
                "drop at 4 bits as a share of that of plain rounding",
                certificates[BEST].drop / certificates[PLAIN].drop,
                1 / 3,
                1 / 5,
                better="lower",
            ),
            goal(
                "wall time of calibration ÷ that of quantize_static, the worst of three observers",
                max(found["ratio"] for found in calibration.values()),
                1.5,
                1.0,
                better="lower",
            ),
        ],
    }


def _calibration(resume_dir: Path) -> dict[str, dict[str, float]]:
    """Return for each observer the wall time of lowering and that of `quantize_static`, in turns, seconds."""
    model, task = resnet20_cifar10.model(), resnet20_cifar10.task()
    exported = export(model, task.example_batch(2), {"input": {0: "batch"}})
    images = np.stack([np.asarray(task.data("calibrate")[i % len(task.data("calibrate"))][0]) for i in range(IMAGES)])
    batches, runtime, found = np.split(images, 25), get_runtime("onnxruntime"), {}  # the peer wants equal ones
    for observer in CALIBRATORS:
        formats = compress(model, Plan().then(QuantizeStatic(observer=observer)), task).formats
        ways: dict[str, Callable[[Path], Lowered]] = {
            "trimpoint_s": lambda out, formats=formats: runtime.lower(
                exported, out, formats=formats, calibration=batches
            ),
            "quantize_static_s": lambda out, observer=observer: quantize_static_by(observer)(exported, out, batches),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, lower in ways.items():
                with tempfile.TemporaryDirectory(dir=resume_dir) as out:
                    start = time.perf_counter()
                    lower(Path(out))
                    seconds[way].append(time.perf_counter() - start)
        ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
        found[observer] = {way: statistics.median(times) for way, times in seconds.items()}
        found[observer] |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return found
