"""Choosing the integers of the weights of linear layers and convolutions, as a step of a plan."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trimpoint.method import Context
from trimpoint.quantization.rounding import adaround, best_scale, error_of, gptq, nearest
from trimpoint.sparsity.inputs import InputStatistics, as_matrix, from_matrix, gather, groups_of, own_forward

RULES: dict[str, Callable[[Tensor, Tensor, int, Tensor], Tensor]] = {"gptq": gptq, "adaround": adaround}


@torch.no_grad()
def round_weights(ctx: Context, paths: Sequence[str], bits: int, rounding: str) -> None:
    """Put weights on grids of `bits` bits, a scale for each output channel; what cannot be is skipped.

    Scales are those of the least error of the layer's output on the calibration data; a layer of which it cannot be
    told what it multiplies with gets those of the least error of its weight, and is rounded to nearest; so is each
    output for which that is better than `rounding`, as it can be with few inputs.

    Args:
        ctx: of the step.
        paths: of linear layers and convolutions, also transposed ones.
        bits: of a code, 2 to 8.
        rounding: `"nearest"`, or one of `RULES`.

    Raises:
        DataError: if the task has no calibration data.
    """
    modules = {path: ctx.get(path) for path in paths}
    plain = {path: module for path, module in modules.items() if not own_forward(module)}
    seen = gather(ctx, plain, products=True)
    for done, (path, module) in enumerate(modules.items()):
        ctx.report(f"choosing integers of {path}", done / len(modules))
        weight, axis = cast(Tensor, module.weight).detach(), 0
        if path in plain and seen[path].positions:
            values, scale = _by_inputs(module, weight, seen[path], bits, rounding)
            reason = f"least error of its output on {seen[path].positions:,} positions, {rounding}"
        else:
            axis = 1 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
            rows = weight.movedim(axis, 0)
            scale = best_scale(rows.flatten(1), top := _top(bits))
            rounded = nearest(rows.flatten(1), scale, top).reshape(rows.shape).movedim(0, axis)
            values, reason = rounded.to(weight.dtype), "least error of its weight, nearest"
        ctx.put_on_grid(path, scale, bits, axis=axis, values=values, reason=reason)


def _by_inputs(
    module: nn.Module, weight: Tensor, seen: InputStatistics, bits: int, rounding: str
) -> tuple[Tensor, Tensor]:
    """Return the weight on its grid and the scale of each output channel."""
    matrix, groups, top = as_matrix(weight).double(), groups_of(module), _top(bits)
    totals = cast(Tensor, seen.total) / seen.positions
    values, scales = [], []
    for rows, products in zip(matrix.chunk(groups), totals, strict=True):
        scale = best_scale(rows, top, products)
        rounded = nearest(rows, scale, top)
        if rounding in RULES:
            with torch.enable_grad():
                found = RULES[rounding](rows, scale, top, products)
            better = error_of(found - rows, products) < error_of(rounded - rows, products)
            rounded = torch.where(better[:, None], found, rounded)
        values.append(rounded)
        scales.append(scale)
    return from_matrix(torch.cat(values), weight.shape).to(weight.dtype), torch.cat(scales)


def _top(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)
