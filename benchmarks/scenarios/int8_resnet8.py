"""ResNet-8, the image classifier of MLPerf Tiny: how small it gets in int8, as a file and as a coded one.

The file of MLPerf Tiny's own int8 model for TensorFlow Lite has 98,496 bytes, graph included, as ours has. Fewer bits
do not make the file smaller that a runtime loads, since kernels compute 8; they show in the coded file. Nothing is
trained here, so drops are against the network as it is. The images are CIFAR-10 encoded again as JPEG, on which
networks score lower than on the original ones: what is compared is size and drop, not accuracy with theirs. The
finalists are a second set: of a first one int8 passed, and 4 bits by GPTQ and by adaptive rounding did not.
"""

from pathlib import Path
from typing import Any

from benchmarks.checkpoints import resnet8_cifar10
from benchmarks.comparison import Comparison, goal

from trimpoint.filters import parse
from trimpoint.measure.profile import coded_profile
from trimpoint.methods.quantize_mixed import QuantizeMixed
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step

QUESTION = "How small is a ResNet-8 in int8, as a file and coded, at a drop of at most half a point?"
OURS, LARGEST = "int8", "stacks.2.conv2"
GPTQ = {bits: QuantizeStatic(bits=bits, rounding="gptq") for bits in (4, 5)}
PLANS = {
    OURS: Plan().then(QuantizeStatic()),
    "4 bits, GPTQ": Plan().then(GPTQ[4]),
    "4 bits, adaptive rounding": Plan().then(QuantizeStatic(bits=4, rounding="adaround")),
    "mean 4.5 bits, by layer": Plan().then(QuantizeMixed(mean_bits=4.5)),
    "5 bits, GPTQ": Plan().then(GPTQ[5]),
    "4 bits in the largest layer, 5 in others, GPTQ": Plan().then(
        Step(GPTQ[4], parse(LARGEST)), Step(GPTQ[5], ~parse(LARGEST))
    ),
}
TINY_BYTES, CODED_BYTES, MARGIN = 98_496, 45_000, 0.005
"""MLPerf Tiny's file, https://github.com/mlcommons/tiny; what a coded file should take; the drop that is allowed."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Make, score, time and code all; certify int8, and of those small enough the one that loses least on `select`."""
    comparison = Comparison(resume_dir, resnet8_cifar10.model(), resnet8_cifar10.task())
    comparison.add_one_line_int8()
    for name, plan in PLANS.items():
        comparison.add(name, plan)
    coded = {name: coded_profile(made.files)["coded_bytes"].value for name, made in comparison.systems.items()}
    small = sorted(
        (name for name in PLANS if name != OURS and coded[name] <= CODED_BYTES), key=comparison.expected_bound
    )
    finalists = [OURS, *small[:1]]
    certificates = comparison.certify(finalists, MARGIN, "int8-resnet8-second")
    timed = comparison.timed()
    rows = [{**row, "coded_bytes": coded[row["system"]]} for row in comparison.rows(timed, certificates)]
    passed = [name for name in finalists if certificates[name].status == "passed"]
    sizes = {row["system"]: row["file_bytes"] for row in rows}
    return {
        "rows": rows,
        "goals": [
            goal("file of int8", sizes[OURS], TINY_BYTES, None, better="lower", unit="bytes"),
            goal("upper bound of the drop of int8", 100 * certificates[OURS].upper, 0.5, None, better="lower",
                 unit="points"),
            goal("smallest coded file of a certified finalist", min((coded[name] for name in passed), default=None),
                 None, CODED_BYTES, better="lower", unit="bytes"),
            goal("int8 times faster than float32", timed[OURS].ratio, None, 1.75),
            goal("float32 accuracy on the test images", 100 * certificates[OURS].baseline, None, 83.0, unit="%"),
        ],
    }  # fmt: skip
