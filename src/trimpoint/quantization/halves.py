"""Numbers of 16 bits: which weights they hold. Nothing here imports torch."""

import numpy as np

_LOST = 2.0**-8
"""Share of a weight's norm that rounding may take: twice what bfloat16's 8 significant bits cost at most."""


def as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Return float32 numbers, rounded to the nearest float16 or bfloat16 (ties to even), as their 16 bits, uint16.

    Example:
        >>> [f"{bits:04x}" for bits in as_bits(np.array([1.0, -2.0], np.float32), "bfloat16")]
        ['3f80', 'c000']
    """
    if kind == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).view(np.uint16)
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    result: np.ndarray = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)
    return result


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Return float32 numbers, rounded to the nearest float16 or bfloat16."""
    bits = as_bits(values, kind)
    if kind == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def why_not(values: np.ndarray, kind: str) -> str:
    """Return why a weight cannot be held in 16 bits, or `""`.

    Example:
        >>> why_not(np.array([1e5, 1.0], np.float32), "float16")
        'a weight of 1e+05 is beyond the range of float16'
    """
    largest = float(np.abs(values).max(initial=0))
    short = rounded(values, kind)
    if not np.isfinite(short).all():
        return f"a weight of {largest:.4g} is beyond the range of {kind}"
    if np.linalg.norm((short - values).astype(np.float64)) > _LOST * np.linalg.norm(values.astype(np.float64)):
        return f"its weights, {largest:.4g} at most, are too small for {kind}"
    return ""
