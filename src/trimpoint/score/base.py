"""The contract of a score: one record per sample, and an aggregate over records."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, ModelError

Records = NDArray[np.float64]
Weights = NDArray[np.float64]
IGNORED = -100
"""Target of a token that does not count."""


@dataclass(frozen=True, kw_only=True)
class Score(ABC):
    """A measure of quality over a data set.

    Attributes:
        name: short and stable (`"accuracy"`).
        better: whether a higher or a lower score is better.
        proportion: whether each record is a single 0 or 1 and the aggregate their mean (then exact paired intervals
            for proportions apply).
        bounded: whether the score has a fixed range; unbounded ones need a relative `max_drop`.
    """

    name: ClassVar[str]
    better: ClassVar[Literal["lower", "higher"]] = "higher"
    proportion: ClassVar[bool] = False
    bounded: ClassVar[bool] = True

    @abstractmethod
    def records(self, outputs: Any, targets: Any) -> Records:
        """Return one row of numbers per sample of a batch.

        Args:
            outputs: what the model returned, in its own structure, as NumPy arrays.
            targets: the collated targets, as NumPy arrays (or whatever the task's `collate` makes of them).

        Returns:
            `[samples, k]`.
        """

    @abstractmethod
    def aggregate(self, records: Records, weights: Weights | None = None) -> float:
        """Return the score of a set of samples.

        Args:
            records: `[samples, k]`.
            weights: `[samples]`, how often each sample counts (for resampling); `None` is once each. The result is
                that of `np.repeat(records, weights, axis=0)`.

        Returns:
            The score; NaN where it is not defined, such as the ROC AUC of a single class.
        """

    def aggregate_many(self, records: Records, weights: Weights) -> NDArray[np.float64]:
        """Return the score of many resamples at once: `aggregate` for each row of `weights`.

        Args:
            records: `[samples, k]`.
            weights: `[resamples, samples]`.

        Returns:
            `[resamples]`.
        """
        return np.array([self.aggregate(records, row) for row in weights], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class SumScore(Score):
    """A score that is a function of the sums of its records: means, ratios of counts."""

    @abstractmethod
    def from_sums(self, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the scores of resamples.

        Args:
            sums: `[resamples, k]`, the weighted sums of the records' columns.
            counts: `[resamples]`, the number of samples.
        """

    def aggregate(self, records: Records, weights: Weights | None = None) -> float:
        """Return the score of the weighted sums of the records."""
        check_records(records)
        weights = np.ones(len(records)) if weights is None else np.asarray(weights, dtype=np.float64)
        return float(self.from_sums((weights @ records)[None], weights.sum(keepdims=True))[0])

    def aggregate_many(self, records: Records, weights: Weights) -> NDArray[np.float64]:
        """Return the scores of `[resamples, samples]` weights by one matrix product."""
        check_records(records)
        weights = np.asarray(weights, dtype=np.float64)
        return self.from_sums(weights @ records, weights.sum(axis=1))


def main_output(outputs: Any) -> NDArray[Any]:
    """Return the tensor that predictions are read from: the output itself, `logits` of a mapping, or the first one."""
    if isinstance(outputs, Mapping):
        return np.asarray(outputs["logits"] if "logits" in outputs else next(iter(outputs.values())))
    if isinstance(outputs, (tuple, list)):
        return main_output(outputs[0])
    return np.asarray(outputs)


def check_records(records: Records) -> None:
    """Check that there is something to aggregate.

    Raises:
        DataError: if there are no records.
    """
    if len(records) == 0:
        raise DataError("A score needs at least one record. Got none.", "check that the data set is not empty")


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the element-wise ratio, 0 where the denominator is 0 (nothing to be found and nothing found)."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def class_logits(name: str, outputs: Any, targets: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the logits `[samples, classes]` and the class indices `[samples]` of a batch, checked.

    A single logit per sample (`[samples]` or `[samples, 1]`) is that of class 1 against 0.

    Raises:
        ModelError: if an output is NaN or does not have one row of logits per sample.
        DataError: if the targets are no class indices.
    """
    logits, labels = main_output(outputs), np.asarray(targets)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iufb" or not np.array_equal(labels, np.floor(labels)):
        raise DataError(
            f"The score {name!r} needs one class index per sample. Got targets {labels.dtype} of shape "
            f"{list(labels.shape)}.",
            "for a tag per token use `EntityF1`, for numbers `MeanSquaredError`",
        )
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ModelError(
            f"The score {name!r} needs outputs of shape [{len(labels)}, classes]. Got {list(logits.shape)}.",
            "the first output, or `logits` of a mapping, is taken; use `Task(predict=...)` for anything else",
        )
    check_not_nan(name, logits)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return logits, labels.astype(np.int64)


def check_not_nan(name: str, outputs: NDArray[Any]) -> None:
    """Check the outputs of a model.

    Raises:
        ModelError: if one is NaN.
    """
    if np.isnan(outputs).any():
        raise ModelError(
            f"The model gave NaN for {int(np.isnan(outputs).sum()):,} of {outputs.size:,} outputs; the score {name!r} "
            "needs numbers.",
            "look for weights or inputs that are not finite, or a number format that overflows",
        )
