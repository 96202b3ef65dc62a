"""Weights of as many bits as each layer needs, and 8-bit activations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from trimpoint.errors import InvalidParameterError
from trimpoint.graph import OnGrid
from trimpoint.method import Bounds, Context, Fact, Method, Stage, Traits, param
from trimpoint.quantization.sensitivity import divergence, weight_as
from trimpoint.quantization.weights import Choice, choices, why_no_grid
from trimpoint.values import Format


@dataclass(frozen=True, kw_only=True)
class QuantizeMixed(Method):
    """Give each layer the number of bits that costs the answers least, all weights together within a size.

    What each number of bits of each layer does to the answers is measured on calibration data, one layer at a time;
    which to take is a multiple-choice knapsack, and solved exactly.

    When it pays:
        Where the size of a coded file counts and one number of bits for all layers is too few for some and too many for
        others, as in most networks below 6 bits. As with `quantize-static`, fewer than 8 bits save no time, and no
        bytes in the file as the runtime loads it.
    What it costs:
        A pass over the calibration data, and one over `samples` of it for each layer and number of bits: on a ResNet-20
        about two minutes. Answers are measured with one layer changed at a time; what several layers do to each other
        is not seen.
    Needs:
        `calibrate` data.
    Leaves alone:
        What `quantize-static` leaves alone, and layers whose integers cannot be chosen: weights that are computed or
        shared, and transposed convolutions in groups.

    References:
        Dong, Yao, Gholami, Mahoney and Keutzer, "HAWQ: Hessian aware quantization of neural networks with
        mixed-precision" (2019), and Yao et al., "HAWQ-V3: dyadic neural network quantization" (2021), for the integer
        program; Cai et al., "ZeroQ: a novel zero shot quantization framework" (2020), for sensitivities by the answers.
    """

    mean_bits: float = param(
        4.0,
        doc="of a weight, the mean of all weights in scope, at most",
        bounds=Bounds(ge=2, le=8),
        search=(6.0, 5.0, 4.0),
    )
    fewest_bits: int = param(2, doc="of a weight of a layer", bounds=Bounds(ge=2, le=8))
    most_bits: int = param(8, doc="of a weight of a layer", bounds=Bounds(ge=2, le=8))
    samples: int = param(256, doc="of the calibration data by which layers are measured", bounds=Bounds(ge=1))
    rounding: str = param(
        "gptq",
        doc="of weights: to the nearest number, or by what the layer multiplies them with",
        choices=("nearest", "gptq", "adaround"),
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.QUANTIZE,
        targets=("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "Linear"),
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
            "weight": Format(dtype=f"int{int(self.mean_bits)}", granularity="channel", reduce_range=True),
            "input": Format(dtype="uint8", granularity="tensor", symmetric=False),
        }

    def apply(self, ctx: Context) -> None:
        """Choose integers for every number of bits, measure what each costs, solve, and put the weights on grids."""
        paths = []
        for site in ctx.modules():
            reason = "it shares a weight with another module" if site.tied else why_no_grid(site.module)
            if reason:
                ctx.skip(site.path, reason)
            else:
                paths.append(site.path)
        if not paths:
            return
        every = range(self.fewest_bits, self.most_bits + 1)
        found = {path: each for path, _, each in choices(ctx, paths, every, self.rounding, "output-error")}
        costs = divergence(
            ctx,
            {
                (path, bits): partial(weight_as, ctx.get(path), choice.values)
                for path, each in found.items()
                for bits, choice in each.items()
            },
            self.samples,
            "measuring what bits cost:",
        )
        sizes = {path: next(iter(each.values())).values.numel() for path, each in found.items()}
        chosen = allocated(costs, sizes, self.mean_bits)
        for path, bits in chosen.items():
            self._assign(ctx, path, bits, found[path][bits], costs[path, bits])

    def _assign(self, ctx: Context, path: str, bits: int, choice: Choice, cost: float) -> None:
        reason = f"{choice.reason}; moves the answers by {cost:.2g} of their variance"
        ctx.put_on_grid(path, OnGrid(choice.scale.float(), bits, choice.axis), values=choice.values, reason=reason)
        ctx.assign(path, "weight", replace(self.formats["weight"], dtype=f"int{bits}"))
        ctx.assign(path, "input", self.formats["input"])


def allocated(costs: Mapping[tuple[str, int], float], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """Return the bits of each layer of the least total cost, of a mean over all weights of at most `mean_bits`.

    Args:
        costs: (layer, bits) → what it costs.
        sizes: layer → number of weights.
        mean_bits: limit; not below the least number of bits.

    References:
        https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.milp.html
    """
    from scipy.optimize import Bounds as Limits
    from scipy.optimize import LinearConstraint, milp

    keys = list(costs)
    total = sum(sizes.values())
    weight = np.array([bits * sizes[path] / total for path, bits in keys])
    one_each = np.array([[path == layer for path, _ in keys] for layer in sizes], dtype=float)
    # Of equal costs the fewest bits: a millionth of the whole cost for all of them.
    cost = np.array([costs[key] for key in keys])
    cost = cost / max(float(cost.max()), 1e-30) + 1e-9 * weight
    result = milp(
        cost,
        integrality=np.ones(len(keys)),
        options={"mip_rel_gap": 0.0},
        bounds=Limits(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, mean_bits + 1e-9)],
    )
    return {path: bits for (path, bits), taken in zip(keys, result.x, strict=True) if taken > 0.5}
