"""Choosing the integers of the weights of linear layers and convolutions, as a step of a plan."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.graph import OnGrid, kept_by, why_not_held
from trimpoint.method import Context
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
def round_weights(ctx: Context, paths: Sequence[str], bits: int, rounding: str, scale: str) -> None:
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

    Raises:
        DataError: if the task has no calibration data, or a layer reads what is not finite.
    """
    modules = {path: ctx.get(path) for path in paths}
    plain = {path: module for path, module in modules.items() if not own_forward(module)}
    needed = plain if rounding in RULES or scale == "output-error" else {}
    left, top = dict(modules), _top(bits)
    for done, (path, seen) in enumerate(gather(ctx, needed, products=True)):
        ctx.report(f"choosing integers of {path}", done / len(modules))
        if seen.total is None:
            continue
        if not bool(torch.isfinite(seen.total).all()):
            raise DataError(
                f"The calibration data leads to values that are not finite at the input of `{path}`.",
                "check it for outliers and NaNs",
            )
        values, sizes = _by_inputs(left.pop(path), seen, top, rounding, scale)
        reason = f"scale by {scale}, {rounding}, on {seen.positions:,} positions"
        ctx.put_on_grid(path, OnGrid(sizes.float(), bits), values=values, reason=reason)
    for path, module in left.items():
        weight = cast(Tensor, module.weight).detach()
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
        rows = weight.movedim(axis, 0)
        sizes = (widest_scale if scale == "largest" else best_scale)(rows.flatten(1), top)
        values = nearest(rows.flatten(1), sizes, top).reshape(rows.shape).movedim(0, axis).to(weight.dtype)
        reason = f"scale by {'largest' if scale == 'largest' else 'weight-error'}, nearest"
        ctx.put_on_grid(path, OnGrid(sizes.float(), bits, axis), values=values, reason=reason)


def _by_inputs(module: nn.Module, seen: InputStatistics, top: int, rounding: str, scale: str) -> tuple[Tensor, Tensor]:
    """Return the weight on its grid and the scale of each output channel."""
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
    return from_matrix(torch.cat(values), weight.shape).to(weight.dtype), torch.cat(scales)


def _top(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)
