"""How a check says that a method does not conform."""


class ConformanceFailure(AssertionError):  # noqa: N818 - a failed test is no error of the program
    """A method does not have a property that its contract or its traits promise."""


def expect(condition: bool, explanation: str) -> None:
    """Raise unless `condition` holds.

    Args:
        condition: what the contract promises.
        explanation: what was expected and what was found instead.

    Raises:
        ConformanceFailure: with the explanation.
    """
    if not condition:
        raise ConformanceFailure(explanation)


def few(items: "list[str] | set[str] | tuple[str, ...]", most: int = 5) -> str:
    """Return the first few names of a list as text, and how many there are more.

    Example:
        >>> few(["a", "b", "c"], 2)
        '`a`, `b` and 1 more'
    """
    names = sorted(items)
    shown = ", ".join(f"`{name}`" if name else "the model itself" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
