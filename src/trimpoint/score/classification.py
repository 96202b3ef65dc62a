"""Scores of classifiers: accuracy, precision, recall, F1, ROC AUC."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import InvalidParameterError, suggest
from trimpoint.score.base import Records, Score, SumScore, Weights, check_records, class_logits, ratio

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Accuracy(SumScore):
    """Share of samples whose largest logit is the target's.

    Example:
        >>> score = Accuracy()
        >>> score.aggregate(score.records(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0])))
        0.5
    """

    name: ClassVar[str] = "accuracy"
    proportion: ClassVar[bool] = True

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[samples, 1]`: 1 where the prediction is right."""
        logits, labels = class_logits(self.name, outputs, targets)
        right: Records = (logits.argmax(-1) == labels).astype(np.float64)[:, None]
        return right

    def from_sums(self, sums: Floats, counts: Floats) -> Floats:
        """Return the means."""
        return ratio(sums[:, 0], counts)


@dataclass(frozen=True, kw_only=True)
class _CountScore(Score):
    """A ratio of true positives, false positives and false negatives per class.

    Args:
        average: `"macro"`: the mean over the classes; `"micro"`: of the counts over all classes together.
        classes: class indices to average over, such as `(1,)` for the positive one of two; by default those that occur
            as target or prediction.
    """

    average: Literal["macro", "micro"] = "macro"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.average not in ("macro", "micro"):
            raise InvalidParameterError(
                f"The 'average' parameter of {type(self).__name__} must be 'macro' or 'micro'. Got {self.average!r}.",
                suggest(str(self.average), ["macro", "micro"]),
            )
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
            if not self.classes or len(set(self.classes)) != len(self.classes):
                raise InvalidParameterError(
                    f"The 'classes' parameter of {type(self).__name__} must be distinct class indices, at least one. "
                    f"Got {self.classes!r}."
                )

    @abstractmethod
    def ratio(self, true_positive: Floats, predicted: Floats, actual: Floats) -> Floats:
        """Return the ratio of counts, of any shape; 0 where it is 0/0."""

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[samples, 2]`: the predicted and the true class."""
        logits, labels = class_logits(self.name, outputs, targets)
        return np.stack([logits.argmax(-1), labels], axis=1).astype(np.float64)

    def aggregate(self, records: Records, weights: Weights | None = None) -> float:
        """Return the averaged ratio."""
        weights = np.ones(len(records)) if weights is None else np.asarray(weights, dtype=np.float64)
        return float(self.aggregate_many(records, weights[None])[0])

    def aggregate_many(self, records: Records, weights: Weights) -> Floats:
        """Return the averaged ratio of each row of `[resamples, samples]` weights."""
        check_records(records)
        classes, codes = np.unique(records, return_inverse=True)
        predicted, actual = codes.reshape(records.shape).T
        right = predicted == actual
        true_positive = _sums_by_class(weights[:, right], actual[right], len(classes))
        n_predicted = _sums_by_class(weights, predicted, len(classes))
        n_actual = _sums_by_class(weights, actual, len(classes))
        if self.classes is not None:
            chosen = np.isin(classes, self.classes)
            counted = [counts[:, chosen] for counts in (true_positive, n_predicted, n_actual)]
        else:
            counted = [true_positive, n_predicted, n_actual]
        if self.average == "micro":
            return self.ratio(*(counts.sum(axis=1) for counts in counted))
        sums = self.ratio(*counted).sum(axis=1)
        occurring = ((n_predicted + n_actual) > 0).sum(axis=1, dtype=np.float64)
        return ratio(sums, occurring if self.classes is None else np.full_like(sums, len(self.classes)))


@dataclass(frozen=True, kw_only=True)
class Precision(_CountScore):
    """Share of right ones among what was predicted: TP / (TP + FP), 0 for a class that was never predicted.

    Args:
        average: `"macro"` or `"micro"`.
        classes: class indices to average over; by default those that occur.
    """

    name: ClassVar[str] = "precision"

    def ratio(self, true_positive: Floats, predicted: Floats, actual: Floats) -> Floats:  # noqa: ARG002
        """Return TP / (TP + FP)."""
        return ratio(true_positive, predicted)


@dataclass(frozen=True, kw_only=True)
class Recall(_CountScore):
    """Share of right ones among what there is: TP / (TP + FN), 0 for a class that never occurs.

    Args:
        average: `"macro"` or `"micro"`.
        classes: class indices to average over; by default those that occur.
    """

    name: ClassVar[str] = "recall"

    def ratio(self, true_positive: Floats, predicted: Floats, actual: Floats) -> Floats:  # noqa: ARG002
        """Return TP / (TP + FN)."""
        return ratio(true_positive, actual)


@dataclass(frozen=True, kw_only=True)
class F1(_CountScore):
    """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN), of each class; macro is the mean of those.

    Args:
        average: `"macro"` or `"micro"`.
        classes: class indices to average over; by default those that occur.
    """

    name: ClassVar[str] = "f1"

    def ratio(self, true_positive: Floats, predicted: Floats, actual: Floats) -> Floats:
        """Return 2 TP / (2 TP + FP + FN)."""
        return ratio(2 * true_positive, predicted + actual)


@dataclass(frozen=True, kw_only=True)
class RocAuc(Score):
    """Area under the ROC curve: of two classes, or the mean over the classes, each against the rest.

    It is the Mann-Whitney statistic, ties counted half. Outputs are logits: one per sample, or one per class. In a
    resample, the mean is over the classes that have members and others; NaN where there is none.

    References:
        Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 143 (1982).
    """

    name: ClassVar[str] = "roc_auc"

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[samples, 2]`: log-odds of class 1, class; or `[samples, classes + 1]`: log-probabilities, class."""
        logits, labels = class_logits(self.name, outputs, targets)
        logits = logits.astype(np.float64)
        if logits.shape[1] == 2:
            scores = logits[:, 1:] - logits[:, :1]
        else:
            scores = logits - logits.max(axis=1, keepdims=True)
            scores = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return np.concatenate([scores, labels[:, None].astype(np.float64)], axis=1)

    def aggregate(self, records: Records, weights: Weights | None = None) -> float:
        """Return the area."""
        weights = np.ones(len(records)) if weights is None else np.asarray(weights, dtype=np.float64)
        return float(self.aggregate_many(records, weights[None])[0])

    def aggregate_many(self, records: Records, weights: Weights) -> Floats:
        """Return the area for each row of `[resamples, samples]` weights."""
        check_records(records)
        scores, labels = records[:, :-1], records[:, -1]
        if scores.shape[1] == 1:
            return _areas(scores[:, 0], labels == 1, weights)
        total, defined = np.zeros(len(weights)), np.zeros(len(weights))
        for index in np.unique(labels).astype(int):
            areas = _areas(scores[:, index], labels == index, weights)
            total += np.nan_to_num(areas)
            defined += ~np.isnan(areas)
        return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def _areas(scores: Floats, positive: NDArray[np.bool_], weights: Weights) -> Floats:
    """Return the Mann-Whitney areas `[resamples]`; NaN where a side has no weight."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    areas = np.full(len(weights), np.nan)
    rows = max(1, 4_000_000 // max(1, len(scores)))
    for first in range(0, len(weights), rows):
        sorted_weights = np.asarray(weights[first : first + rows], dtype=np.float64)[:, order]
        wins = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
        losses = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
        below = np.cumsum(losses, axis=1) - losses / 2
        pairs = wins.sum(axis=1) * losses.sum(axis=1)
        won = (wins * below).sum(axis=1)
        np.divide(won, pairs, out=areas[first : first + rows], where=pairs > 0)
    return areas


def _sums_by_class(weights: Weights, codes: NDArray[np.intp], classes: int) -> Floats:
    """Return `[resamples, classes]`: the summed weight of the samples of each class."""
    sums = np.zeros((len(weights), classes))
    if not codes.size:
        return sums
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    rows = max(1, 4_000_000 // codes.size)
    for first in range(0, len(weights), rows):
        chunk = np.asarray(weights[first : first + rows], dtype=np.float64)[:, order]
        sums[first : first + rows, present] = np.add.reduceat(chunk, starts, axis=1)
    return sums
