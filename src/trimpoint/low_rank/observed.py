"""What a model's layers see: moments of their inputs, and the Fisher information of their weights."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.losses import for_loss_
from trimpoint.low_rank.moments import Moments
from trimpoint.method import Context
from trimpoint.padding import calibrate_kept, rows_of
from trimpoint.task import Task

MOST_BYTES = 1 << 30
"""Covariances that are held at once; where they would need more, the data is run through several times."""

_BYTES = 8


def patches_of(layer: Any, value: Tensor, most: int, rng: np.random.Generator) -> Tensor:
    """Return what a convolution's kernel is multiplied with, at random positions, `[positions, channels · kernel]`.

    Args:
        layer: the convolution.
        value: its input, `[batch, channels, *size]`, or without a batch.
        most: number of positions at most.
        rng: draws them.
    """
    dims = len(layer.kernel_size)
    value = value[None] if value.ndim == dims + 1 else value
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(value, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + dim, (size - 1) * gap + 1, step)[..., ::gap]
    windows = windows.movedim(1, dims + 1)
    places = tuple(windows.shape[: dims + 1])
    count = math.prod(places)
    chosen = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
    return windows[tuple(torch.from_numpy(index) for index in np.unravel_index(chosen, places))].flatten(1)


def gather(
    ctx: Context, sizes: Mapping[str, int], rows: Callable[[str, Any, Tensor | None], Tensor] | None = None
) -> dict[str, Moments]:
    """Return the moments of the inputs of layers over the calibration data; padding does not count.

    Args:
        ctx: of the step.
        sizes: path → number of input features.
        rows: `(path, input, kept positions)` → row vectors; by default those along the last dimension.

    Raises:
        DataError: if the task has no calibration data.
    """
    found = {path: Moments(size) for path, size in sizes.items()}

    def see(path: str, _module: nn.Module, value: Any, kept: Tensor | None) -> None:
        found[path].update(rows_of(value, kept) if rows is None else rows(path, value, kept))

    for paths in _passes(sizes):
        calibrate_kept(ctx, see, paths)
    return found


def input_fisher(
    module: nn.Module, task: Task, grads: Mapping[str, Callable[[nn.Module], Tensor]]
) -> dict[str, Tensor]:
    """Return for each layer the empirical Fisher information of the weights of each input, `[in]`.

    The sum over outputs of the mean, over the calibration samples one by one, of the squared gradient of the loss.

    Args:
        module: the model; it is copied.
        task: with calibration data and a loss.
        grads: path → what returns the gradient of the layer's matrix, `[out, in]`.

    Raises:
        DataError: if the task has no calibration data or no loss.
    """
    probe = for_loss_(copy.deepcopy(module).requires_grad_(True), inner=task.step is not None)
    found: dict[str, Tensor] = {}
    count = 0
    for batch in task.batches("calibrate", size=1):
        probe.zero_grad(set_to_none=True)
        with torch.enable_grad():
            task.loss_of(probe, batch).backward()  # type: ignore[no-untyped-call]
        count += 1
        for path, grad in grads.items():
            squares = grad(probe.get_submodule(path)).detach().double().square().sum(0)
            found[path] = found[path] + squares if path in found else squares
    return {path: value / max(1, count) for path, value in found.items()}


def _passes(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield groups of paths whose covariances fit into `MOST_BYTES` together; one that does not fit stands alone."""
    group: list[str] = []
    used = 0
    for path, size in sizes.items():
        need = size * size * _BYTES
        if group and used + need > MOST_BYTES:
            yield group
            group, used = [], 0
        group.append(path)
        used += need
    if group:
        yield group
