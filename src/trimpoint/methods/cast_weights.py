"""Weights stored as floating-point numbers of 16 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from trimpoint.method import Context, Fact, Method, Stage, Traits, param
from trimpoint.quantization.halves import why_not
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class CastWeights(Method):
    """Store weights in 16 bits, as float16 or bfloat16; everything is computed in float32 as before.

    When it pays:
        Where the file is to be half as large and the answers are to stay what they were: float16 is off by at most one
        part in 2,048. **Nothing gets faster**: runtimes bring the weights back to float32 as they open the file, and
        trimpoint holds OpenVINO to float32, which would otherwise compute in bfloat16 on CPUs that can. `quantize-*`
        makes smaller and faster files where their error is bearable; layers that they must leave alone can be cast.
    What it costs:
        Nothing to make, and next to nothing in quality.
    Needs:
        No data.
    Leaves alone:
        Biases and normalisations, which are small. Layers with a weight beyond the range of float16 (65,504), or with
        weights so small that it would lose much of them: those stay in float32, with the reason; bfloat16 has the range
        of float32. Weights are rounded in the file and not in the module.

    References:
        Micikevicius et al., "Mixed precision training" (2018), for the range of float16; Kalamkar et al., "A study of
        BFLOAT16 for deep learning training" (2019).
    """

    dtype: str = param("float16", doc="of the stored weights", choices=("float16", "bfloat16"))

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
        """The format of a weight."""
        return {"weight": Format(dtype=self.dtype)}

    def apply(self, ctx: Context) -> None:
        """Assign the format to the weights of every module in scope that 16 bits can hold."""
        for site in ctx.modules():
            weights = [p for p in site.module.parameters(recurse=False) if p.ndim > 1]
            reasons = [why_not(cast(Tensor, p).detach().float().cpu().numpy(), self.dtype) for p in weights]
            if reason := next(filter(None, reasons), ""):
                ctx.skip(site.path, reason)
            else:
                ctx.assign(site.path, "weight", self.formats["weight"])
