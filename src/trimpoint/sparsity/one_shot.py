"""Pruning a layer at once, by what it multiplies its weights with: Wanda and SparseGPT.

References:
    Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language models" (2023); Frantar and
    Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot" (2023).
"""

import torch
from torch import Tensor

from trimpoint.sparsity.ranking import least, least_of_each, share_of

Pattern = tuple[int, int]
"""How many of how many consecutive weights of a row are kept, such as (2, 4)."""


def wanda(weight: Tensor, squares: Tensor, ratio: float, pattern: Pattern | None = None) -> Tensor:
    """Return which weights to remove: the least |w| · ‖x‖₂ of each row.

    Args:
        weight: `[outputs, inputs]`.
        squares: sum of the squares of each input over the calibration data, `[inputs]`.
        ratio: share of each row; without a meaning where there is a pattern.
        pattern: see `Pattern`.

    Returns:
        Booleans `[outputs, inputs]`, true where a weight goes.
    """
    size = weight.detach().double().abs()
    scores = size * squares.double().sqrt()
    inputs = weight.shape[1]
    kept, of = pattern or (inputs - share_of(ratio, inputs), inputs)
    return least_of_each([scores, size], of - kept, of)


def sparsegpt(
    weight: Tensor,
    products: Tensor,
    count: int,
    pattern: Pattern | None = None,
    *,
    held: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Remove weights one column after the other, and let the columns behind it make up for what is lost.

    The optimal brain surgeon's update with one sequence of inverse Hessians for all rows: its rows are the rows of the
    Cholesky factor U of H⁻¹ = UᵀU, H = XᵀX + λI. Which weights of a block of columns go is chosen when the sweep
    arrives there: those of least w² / Uⱼⱼ².

    Args:
        weight: `[outputs, inputs]`.
        products: XᵀX `[inputs, inputs]` over the calibration data.
        count: weights to remove: those of inputs that are always zero first, the others from each block in proportion;
            without a meaning where there is a pattern.
        pattern: see `Pattern`.
        held: booleans `[outputs, inputs]`: weights that are zero already and stay it.
        damping: λ as a share of the mean of H's diagonal.
        block: columns that are chosen and updated together.

    Returns:
        The new weights, float64, zero where they were removed, and where that is.
    """
    rows, columns = weight.shape
    left = weight.detach().double().clone()
    removed = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    factor = inverse_factor(products, damping)
    dead = products.diagonal() == 0
    quota = _quota(dead, count, rows)
    kept, of = pattern or (0, 1)
    block -= block % of
    for start in range(0, columns, block):
        end = min(start + block, columns)
        inner, part = factor[start:end, start:end], left[:, start:end]
        gone, errors = removed[:, start:end], torch.zeros_like(part)
        if pattern is None:
            due = quota[end - 1] - int(removed.sum())
            gone |= _chosen(part.masked_fill(dead[start:end], 0.0), inner, held, start, end, due, 0)
        for column in range(end - start):
            if pattern is not None and column % of == 0:
                run = slice(column, column + of)
                gone[:, run] = _chosen(
                    part[:, run], inner[run, run], held, start + column, start + column + of, of - kept, of
                )
            error = torch.where(gone[:, column], part[:, column], 0.0) / inner[column, column]
            part[:, column:] -= error[:, None] * inner[column, column:]
            errors[:, column] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return left.masked_fill(removed, 0.0), removed


def _quota(dead: Tensor, count: int, rows: int) -> list[int]:
    """Return how many weights are to be gone after each column: all those of dead inputs, if so many are to go."""
    shares = []
    for columns, total in ((dead, min(count, rows * int(dead.sum()))), (~dead, max(0, count - rows * int(dead.sum())))):
        passed, whole = columns.cumsum(0), max(1, int(columns.sum()))
        shares.append((2 * total * passed + whole) // (2 * whole))
    found: list[int] = (shares[0] + shares[1]).tolist()
    return found


def _chosen(part: Tensor, factor: Tensor, held: Tensor | None, start: int, end: int, count: int, size: int) -> Tensor:
    """Return which weights of some columns go: the least of all, or of each run of `size`, and all that are held."""
    scores = part.square() / factor.diagonal().square()
    if held is None:
        return least_of_each([scores], count, size) if size else least([scores], count)
    before = held[:, start:end]
    scores = scores.masked_fill(before, -1.0)
    return before | (least_of_each([scores], count, size) if size else least([scores], count))


def inverse_factor(products: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse; inputs that were always zero stand apart."""
    hessian = products.double().clone()
    mean = float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
