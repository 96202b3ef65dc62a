"""Scores of models that predict numbers: mean squared and mean absolute error."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, ModelError
from trimpoint.score.base import Records, SumScore, check_not_nan, main_output, ratio

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _ErrorScore(SumScore):
    """A mean over samples of a mean over the numbers of a sample."""

    better: ClassVar[Literal["lower", "higher"]] = "lower"
    bounded: ClassVar[bool] = False

    @abstractmethod
    def error(self, difference: Floats) -> Floats:
        """Return the error of each number."""

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[samples, 1]`: the mean error over the numbers of each sample.

        Raises:
            ModelError: if an output is NaN, or there are not as many outputs as targets.
            DataError: if a target is not finite.
        """
        predicted, wanted = main_output(outputs), np.asarray(targets, dtype=np.float64)
        if not np.isfinite(wanted).all():
            raise DataError(f"The score {self.name!r} needs finite targets.", "clean the data first")
        if wanted.ndim == 0 or predicted.size != wanted.size or len(predicted) != len(wanted):
            raise ModelError(
                f"The score {self.name!r} needs as many outputs as targets, {list(wanted.shape)}. Got "
                f"{list(predicted.shape)}.",
                "the first output, or `logits` of a mapping, is taken; use `Task(predict=...)` for anything else",
            )
        check_not_nan(self.name, predicted)
        difference = predicted.astype(np.float64).reshape(len(wanted), -1) - wanted.reshape(len(wanted), -1)
        errors: Records = self.error(difference).mean(axis=1, keepdims=True)
        return errors

    def from_sums(self, sums: Floats, counts: Floats) -> Floats:
        """Return the means."""
        return ratio(sums[:, 0], counts)


@dataclass(frozen=True, kw_only=True)
class MeanSquaredError(_ErrorScore):
    """Mean of the squared difference, in the square of the target's unit.

    Example:
        >>> score = MeanSquaredError()
        >>> score.aggregate(score.records(np.array([[1.0], [5.0]]), np.array([1.0, 3.0])))
        2.0
    """

    name: ClassVar[str] = "mse"

    def error(self, difference: Floats) -> Floats:
        """Return the squares."""
        return np.square(difference)


@dataclass(frozen=True, kw_only=True)
class MeanAbsoluteError(_ErrorScore):
    """Mean of the absolute difference, in the target's unit."""

    name: ClassVar[str] = "mae"

    def error(self, difference: Floats) -> Floats:
        """Return the absolute values."""
        return np.abs(difference)
