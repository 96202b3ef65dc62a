"""Running a model before and after an edit, and telling what the edit broke."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.graph.edits import tensors_in
from trimpoint.losses import call
from trimpoint.signature import flatten, structure_of, unflatten

# What a model's forward pass raises when sizes no longer fit.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the time being, without gradients and with a random state of its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def in_double(module: nn.Module, inputs: Any, wanted: bool) -> Iterator[Any]:
    """Compute in float64 for the time being, if that is wanted and the model can; yield inputs of the right type.

    Heads that are told apart wrongly can change the outputs by very little.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if wanted and t.is_floating_point()]
    saved = [(tensor, tensor.data) for tensor in tensors]
    leaves = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in flatten(inputs)]
    wide = unflatten(structure_of(inputs), leaves) if wanted else inputs
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        runs = not wanted or _runs(module, wide)
        if not runs:
            for tensor, data in saved:
                tensor.data = data
        yield wide if runs else inputs
    finally:
        for tensor, data in saved:
            tensor.data = data


def _runs(module: nn.Module, inputs: Any) -> bool:
    try:
        run(module, inputs)
    except _FAILURES:
        return False
    return True


def run(module: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors that a model returns, from a fixed random state."""
    torch.manual_seed(0)
    return list(tensors_in(call(module, inputs)))


def check_shapes(module: nn.Module, inputs: Any, before: Sequence[Tensor]) -> str:
    """Return what is wrong with the model's outputs after an edit, or `""`."""
    try:
        after = run(module, inputs)
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return f"the model does not run ({type(error).__name__}: {lines[0]})"
    if [t.shape for t in after] != [t.shape for t in before]:
        return f"the outputs change from {[list(t.shape) for t in before]} to {[list(t.shape) for t in after]}"
    return ""


def compare(after: Sequence[Tensor], reference: Sequence[Tensor]) -> str:
    """Return what is wrong with outputs that should be those of the model with zeros for what was removed, or `""`."""
    for got, want in zip(after, reference, strict=True):
        if not _same(got, want):
            return (
                "without these channels the model does not compute what it computes when they are not read (a size or "
                "position is fixed in its code)"
            )
    return ""


def _same(got: Tensor, want: Tensor) -> bool:
    """Return whether two outputs agree: numbers nearly, whatever is not finite, and all other values, exactly."""
    if not want.is_floating_point():
        return torch.equal(got, want)
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[~finite].nan_to_num(), want[~finite].nan_to_num()
    ):
        return False
    if not bool(finite.any()):
        return True
    found, wanted = got[finite].double(), want[finite].double()
    limit = _TOLERANCE.get(want.dtype, 0.1) * max(float(wanted.abs().max()), 1e-30)
    return float((found - wanted).abs().max()) <= limit
