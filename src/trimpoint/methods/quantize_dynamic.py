"""Eight-bit weights; activations rounded to eight bits by their range in each call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import nn

from trimpoint.method import Context, Fact, Method, Stage, Traits, param
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Method):
    """Compute linear, attention and recurrent layers on 8-bit integers, an activation's range being that of each call.

    When it pays:
        Where matrix products with weights or LSTM layers take most of the time, at batch 1 above all, and where nothing
        is known of the data: text classifiers, recurrent networks, perceptrons. In ONNX Runtime an LSTM of 256 units
        gets three to six times faster and a six-layer transformer about twice; static int8 is as fast there, and the
        only one for convolutions, which this leaves alone: give each its own layers by `where`.
    What it costs:
        Nothing to make. Activations are rounded as coarsely as their largest value in the call asks for, so what else
        is in a batch, or in a chunk of a sequence, changes the answers slightly. On a CPU without VNNI sums saturate
        without `reduce_range`: an LSTM of 256 units was then off by 12 % instead of 1.3 %.
    Needs:
        No data.
    Leaves alone:
        Everything but linear layers, multi-head attention (its projections; the products of two activations stay in
        float32, since rounding both made nothing faster), embeddings (stored in 8 bits with a scale per row),
        recurrent layers and their cells. The target's runtime computes what it has kernels for and lists the others: in
        ONNX Runtime `nn.GRU` stays in float32, and its cells do not; `nn.RNN`, which is exported step by step, is int8
        too; OpenVINO stores the weights of linear layers and embeddings in 8 bits, rounds activations on CPUs with VNNI
        only, and leaves recurrent layers in float32.

    References:
        ONNX operators, `DynamicQuantizeLinear` and `MatMulInteger`; ONNX Runtime, "Quantize ONNX models", for
        `reduce_range`; Jacob et al., "Quantization and training of neural networks for efficient
        integer-arithmetic-only inference" (2018); He et al., "Effective quantization methods for recurrent neural
        networks" (2016).
    """

    granularity: str = param(
        "channel", doc="one scale of a weight per output or per tensor", choices=("channel", "tensor")
    )
    reduce_range: bool = param(True, doc="7-bit weights, exact on CPUs without VNNI as well", search=(True, False))

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Linear", "Conv1D", "MultiheadAttention", "RNNBase", "RNNCellBase", "Embedding"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        status="experimental",
    )

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats of a weight and of what it is multiplied with."""
        granularity = cast(Literal["channel", "tensor"], self.granularity)
        return {
            "weight": Format(dtype="int8", granularity=granularity, reduce_range=self.reduce_range),
            "input": Format(dtype="uint8", symmetric=False, dynamic=True),
        }

    def apply(self, ctx: Context) -> None:
        """Assign formats to the weights of every module in scope, and to the input of those that multiply."""
        formats = self.formats
        for site in ctx.modules():
            if isinstance(site.module, nn.Embedding):
                ctx.assign(site.path, "weight", Format(dtype="int8", granularity="channel"))
                continue
            ctx.assign(site.path, "weight", formats["weight"])
            ctx.assign(site.path, "input", formats["input"])
