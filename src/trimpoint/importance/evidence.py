"""What criteria of importance are computed from: weights by unit, gradients, activations; each when it is asked for."""

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.importance.activations import Watch
from trimpoint.losses import for_loss_
from trimpoint.parts import Group, Member
from trimpoint.task import Task

if TYPE_CHECKING:
    import numpy as np

    from trimpoint.method import Context

SAMPLES = 256
"""How many calibration samples gradients are taken of one by one, at most."""

RUNNING = ("running_mean", "running_var")
Parts = list[tuple[Member, Tensor]]


class Evidence:
    """What is known of the units of some groups; computed when it is first asked for, for all groups at once.

    Every tensor is float64, whatever the model's type. The model is only read: gradients are taken on a copy.

    Args:
        ctx: of the method that asks.
        groups: all that will be asked for.
        name: of the criterion, for messages.

    Attributes:
        module: the model as it is now, to be read.
        rng: NumPy generator, seeded by the plan.
    """

    def __init__(self, ctx: "Context", groups: Sequence[Group], name: str = "") -> None:
        self.module: nn.Module = ctx.module
        self.rng: np.random.Generator = ctx.rng
        self._ctx, self._groups, self._name = ctx, tuple(groups), name

    def weights(self, group: Group) -> Parts:
        """Return the weights of each unit in each member, `[units, weights]`; biases and running statistics are none.

        Members in which every weight is zero are left out.
        """
        found = []
        for member in group.members:
            if "bias" not in member.parameter and member.parameter not in RUNNING:
                values = self.slices(member)
                if bool(values.any()):
                    found.append((member, values))
        return found

    def slices(self, member: Member) -> Tensor:
        """Return everything of a member that belongs to each unit, `[units, weights]`."""
        return slices(tensor_of(self.module, member).detach().double(), member)

    def batch_products(self, group: Group) -> Parts:
        """Return for each member the sum of gradient times weight over each unit's slice, `[batches, units]`.

        The gradient is that of the loss of one batch of the calibration data. Members without a gradient are left out.

        Raises:
            DataError: if the task has no calibration data or no loss.
        """
        return self._batch_products[group.name]

    def sample_products(self, group: Group) -> Parts:
        """Return the same as `batch_products` for single samples, `[samples, units]`, at most `SAMPLES` of them."""
        return self._sample_products[group.name]

    def squared_gradients(self, group: Group) -> Parts:
        """Return the diagonal of the empirical Fisher information for each unit's slices, `[units, weights]`.

        That is the square of the gradient of a single sample's loss, averaged over at most `SAMPLES` samples of the
        calibration data. Members without a gradient are left out.

        Raises:
            DataError: if the task has no calibration data or no loss.
        """
        return [
            (member, slices(self._squares[member.path, member.parameter], member))
            for member in group.members
            if (member.path, member.parameter) in self._squares
        ]

    def activations(self, group: Group) -> list[tuple[str, Tensor]]:
        """Return the mean absolute activation of each unit, `[units]`, at each module that reads it, with its path.

        Where no module is called with the units, at the modules that make them: of recurrent layers the last hidden
        state, of `nn.MultiheadAttention` the queries, keys and values. Nothing where that cannot be seen either.

        Raises:
            DataError: if the task has no calibration data.
        """
        return self._watch.of(group)

    @cached_property
    def _watch(self) -> Watch:
        self._needed("calibrate")
        watch = Watch(self.module, self._groups)
        self._ctx.calibrate(watch.observe, watch.paths)
        return watch

    @cached_property
    def _batch_products(self) -> dict[str, Parts]:
        return self._products(None, None)

    @cached_property
    def _sample_products(self) -> dict[str, Parts]:
        return self._products(1, SAMPLES)

    def _products(self, size: int | None, limit: int | None) -> dict[str, Parts]:
        members = [(group.name, member) for group in self._groups for member in group.members]
        rows: list[list[Tensor]] = [[] for _ in members]
        for probe in self._backward(size, limit):
            for (_, member), found in zip(members, rows, strict=True):
                tensor = tensor_of(probe, member)
                if tensor.grad is not None:
                    found.append(by_unit(tensor.detach().double() * tensor.grad.double(), member))
        products: dict[str, Parts] = {group.name: [] for group in self._groups}
        for (name, member), found in zip(members, rows, strict=True):
            if found:
                products[name].append((member, torch.stack(found)))
        return products

    @cached_property
    def _squares(self) -> dict[tuple[str, str], Tensor]:
        asked = {(member.path, member.parameter): member for group in self._groups for member in group.members}
        sums: dict[tuple[str, str], Tensor] = {}
        count = 0
        for probe in self._backward(1, SAMPLES):
            count += 1
            for key, member in asked.items():
                gradient = tensor_of(probe, member).grad
                if gradient is not None:
                    square = gradient.double().square()
                    sums[key] = sums[key] + square if key in sums else square
        return {key: total / count for key, total in sums.items()}

    def _backward(self, size: int | None, limit: int | None) -> Iterator[nn.Module]:
        """Yield a copy of the model with the gradients of each batch of the calibration data."""
        task = self._needed("calibrate", "loss")
        probe = _probe(self.module, task)
        for batch in task.batches("calibrate", size=size, limit=limit):
            probe.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(self._ctx.seed)
                loss = task.loss_of(probe, batch)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            for buffer in probe.buffers():
                buffer.detach_()  # A model may keep there what it has computed.
            yield probe

    def _needed(self, *needs: str) -> Task:
        task = self._ctx.task
        if task is None or not all(task.has(need) for need in needs):
            what = "`calibrate` data" + (" and a loss" if "loss" in needs else "")
            lacks = "one of them" if len(needs) > 1 else "it"
            raise DataError(
                f'importance="{self._name}" needs {what}. The task lacks {lacks}.',
                'give what is missing, or take importance="magnitude"',
            )
        return task


def tensor_of(module: nn.Module, member: Member) -> Tensor:
    """Return the parameter or buffer of a member."""
    return getattr(module.get_submodule(member.path), member.parameter)  # type: ignore[no-any-return]


def slices(values: Tensor, member: Member) -> Tensor:
    """Return everything in `values`, of the parameter's shape, that belongs to each unit, `[units, weights]`."""
    positions = torch.tensor(member.indices, device=values.device)
    return values.movedim(member.dim, 0)[positions].flatten(1)


def by_unit(values: Tensor, member: Member, positions: Tensor | None = None) -> Tensor:
    """Return the sum of `values`, of the parameter's shape, over everything that belongs to each unit, `[units]`.

    Args:
        values: of the parameter's shape.
        member: which of them belong to a unit.
        positions: the member's indices as a tensor, where they are needed again and again.
    """
    along = values.movedim(member.dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
    found = torch.tensor(member.indices) if positions is None else positions
    return along[found.to(values.device)].sum(1)


def _probe(module: nn.Module, task: Task) -> nn.Module:
    """Return a copy in which every weight takes a gradient."""
    probe = for_loss_(copy.deepcopy(module), inner=task.step is not None)
    for parameter in probe.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return probe
