"""Budgets of time as people write them."""

import math
import re

from trimpoint.errors import InvalidParameterError

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)([hms])")


def parse_duration(text: str | float) -> float:
    """Return a duration in seconds.

    Args:
        text: a number of seconds, or hours, minutes and seconds in that order (`"1h30m"`, `"10m"`, `"90s"`, `"90"`).

    Raises:
        InvalidParameterError: if it is no duration above zero.

    Example:
        >>> parse_duration("1h30m"), parse_duration("90s"), parse_duration(90)
        (5400.0, 90.0, 90.0)
    """
    seconds = _seconds(str(text).strip().lower().replace(" ", ""))
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        raise InvalidParameterError(
            f"A duration must be a time above zero. Got {text!r}.", "write it like `10m`, `90s` or `1h30m`"
        )
    return seconds


def _seconds(text: str) -> float | None:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = _PART.findall(text)
    units = [unit for _, unit in parts]
    if (
        not parts
        or "".join(number + unit for number, unit in parts) != text
        or units != sorted(set(units), key="hms".index)
    ):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
