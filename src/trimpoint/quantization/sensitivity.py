"""What it costs a model's answers when one layer is changed: forward passes on calibration data, no labels."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.graph.held import parameter_behind
from trimpoint.graph.input_grids import InputGrid, put_input_on_grid_, take_off_grids_
from trimpoint.losses import call, main_tensor
from trimpoint.method import Context
from trimpoint.padding import kept_positions
from trimpoint.quantization.activations import input_ranges_of
from trimpoint.quantization.weights import choices, rounded_by_tensor
from trimpoint.values import Format

Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def divergence(
    ctx: Context, variants: Mapping[Key, Callable[[], Any]], samples: int, what: str = "measuring"
) -> dict[Key, float]:
    """Return how far answers move when the model is changed in single ways, as a share of how far they vary.

    The sum of squared differences of the main output, over that of its distances from its mean; noise of layers that
    are rounded independently adds up in it. Answers at padding do not count, where an output has one for each position.
    Answers that are no longer finite have moved infinitely far.

    Args:
        ctx: of the step.
        variants: key → context manager in which the model is changed.
        samples: of the calibration data, at most.
        what: is done, to be reported.

    Raises:
        DataError: if the task has no calibration data, or answers of the unchanged model are not finite.
    """
    if ctx.task is None or ctx.task.calibrate is None:
        raise DataError("Measuring what layers cost needs calibration data.", "give the task a `calibrate` role")
    model = ctx.module.eval()
    size = min(32, ctx.task.batch_size)
    batches = [inputs for inputs, _ in ctx.task.batches("calibrate", size=size, limit=samples)]
    whole = [main_tensor(call(model, inputs)) for inputs in batches]
    kept = [kept_positions(inputs) for inputs in batches]
    if any(mask is None or answer.shape[:2] != mask.shape for answer, mask in zip(whole, kept, strict=True)):
        kept = [None] * len(batches)
    before = [_rows(answer, mask) for answer, mask in zip(whole, kept, strict=True)]
    alike = len({rows.shape[1] for rows in before}) == 1
    rows = torch.cat(before if alike else [rows.reshape(-1, 1) for rows in before])
    spread = float((rows - rows.mean(0)).square().sum())
    if not spread < math.inf:
        raise DataError("The calibration data leads to answers that are not finite.", "check it for outliers and NaNs")
    found = {}
    for done, (key, changed) in enumerate(variants.items()):
        ctx.report(f"{what} {key}", done / len(variants))
        with changed():
            moved = sum(
                float((_rows(main_tensor(call(model, inputs)), mask) - rows).square().sum())
                for inputs, mask, rows in zip(batches, kept, before, strict=True)
            )
        moved = moved / spread if spread else moved
        found[key] = moved if math.isfinite(moved) else math.inf
    return found


def _rows(answer: Tensor, kept: Tensor | None) -> Tensor:
    """Return an output as float64 row vectors `[positions, features]`."""
    answer = (answer if kept is None else answer[kept]).double()
    return answer.flatten(0, -2) if answer.ndim > 1 else answer[:, None]


@torch.no_grad()
def layer_costs(ctx: Context, paths: Sequence[str], weight: Format, kind: Format, samples: int) -> dict[str, float]:
    """Return what it costs the answers to round weights and input of a layer, one layer at a time, see `divergence`.

    Args:
        ctx: of the step.
        paths: of linear layers and convolutions.
        weight: that weights are rounded to, to nearest, with scales by the largest weight.
        kind: of the input.
        samples: of the calibration data, at most.

    Raises:
        DataError: if the task has no calibration data, or a layer reads what is not finite.
    """
    ranges = {path: range_ for alike, range_ in input_ranges_of(ctx, paths, kind).items() for path in alike}
    bits = min(weight.bits, 7) if weight.reduce_range else weight.bits
    if weight.granularity == "tensor":
        rounded = rounded_by_tensor(ctx, paths, bits)
    else:
        rounded = {path: each[bits].values for path, _, each in choices(ctx, paths, [bits], "nearest", "largest")}
    ways = {path: partial(_rounded, ctx.get(path), values, ranges.get(path)) for path, values in rounded.items()}
    return divergence(ctx, ways, samples, "measuring what int8 costs:")


@contextmanager
def _rounded(module: nn.Module, values: Tensor, ends: tuple[float, float] | None) -> Iterator[None]:
    with weight_as(module, values):
        if ends is not None:
            put_input_on_grid_([module], InputGrid(*ends))
        try:
            yield
        finally:
            take_off_grids_(module)


@contextmanager
def weight_as(module: nn.Module, values: Tensor) -> Iterator[None]:
    """Let a module have another weight for a while."""
    weight = parameter_behind(module, "weight").data
    before = weight.clone()
    try:
        weight.copy_(values)
        yield
    finally:
        weight.copy_(before)
