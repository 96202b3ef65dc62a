"""Scores of units by the name of a criterion, or by a reference to one of the user's own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from trimpoint.errors import ModelError, TrimpointError
from trimpoint.importance.criteria import BETWEEN_GROUPS, BUILT_IN
from trimpoint.importance.evidence import Evidence
from trimpoint.parts import Group
from trimpoint.reference import load_reference

if TYPE_CHECKING:
    from trimpoint.method import Context

_Numbers = TypeVar("_Numbers", float, Tensor)

NAMES: tuple[str, ...] = tuple(BUILT_IN)
"""The built-in criteria."""


def scores(ctx: "Context", groups: Sequence[Group], importance: str) -> dict[str, Tensor]:
    """Return the importance of the units of each group, group name → `[units]` in float64; higher is more important.

    Groups by whose weights the loss has no gradient are left out by the criteria that need one.

    Args:
        ctx: of the method that asks.
        groups: of any kind.
        importance: the name of a built-in criterion, or `package.module:attribute` for a function of one's own,
            `(group, evidence) -> [units]`; see `Evidence` for what it can ask for.

    Raises:
        UnknownNameError: if there is no such criterion.
        DataError: if it needs data that the task does not have.
        ModelError: if it gives something else than one finite number for each unit.
    """
    evidence = Evidence(ctx, groups, importance)
    if importance in BUILT_IN:
        told = [(group, BUILT_IN[importance](group, evidence)) for group in groups]
        return {group.name: checked(values, group, importance) for group, values in told if values is not None}
    criterion = load_reference(importance, object, "importance")
    return {group.name: checked(_call(criterion, group, evidence, importance), group, importance) for group in groups}


def between_groups(found: Mapping[str, Tensor], importance: str) -> dict[str, Tensor]:
    """Return scores that can be compared between groups: divided by their mean, unless the criterion sees to it."""
    if importance in BETWEEN_GROUPS:
        return dict(found)
    return {name: values / values.abs().mean().clamp_min(1e-30) for name, values in found.items()}


def _call(criterion: Any, group: Group, evidence: Evidence, name: str) -> Any:
    try:
        return criterion(group, evidence)
    except TrimpointError:
        raise
    except Exception as error:
        raise ModelError(
            f"The importance {name!r} failed on the group `{group.name}` with {type(error).__name__}: {error}.",
            "it must be a function `(group, evidence) -> one number for each unit`",
        ) from error


def checked(values: Any, group: Group, name: str) -> Tensor:
    """Return the importance of the units of a group in float64, `[units]`, after a check.

    Raises:
        ModelError: if it is something else than one finite number for each unit.
    """
    head = f"The importance {name!r} of the group `{group.name}` must be {group.size} finite numbers, one for each unit"
    try:
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{head}. Got {type(values).__name__}.", "return a tensor of shape [units]") from error
    if tuple(found.shape) != (group.size,):
        raise ModelError(f"{head}. Got shape {list(found.shape)}.", "return a tensor of shape [units]")
    return finite(found.to("cpu", torch.float64), f"The importance {name!r} of the group `{group.name}`")


def finite(values: _Numbers, what: str) -> _Numbers:
    """Return one or more numbers that something is ranked by, after a check.

    Raises:
        ModelError: if some are not finite; `what` they are begins the message.
    """
    numbers = torch.as_tensor(values)
    if bad := int((~torch.isfinite(numbers)).sum()):
        got = f"{bad} that are not finite" if numbers.ndim else f"{values}"
        raise ModelError(f"{what} must be finite. Got {got}.", "check the calibration data and the loss for NaN")
    return values
