"""Weights of four bits on a ResNet-20: trained on their grid with learned steps, or as many bits as a layer needs.

Activations have 8 bits. Training is distillation from the unmodified network; the original is given the same training,
and drops are against the better of the two. Uniform 4 and 6 bits are rounded by GPTQ, as the layers of mixed ones are.
"""

from pathlib import Path
from typing import Any

from benchmarks.checkpoints import resnet20_cifar10
from benchmarks.comparison import UNMODIFIED, Comparison, goal

from trimpoint.measure.quality import quality
from trimpoint.methods.distill import Distill
from trimpoint.methods.quantize_mixed import QuantizeMixed
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan

QUESTION = "What do training on the grid and bits by layer bring back of what four bits lose?"
EXTRA = "unmodified, the same training"
PLAIN, FOUR, SIX = "4 bits, to nearest, scale by the largest", "4 bits, GPTQ", "6 bits, GPTQ"
FIXED, LEARNED, MIXED = "4 bits, trained", "4 bits, trained with learned steps", "mean 4 bits, by layer"
TRAINING = Distill(epochs=2.0, lr=0.01)
MARGIN = 0.005
PLANS = {
    EXTRA: Plan().then(TRAINING),
    PLAIN: Plan().then(QuantizeStatic(bits=4, weights="largest")),
    FOUR: Plan().then(QuantizeStatic(bits=4, rounding="gptq")),
    SIX: Plan().then(QuantizeStatic(bits=6, rounding="gptq")),
    FIXED: Plan().then(QuantizeStatic(bits=4, rounding="gptq"), TRAINING),
    LEARNED: Plan().then(QuantizeStatic(bits=4, rounding="gptq", learned_steps=True), TRAINING),
    MIXED: Plan().then(QuantizeMixed(mean_bits=4.0)),
    "mean 3 bits, by layer": Plan().then(QuantizeMixed(mean_bits=3.0)),
    "3 bits, GPTQ": Plan().then(QuantizeStatic(bits=3, rounding="gptq")),
}


def run(resume_dir: Path) -> dict[str, Any]:
    """Make and score all; certify what was trained, and what has bits by layer."""
    comparison = Comparison(resume_dir, resnet20_cifar10.model(), resnet20_cifar10.task())
    for name, plan in PLANS.items():
        comparison.add(name, plan)
    comparison.refer_to(UNMODIFIED, EXTRA)
    select = {name: made.evaluation for name, made in comparison.systems.items()}
    trained = max((FIXED, LEARNED), key=lambda name: select[name].value)
    certificates = comparison.certify([trained, MIXED, FOUR], MARGIN, "few-bits-resnet20")
    against = {name: quality(select[MIXED], select[name]) for name in (FOUR, SIX)}
    gain = {name: -100 * (found.drop or 0.0) for name, found in against.items()}
    return {
        "rows": comparison.rows({}, certificates),
        "goals": [
            goal("drop of trained 4 bits", 100 * certificates[trained].drop, 0.5, 0.1, better="lower", unit="points"),
            goal("bits by layer above uniform 4 bits, paired, select", gain[FOUR], 0.0, None, unit="points"),
            goal("bits by layer above uniform 6 bits, paired, select", gain[SIX], None, 0.0, unit="points"),
            goal(
                "upper bound of what bits by layer lose against uniform 4 bits",
                100 * (against[FOUR].drop_upper or 0.0),
                None,
                0.0,
                better="lower",
                unit="points",
            ),
        ],
    }
