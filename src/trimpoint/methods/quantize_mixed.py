"""Weights of as many bits as each layer needs, and 8-bit activations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

from torch import nn

from trimpoint.errors import InvalidParameterError
from trimpoint.graph import OnGrid
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.quantization.allocation import cheapest
from trimpoint.quantization.gates import (
    MOST_BITS,
    Gate,
    Rounded,
    gate_as,
    gate_choices,
    gates_of,
    put_gates,
    why_no_gates,
)
from trimpoint.quantization.sensitivity import divergence, weight_as
from trimpoint.quantization.weights import Choice, choices, why_no_grid
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class QuantizeMixed(Method):
    """Give each layer the number of bits that costs the answers least, all weights together within a size.

    What each number of bits of each layer does to the answers is measured on calibration data, one layer at a time;
    which to take is a multiple-choice knapsack, and solved exactly. In LSTM, GRU and plain recurrent layers each gate
    of each layer and direction has bits of its own, 7 at most, rounded to nearest.

    When it pays:
        Where the size of a coded file counts and one number of bits for all layers is too few for some and too many for
        others, as in most networks below 6 bits. As with `quantize-static`, fewer than 8 bits save no time, and no
        bytes in the file as the runtime loads it. ONNX Runtime computes an LSTM on 8-bit integers whatever the bits of
        its gates, with activations rounded by their range in each call, and the coded file shrinks; a GRU stays in
        float32 there, rounded, and saves nothing in either file; plain recurrent layers are rounded once more.
    What it costs:
        A pass over the calibration data, and one over `samples` of it for each layer and number of bits: on a ResNet-20
        about two minutes. Answers are measured with one layer changed at a time; what several layers do to each other
        is not seen.
    Needs:
        `calibrate` data.
    Leaves alone:
        What `quantize-static` leaves alone but recurrent layers, and layers whose integers cannot be chosen: weights
        that are computed or shared, transposed convolutions in groups, recurrent cells, and LSTMs that project their
        state.

    References:
        Dong, Yao, Gholami, Mahoney and Keutzer, "HAWQ: Hessian aware quantization of neural networks with
        mixed-precision" (2019), and Yao et al., "HAWQ-V3: dyadic neural network quantization" (2021), for the integer
        program; Cai et al., "ZeroQ: a novel zero shot quantization framework" (2020), for sensitivities by
        the answers; He et al., "Effective quantization methods for recurrent neural networks" (2016).
    """

    mean_bits: float = param(
        4.0,
        doc="of a weight, the mean of all weights in scope, at most",
        bounds=Bounds(ge=2, le=8),
        search=(6.0, 5.0, 4.0),
    )
    fewest_bits: int = param(2, doc="of a weight of a layer", bounds=Bounds(ge=2, le=8))
    most_bits: int = param(8, doc="of a weight of a layer", bounds=Bounds(ge=2, le=8))
    reduce_range: bool = param(True, doc="at most 7 bits, exact on CPUs without VNNI as well")
    samples: int = param(256, doc="of the calibration data by which layers are measured", bounds=Bounds(ge=1))
    rounding: str = param(
        "gptq",
        doc="of weights: to the nearest number, or by what the layer multiplies them with",
        choices=("nearest", "gptq", "adaround"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Linear", "RNNBase"),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.FLOAT_WEIGHT,
        reduces=frozenset({"file_bytes"}),
        needs=frozenset({"calibrate"}),
        status="experimental",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fewest_bits > min(self.most_bits, self.mean_bits):
            raise InvalidParameterError(
                "The 'fewest_bits' parameter of QuantizeMixed must be at most 'mean_bits' and 'most_bits'. Got "
                f"{self.fewest_bits}, {self.mean_bits:g} and {self.most_bits}.",
                "allow a layer fewer bits",
            )

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats of a weight, with the mean number of bits, and of what it is multiplied with."""
        return {
            "weight": Format(dtype=f"int{int(self.mean_bits)}", granularity="channel", reduce_range=self.reduce_range),
            "input": Format(dtype="uint8", granularity="tensor", symmetric=False),
        }

    def apply(self, ctx: Context) -> None:
        """Choose integers for every number of bits, measure what each costs, solve, and put the weights on grids."""
        paths, gates = [], list[Gate]()
        for site in ctx.modules():
            recurrent = isinstance(site.module, nn.RNNBase)
            why_not = why_no_gates(cast(nn.RNNBase, site.module)) if recurrent else why_no_grid(site.module)
            if reason := "it shares a weight with another module" if site.tied else why_not:
                ctx.skip(site.path, reason)
            elif recurrent:
                gates += gates_of(cast(nn.RNNBase, site.module), site.path)
            else:
                paths.append(site.path)
        if not paths and not gates:
            return
        every = sorted(
            {min(bits, 7 if self.reduce_range else 8) for bits in range(self.fewest_bits, self.most_bits + 1)}
        )
        found = {path: each for path, _, each in choices(ctx, paths, every, self.rounding, "output-error")}
        fewer = sorted({min(bits, MOST_BITS) for bits in every})
        rounded = {gate: gate_choices(ctx.get(gate.path), gate, fewer) for gate in gates}
        ways = {
            (path, bits): partial(weight_as, ctx.get(path), choice.values)
            for path, each in found.items()
            for bits, choice in each.items()
        } | {
            (str(gate), bits): partial(gate_as, ctx.get(gate.path), gate, rows)
            for gate, made in rounded.items()
            for bits, rows in made.items()
        }
        costs = divergence(ctx, ways, self.samples, "measuring what bits cost:")
        sizes = {path: next(iter(each.values())).values.numel() for path, each in found.items()}
        sizes |= {str(gate): _count(next(iter(made.values()))) for gate, made in rounded.items()}
        chosen = allocated(costs, sizes, self.mean_bits)
        for path in found:
            self._assign(ctx, path, chosen[path], found[path][chosen[path]], costs[path, chosen[path]])
        put_gates(ctx, {gate: (chosen[str(gate)], made[chosen[str(gate)]]) for gate, made in rounded.items()})
        for path in dict.fromkeys(gate.path for gate in gates):
            weight = Format(dtype="int8", granularity="channel", symmetric=True, reduce_range=True)
            ctx.assign(path, "weight", weight)
            ctx.assign(path, "input", Format(dtype="uint8", symmetric=False, dynamic=True))

    def _assign(self, ctx: Context, path: str, bits: int, choice: Choice, cost: float) -> None:
        reason = f"{choice.reason}; moves the answers by {cost:.2g} of their variance"
        ctx.put_on_grid(path, OnGrid(choice.scale.float(), bits, choice.axis), values=choice.values, reason=reason)
        ctx.assign(path, "weight", replace(self.formats["weight"], dtype=f"int{bits}"))
        ctx.assign(path, "input", self.formats["input"])


def _count(rounded: Rounded) -> int:
    return sum(values.numel() for values, _ in rounded.values())


def allocated(costs: Mapping[tuple[str, int], float], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """Return the bits of each layer of the least total cost, of a mean over all weights of at most `mean_bits`.

    Args:
        costs: (layer, bits) → what it costs.
        sizes: layer → number of weights.
        mean_bits: limit.

    Raises:
        InvalidParameterError: if it is below the least number of bits.
    """
    total = sum(sizes.values())
    weights = {(path, bits): bits * sizes[path] / total for path, bits in costs}
    found = cheapest(costs, weights, mean_bits)
    if found is None:
        raise InvalidParameterError(
            f"The 'mean_bits' parameter of QuantizeMixed is below the fewest bits of all layers. Got {mean_bits:g}."
        )
    return found
