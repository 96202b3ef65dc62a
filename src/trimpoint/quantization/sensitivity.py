"""What it costs a model's answers when one layer is changed: forward passes on calibration data, no labels."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.graph.held import parameter_behind
from trimpoint.losses import call, main_tensor
from trimpoint.method import Context

Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def divergence(
    ctx: Context, variants: Mapping[Key, Callable[[], Any]], samples: int, what: str = "measuring"
) -> dict[Key, float]:
    """Return how far answers move when the model is changed in single ways, as a share of how far they vary.

    The sum of squared differences of the main output, over that of its distances from its mean; noise of layers that
    are rounded independently adds up in it.

    Args:
        ctx: of the step.
        variants: key → context manager in which the model is changed.
        samples: of the calibration data, at most.
        what: is done, to be reported.

    Raises:
        DataError: if the task has no calibration data, or answers are not finite.
    """
    if ctx.task is None or ctx.task.calibrate is None:
        raise DataError("Measuring what layers cost needs calibration data.", "give the task a `calibrate` role")
    model = ctx.module.eval()
    size = min(32, ctx.task.batch_size)
    batches = [inputs for inputs, _ in ctx.task.batches("calibrate", size=size, limit=samples)]
    before = [_answer(model, inputs) for inputs in batches]
    rows = torch.cat([answer.flatten(0, -2) if answer.ndim > 1 else answer[:, None] for answer in before])
    spread = float((rows - rows.mean(0)).square().sum())
    if not spread < float("inf"):
        raise DataError("The calibration data leads to answers that are not finite.", "check it for outliers and NaNs")
    found = {}
    for done, (key, changed) in enumerate(variants.items()):
        ctx.report(f"{what} {key}", done / len(variants))
        with changed():
            moved = sum(
                float((_answer(model, inputs) - answer).square().sum())
                for inputs, answer in zip(batches, before, strict=True)
            )
        found[key] = moved / spread if spread else moved
    return found


def _answer(model: nn.Module, inputs: Any) -> Tensor:
    return main_tensor(call(model, inputs)).double()


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
