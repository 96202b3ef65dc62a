"""Running a model before and after an edit, and telling what the edit broke."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimpoint.graph.bypass import tensors_in
from trimpoint.losses import call
from trimpoint.signature import flatten, leaf_names, structure_of, unflatten

# What a model's forward pass raises when sizes no longer fit.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Differences of outputs, relative to their size, that are too large in any case, and that may be rounding.
_TOLERANCES = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-3, 1e-5)}
_OF_EFFECT = 1e-3
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
UNCHECKED = "cannot be checked: the model has no finite output for the example inputs"


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch to run a model on, and what it returns for it before it is edited.

    Attributes:
        inputs: the batch.
        outputs: of the model as it was.
        widened: whether code names types that must be read as float64.
    """

    inputs: Any
    outputs: list[Tensor]
    widened: bool = False

    @property
    def tells(self) -> bool:
        """Whether any output is finite."""
        return any(bool(tensor.isfinite().any()) for tensor in self.outputs)


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


class _Wide(TorchFunctionMode):
    """Read every floating-point type that code names as float64, so that it rounds nothing in between.

    Attributes:
        used: whether there was any.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS or any(map(_is_narrow, (*args, *kwargs.values()))):
            self.used = True
            func = Tensor.double if func in _CASTS else func
            args = [torch.float64 if _is_narrow(value) else value for value in args]
            kwargs = {key: torch.float64 if _is_narrow(value) else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return type(value) is torch.dtype and value.is_floating_point


@contextmanager
def _in_double(module: nn.Module) -> Iterator[None]:
    """Compute in float64 for the time being."""
    saved = [(t, t.data) for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in saved:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


@contextmanager
def probing(module: nn.Module, inputs: Any) -> Iterator[Probe]:
    """Compute in float64 for the time being, if the model can; yield what to run it on to see what an edit changes.

    That is the batch with all but its first sample drawn anew, see `drawn_around`; the batch itself where the model
    does not run on that, or has fewer finite outputs.
    """
    drawn = drawn_around(inputs)
    with _in_double(module):
        found = _best(module, [_double(drawn), _double(inputs), drawn, inputs], widened=True)
        if found is not None:
            yield found
    if found is None:
        yield _best(module, [drawn, inputs]) or Probe(inputs, run(module, inputs))


def _double(inputs: Any) -> Any:
    leaves = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in flatten(inputs)]
    return unflatten(structure_of(inputs), leaves)


def _best(module: nn.Module, candidates: Sequence[Any], *, widened: bool = False) -> Probe | None:
    """Return the first of some batches for which all outputs are finite, or else the one for which most are."""
    best, most = None, -1
    for inputs in candidates:
        wide = _Wide()
        try:
            with wide if widened else nullcontext():
                outputs = run(module, inputs)
        except _FAILURES:
            continue
        finite = sum(int(tensor.isfinite().sum()) for tensor in outputs)
        if finite == sum(tensor.numel() for tensor in outputs):
            return Probe(inputs, outputs, wide.used)
        if finite > most:
            best, most = Probe(inputs, outputs, wide.used), finite
    return best


def drawn_around(inputs: Any) -> Any:
    """Return a batch whose first sample is as it was and whose others are random, by a fixed seed.

    What is the same everywhere, or not finite, hides what an edit breaks. Numbers get noise of their own size (those
    that are never negative stay so), whole numbers change places within their sample. Masks are left alone, and so are
    whole numbers up to 1 unless there is nothing else.
    """
    leaves, names = flatten(inputs), leaf_names(inputs, "input")
    drawn = leaves
    for lowest in (1, -1):
        generator = torch.Generator().manual_seed(0)
        drawn = [
            _drawn(leaf, generator, lowest) if isinstance(leaf, Tensor) and "mask" not in name else leaf
            for leaf, name in zip(leaves, names, strict=True)
        ]
        if any(new is not old for new, old in zip(drawn, leaves, strict=True)):
            break
    return unflatten(structure_of(inputs), drawn)


def _drawn(leaf: Tensor, generator: torch.Generator, lowest: int) -> Tensor:
    if leaf.dim() == 0 or leaf.numel() == 0 or leaf.dtype == torch.bool or leaf.is_complex():
        return leaf
    copied = leaf.detach().clone()
    others = copied[1:] if len(copied) > 1 else copied
    if leaf.is_floating_point():
        others.copy_(_noisy(others, leaf[leaf.isfinite()].double(), generator))
    elif leaf.dim() == 1 or int(leaf.max()) <= lowest:
        return leaf
    elif bool((leaf == leaf.flatten()[0]).all()):
        others.copy_(torch.randint(0, max(2, int(leaf.max()) + 1), others.shape, generator=generator))
    else:
        for sample in others:
            order = torch.randperm(sample.numel(), generator=generator).to(sample.device)
            sample.copy_(sample.flatten()[order].view_as(sample))
    return copied


def _noisy(values: Tensor, finite: Tensor, generator: torch.Generator) -> Tensor:
    size = float(finite.square().mean().sqrt()) if len(finite) else 0.0
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.device) * (size or 1.0)
    new = values.double().nan_to_num(0.0, float("inf"), -float("inf")) + noise
    return new.abs() if size and float(finite.min()) >= 0 else new


def run(module: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors that a model returns, from a fixed random state; what it does to its buffers is undone."""
    torch.manual_seed(0)
    kept = [
        (part, name, t, t.clone()) for part in module.modules() for name, t in part._buffers.items() if t is not None
    ]
    try:
        return list(tensors_in(call(module, inputs)))
    finally:
        for part, name, buffer, values in kept:
            part._buffers[name] = buffer
            buffer.data = values


