"""Integers of a matrix with a scale and a zero point for each run of its inputs.

Weights are `[outputs, inputs]`, scales and zero points `[outputs, groups]`; the last group may have fewer inputs. A
weight is scale · (code − zero), codes are 0 to 2ᵇⁱᵗˢ − 1. All is computed in float64 and rounded to what a file holds:
scales of float32, whole zero points.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trimpoint.quantization.rounding import error_of, sweep

_LEAST = 1e-30
_SHARES = torch.linspace(1.0, 0.5, 26, dtype=torch.float64)
_POWERS = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Scales and zero points of a matrix.

    Args:
        scale: `[outputs, groups]`, float64 that float32 holds, positive.
        zero: `[outputs, groups]`, float64.
        size: of a group.
        bits: of a code.
        inputs: of the matrix.
    """

    scale: Tensor
    zero: Tensor
    size: int
    bits: int
    inputs: int

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    def spread(self, values: Tensor) -> Tensor:
        """Return for each input what its group has, `[outputs, inputs]`."""
        return values.repeat_interleave(self.size, 1)[:, : self.inputs]

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest weights on the grid."""
        scale, zero = self.spread(self.scale), self.spread(self.zero)
        return ((weight.double() / scale + zero).round().clamp(0, self.top) - zero) * scale


def widest(weight: Tensor, size: int, bits: int, symmetric: bool, share: Tensor | float = 1.0) -> Groups:
    """Return the scales at which the codes of each group reach from its least weight to its greatest, zero included.

    Args:
        weight: `[outputs, inputs]`.
        size: of a group.
        bits: of a code.
        symmetric: zero is the code 2ᵇⁱᵗˢ⁻¹ everywhere, and the scale the least that reaches both.
        share: of the range that is covered.
    """
    parts = _grouped(weight.double(), size)
    low, high = parts.amin(2).clamp_max(0) * share, parts.amax(2).clamp_min(0) * share
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    scale = torch.maximum(high / (middle - 1), -low / middle) if symmetric else (high - low) / top
    scale = torch.where(scale > 0, scale.clamp_min(_LEAST), 1.0).float().double()
    zero = torch.full_like(scale, middle) if symmetric else (-low / scale).round().clamp(0, top)
    return Groups(scale=scale, zero=zero, size=size, bits=bits, inputs=weight.shape[1])


def searched(weight: Tensor, size: int, bits: int, symmetric: bool, weights: Tensor | None = None) -> Groups:
    """Return of 26 shares of the widest range, from all to a half, those with the least squared error of each group.

    Args:
        weight: `[outputs, inputs]`.
        size: of a group.
        bits: of a code.
        symmetric: see `widest`.
        weights: how much the error of each input counts, `[inputs]`, such as the diagonal of XᵀX.
    """
    best = widest(weight, size, bits, symmetric)
    least = _errors(weight, best, weights)
    for share in _SHARES[1:].tolist():
        other = widest(weight, size, bits, symmetric, share)
        errors = _errors(weight, other, weights)
        better = errors < least
        best = _where(better, other, best)
        least = torch.where(better, errors, least)
    return best


def _errors(weight: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
    wrong = (groups.nearest(weight) - weight.double()).square()
    return _grouped(wrong if weights is None else wrong * weights.double(), groups.size).sum(2)


def gptq_groups(
    weight: Tensor, groups: Groups, products: Tensor, keep: Tensor | None = None, damping: float = 0.01
) -> Tensor:
    """Round one input after the other onto given groups, see `trimpoint.quantization.rounding.gptq`.

    Scales are fixed beforehand, so that inputs may be taken in any order and yet lie in the groups of their positions:
    the options `act_order` and `static_groups` of the authors' code.
    """
    scale, zero = groups.spread(groups.scale), groups.spread(groups.zero)

    def onto(values: Tensor, column: int) -> Tensor:
        size, shift = scale[:, column], zero[:, column]
        return ((values / size + shift).round().clamp(0, groups.top) - shift) * size

    return sweep(weight, onto, products, keep, damping)


def hqq(
    weight: Tensor,
    groups: Groups,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
    whole: bool = True,
) -> Groups:
    """Move zero points, without data, so that few weights are far off rather than many a little.

    Minimises ‖W − Wq‖ₚ, p < 1, by half-quadratic splitting: in turns, the error is shrunk, and the zero point set to
    the mean of what is left. Kernels take whole zero points: with `whole`, they are rounded in the end, the scales are
    fitted to the same splitting for as many steps again, and a group that this leaves worse stays as it was.

    Args:
        weight: `[outputs, inputs]`.
        groups: to begin with.
        power: p.
        beta: how much the splitting holds at first.
        growth: of that in each step.
        steps: of the solver.
        whole: see above; without it zero points are real and groups never go back.

    References:
        Badri and Shaji, "Half-quadratic quantization of large machine learning models" (2023),
        https://mobiusml.github.io/hqq_blog; p, β and its growth are those of their code.
    """
    parts, there = _grouped(weight.double(), groups.size), _grouped(torch.ones_like(weight.double()), groups.size)
    scale, zero, now = groups.scale[:, :, None], groups.zero[:, :, None], beta
    count = there.sum(2, keepdim=True)
    for _ in range(steps):
        codes = (parts / scale + zero).round().clamp(0, groups.top)
        error = _shrunk(parts - scale * (codes - zero), now, power)
        zero = ((codes - (parts - error) / scale) * there).sum(2, keepdim=True) / count
        now *= growth
    if not whole:
        return replace(groups, zero=zero[:, :, 0])
    zero, now = zero.round().clamp(0, groups.top), beta
    for _ in range(steps):
        steps_up = ((parts / scale + zero).round().clamp(0, groups.top) - zero) * there
        error = _shrunk(parts - scale * steps_up, now, power)
        squares = steps_up.square().sum(2, keepdim=True)
        fitted = ((parts - error) * steps_up).sum(2, keepdim=True) / squares
        scale = torch.where((squares > 0) & (fitted > 0), fitted, scale)
        now *= growth
    found = replace(groups, scale=scale[:, :, 0].float().double().clamp_min(_LEAST), zero=zero[:, :, 0])
    far = [
        _grouped((g.nearest(weight) - weight.double()).abs().pow(power), groups.size).sum(2) for g in (groups, found)
    ]
    better = far[1] < far[0]
    return _where(better, found, groups)


def _where(which: Tensor, some: Groups, others: Groups) -> Groups:
    """Return some groups of one and the rest of another."""
    zero = torch.where(which, some.zero, others.zero)
    return replace(others, scale=torch.where(which, some.scale, others.scale), zero=zero)


def _shrunk(error: Tensor, beta: float, power: float) -> Tensor:
    """Return the minimiser e of |e|ᵖ + β/2 (e − error)², as generalised soft thresholding approximates it."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(1e-12).pow(power - 1) / beta).clamp_min(0)


