"""Weights held at zero: a parametrisation of the module that has them, so that every training loop keeps the zeros.

`torch.nn.utils.parametrize` computes the weight from a parameter `original` and a mask whenever it is read. The mask is
part of the module's state. Before lowering it is baked in: the file has plain weights with zeros among them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimpoint.errors import SurgeryError
from trimpoint.graph.held import Held, hold_, parameter_behind
from trimpoint.parts import MaskSchedule
from trimpoint.sparsity.ranking import cubic, least, least_of_each

UPDATES = 100
"""Times that a scheduled mask is ranked anew, at most: ranking a large layer takes as long as a training step."""
RATE, DECAY = 4.0, 0.999
"""By how many times the layer's root mean square all steps of one direction move a score, and the memory of squares."""

MASKED = "a mask holds weights of `{}` at zero (`trimpoint.bake` makes plain weights of them)"
"""Why what needs plain weights leaves a module alone, by the module's path."""


class Mask(Held):
    """Hold the weights that are not kept at zero.

    Attributes:
        keep: booleans of the weight's shape, a buffer.
    """

    order = 0
    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros."""
        return weight.masked_fill(~self.keep, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    @property
    def removed(self) -> int:
        """The number of weights that are zero in evaluation mode."""
        return int((~self.keep).sum())

    def extra_repr(self) -> str:
        """Show how many weights are zero."""
        return f"{self.removed:,} of {self.keep.numel():,} zero"


class ScheduledMask(Mask):
    """Hold more and more weights at zero, over the steps of a training.

    A step is a forward pass in training mode that a backward pass follows; the mask changes at the beginning of one,
    and no longer when the schedule has ended. In evaluation mode as many weights are zero as at the end of the
    schedule, whether it has ended or not. Weights that are held at zero keep their value behind the mask, and may come
    back until the schedule ends. A weight that takes no gradient has all its zeros from the first step on.

    By movement a weight ranks by |w| over the root mean square of its layer, plus 4 / steps times its score. Sanh et
    al. (2020) learn scores alone, with Adam, from zero on, as fits a network that was pretrained for something else. In
    one that is trained for its task already they are sums of noise, and the first to go would be large weights; so they
    start from the magnitudes, as in Sehwag et al., "HYDRA: pruning adversarially robust neural networks" (2020).

    Args:
        keep: the mask before the first step.
        schedule: see `MaskSchedule`.

    Attributes:
        step: steps so far, a buffer.
        scores: −Σ m/√v over the steps so far, m = w·∂L/∂w and v the moving average of m², a buffer, float32; only where
            the schedule ranks by movement.
        squares: the moving average of m², as `scores`.
    """

    step: Tensor
    scores: Tensor
    squares: Tensor

    def __init__(self, keep: Tensor, schedule: MaskSchedule) -> None:
        super().__init__(keep)
        self.schedule = schedule
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=keep.device))
        if schedule.rank == "movement":
            for name in ("scores", "squares"):
                self.register_buffer(name, torch.zeros(keep.shape, dtype=torch.float32, device=keep.device))
        self._pending = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the zeros of this step; in evaluation mode with those of the end."""
        frozen = torch.is_grad_enabled() and not weight.requires_grad  # No gradient will tell that a step was made.
        if not self.training or frozen:
            return weight.masked_fill(~self.final(weight), 0.0)
        if torch.is_grad_enabled() and not self._pending:
            self._advance(weight)
        masked = super().forward(weight)
        if masked.requires_grad:
            masked.register_hook(lambda gradient: self._learn(weight, gradient))  # type: ignore[no-untyped-call]
        return masked

    def final(self, weight: Tensor) -> Tensor:
        """Return which weights are kept in evaluation mode, booleans of the shape of `weight`."""
        return self.keep if int(self.step) >= self.schedule.steps else self._ranked(weight, self.schedule.removed)

    def train(self, mode: bool = True) -> "ScheduledMask":
        """Change the mode; what was not followed by a backward pass is forgotten."""
        if mode != self.training:
            self._pending = False
        super().train(mode)
        return self

    @property
    def removed(self) -> int:
        """The number of weights that are zero in evaluation mode."""
        return self.schedule.removed

    @torch.no_grad()
    def _advance(self, weight: Tensor) -> None:
        self._pending = True
        steps, step = self.schedule.steps, int(self.step) + 1
        if step > steps:
            return
        self.step.fill_(step)
        if step == steps or step % max(1, steps // UPDATES) == 0:
            self.keep.copy_(self._ranked(weight, removed_at(self.schedule, step, weight.numel())))

    def _learn(self, weight: Tensor, gradient: Tensor) -> None:
        """Sum up the scores: the gradient is that of the masked weight, so what is zero goes on being scored."""
        self._pending = False
        step = int(self.step)
        if self.schedule.rank == "movement" and step < self.schedule.steps:
            # A gradient that overflowed, which mixed precision skips, says nothing.
            moved = (weight.detach().float() * gradient.detach().float()).nan_to_num_(0.0, 0.0, 0.0)
            self.squares.mul_(DECAY).addcmul_(moved, moved, value=1.0 - DECAY)
            mean = (self.squares / (1.0 - DECAY ** max(1, step))).sqrt_()
            self.scores.sub_(moved.div_(mean.clamp_min_(torch.finfo(torch.float32).tiny)))

    @torch.no_grad()
    def _ranked(self, weight: Tensor, removed: int) -> Tensor:
        keys = [weight.detach().float().abs()]
        if self.schedule.rank == "movement":
            size = keys[0] / keys[0].square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            # What is zero without this mask, by one before it, goes first.
            keys.insert(0, (size + RATE / self.schedule.steps * self.scores).masked_fill(weight == 0, -math.inf))
        if not self.schedule.of:
            return ~least(keys, removed)
        runs = [key.movedim(1, -1) for key in keys]
        share = round(removed * self.schedule.of / weight.numel())
        return ~least_of_each(runs, share, self.schedule.of).movedim(-1, 1)


def removed_at(schedule: MaskSchedule, step: int, count: int) -> int:
    """Return how many of `count` weights are zero at a step."""
    if schedule.curve == "one-shot":
        return schedule.removed if step >= schedule.steps else schedule.start
    return math.floor(cubic(step, schedule.steps, schedule.removed / count, schedule.start / count) * count + 0.5)


def masks_of(module: nn.Module) -> dict[str, Mask]:
    """Return the masks of a module's own tensors, by the tensor's name."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast(nn.ModuleDict, module.parametrizations).items()
    return {name: part for name, chain in lists for part in cast(nn.ModuleList, chain) if isinstance(part, Mask)}


def owner_of(path: str) -> str:
    """Return the path of the module whose parametrisation is at `path`; any other path as it is.

    Example:
        >>> owner_of("head.parametrizations.weight.0"), owner_of("head")
        ('head', 'head')
    """
    parts = path.split(".")
    return ".".join(parts[: parts.index("parametrizations")]) if "parametrizations" in parts else path


def kept_by(module: nn.Module) -> Tensor:
    """Return which weights of a module a mask keeps, booleans: all where there is none."""
    weight = cast(Tensor, module.weight).detach()
    return torch.ones_like(weight, dtype=torch.bool) if "weight" not in masks_of(module) else weight != 0


def mask_(
    module: nn.Module,
    parameter: str,
    keep: Tensor | None = None,
    schedule: MaskSchedule | None = None,
    values: Tensor | None = None,
) -> None:
    """Hold weights of a module at zero, in place; the parameter keeps its identity, a mask that it had gives way.

    Args:
        module: that has the parameter.
        parameter: its name.
        keep: booleans of its shape; by default those of the mask that it has, or all.
        schedule: by which the mask changes in training; `None` for one that does not.
        values: that the parameter takes before.

    Raises:
        SurgeryError: if the module has no such parameter, or the mask does not fit it.
    """
    weight, old = parameter_behind(module, parameter), masks_of(module).get(parameter)
    if keep is None:
        keep = torch.ones_like(weight, dtype=torch.bool) if old is None else old.keep
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise SurgeryError(
            f"A mask must be booleans of the shape {list(weight.shape)}. Got {keep.dtype} {list(keep.shape)}."
        )
    if schedule is not None and schedule.of and (weight.ndim < 2 or weight.shape[1] % schedule.of):
        raise SurgeryError(f"{list(weight.shape)} has no runs of {schedule.of} along dimension 1.")
    if values is not None:
        weight.data.copy_(values)
    own = keep.clone(memory_format=torch.contiguous_format)
    put_mask_(module, parameter, Mask(own) if schedule is None else ScheduledMask(own, schedule))


def put_mask_(module: nn.Module, parameter: str, mask: Mask) -> None:
    """Put a mask on a parameter of a module, in place, whatever state it is in; one that it had gives way.

    Args:
        module: that has the parameter.
        parameter: its name.
        mask: of its shape.

    Raises:
        SurgeryError: if the parameter cannot be held, see `why_not_held`.
    """
    weight = parameter_behind(module, parameter)
    if not isinstance(mask, ScheduledMask):
        weight.data.masked_fill_(~mask.keep, 0.0)
    hold_(module, parameter, mask)


@torch.no_grad()
def end_schedules_(module: nn.Module) -> None:
    """Put a fixed mask in the place of each scheduled one, in place: that of the end of its schedule."""
    for part in module.modules():
        for name, mask in masks_of(part).items():
            if isinstance(mask, ScheduledMask):
                hold_(part, name, Mask(mask.eval().final(parameter_behind(part, name))))


def schedule_to_data(schedule: MaskSchedule | None) -> dict[str, Any] | None:
    """Return a schedule as JSON data."""
    return None if schedule is None else asdict(schedule)


def check_schedule(data: Any) -> str:
    """Return what is wrong with the JSON form of a schedule, or `""`."""
    if data is None:
        return ""
    if not isinstance(data, Mapping) or set(data) != set(MaskSchedule.__dataclass_fields__):
        return f"a schedule has {', '.join(MaskSchedule.__dataclass_fields__)}. Got {data!r}"
    if data["rank"] not in ("magnitude", "movement") or data["curve"] not in ("one-shot", "cubic"):
        return f"it ranks by magnitude or movement, one-shot or cubic. Got {data!r}"
    least_values = {"removed": 0, "steps": 1, "start": 0, "of": 0}
    bad = [k for k, low in least_values.items() if type(data[k]) is not int or not low <= data[k] < 1 << 62]
    return f"{bad[0]!r} of a schedule must not be {data[bad[0]]!r}" if bad else ""


def schedule_from_data(data: Mapping[str, Any] | None) -> MaskSchedule | None:
    """Return the schedule of sound JSON data, see `check_schedule`."""
    return None if data is None else MaskSchedule(**data)
