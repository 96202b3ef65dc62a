"""What a model's layers see: moments of their inputs, and the Fisher information of their weights."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trimpoint.graph.layers import LowRank
from trimpoint.losses import call
from trimpoint.low_rank.moments import CrossMoments, Moments
from trimpoint.method import Context, Site
from trimpoint.task import Task

MOST_BYTES = 1 << 30
"""Covariances that are held at once; where they would need more, the data is run through several times."""

_KEEP, _DROP = ("attention_mask",), ("key_padding_mask", "src_key_padding_mask")
_BYTES = 8


def unfit(ctx: Context, site: Site, plain: type[nn.Module] | None) -> str:
    """Return why a layer cannot be replaced by its factors, or `""`.

    Args:
        ctx: of the step.
        site: the layer.
        plain: the class whose forward pass the factors stand for; `None` where that was looked at already.
    """
    parent = site.path.rpartition(".")[0]
    if site.path and isinstance(ctx.get(parent), LowRank):
        return "it is a factor of a layer already"
    if site.tied:
        return "it shares its weight with another module"
    if parametrize.is_parametrized(site.module):
        return "its weight is computed from others (a parametrization)"
    if plain is not None and type(site.module).forward is not plain.forward:
        return f"its class {type(site.module).__name__} has a forward pass of its own"
    if site.module._forward_hooks or site.module._forward_pre_hooks:
        return "it has hooks, which would be lost"
    return ""


def kept_positions(inputs: Any) -> Tensor | None:
    """Return which positions of a batch are no padding, `[batch, length]`; `None` where nothing tells.

    A mapping tells by `attention_mask` (1 where there is a token) or by `key_padding_mask` or `src_key_padding_mask`
    (1 where there is none), if that has two dimensions and no other values.
    """
    for name in (*_KEEP, *_DROP) if isinstance(inputs, Mapping) else ():
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and bool(((mask == 0) | (mask == 1)).all()):
            return (mask != 0) if name in _KEEP else (mask == 0)
    return None


def rows_of(value: Any, kept: Tensor | None) -> Tensor:
    """Return the row vectors along the last dimension of a layer's input or output, `[positions, features]`.

    Args:
        value: a tensor, or a packed sequence.
        kept: positions that count, see `kept_positions`; used where the tensor has just these leading dimensions.
    """
    tensor: Tensor = getattr(value, "data", value)
    if kept is not None and tensor.shape[:-1] == kept.shape:
        return tensor[kept]
    return tensor.reshape(-1, tensor.shape[-1])


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

    Returns:
        Path → moments, in the order in which the layers are called; those that are never called come last.

    Raises:
        DataError: if the task has no calibration data.
    """
    found = {path: Moments(size) for path, size in sizes.items()}
    order: dict[str, None] = {}
    for paths in _passes(sizes):

        def see(path: str, inputs: Any, kept: Tensor | None, paths: Sequence[str] = paths) -> None:
            order.setdefault(path)
            if path in paths:
                found[path].update(rows_of(inputs, kept) if rows is None else rows(path, inputs, kept))

        _watch(ctx, see, list(sizes), _masks(ctx))
    return {path: found[path] for path in (*order, *(path for path in sizes if path not in order))}


def gather_pairs(
    ctx: Context, reference: nn.Module, sizes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, CrossMoments]]:
    """Yield the moments of the inputs of layers as they are, with the outputs that they have in another model.

    Args:
        ctx: of the step.
        reference: the other model, whose layers are as they were.
        sizes: path of a layer, in both models → size of an input and an output.
    """
    for paths in _passes({path: max(pair) for path, pair in sizes.items()}):
        found = {path: CrossMoments(*sizes[path]) for path in paths}

        def see(
            path: str,
            inputs: Any,
            state: tuple[Tensor | None, dict[str, list[Any]]],
            found: Mapping[str, CrossMoments] = found,
        ) -> None:
            kept, outputs = state
            if outputs[path]:
                found[path].update(rows_of(inputs, kept), rows_of(outputs[path].pop(0), kept))

        _watch(ctx, see, paths, zip(_masks(ctx), _outputs(ctx, reference, paths), strict=True))
        yield from found.items()


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
    probe = copy.deepcopy(module).requires_grad_(True).eval()
    if task.step is not None:  # a loss inside the model may exist in training mode only
        probe.train()
        for part in probe.modules():
            if isinstance(part, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)):
                part.eval()
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


def _watch(ctx: Context, see: Callable[[str, Any, Any], None], paths: Sequence[str], states: Iterator[Any]) -> None:
    """Run the calibration data through the model and call `see(path, input, state of the batch)` at `paths`."""
    state = next(states)

    def observe(path: str, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        nonlocal state
        if path in paths:
            see(path, inputs[0], state)
        if path == "":
            state = next(states, None)

    ctx.calibrate(observe, list(dict.fromkeys([*paths, ""])))


def _masks(ctx: Context) -> Iterator[Tensor | None]:
    """Yield the kept positions of each calibration batch."""
    for inputs, _ in ctx.task.batches("calibrate") if ctx.task is not None else ():
        yield kept_positions(inputs)


def _outputs(ctx: Context, reference: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield for each calibration batch what the layers at `paths` of `reference` return, for each of their calls."""
    seen: dict[str, list[Any]] = {path: [] for path in paths}

    def keep(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen[path].append(output)

    handles = [reference.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        for inputs, _ in ctx.task.batches("calibrate") if ctx.task is not None else ():
            for outputs in seen.values():
                outputs.clear()
            with torch.no_grad():
                call(reference, inputs)
            yield seen
    finally:
        for handle in handles:
            handle.remove()
