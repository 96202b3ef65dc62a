"""Which positions of a batch are padding, and what layers see elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimpoint.method import Context

_KEEP, _DROP = ("attention_mask",), ("key_padding_mask", "src_key_padding_mask")


def kept_positions(inputs: Any) -> Any:
    """Return which positions of a batch are no padding, `[batch, length]`; `None` where nothing tells.

    A mapping tells by `attention_mask` (1 where there is a token) or by `key_padding_mask` or `src_key_padding_mask`
    (1 where there is none), if that has two dimensions and no other values.

    Args:
        inputs: of the model; tensors or arrays.

    Returns:
        Booleans of the mask's kind, tensor or array.
    """
    name = padding_mask(inputs)
    return None if name is None else (inputs[name] != 0) if name in _KEEP else (inputs[name] == 0)


def padding_mask(inputs: Any) -> str | None:
    """Return the name of the input that tells which positions are padding, see `kept_positions`."""
    for name in (*_KEEP, *_DROP) if isinstance(inputs, Mapping) else ():
        mask = inputs.get(name)
        if getattr(mask, "ndim", 0) == 2 and bool(((mask == 0) | (mask == 1)).all()):
            return name
    return None


def rows_of(value: Any, kept: Tensor | None) -> Tensor:
    """Return the row vectors along the last dimension of a layer's input or output, `[positions, features]`.

    Args:
        value: a tensor, or a packed sequence.
        kept: positions that count, see `kept_positions`; used where the tensor has just these leading dimensions, in
            this order or, of two that differ, the other way round.
    """
    tensor: Tensor = getattr(value, "data", value)
    for those in () if kept is None else (kept, kept.T):
        if tensor.shape[:-1] == those.shape:
            return tensor[those]
    return tensor.reshape(-1, tensor.shape[-1])


def calibrate_kept(
    ctx: Context, see: Callable[[str, nn.Module, Any, Tensor | None], None], paths: Sequence[str]
) -> None:
    """Run the calibration data through the model and tell what layers read, and where that is no padding.

    Args:
        ctx: of the step.
        see: called with the path, the module, its first input and the kept positions of the batch.
        paths: of the layers.

    Raises:
        DataError: if the task has no calibration data.
    """
    batches = iter(ctx.task.batches("calibrate")) if ctx.task is not None else iter(())
    masks = (kept_positions(inputs) for inputs, _ in batches)
    kept = next(masks, None)

    def observe(path: str, module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        nonlocal kept
        if path in paths:
            see(path, module, inputs[0], kept)
        if path == "":  # the whole model: the batch is over
            kept = next(masks, None)

    ctx.calibrate(observe, list(dict.fromkeys([*paths, ""])))
