"""Whether a value has the type that a field is declared with: numbers, text, truth values, tuples of them, `None`."""

from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "None"}
_ITEMS = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts"}


@cache
def annotations_of(kind: type) -> dict[str, Any]:
    """Return the types of a class's fields by name; none where they are written as text that cannot be read."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value has the type of an annotation; one of another kind than those above fits always.

    Example:
        >>> fits(1, float), fits(True, float), fits(None, int | None), fits(("a", 1), tuple[str, ...])
        (True, False, True, False)
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and (parts[-1] is not Ellipsis or all(fits(item, parts[0]) for item in value))
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return kind not in _PLAIN or isinstance(value, kind)


def in_words(kind: Any) -> str:
    """Return what values fit an annotation.

    Example:
        >>> in_words(int | None), in_words(tuple[str, ...])
        ('a whole number or None', 'a tuple of texts')
    """
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(in_words, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a tuple of {_ITEMS.get(get_args(kind)[0], 'values')}"
    return _PLAIN.get(kind, str(kind))
