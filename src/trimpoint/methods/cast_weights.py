"""Floating-point numbers of 16 bits: to store weights in, and to compute in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from trimpoint.method import Context, Fact, Method, Stage, Traits, param
from trimpoint.quantization.halves import why_not
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class CastWeights(Method):
    """Store weights in 16 bits, as float16 or bfloat16, and compute in float32 as before or in bfloat16.

    When it pays:
        Where the file is to be half as large and the answers are to stay what they were: float16 is off by at most one
        part in 2,048. So stored, **nothing gets faster**: runtimes bring the weights back to float32 as they open the
        file. With `activations="bfloat16"` OpenVINO computes in it as well, on CPUs that have its products
        (AVX512-BF16, AMX): 1.6 to 1.9 times as fast as float32 there, without calibration, where int8 costs too much.
        `quantize-*` makes smaller and faster files where their error is bearable; layers that they must leave alone can
        be cast.
    What it costs:
        Nothing to make, and next to nothing in quality: answers in float16 are as good as the same, those computed in
        bfloat16 are off by about 1 % of their size (40 dB). On CPUs without products of bfloat16 a file that asks for
        them is computed in float32.
    Needs:
        No data.
    Leaves alone:
        Biases and normalisations, which are small. Layers with a weight beyond the range of float16 (65,504), or with
        weights so small that it would lose much of them: those stay in float32, with the reason; bfloat16 has the range
        of float32. Weights are rounded in the file and not in the module. OpenVINO has one setting for all matrix
        products of a model: unless all of them are cast or int8, everything is computed in float32, and the file says
        so; single convolutions and recurrent layers can stay in float32. Other runtimes compute in float32.

    References:
        Micikevicius et al., "Mixed precision training" (2018), for the range of float16; Kalamkar et al., "A study of
        BFLOAT16 for deep learning training" (2019); OpenVINO, "Precision control",
        https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference/precision-control.html
    """

    dtype: str = param("float16", doc="of the stored weights", choices=("float16", "bfloat16"))
    activations: str = param("float32", doc="what products are computed in", choices=("float32", "bfloat16"))

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Linear", "Conv1D", "_ConvNd", "MultiheadAttention", "RNNBase", "RNNCellBase", "Embedding"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        status="experimental",
    )

    @property
    def formats(self) -> Mapping[str, Format]:
        """The format of a weight and, where products are computed in bfloat16, of an input."""
        formats = {"weight": Format(dtype=self.dtype)}
        return formats if self.activations == "float32" else {**formats, "input": Format(dtype=self.activations)}

    def apply(self, ctx: Context) -> None:
        """Assign the format to the weights of every module in scope that 16 bits can hold."""
        for site in ctx.modules():
            weights = [p for p in site.module.parameters(recurse=False) if p.ndim > 1]
            reasons = [why_not(cast(Tensor, p).detach().float().cpu().numpy(), self.dtype) for p in weights]
            if reason := next(filter(None, reasons), ""):
                ctx.skip(site.path, reason)
            else:
                ctx.assign(site.path, "weight", self.formats["weight"])
                if "input" in self.formats:
                    ctx.assign(site.path, "input", self.formats["input"])
