"""Eight-bit weights and activations with scales fixed beforehand."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Method):
    """Compute convolutions and linear layers on 8-bit integers, with ranges taken from calibration data (W8A8).

    When it pays:
        Almost always on a CPU with 8-bit dot products: files a quarter of the size, and up to four times the speed
        where convolutions and matrix products dominate. Very small or depthwise networks may even get slower: measure.
    What it costs:
        A forward pass over the calibration data when the model is lowered; quality falls by tenths of a point on
        convolutional networks, more where a few activations are much larger than the others.
    Needs:
        `calibrate` data: a few hundred samples like those that the model will see.
    Leaves alone:
        Everything but convolutions, transposed convolutions and linear layers, and modules whose weights are no
        floating-point parameters. The module itself stays in float: the target's runtime realises the formats, and
        what it cannot realise is listed.

    References:
        Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
        (2018); Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), for a scale per
        channel; Migacz, "8-bit inference with TensorRT" (2017), for entropy; Banner, Nahshan, Soudry, "Post training
        4-bit quantization of convolutional networks" (2019), for squared error; ONNX Runtime, "Quantize ONNX models",
        for `reduce_range` on CPUs whose 16-bit sums saturate.
    """

    granularity: str = param(
        "channel", doc="one scale of the weight per channel or tensor", choices=("channel", "tensor")
    )
    symmetric_activations: bool = param(False, doc="int8 activations with zero point 0 instead of uint8 with any")
    reduce_range: bool = param(True, doc="7-bit weights, exact on CPUs without VNNI as well", search=(True, False))
    observer: str = param(
        "minmax",
        doc="range of an activation: all values, without the outermost, least divergence, or least squared error",
        choices=("minmax", "percentile", "entropy", "mse"),
    )
    percentile: float = param(
        99.99, doc="of the values that the range holds, with `observer='percentile'`", bounds=Bounds(gt=50.0, le=100.0)
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Linear"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        needs=frozenset({"calibrate"}),
    )

    def apply(self, ctx: Context) -> None:
        """Assign formats to weight and input of every module in scope."""
        granularity = cast(Literal["channel", "tensor"], self.granularity)
        weight = Format(dtype="int8", granularity=granularity, symmetric=True, reduce_range=self.reduce_range)
        symmetric = self.symmetric_activations
        activations = Format(
            dtype="int8" if symmetric else "uint8",
            granularity="tensor",
            symmetric=symmetric,
            observer=cast(Literal["minmax", "percentile", "entropy", "mse"], self.observer),
            percentile=self.percentile,
        )
        for site in ctx.modules():
            ctx.assign(site.path, "weight", weight)
            ctx.assign(site.path, "input", activations)
