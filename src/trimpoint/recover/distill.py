"""Learn from the unmodified model: losses on its outputs, and a memory of those outputs."""

import copy
import hashlib
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.errors import ModelError
from trimpoint.losses import call, explained, main_tensor
from trimpoint.recover.batches import mix
from trimpoint.recover.checkpoint import weights_digest
from trimpoint.recover.hints import hint_loss, recording
from trimpoint.recover.layout import channels_last_, prepare, suits_channels_last
from trimpoint.signature import flatten
from trimpoint.task import Batch, Task

Lesson = tuple[Callable[[nn.Module, Any], Tensor], Callable[[int], int]]
"""A loss to train with, and the seed of each epoch."""

IGNORED = -100
"""The target that marks a token which does not count."""

MEMORY_LIMIT = 1 << 30
"""Bytes of teacher outputs that are kept at most; beyond, the teacher is asked again."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What is learnt from the unmodified model.

    Args:
        temperature: by which logits are divided before the softmax.
        alpha: weight of the teacher in the loss; the task's own loss has `1 - alpha`.
        views: number of differently augmented and shuffled epochs that are cycled through; 0 never repeats one.
        match: compare class probabilities, or squared error of the outputs; `auto` goes by the targets.
        hints: weight of the distance between inner outputs, at `places`; 0 leaves them out.
        places: paths of the modules whose outputs are compared, in the order of execution.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    views: int = 8
    match: Literal["auto", "softmax", "mse"] = "auto"
    hints: float = 0.0
    places: tuple[str, ...] = ()

    @property
    def inner(self) -> bool:
        """Whether inner outputs are compared: then the teacher must run on every batch."""
        return self.hints > 0 and len(self.places) > 0


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Any,
    *,
    temperature: float = 4.0,
    match: Literal["auto", "softmax", "mse"] = "auto",
) -> Tensor:
    """Return how far the student's output is from the teacher's.

    Class logits: `T² · KL(softmax(teacher / T) ‖ softmax(student / T))`, mean over samples, or over the tokens whose
    target is not −100 (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015). Anything else:
    mean squared error (Ba and Caruana, "Do deep nets really need to be deep?", 2014).

    Args:
        student: `[batch, …, classes]`, or `[batch, classes, …]` where the targets are `[batch, …]`.
        teacher: of the same shape, without gradient.
        targets: class indices decide that the outputs are logits, and which tokens count.
        temperature: by which logits are divided.
        match: `auto` goes by the targets; `softmax` and `mse` insist.

    Raises:
        ModelError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"Student and teacher must have main outputs of one shape. Got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    dim = _class_dim(student, targets) if match != "mse" else None
    if dim is None and match == "softmax":
        dim = -1
    if dim is None:
        return F.mse_loss(student.float(), teacher.float())
    student, teacher = (t.movedim(dim, -1).reshape(-1, t.shape[dim]).float() for t in (student, teacher))
    if isinstance(targets, Tensor) and targets.numel() == len(student):
        counts = targets.reshape(-1) != IGNORED
        if not bool(counts.all()):
            student, teacher = student[counts], teacher[counts]
    if len(student) == 0:
        return student.sum()
    log_student, log_teacher = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def _class_dim(output: Tensor, targets: Any) -> int | None:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or output.ndim < 2:
        return None
    if targets.shape == output.shape[:-1]:
        return -1
    return 1 if targets.shape == output.shape[:1] + output.shape[2:] else None


