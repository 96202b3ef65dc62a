"""Hyper-parameters, declared once: what they mean, which values they may take, which a search tries."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimpoint.annotations import annotations_of, fits, in_words


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A range of numbers: each end open (`gt`, `lt`), closed (`ge`, `le`) or absent."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether `value` is inside; NaN never is."""
        return (
            value == value
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        low = f"({self.gt:g}" if self.gt is not None else f"[{self.ge:g}" if self.ge is not None else "(-inf"
        high = f"{self.lt:g})" if self.lt is not None else f"{self.le:g}]" if self.le is not None else "inf)"
        return f"{low}, {high}"


_MISSING: Any = object()


def param(
    default: Any,
    *,
    doc: str,
    bounds: Bounds | None = None,
    choices: Sequence[str] | None = None,
    reference: bool = False,
    noop: Any = _MISSING,
    weak: Any = _MISSING,
    search: Sequence[Any] | None = None,
) -> Any:
    """Declare a hyper-parameter of a method, once and for all its uses.

    Args:
        default: its value when it is not given.
        doc: what it means, with its unit.
        bounds: the numbers it may take.
        choices: the words it may take.
        reference: whether it may also name an object of the user's own, `package.module:attribute`.
        noop: the value at which the method changes nothing at all.
        weak: a value at which it changes less than at its default (for the check that the error falls with strength).
        search: the values that a search tries, weakest first.
    """
    metadata: dict[str, Any] = {"doc": doc, "bounds": bounds, "search": search, "reference": reference}
    metadata["choices"] = tuple(choices) if choices else None
    if noop is not _MISSING:
        metadata["noop"] = noop
    if weak is not _MISSING:
        metadata["weak"] = weak
    return dataclasses.field(default=default, metadata=metadata)


def wrong_param(method: object, field: "dataclasses.Field[Any]") -> str | None:
    """Return what is wrong with a hyper-parameter of a method, or nothing."""
    value, bounds, choices = getattr(method, field.name), field.metadata.get("bounds"), field.metadata.get("choices")
    head = f"The {field.name!r} parameter of {type(method).__name__} must be"
    refers = bool(field.metadata.get("reference"))
    if choices and value not in choices and not (refers and isinstance(value, str) and ":" in value):
        own = ", or `package.module:attribute`" if refers else ""
        return f"{head} one of {', '.join(map(repr, choices))}{own}. Got {value!r}."
    owner: Any = type(method)
    kind = annotations_of(owner).get(field.name, Any)
    if not fits(value, kind):
        return f"{head} {in_words(kind)}. Got {value!r}."
    if bounds and value is not None and not bounds.contains(value):
        return f"{head} in the range {bounds}. Got {value!r}."
    return None
