"""The integers that a weight consists of. Nothing here imports torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The integers that a weight consists of, where a method chose them: weight = scale · codes.

    Args:
        codes: of the weight's shape, symmetric around zero, int8.
        scale: one number for each position of the weight's dimension `axis`, or a single one; positive.
        axis: the dimension of the output channels.
        bits: of a code.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int
    bits: int
