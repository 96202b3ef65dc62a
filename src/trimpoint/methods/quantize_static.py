"""Weights of 8 bits or fewer and 8-bit activations, with scales fixed beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from trimpoint.errors import InvalidParameterError
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.quantization.activations import learn_ranges
from trimpoint.quantization.sensitivity import layer_costs
from trimpoint.quantization.weights import round_weights, why_no_grid
from trimpoint.values import Format

_BITS = Bounds(ge=2, le=8)
_SAMPLES = 256
"""Of the calibration data, by which layers are measured."""


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Method):
    """Compute convolutions and linear layers on 8-bit integers, with ranges taken from calibration data (W8A8).

    When it pays:
        Almost always on a CPU with 8-bit dot products: files a quarter of the size, and up to four times the speed
        where convolutions and matrix products dominate. Very small or depthwise networks may even get slower: measure.
    What it costs:
        A forward pass over the calibration data when the model is lowered, and one more where integers are chosen (for
        a ResNet-20 and 512 images a quarter of a minute with `gptq`, three quarters with `adaround`). At 8 bits quality
        falls by tenths of a point on convolutional networks, more where a few activations are much larger than the
        others; on a CPU without VNNI it falls by points without `reduce_range`.
    Needs:
        `calibrate` data: a few hundred samples like those that the model will see.
    Leaves alone:
        Everything but convolutions, transposed convolutions and linear layers, and modules whose weights are no
        floating-point parameters. Where 8 bits are rounded to nearest the module stays as it is, and the target's
        runtime rounds; what it cannot realise is listed. Where integers are chosen, weights are put on a grid, and stay
        on it when they are trained.

    References:
        Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
        (2018); Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), for a scale per
        channel; Migacz, "8-bit inference with TensorRT" (2017), for entropy; Banner, Nahshan, Soudry, "Post training
        4-bit quantization of convolutional networks" (2019), for squared error; ONNX Runtime, "Quantize ONNX models",
        for `reduce_range` on CPUs whose 16-bit sums saturate; Frantar et al., "GPTQ: accurate post-training
        quantization for generative pre-trained transformers" (2023); Nagel et al., "Up or down? Adaptive rounding for
        post-training quantization" (2020); Nagel et al., "Data-free quantization through weight equalization and
        bias correction" (2019), for corrected biases.
    """

    granularity: str = param(
        "channel", doc="one scale of the weight per channel or tensor", choices=("channel", "tensor")
    )
    symmetric_activations: bool = param(False, doc="int8 activations with zero point 0 instead of uint8 with any")
    reduce_range: bool = param(True, doc="7-bit weights, exact on CPUs without VNNI as well", search=(True, False))
    bits: int = param(8, doc="of a weight; fewer than 8 save no time and, in the file as it is, no bytes", bounds=_BITS)
    weights: str = param(
        "auto",
        doc="scale of an output channel's weights: by the largest, or by the least error of the weights or of what the "
        "layer computes; `auto` is the largest where 8 bits are rounded to nearest, else what it computes",
        choices=("auto", "largest", "weight-error", "output-error"),
    )
    rounding: str = param(
        "nearest",
        doc="of weights: to the nearest number, or by what the layer multiplies them with",
        choices=("nearest", "gptq", "adaround"),
    )
    correct_bias: bool = param(
        False,
        doc="take the mean error of rounded weights from biases, or from the batch norms behind; where scales are by "
        "`output-error` it is gone already",
    )
    learned_steps: bool = param(
        False,
        doc="round inputs in the module too, and let later training learn their ranges and the scales of weights (LSQ)",
    )
    keep_float: int = param(
        0,
        doc="layers that stay in float32: those of which rounding weights and input alone moves the answers most",
        bounds=Bounds(ge=0),
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric_activations and self.learned_steps:
            raise InvalidParameterError(
                "The 'symmetric_activations' parameter of QuantizeStatic must be False with learned_steps=True. Got "
                "True.",
                "both ends of a range are learned",
            )
        if self.granularity == "tensor" and self._chosen:
            raise InvalidParameterError(
                "The 'granularity' parameter of QuantizeStatic must be 'channel' where weights have fewer than 8 bits "
                "or are not rounded to nearest. Got 'tensor'.",
                "batch normalisation that is folded in scales each channel by itself",
            )

    @property
    def _chosen(self) -> bool:
        """Whether the integers of the weights are chosen here; the runtime rounds 8 bits to nearest by itself."""
        by_inputs = self.rounding != "nearest" or self.weights not in ("auto", "largest")
        return self.bits < 8 or by_inputs or self.correct_bias or self.learned_steps

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats of a weight and of what it is multiplied with."""
        symmetric = self.symmetric_activations
        return {
            "weight": Format(
                dtype=f"int{self.bits}",
                granularity=cast(Literal["channel", "tensor"], self.granularity),
                symmetric=True,
                reduce_range=self.reduce_range,
            ),
            "input": Format(
                dtype="int8" if symmetric else "uint8",
                granularity="tensor",
                symmetric=symmetric,
                observer=cast(Literal["minmax", "percentile", "entropy", "mse"], self.observer),
                percentile=self.percentile,
            ),
        }

    def apply(self, ctx: Context) -> None:
        """Assign formats to weight and input of every module in scope, and choose integers where that is asked for."""
        sites = list(ctx.modules())
        weight, activations = self.formats["weight"], self.formats["input"]
        if self.keep_float:
            sites = self._without_the_worst(ctx, sites)
        if self._chosen:
            refused = {
                site.path: "it shares a weight with another module" if site.tied else why_no_grid(site.module)
                for site in sites
            }
            chosen = [path for path, reason in refused.items() if not reason]
            if self.bits < 8:  # the runtime rounds 8 bits by itself
                for path, reason in refused.items():
                    if reason:
                        ctx.skip(path, reason)
                sites = [site for site in sites if site.path in chosen]
            bits = 7 if self.bits == 8 and self.reduce_range else self.bits
            scale = "output-error" if self.weights == "auto" else self.weights
            round_weights(
                ctx, chosen, bits, self.rounding, scale, correct_bias=self.correct_bias, learned=self.learned_steps
            )
        for site in sites:
            ctx.assign(site.path, "weight", weight)
            ctx.assign(site.path, "input", activations)
        if self.learned_steps:
            learn_ranges(ctx, [site.path for site in sites], activations)

    def _without_the_worst(self, ctx: Context, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that are quantised; the others are told why they are not."""
        paths = [site.path for site in sites if not site.tied and not why_no_grid(site.module)]
        costs = layer_costs(ctx, paths, self.formats["weight"], self.formats["input"], _SAMPLES)
        kept = sorted(costs, key=lambda path: -costs[path])[: self.keep_float]
        for path in kept:
            ctx.skip(
                path, f"kept in float32: rounding it alone moves the answers by {costs[path]:.2g} of their variance"
            )
        return [site for site in sites if site.path not in kept]
