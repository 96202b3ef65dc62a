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


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupGrid:
    """The integers of a matrix with a scale and a zero point for each run of inputs.

    weight[o, i] = scale[o, g] · (codes[o, i] − zero[o, g]) · factor[i], with g = i // group.

    Args:
        codes: `[outputs, inputs]`, uint8, below 2 ** bits.
        scale: `[outputs, groups]`, float32, positive.
        zero: `[outputs, groups]`, uint8, below 2 ** bits.
        group: inputs that share a scale; the last group may have fewer.
        bits: of a code.
        factor: of each input, float32, positive; `None` where all are one.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: int
    bits: int
    factor: np.ndarray | None = None

    def weight(self, *, factored: bool = True) -> np.ndarray:
        """Return the weight `[outputs, inputs]`, float32, with the factors of its inputs or without."""
        inputs = self.codes.shape[1]
        scale, zero = (np.repeat(each, self.group, 1)[:, :inputs] for each in (self.scale, self.zero))
        found: np.ndarray = (self.codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
        return found if self.factor is None or not factored else found * self.factor.astype(np.float32)