class Teacher:
    """The unmodified model as a teacher that remembers what it said.

    Args:
        model: is copied; the copy never changes.
        memory: hash of the model and of a batch's inputs → main output. Share one between trainings, and each output
            is computed only once. `None` does not remember.
        core: path of the submodule whose output is taught; `None` is the model itself.
    """

    def __init__(
        self, model: nn.Module, memory: MutableMapping[str, Tensor] | None = None, core: str | None = None
    ) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.memory, self.core = memory, core
        self.asked, self.remembered = 0, 0
        self._digest = weights_digest(self.model) if memory is not None else ""
        self._bytes = sum(tensor.nbytes for tensor in memory.values()) if memory is not None else 0
        self._channels_last = suits_channels_last(self.model)
        channels_last_(self.model)

    def main_output(self, inputs: Any) -> Tensor:
        """Return the teacher's main output for a batch of inputs."""
        self.asked += 1
        key = "" if self.memory is None else f"{self._digest}/{self.core}/{_digest_of(inputs)}"
        if self.memory is not None and key in self.memory:
            self.remembered += 1
            return self.memory[key]
        parameter = next(self.model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        with torch.no_grad(), explained(inputs):
            moved = prepare(inputs, device, self._channels_last)
            output, _ = observe(self.model, self.core, lambda model: call(model, moved))
        if self.memory is not None and self._bytes + output.nbytes <= MEMORY_LIMIT:
            self.memory[key] = output
            self._bytes += output.nbytes
        return output


def _digest_of(inputs: Any) -> str:
    """Return a hash of a batch's inputs: about a millisecond a megabyte, little beside a forward pass."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in flatten(inputs):
        array = np.asarray(leaf.detach().cpu().contiguous() if isinstance(leaf, Tensor) else leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class DistillationLoss:
    """The task's loss mixed with the distance from the teacher, for batches `(inputs, targets)`."""

    def __init__(self, task: Task, teacher: Teacher, settings: Distillation) -> None:
        self.task, self.teacher, self.settings = task, teacher, settings
        self.alpha = settings.alpha if task.has("loss") else 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of `model` on a batch."""
        inputs, targets = batch
        places = self.settings.places if self.settings.inner else ()
        with recording(model, places) as mine:
            output, own = self._forward(model, (inputs, targets))
        with recording(self.teacher.model, places) as theirs:
            taught = self.teacher.main_output(inputs)
        far = distillation_loss(
            output, taught, targets, temperature=self.settings.temperature, match=self.settings.match
        )
        loss = far if own is None else self.alpha * far + (1 - self.alpha) * own
        inner = hint_loss(mine, theirs)
        return loss if inner is None else loss + self.settings.hints * inner

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Run the model once; return its main output and the task's loss, `None` where it has no weight."""
        if self.alpha == 1.0:
            return observe(model, self.task.core, lambda student: call(student, batch[0]))[0], None
        return observe(model, self.task.core, lambda student: self.task.loss_of(student, batch))


def observe(model: nn.Module, core: str | None, run: Callable[[nn.Module], Any]) -> tuple[Tensor, Any]:
    """Run something with a model; return the main output of the model, or of its core, and what came of the run.

    Raises:
        ModelError: if the run does not call the module.
    """
    module = model if core is None else model.get_submodule(core)
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        result = run(model)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(
            "`Task.step` did not call the model, so its outputs cannot be compared with the original's.",
            "call `model(...)` itself inside `step`, give `Task(core=...)`, or set `alpha` to 1",
        )
    return main_tensor(seen[0]), result


def lesson(
    task: Task,
    original: nn.Module,
    distillation: Distillation,
    epochs: float,
    memory: MutableMapping[str, Tensor] | None,
    seed: int,
) -> Lesson:
    """Return the loss to learn from the unmodified model with, and the seed of each epoch.

    Epochs are seeded by the plan's seed only, so that all plans see the same views and share what the teacher said
    about them.

    Args:
        task: whose loss is part of it.
        original: the teacher.
        distillation: what to learn from it.
        epochs: that will be trained.
        memory: of what the teacher said, shared with other plans.
        seed: of the plan.
    """
    views = 0 if distillation.inner else distillation.views
    if memory is None and 0 < views < epochs:
        memory = {}
    teacher = Teacher(original, memory if views else None, task.core)
    return DistillationLoss(task, teacher, distillation), lambda epoch: mix(seed, epoch % views if views else epoch)
