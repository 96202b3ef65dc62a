"""Scores of models that answer once per token: entity F1 and perplexity."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, InvalidParameterError, ModelError
from trimpoint.score.base import IGNORED, Records, SumScore, check_not_nan, main_output, ratio

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EntityF1(SumScore):
    """F1 of entities found by a BIO tagger: an entity is right when its type and both of its ends are.

    As in `conlleval` (and seqeval's default mode) an `I-x` that does not continue an entity of type x begins one.
    Tokens whose target is −100 are taken out before entities are read. 0 where there are no entities at all.

    Args:
        labels: the tags in the order of their indices: `"O"`, and `"B-type"`, `"I-type"`.

    Raises:
        InvalidParameterError: if a label is no such tag, or stands twice.

    References:
        Tjong Kim Sang and Buchholz, "Introduction to the CoNLL-2000 shared task: chunking" (conlleval).
    """

    name: ClassVar[str] = "entity_f1"
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        wrong = [label for label in self.labels if label != "O" and label[:2] not in ("B-", "I-")]
        if wrong or not self.labels or len(set(self.labels)) != len(self.labels):
            raise InvalidParameterError(
                "The 'labels' parameter of EntityF1 must be distinct tags 'O', 'B-type' or 'I-type'. Got "
                f"{(wrong or list(self.labels))[0:3]!r}.",
                "give the tags in the order of their indices",
            )

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[sentences, 3]`: true positives, false positives, false negatives.

        Raises:
            ModelError: if the outputs are not `[sentences, tokens, labels]`.
            DataError: if a target is neither an index of `labels` nor −100.
        """
        logits, tags = _token_logits(self.name, outputs, targets, len(self.labels))
        predicted = np.where(tags == IGNORED, IGNORED, logits.argmax(-1))
        order = np.argsort(tags == IGNORED, axis=1, kind="stable")
        found = _Entities.of(np.take_along_axis(predicted, order, axis=1), self.labels)
        there = _Entities.of(np.take_along_axis(tags, order, axis=1), self.labels)
        both = found.starts & there.starts & (found.kinds == there.kinds) & (found.ends == there.ends)
        right = both.sum(axis=1)
        wrong, missed = found.starts.sum(axis=1) - right, there.starts.sum(axis=1) - right
        return np.stack([right, wrong, missed], axis=1).astype(np.float64)

    def from_sums(self, sums: Floats, counts: Floats) -> Floats:  # noqa: ARG002
        """Return 2 TP / (2 TP + FP + FN)."""
        return ratio(2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2])


@dataclass(frozen=True)
class _Entities:
    """Where entities start, `[sentences, tokens]`; their types, and where each token's entity would end."""

    starts: NDArray[np.bool_]
    kinds: Ints
    ends: Ints

    @classmethod
    def of(cls, tags: Ints, labels: tuple[str, ...]) -> "_Entities":
        """Read the entities off tag indices; −100 stands at the end of a row only."""
        names = sorted({label[2:] for label in labels if label != "O"})
        kind_of = np.array([-1 if label == "O" else names.index(label[2:]) for label in labels] + [-1])
        begins = np.array([label.startswith("B-") for label in labels] + [False])
        index = np.where(tags == IGNORED, len(labels), tags)
        kinds = kind_of[index]
        before = np.concatenate([np.full((len(kinds), 1), -1), kinds[:, :-1]], axis=1)
        starts = (kinds >= 0) & (begins[index] | (before != kinds))
        tokens = kinds.shape[1]
        breaks = np.where(starts | (kinds < 0), np.arange(tokens), tokens)
        following = np.concatenate([breaks[:, 1:], np.full((len(kinds), 1), tokens)], axis=1)
        return cls(starts, kinds, np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1])


@dataclass(frozen=True, kw_only=True)
class Perplexity(SumScore):
    """Exponential of the mean negative log-likelihood (natural logarithm) per token; targets of −100 do not count."""

    name: ClassVar[str] = "perplexity"
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    bounded: ClassVar[bool] = False

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[sequences, 2]`: the sum of the negative log-likelihoods, and the number of tokens.

        Raises:
            ModelError: if the outputs are not `[sequences, tokens, vocabulary]`.
            DataError: if a target is neither an index of the vocabulary nor −100.
        """
        logits, wanted = _token_logits(self.name, outputs, targets, None)
        rows = np.empty((len(wanted), 2))
        for i, (row, tokens) in enumerate(zip(logits, wanted, strict=True)):
            counted = tokens != IGNORED
            scores = row[counted].astype(np.float64)
            top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
            log_sum = top[:, 0] + np.log(np.exp(scores - top).sum(axis=-1))
            rows[i] = (log_sum - scores[np.arange(len(scores)), tokens[counted]]).sum(), counted.sum()
        return rows

    def from_sums(self, sums: Floats, counts: Floats) -> Floats:  # noqa: ARG002
        """Return exp(sum of the negative log-likelihoods / number of tokens); NaN without tokens."""
        mean = np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(mean))


def _token_logits(name: str, outputs: Any, targets: Any, labels: int | None) -> tuple[NDArray[Any], Ints]:
    """Return logits `[samples, tokens, labels]` and indices `[samples, tokens]`, checked against each other."""
    logits, wanted = main_output(outputs), np.asarray(targets)
    if wanted.ndim != 2 or wanted.dtype.kind not in "iu":
        raise DataError(
            f"The score {name!r} needs targets of whole numbers, [samples, tokens]. Got {wanted.dtype} of shape "
            f"{list(wanted.shape)}.",
            "pad shorter samples with -100 in the task's `collate`",
        )
    if logits.ndim != 3 or logits.shape[:2] != wanted.shape or (labels is not None and logits.shape[2] != labels):
        expected = [*wanted.shape, "labels" if labels is None else labels]
        raise ModelError(
            f"The score {name!r} needs outputs of shape {expected}. Got {list(logits.shape)}.",
            "the first output, or `logits` of a mapping, is taken; use `Task(predict=...)` for anything else",
        )
    counted = wanted[wanted != IGNORED]
    if counted.size and (counted.min() < 0 or counted.max() >= logits.shape[2]):
        raise DataError(
            f"Targets must be indices below {logits.shape[2]}, or -100 for what does not count. Got "
            f"{counted.min()} to {counted.max()}."
        )
    check_not_nan(name, logits[wanted != IGNORED])
    return logits, wanted.astype(np.int64)
