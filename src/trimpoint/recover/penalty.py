"""Penalties on weights: added to the loss so that training itself tells which units are not needed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.importance.evidence import RUNNING, by_unit, tensor_of
from trimpoint.parts import Group, Member

_SMOOTH = 1e-12


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What is added to the loss for the weights themselves.

    Args:
        of: `(model, step) -> scalar tensor`, steps counted from 0. It must not depend on the length of the run, so that
            a longer run repeats a shorter one.
        key: what it is, in words: states that were kept under another penalty are not used.
        around: `(model) -> context manager` in which the model is trained, for what is part of it meanwhile.
    """

    of: Callable[[nn.Module, int], Tensor]
    key: str
    around: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext


def group_lasso(groups: Sequence[Group], strength: float, rise: int) -> Penalty:
    """Return the group lasso over units: the L2 norm of all weights of a unit, times the root of their number.

    All members of a unit count together, what makes it and what reads it, so that a unit fades as a whole (Wen et al.,
    "Learning structured sparsity in deep neural networks", 2016; the root is that of Yuan and Lin, "Model selection and
    estimation in regression with grouped variables", 2006). Biases, running statistics and what is not trained do not
    count.

    Args:
        groups: whose units are to fade.
        strength: factor, once it has risen.
        rise: steps of linear increase from zero.
    """
    counted = [
        [
            (m, torch.tensor(m.indices))
            for m in group.members
            if "bias" not in m.parameter and m.parameter not in RUNNING
        ]
        for group in groups
    ]

    def penalty(model: nn.Module, step: int) -> Tensor:
        total = torch.zeros(())
        for group, members in zip(groups, counted, strict=True):
            squared, count = torch.zeros(group.size), 0
            for member, positions in members:
                values = tensor_of(model, member)
                if values.requires_grad:
                    squared = squared.to(values.device) + by_unit(values.float().square(), member, positions)
                    count += values.numel() // values.shape[member.dim] * len(member.indices[0])
            if count:
                total = total.to(squared.device) + count**0.5 * (squared + _SMOOTH).sqrt().sum()
        return total * risen(strength, step, rise)

    return Penalty(of=penalty, key=f"group lasso {strength!r} {rise} {[group.name for group in groups]}")


def scale_lasso(groups: Sequence[Group], strength: float, rise: int) -> Penalty:
    """Return the L1 norm of the scales of the batch norms that units run through, each once.

    Liu et al., "Learning efficient convolutional networks through network slimming" (2017).

    Args:
        groups: whose units are to fade; those without a batch norm do not count.
        strength: factor, once it has risen.
        rise: steps of linear increase from zero.
    """

    def penalty(model: nn.Module, step: int) -> Tensor:
        total = torch.zeros(())
        for group in groups:
            for member in scales(model, group):
                values = tensor_of(model, member)
                if values.requires_grad:
                    total = total.to(values.device) + values.float().abs().sum()
        return total * risen(strength, step, rise)

    return Penalty(of=penalty, key=f"scale lasso {strength!r} {rise} {[group.name for group in groups]}")


def scales(model: nn.Module, group: Group) -> tuple[Member, ...]:
    """Return the scales of the batch norms that the units of a group run through."""
    return tuple(
        member
        for member in group.members
        if member.parameter == "weight" and isinstance(model.get_submodule(member.path), nn.modules.batchnorm._NormBase)
    )


def risen(strength: float, step: int, rise: int) -> float:
    """Return the strength at a step, counted from 0: a linear increase from zero over `rise` steps."""
    return strength * min(1.0, (step + 1) / (rise + 1))
