"""The ranges of what layers read, as PyTorch computes it, for steps of a plan that simulate them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trimpoint.errors import DataError, not_finite_at
from trimpoint.method import Context
from trimpoint.padding import calibrate_kept, rows_of
from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import Range, range_of
from trimpoint.values import Format

Shared = dict[tuple[str, ...], Range]
"""Paths of the layers that read one and the same tensor → its range."""


def input_ranges_of(ctx: Context, paths: Sequence[str], kind: Format) -> Shared:
    """Return the ranges of what layers read of the calibration data; layers that read the same tensor share one.

    Args:
        ctx: of the step.
        paths: of the layers.
        kind: whose rule gives the range.

    Raises:
        DataError: if the task has no calibration data, or a layer reads what is not finite.
    """
    seen: dict[str, Histogram] = {}
    first: dict[str, tuple[Any, int]] = {}  # held, so that no other tensor takes their place

    def see(path: str, module: nn.Module, value: Any, kept: Tensor | None) -> None:
        tensor: Tensor = getattr(value, "data", value)
        if path not in first:
            first[path] = tensor, tensor._version
        rows = rows_of(value, kept) if isinstance(module, nn.Linear) else tensor
        try:
            seen.setdefault(path, Histogram()).add(rows.detach().float().cpu().numpy())
        except DataError as error:
            raise not_finite_at(path) from error

    calibrate_kept(ctx, see, paths)
    together: dict[tuple[int, int], list[str]] = {}
    for path, (tensor, version) in first.items():
        together.setdefault((id(tensor), version), []).append(path)
    return {tuple(alike): range_of(seen[alike[0]], kind) for alike in together.values()}


def learn_ranges(ctx: Context, paths: Sequence[str], kind: Format) -> None:
    """Round what layers read as their runtime will, from ranges of the calibration data on, which training learns.

    Args and errors are those of `input_ranges_of`.
    """
    for alike, (low, high) in input_ranges_of(ctx, paths, kind).items():
        ctx.round_input(alike, low, high)
