"""What a model is for: data in roles, a loss, a score. The only place where a user's code enters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from trimpoint.data import check_indexable, check_roles, hash_samples, random_split, shuffled_batches
from trimpoint.errors import DataError, InvalidParameterError, UnknownNameError, suggest
from trimpoint.losses import call, cross_entropy, explained, main_tensor, squared_error
from trimpoint.score import Accuracy, Score
from trimpoint.signature import BATCH, flatten, leaf_names, structure_of, unflatten

__all__ = ["ROLES", "Batch", "Role", "Samples", "Task", "call", "cross_entropy", "main_tensor", "squared_error"]

Role = Literal["train", "calibrate", "select", "certify"]
ROLES: tuple[Role, ...] = ("train", "calibrate", "select", "certify")
Batch = tuple[Any, Any]


class Samples(Protocol):
    """Indexable data: each item is one sample `(inputs, target)`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A model's purpose: its data, its loss, its score.

    Each role is a map-style data set of samples `(inputs, target)`, inputs a tensor, a tuple or a dict. Every role is
    optional: a missing one removes the methods that need it, with a reason.

    Args:
        score: how quality is measured.
        train: what recovery trains on.
        calibrate: what ranges and importances are taken from.
        select: what candidates are compared on.
        certify: what only the final certificate is drawn from.
        loss: `(outputs, targets) -> scalar tensor`.
        step: `(model, (inputs, targets)) -> scalar tensor`, where the loss is computed inside the model.
        core: path of the submodule that is exported and timed, where `model` does more than that; `predict` is then
            needed, and is what surrounds it.
        predict: `(run, inputs) -> outputs`, for what is not `outputs = run(inputs)`. `run` takes and returns the
            core's own structure, as CPU tensors.
        collate: a list of samples to one batch.
        augment: `(inputs, targets, generator) -> (inputs, targets)` on a training batch, random by `generator` only.
        example: one sample's inputs, where no role can provide them.
        dims: named dynamic dimensions, input name → {dimension: name}, where those found in the data do not do.
        batch_size: for evaluation and training.
        version: change it when user code changes in a way that its source does not show.
    """

    score: Score = field(default_factory=Accuracy)
    train: Samples | None = None
    calibrate: Samples | None = None
    select: Samples | None = None
    certify: Samples | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    step: Callable[[nn.Module, Batch], Tensor] | None = None
    core: str | None = None
    predict: Callable[[Callable[[Any], Any], Any], Any] | None = None
    collate: Callable[[list[Any]], Batch] = default_collate
    augment: Callable[[Any, Any, torch.Generator], Batch] | None = None
    example: Any = None
    dims: Mapping[str, Mapping[int, str]] | None = None
    batch_size: int = 128
    version: str = ""

    def __post_init__(self) -> None:
        for role in ROLES:
            if getattr(self, role) is not None:
                check_indexable(getattr(self, role), f"The `{role}` data")
        if not isinstance(self.score, Score):
            raise InvalidParameterError(
                f"The 'score' parameter of Task must be a Score. Got {self.score!r}.",
                "write `Task(score=Accuracy())`, after `from trimpoint.score import Accuracy`",
            )
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InvalidParameterError(
                f"The 'batch_size' parameter of Task must be a whole number ≥ 1. Got {self.batch_size!r}."
            )
        if self.core is not None and self.predict is None:
            raise InvalidParameterError(
                f"A task with a `core` ({self.core!r}) needs `predict`: what is done around it.",
                "`predict=lambda run, inputs: run(inputs)` if the core takes the inputs as they are",
            )

    # Presets

    @classmethod
    def classification(
        cls, train: Samples | None, val: Samples, test: Samples | None = None, *, seed: int = 0, **more: Any
    ) -> "Task":
        """Return a classification task: cross-entropy and accuracy.

        Args:
            train: samples `(inputs, class index)`; a tenth of it, at most 1,000, becomes `calibrate`.
            val: becomes `select`; without `test`, half of it becomes `certify`.
            test: becomes `certify`.
            seed: of the split.
            more: other fields of `Task`.
        """
        return cls(**_roles(train, val, test, seed), **_preset(cross_entropy, Accuracy(), more))

    @classmethod
    def regression(
        cls, train: Samples | None, val: Samples, test: Samples | None = None, *, seed: int = 0, **more: Any
    ) -> "Task":
        """Return a regression task: squared error as loss and score; arguments as for `classification`."""
        from trimpoint.score import MeanSquaredError

        return cls(**_roles(train, val, test, seed), **_preset(squared_error, MeanSquaredError(), more))

    @classmethod
    def tagging(
        cls,
        train: Samples | None,
        val: Samples,
        test: Samples | None = None,
        *,
        labels: Sequence[str],
        seed: int = 0,
        **more: Any,
    ) -> "Task":
        """Return a token-tagging task scored by entity F1; target −100 marks tokens that do not count.

        Args:
            train: samples `(inputs, tag indices)`.
            val: see `classification`.
            test: see `classification`.
            labels: the tags in the order of their indices, such as `["O", "B-city", "I-city"]`.
            seed: of the split.
            more: other fields of `Task`; variable lengths need a padding `collate`.
        """
        from trimpoint.score import EntityF1

        return cls(**_roles(train, val, test, seed), **_preset(cross_entropy, EntityF1(labels=tuple(labels)), more))

    @classmethod
    def language_modelling(
        cls, train: Samples | None, val: Samples, test: Samples | None = None, *, seed: int = 0, **more: Any
    ) -> "Task":
        """Return a next-token task scored by perplexity; targets are already shifted, −100 does not count."""
        from trimpoint.score import Perplexity

        return cls(**_roles(train, val, test, seed), **_preset(cross_entropy, Perplexity(), more))

    @classmethod
    def split(
        cls,
        data: Samples,
        *,
        calibrate: int = 1_000,
        select: int | float = 0.1,
        certify: int | float = 0,
        seed: int = 0,
    ) -> dict[Role, Samples]:
        """Split one data set into roles, reproducibly: `Task(**Task.split(data), ...)`.

        Args:
            data: what to split.
            calibrate: number of samples.
            select: number of samples, or their share where below 1.
            certify: number of samples, or their share; none by default.
            seed: of the permutation.

        Raises:
            DataError: if nothing would be left to train on.
        """
        sizes = {"certify": certify, "select": select, "calibrate": calibrate}
        return cast(dict[Role, Samples], random_split(data, sizes, seed))

    # Access

    def data(self, role: Role) -> Samples:
        """Return the data of a role.

        Raises:
            DataError: if the task has none, or it is empty.
        """
        if role not in ROLES:
            raise UnknownNameError(f"There is no role {role!r}.", suggest(role, ROLES))
        data = getattr(self, role)
        if data is None:
            raise DataError(f"The task has no `{role}` data.", f"give it with `Task({role}=...)`")
        if len(data) == 0:
            raise DataError(
                f"The `{role}` data of the task is empty.", "check the path, or the filter, it was read with"
            )
        return cast(Samples, data)

    def has(self, need: str) -> bool:
        """Return whether the task provides `need`: a role, or `"loss"`."""
        if need == "loss":
            return self.loss is not None or self.step is not None
        return getattr(self, need) is not None

    @property
    def has_example(self) -> bool:
        """Whether there is an example batch: one that was given, or the first samples of some data."""
        return self.example is not None or any(self.has(role) for role in ROLES)

    def batches(self, role: Role, *, size: int | None = None, limit: int | None = None) -> Iterator[Batch]:
        """Yield collated batches of a role in order.

        Args:
            role: which data.
            size: samples in a batch; the task's own by default.
            limit: the number of samples at most.
        """
        data = self.data(role)
        count = len(data) if limit is None else min(limit, len(data))
        size = size or self.batch_size
        for start in range(0, count, size):
            yield self.collate_checked([data[i] for i in range(start, min(start + size, count))], role)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled, augmented training batches of one epoch; the last short one is dropped.

        Where samples differ in length, those of about equal length come together: see `shuffled_batches`.
        """
        data = self.data("train")
        generator = torch.Generator().manual_seed(seed)
        for samples in shuffled_batches(data, min(self.batch_size, len(data)), generator):
            inputs, targets = self.collate_checked(samples, "train")
            yield (inputs, targets) if self.augment is None else self.augment(inputs, targets, generator)

    def collate_checked(self, samples: list[Any], role: str = "given") -> Batch:
        """Collate samples into `(inputs, targets)`; errors of a `collate` of one's own come through as they are.

        Raises:
            DataError: if a sample, or what they collate into, is no pair, or samples do not fit together.
        """
        own = self.collate is not default_collate
        hint = "each item must be a pair (inputs, target); give a padding `collate` where lengths vary"
        for sample in () if own else samples:
            if not isinstance(sample, (tuple, list)) or len(sample) != 2:
                raise DataError(f"A `{role}` sample must be (inputs, target). Got {_describe(sample)}.", hint)
        try:
            batch = self.collate(samples)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            if own:
                raise
            raise DataError(f"The `{role}` samples do not collate into one batch: {error}", hint) from error
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"`collate` must return (inputs, targets). Got {_describe(batch)}.", hint)
        return batch[0], batch[1]

    def example_batch(self, size: int = 1) -> Any:
        """Return the inputs of one batch of real samples (or of `example`, repeated)."""
        for role in ("calibrate", "select", "train", "certify"):
            if getattr(self, role) is not None:
                data = self.data(role)
                return self.collate_checked([data[i % len(data)] for i in range(size)], role)[0]
        if self.example is None:
            raise DataError("The task has neither data nor an `example`.", "give one with `Task(example=inputs)`")
        leaves = [torch.as_tensor(leaf) for leaf in flatten(self.example)]
        return unflatten(structure_of(self.example), [leaf.expand(size, *leaf.shape).contiguous() for leaf in leaves])

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a batch.

        Raises:
            DataError: if the task has no loss.
            ModelError: if the model does not run on the batch.
        """
        if self.step is not None:
            return self.step(model, batch)
        if self.loss is None:
            raise DataError(
                "The task has no loss.", "give `Task(loss=...)`, or `Task(step=...)` for one inside the model"
            )
        with explained(batch[0]):
            outputs = call(model, batch[0])
        return self.loss(outputs, batch[1])

    def core_of(self, model: nn.Module) -> nn.Module:
        """Return the module that is exported and timed.

        Raises:
            UnknownNameError: if `core` names no submodule.
        """
        if self.core is None:
            return model
        try:
            return model.get_submodule(self.core)
        except AttributeError as error:
            names = [name for name, _ in model.named_modules() if name]
            raise UnknownNameError(f"The model has no submodule {self.core!r}.", suggest(self.core, names)) from error

    # What the data tells

    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """Return the named dynamic dimensions of each input: the batch, and every dimension that varies in the data.

        Dimensions that always vary together share a name (`length`, then `length_2`, …).

        Raises:
            UnknownNameError: if `dims` names an input that there is not.
            DataError: if samples differ in the number or rank of their inputs.
        """
        example = self.example_batch()
        names = leaf_names(example, "input")
        if self.dims is not None:
            for name in self.dims:
                if name not in names:
                    raise UnknownNameError(f"`dims` names an input {name!r} that there is not.", suggest(name, names))
            return {name: {0: BATCH} | dict(self.dims.get(name, {})) for name in names}
        shapes = [self._sample_shapes(i) for i in self._spread(64)] or [
            [tuple(leaf.shape) for leaf in flatten(example)]
        ]
        if len(kinds := {tuple(map(len, shape)) for shape in shapes}) > 1:
            raise DataError(
                f"Samples must have inputs of equal number and rank. Got ranks {sorted(kinds)}.",
                "bring them into one form in the data set, or in the task's `collate`",
            )
        found: dict[tuple[int, ...], str] = {}
        dims: dict[str, dict[int, str]] = {}
        for leaf, name in enumerate(names):
            dims[name] = {0: BATCH}
            for dim in range(1, len(shapes[0][leaf])):
                sizes = tuple(shape[leaf][dim] for shape in shapes)
                if len(set(sizes)) > 1:
                    new = "length" if not found else f"length_{len(found) + 1}"
                    dims[name][dim] = found.setdefault(sizes, new)
        return dims

    def lengths(self) -> dict[str, tuple[int, ...]]:
        """Return for each named dimension but the batch its shortest, median and 95th percentile size in the data."""
        dims = self.dynamic_dims()
        if all(len(entry) == 1 for entry in dims.values()):
            return {}
        shapes = [self._sample_shapes(i) for i in self._spread(512)]
        result: dict[str, tuple[int, ...]] = {}
        for leaf, entry in enumerate(dims.values()):
            for dim, name in entry.items():
                if name != BATCH and name not in result and shapes:
                    sizes = np.array([shape[leaf][dim] for shape in shapes])
                    result[name] = tuple(int(s) for s in np.quantile(sizes, [0, 0.5, 0.95], method="nearest"))
        return result

    def _spread(self, count: int) -> list[tuple[Role, int]]:
        role = next((r for r in ("calibrate", "select", "train", "certify") if getattr(self, r) is not None), None)
        if role is None:
            return []
        n = len(self.data(cast(Role, role)))
        return [(cast(Role, role), int(i)) for i in np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))]

    def _sample_shapes(self, at: tuple[Role, int]) -> list[tuple[int, ...]]:
        inputs, _ = self.collate_checked([self.data(at[0])[at[1]]], at[0])
        return [tuple(leaf.shape) for leaf in flatten(inputs)]

    def check(self) -> list[str]:
        """Check the data roles against each other.

        Returns:
            Warnings, such as equal content in two roles.

        Raises:
            DataError: if a role is empty, a value is not finite, or one item of one source has two roles.
        """
        return check_roles({role: self.data(role) for role in ROLES if getattr(self, role) is not None})

    def fingerprint(self, role: Role) -> str:
        """Return the SHA-256 of a role's samples in their order."""
        return hash_samples(self.data(role))

    def with_(self, **fields: Any) -> "Task":
        """Return a task with some fields changed."""
        return replace(self, **fields)


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    size = f" of shape {list(shape)}" if shape is not None else f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{size}"


def _preset(loss: Callable[[Any, Any], Tensor], score: Score, more: dict[str, Any]) -> dict[str, Any]:
    return {"loss": loss, "score": score} | more


def _roles(train: Samples | None, val: Samples, test: Samples | None, seed: int) -> dict[str, Any]:
    for name, data in (("train", train), ("val", val), ("test", test)):
        if data is not None:
            check_indexable(data, f"The `{name}` data")
    roles: dict[str, Any] = {}
    if train is not None:
        roles |= random_split(train, {"calibrate": min(1_000, max(1, len(train) // 10))}, seed)
    if test is not None:
        return roles | {"select": val, "certify": test}
    halves = random_split(val, {"certify": 0.5}, seed, rest="select")
    return roles | halves
