"""Choosing the integers of the weights of linear layers and convolutions, as a step of a plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from trimpoint.errors import TraceError
from trimpoint.graph import OnGrid, kept_by, why_not_held
from trimpoint.method import Context
from trimpoint.quantization.equalize import folded_scale
from trimpoint.quantization.rounding import adaround, best_scale, error_of, gptq, nearest, widest_scale
from trimpoint.sparsity.inputs import InputStatistics, as_matrix, from_matrix, gather, groups_of, own_forward

RULES: dict[str, Callable[[Tensor, Tensor, int, Tensor, Tensor], Tensor]] = {"gptq": gptq, "adaround": adaround}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def why_no_grid(module: nn.Module) -> str:
    """Return why the integers of a module's weight cannot be chosen, or `""`."""
    if isinstance(module, _TRANSPOSED) and groups_of(module) > 1:
        return "as a transposed convolution in groups it has no scale of its own for each output channel"
    return why_not_held(module, "weight")


@torch.no_grad()
def round_weights(
    ctx: Context,
    paths: Sequence[str],
    bits: int,
    rounding: str,
    scale: str,
    *,
    correct_bias: bool = False,
    learned: bool = False,
) -> None:
    """Put weights on grids of `bits` bits, a scale for each output channel.

    A layer of which it cannot be told what it multiplies with has scales of the least error of its weight instead of
    its output, and is rounded to nearest; so is each output for which that is better than `rounding`, as it can be with
    few inputs.

    Args:
        ctx: of the step.
        paths: of linear layers and convolutions, also transposed ones, whose integers can be chosen, see `why_no_grid`.
        bits: of a code, 2 to 8.
        rounding: `"nearest"`, or one of `RULES`.
        scale: `"largest"`: the largest weight has the greatest code; `"weight-error"`, `"output-error"`: that of the
            least error of the weight, or of what the layer computes on the calibration data.
        correct_bias: take from biases (without one, from the batch norm behind) by what rounding shifts the mean of
            outputs, (Q − W) E[x], as in Nagel et al., "Data-free quantization through weight equalization and bias
            correction" (2019), section 4.2.
        learned: whether training learns the scales.

    Raises:
        DataError: if the task has no calibration data, or a layer reads what is not finite.
    """
    norms = _norms(ctx) if correct_bias else {}
    for path, seen, found in choices(ctx, paths, [bits], rounding, scale, means=correct_bias):
        before, best = cast(Tensor, ctx.get(path).weight).detach().double(), found[bits]
        grid = OnGrid(best.scale.float(), bits, best.axis, learned=learned)
        ctx.put_on_grid(path, grid, values=best.values, reason=best.reason)
        if correct_bias and seen is not None:
            _correct(ctx, path, best.values.double() - before, seen, norms)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Integers for a weight: what it becomes, the scale of each channel along `axis`, and how they were chosen."""

    values: Tensor
    scale: Tensor
    axis: int
    reason: str


@torch.no_grad()
def choices(
    ctx: Context, paths: Sequence[str], bits: Sequence[int], rounding: str, scale: str, *, means: bool = False
) -> Iterator[tuple[str, InputStatistics | None, dict[int, Choice]]]:
    """Yield for each layer what it was seen to read, and its integers for each number of bits: see `round_weights`.

    Nothing is changed here; layers that are seen together are seen as they are before the first of them is yielded.
    """
    modules = {path: ctx.get(path) for path in paths}
    products = rounding in RULES or scale == "output-error"
    needed = {path: module for path, module in modules.items() if not own_forward(module)} if products or means else {}
    left = dict(modules)
    for done, (path, seen) in enumerate(gather(ctx, needed, products=products)):
        ctx.report(f"choosing integers of {path}", done / len(modules))
        if seen.total is None:
            continue
        module = left.pop(path)
        yield path, seen, {count: _by_inputs(module, seen, _top(count), rounding, scale) for count in bits}
    for path, module in left.items():
        yield path, None, {count: _alone(module, _top(count), scale) for count in bits}


def _alone(module: nn.Module, top: int, scale: str) -> Choice:
    """Choose by the weight itself."""
    weight = cast(Tensor, module.weight).detach()
    axis = 1 if isinstance(module, _TRANSPOSED) else 0
    rows = weight.movedim(axis, 0)
    sizes = (widest_scale if scale == "largest" else best_scale)(rows.flatten(1), top)
    values = nearest(rows.flatten(1), sizes, top).reshape(rows.shape).movedim(0, axis).to(weight.dtype)
    reason = f"scale by {'largest' if scale == 'largest' else 'weight-error'}, nearest"
    return Choice(values=values, scale=sizes, axis=axis, reason=reason)


@torch.no_grad()
def rounded_by_tensor(ctx: Context, paths: Sequence[str], bits: int) -> dict[str, Tensor]:
    """Return weights rounded to nearest with one scale per tensor, by the largest weight.

    A runtime rounds a weight as it is with the batch norm behind it folded in; so are these, and the norm taken out
    again.

    Args:
        ctx: of the step.
        paths: of linear layers and convolutions.
        bits: of a weight.
    """
    norms, top, found = _norms(ctx), _top(bits), {}
    for path in paths:
        module = ctx.get(path)
        weight = cast(Tensor, module.weight).detach()
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
        rows = weight.movedim(axis, 0)
        matrix = rows.flatten(1).double()
        factors = folded_scale(ctx.get(norms[path])).abs() if path in norms else matrix.new_ones(len(matrix))
        whole = widest_scale((matrix * factors[:, None]).reshape(1, -1), top)
        scales = torch.where(factors > 0, whole / factors, 1.0)  # what a factor of 0 leaves over does not matter
        found[path] = nearest(matrix, scales, top).reshape(rows.shape).movedim(0, axis).to(weight.dtype)
    return found


def _norms(ctx: Context) -> Mapping[str, str]:
    try:
        return ctx.scalings().norms
    except TraceError:  # layers with a bias of their own need none
        return {}


def _correct(ctx: Context, path: str, wrong: Tensor, seen: InputStatistics, norms: Mapping[str, str]) -> None:
    """Take back the mean error of a layer whose weight is wrong by `wrong`."""
    module = ctx.get(path)
    means = cast(Tensor, seen.sums) / seen.positions
    rows = as_matrix(wrong).chunk(groups_of(module))
    shift = torch.cat([part @ mean for part, mean in zip(rows, means, strict=True)])
    if isinstance(module.bias, Tensor):
        ctx.shift(path, "bias", -shift, "mean error taken back")
    elif path in norms:
        ctx.shift(norms[path], "running_mean", shift, f"mean error of `{path}` taken back")


def _by_inputs(module: nn.Module, seen: InputStatistics, top: int, rounding: str, scale: str) -> Choice:
    """Choose by what the layer multiplies the weight with."""
    weight, kept, groups = cast(Tensor, module.weight).detach(), kept_by(module), groups_of(module)
    parts = (as_matrix(weight).double().chunk(groups), as_matrix(kept).chunk(groups))
    totals, by_output = cast(Tensor, seen.total) / seen.positions, scale == "output-error"
    values, scales = [], []
    for rows, keep, products in zip(*parts, totals, strict=True):
        size = widest_scale(rows, top) if scale == "largest" else best_scale(rows, top, products if by_output else None)
        rounded = nearest(rows, size, top)
        if rounding in RULES:
            with torch.enable_grad():
                found = RULES[rounding](rows, size, top, products, keep)
            better = error_of(found - rows, products) < error_of(rounded - rows, products)
            rounded = torch.where(better[:, None], found, rounded)
        values.append(rounded)
        scales.append(size)
    return Choice(
        values=from_matrix(torch.cat(values), weight.shape).to(weight.dtype),
        scale=torch.cat(scales),
        axis=0,
        reason=f"scale by {scale}, {rounding}, on {seen.positions:,} positions",
    )


def _top(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)