def awq(
    weight: Tensor, products: Tensor, sizes: Tensor, make: Callable[[Tensor], Groups]
) -> tuple[Tensor, Groups, Tensor]:
    """Scale up the weights of inputs that are large, before they are rounded to nearest; find by how much.

    The factors are the mean magnitudes of the inputs to one of 21 powers from 0 to 1, that of the least error
    of the layer's output.

    Args:
        weight: `[outputs, inputs]`.
        products: XᵀX `[inputs, inputs]`.
        sizes: magnitude of each input, `[inputs]`.
        make: returns the groups of a weight.

    Returns:
        the factor of each input, by which its weights are divided (the inverse of the authors' s), the groups of the
        divided weight, and the weights on the grid with the factors multiplied in again.

    References:
        Lin et al., "AWQ: activation-aware weight quantization for LLM compression and acceleration" (2023).
    """
    sizes = torch.where(sizes > 0, sizes.double(), sizes.double().mean()).clamp_min(_LEAST)
    best: tuple[Tensor, Groups, Tensor] | None = None
    least = float("inf")
    for power in _POWERS.tolist():
        raised = (sizes / sizes.mean()).pow(power).clamp(1e-4, 1e4)
        factor = ((raised.amax() * raised.amin()).sqrt() / raised).float().double()
        groups = make(weight.double() / factor)
        values = groups.nearest(weight.double() / factor) * factor
        error = float(error_of(values - weight.double(), products.double()).sum())
        if error < least or best is None:
            best, least = (factor, groups, values), error
    return best  # type: ignore[return-value]


def _grouped(values: Tensor, size: int) -> Tensor:
    """Return `[outputs, groups, size]`, with zeros behind the last input."""
    short = -values.shape[1] % size
    return F.pad(values, (0, short)).reshape(len(values), -1, size)
