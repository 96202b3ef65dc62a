"""Which modules a step applies to: values that are combined with `&`, `|` and `~` and read back from text.

Example:
    >>> str(Glob("stages.*") & ~Type("Linear"))
    'stages.* & !type:Linear'
    >>> parse("stages.* & !type:Linear").matches("stages.0.conv1", ("Conv2d", "Module"))
    True
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase

from trimpoint.errors import InvalidParameterError


class Filter(ABC):
    """A condition on a module: its origin path and the names of its classes."""

    @abstractmethod
    def matches(self, origin: str, types: tuple[str, ...]) -> bool:
        """Return whether the module at `origin`, whose class and base classes are named `types`, is meant."""

    def __and__(self, other: "Filter") -> "Filter":
        return And(self, other)

    def __or__(self, other: "Filter") -> "Filter":
        return Or(self, other)

    def __invert__(self) -> "Filter":
        return Not(self)

    def __repr__(self) -> str:
        return f"parse({str(self)!r})"


@dataclass(frozen=True, repr=False)
class Glob(Filter):
    """Modules whose path fits a shell pattern; a path also stands for everything below it.

    Example:
        >>> Glob("encoder.layer.0").matches("encoder.layer.0.output.dense", ())
        True
    """

    pattern: str

    def matches(self, origin: str, types: tuple[str, ...]) -> bool:  # noqa: ARG002
        """Return whether `origin` or one of its parents fits the pattern."""
        parts = origin.split(".")
        return any(fnmatchcase(".".join(parts[: end + 1]), self.pattern) for end in range(len(parts)))

    def __str__(self) -> str:
        return self.pattern


@dataclass(frozen=True, repr=False)
class Type(Filter):
    """Modules of a class, or of a class derived from it, by the class's name."""

    name: str

    def matches(self, origin: str, types: tuple[str, ...]) -> bool:  # noqa: ARG002
        """Return whether one of `types` is the name."""
        return self.name in types

    def __str__(self) -> str:
        return f"type:{self.name}"


@dataclass(frozen=True, repr=False)
class And(Filter):
    """Modules that both filters match."""

    left: Filter
    right: Filter

    def matches(self, origin: str, types: tuple[str, ...]) -> bool:
        """Return whether both match."""
        return self.left.matches(origin, types) and self.right.matches(origin, types)

    def __str__(self) -> str:
        return " & ".join(f"({side})" if isinstance(side, Or) else str(side) for side in (self.left, self.right))


@dataclass(frozen=True, repr=False)
class Or(Filter):
    """Modules that at least one of the filters matches."""

    left: Filter
    right: Filter

    def matches(self, origin: str, types: tuple[str, ...]) -> bool:
        """Return whether one matches."""
        return self.left.matches(origin, types) or self.right.matches(origin, types)

    def __str__(self) -> str:
        return f"{self.left} | {self.right}"


@dataclass(frozen=True, repr=False)
class Not(Filter):
    """Modules that the filter does not match."""

    inner: Filter

    def matches(self, origin: str, types: tuple[str, ...]) -> bool:
        """Return whether the inner filter does not match."""
        return not self.inner.matches(origin, types)

    def __str__(self) -> str:
        return f"!({self.inner})" if isinstance(self.inner, (And, Or)) else f"!{self.inner}"


EVERYTHING: Filter = Glob("*")

_TOKEN = re.compile(r"\s*([()&|!]|[^\s()&|!]+)")


def parse(text: str) -> Filter:
    """Read a filter from text: globs, `type:Name`, `!`, `&`, `|` and parentheses.

    Raises:
        InvalidParameterError: if the text is no filter.
    """
    tokens = _TOKEN.findall(text)
    if not tokens:
        raise InvalidParameterError("A filter must not be empty.", 'use "*" for every module')
    result, rest = _parse_or(tokens, text)
    if rest:
        raise _broken(text, rest[0])
    return result


def _broken(text: str, token: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"The filter {text!r} cannot be read at {token!r}.", "write it like `stages.* & !type:Linear`"
    )


def _parse_or(tokens: list[str], text: str) -> tuple[Filter, list[str]]:
    left, tokens = _parse_and(tokens, text)
    while tokens and tokens[0] == "|":
        right, tokens = _parse_and(tokens[1:], text)
        left = Or(left, right)
    return left, tokens


def _parse_and(tokens: list[str], text: str) -> tuple[Filter, list[str]]:
    left, tokens = _parse_one(tokens, text)
    while tokens and tokens[0] == "&":
        right, tokens = _parse_one(tokens[1:], text)
        left = And(left, right)
    return left, tokens


def _parse_one(tokens: list[str], text: str) -> tuple[Filter, list[str]]:
    if not tokens or tokens[0] in "&|)":
        raise _broken(text, tokens[0] if tokens else "the end")
    first, rest = tokens[0], tokens[1:]
    if first == "!":
        inner, rest = _parse_one(rest, text)
        return Not(inner), rest
    if first == "(":
        inner, rest = _parse_or(rest, text)
        if not rest or rest[0] != ")":
            raise _broken(text, rest[0] if rest else "the end")
        return inner, rest[1:]
    return (Type(first.removeprefix("type:")) if first.startswith("type:") else Glob(first)), rest