def check_shapes(module: nn.Module, inputs: Any, before: Sequence[Tensor]) -> str:
    """Return what is wrong with the model's outputs after an edit, or `""`."""
    return _run_alike(lambda: run(module, inputs), before)[1]


def run_probe(module: nn.Module, probe: Probe) -> list[Tensor]:
    """Return the tensors that a model returns for a probe."""
    with _Wide() if probe.widened else nullcontext():
        return run(module, probe.inputs)


def check_values(module: nn.Module, probe: Probe, reference: Sequence[Tensor]) -> str:
    """Return in what the outputs differ from those of the model with zeros for what was removed, or `""`."""
    after, reason = _run_alike(lambda: run_probe(module, probe), reference)
    return f"without these channels {reason}" if reason else compare(after, reference, probe.outputs)


def _run_alike(make: Callable[[], list[Tensor]], before: Sequence[Tensor]) -> tuple[list[Tensor], str]:
    try:
        after = make()
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return [], f"the model does not run ({type(error).__name__}: {lines[0]})"
    if [t.shape for t in after] != [t.shape for t in before]:
        return [], f"the outputs change from {[list(t.shape) for t in before]} to {[list(t.shape) for t in after]}"
    return after, ""


def compare(after: Sequence[Tensor], reference: Sequence[Tensor], before: Sequence[Tensor] = ()) -> str:
    """Return what is wrong with outputs that should be those of the model with zeros for what was removed, or `""`.

    Args:
        after: outputs of the edited model.
        reference: outputs of the model with the zeros.
        before: outputs of the model as it was; a difference must also be small against what the zeros change.
    """
    if not any(bool(tensor.isfinite().any()) for tensor in reference):
        return UNCHECKED
    if [t.shape for t in before] != [t.shape for t in reference]:
        before = ()
    for index, (got, want) in enumerate(zip(after, reference, strict=True)):
        if not _same(got, want, before[index] if before else None):
            return (
                "without these channels the model does not compute what it computes when they are not read (a size or "
                "position is fixed in its code)"
            )
    return ""


def _same(got: Tensor, want: Tensor, before: Tensor | None) -> bool:
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
    limit, rounding = _TOLERANCES.get(want.dtype, (0.1, 0.02))
    wanted, old = want[finite].double(), (want if before is None else before)[finite].double()
    old = torch.where(old.isfinite(), old, wanted)
    difference = float((got[finite].double() - wanted).abs().max())
    scale = max(float(wanted.abs().max()), float(old.abs().max()), 1e-30)
    if difference <= rounding * scale or before is None:
        return difference <= limit * scale
    return difference <= min(limit * scale, _OF_EFFECT * float((old - wanted).abs().max()))
