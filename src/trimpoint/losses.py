"""How a model is called with a batch, and the losses of the presets."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.errors import DataError, ModelError, TrimpointError
from trimpoint.signature import flatten

_NO_TARGET = -100
_STILL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call `model` with a batch: a mapping as keywords, a tuple as positions, a tensor as the only argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def explained(inputs: Any, batch: str = "a batch") -> Iterator[None]:
    """Turn what a model raises on inputs into an error that tells their shapes and types.

    Args:
        inputs: what the model is called with inside.
        batch: what they are, for the message.

    Raises:
        ModelError: in the place of whatever is not an error of this package or of the memory.
    """
    try:
        yield
    except (TrimpointError, MemoryError):
        raise
    except Exception as error:
        leaves = [leaf for leaf in flatten(inputs) if hasattr(leaf, "shape")]
        shapes = ", ".join(f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves)
        raise ModelError(
            f"The model does not run on {batch} of {shapes}: {type(error).__name__}: {error}",
            "check shapes, types and range of the task's samples against `forward`",
        ) from error


def for_loss_(model: nn.Module, *, inner: bool) -> nn.Module:
    """Put a model into the mode in which its loss can be taken without changing it, and return it.

    Args:
        model: its mode changes.
        inner: whether the loss is taken inside the model, which may exist in training mode only: then norms and
            whatever drops values are in evaluation mode, the rest in training mode.
    """
    model.train(inner)
    for part in model.modules():
        if isinstance(part, _STILL):
            part.eval()
    return model


def main_tensor(outputs: Any) -> Tensor:
    """Return the tensor that losses read: the output itself, `logits` of a mapping, or the first one.

    Raises:
        ModelError: if that is no tensor.
    """
    if isinstance(outputs, Mapping):
        return cast(Tensor, outputs["logits"] if "logits" in outputs else next(iter(outputs.values())))
    if isinstance(outputs, (tuple, list)) and outputs:
        return main_tensor(outputs[0])
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"The main output of the model must be a tensor. Got {type(outputs).__name__}.",
            "return it first or as `logits`, or give a loss of your own with `Task(loss=...)`",
        )
    return outputs


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of `[batch, …, classes]` against class indices; −100 does not count.

    Raises:
        DataError: if there is not one class index for each row of logits, or not one of its classes.
    """
    logits = main_tensor(outputs)
    if logits.ndim < 2 or logits.numel() != targets.numel() * logits.shape[-1]:
        raise _misfit("[batch, …, classes], one row for each target", logits, targets)
    classes = logits.shape[-1]
    if targets.is_floating_point() or targets.is_complex():
        raise DataError(
            f"The targets of a cross-entropy must be class indices. Got {targets.dtype}.",
            "give whole numbers, or a loss of your own with `Task(loss=...)`",
        )
    try:
        return F.cross_entropy(logits.reshape(-1, classes), targets.reshape(-1).long())
    except IndexError as error:
        bad = next(int(t) for t in targets.reshape(-1) if t != _NO_TARGET and not 0 <= t < classes)
        raise DataError(
            f"The targets must be class indices from 0 to {classes - 1}: the model has {classes} outputs. Got {bad}.",
            "check the labels, or the size of the model's head; −100 marks what does not count",
        ) from error


def squared_error(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean squared error of the main output.

    Raises:
        DataError: if there are not as many outputs as targets.
    """
    predicted = main_tensor(outputs)
    if predicted.numel() != targets.numel():
        raise _misfit("of as many numbers as the targets", predicted, targets)
    return F.mse_loss(predicted.reshape(targets.shape), targets.to(predicted.dtype))


def _misfit(wanted: str, outputs: Tensor, targets: Tensor) -> DataError:
    return DataError(
        f"The loss needs outputs {wanted}. Got {list(outputs.shape)} for targets {list(targets.shape)}.",
        "give a loss of your own with `Task(loss=...)`, or check the model's head and the targets",
    )
