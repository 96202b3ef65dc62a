"""Which integers stand for a weight: by the scale alone, or by what the layer multiplies it with.

Weights are matrices `[outputs, inputs]`, scales `[outputs]`; XᵀX is that of the layer's inputs, see
`trimpoint.sparsity.inputs`. The error of a layer is ‖(Q − W)X‖² = tr (Q − W) XᵀX (Q − W)ᵀ.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimpoint.sparsity.one_shot import inverse_factor

_SHARES = torch.linspace(0.3, 1.0, 71, dtype=torch.float64)
_BLOCK = 64
_LEAST = 1e-30
_PENALTY, _SWEEPS = 30.0, 20


def widest_scale(weight: Tensor, top: int) -> Tensor:
    """Return the scale at which the largest weight of each output has the greatest code; 1 where all are zero.

    It is at least 10⁻³⁰, so that it is no zero in float32.
    """
    largest = weight.detach().double().abs().amax(1)
    return torch.where(largest > 0, (largest / top).clamp_min(_LEAST), 1.0)


def best_scale(weight: Tensor, top: int, products: Tensor | None = None) -> Tensor:
    """Return the scale with the least error of rounding to nearest, of 71 from 0.3 to 1 times the widest.

    Args:
        weight: `[outputs, inputs]`.
        top: the greatest code.
        products: XᵀX `[inputs, inputs]`; without it the error of the weights themselves counts.

    Returns:
        `[outputs]`, float64.
    """
    weight, widest = weight.detach().double(), widest_scale(weight, top)
    errors = []
    for share in _SHARES:
        wrong = nearest(weight, share * widest, top) - weight
        errors.append((wrong if products is None else wrong @ products.double()).mul(wrong).sum(1))
    # Of equal errors, as of weights that are all zero, the widest counts.
    best = len(_SHARES) - 1 - torch.stack(errors).flip(0).argmin(0)
    return _SHARES.to(best.device)[best] * widest


def nearest(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """Return the nearest weights on the grid, float64."""
    steps = scale[:, None]
    return (weight.double() / steps).round().clamp(-top, top) * steps


def gptq(
    weight: Tensor, scale: Tensor, top: int, products: Tensor, keep: Tensor | None = None, damping: float = 0.01
) -> Tensor:
    """Round one input after the other, and let those behind it make up for what each rounding costs.

    Inputs are taken in the order of their squares, the largest first. With the Cholesky factor U of H⁻¹ = UᵀU,
    H = XᵀX + λI, a column j that is rounded by δ moves the columns k behind it by −δ Uⱼₖ / Uⱼⱼ.

    Args:
        weight: `[outputs, inputs]`.
        scale: `[outputs]`.
        top: the greatest code.
        products: XᵀX `[inputs, inputs]`.
        keep: booleans `[outputs, inputs]`: the others are zero and stay it.
        damping: λ as a share of the mean of H's diagonal.

    Returns:
        Weights on the grid, float64.

    References:
        Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
        transformers" (2023); the order is that of the option `act_order` of its authors' code.
    """
    return sweep(weight, lambda values, _: nearest(values[:, None], scale, top)[:, 0], products, keep, damping)


def sweep(
    weight: Tensor,
    onto: Callable[[Tensor, int], Tensor],
    products: Tensor,
    keep: Tensor | None = None,
    damping: float = 0.01,
) -> Tensor:
    """Do what `gptq` does on any grid.

    Args:
        weight: `[outputs, inputs]`.
        onto: returns weights `[outputs]` of an input on the grid, given its position.
        products: as those that follow, see `gptq`.
        keep: booleans `[outputs, inputs]`.
        damping: of the diagonal.
    """
    order = products.diagonal().argsort(descending=True, stable=True)
    left = weight.detach().double()[:, order].clone()
    gone = None if keep is None else ~keep[:, order]
    factor = inverse_factor(products[order][:, order], damping)
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        part, inner = left[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for column in range(end - start):
            now = onto(part[:, column], int(order[start + column]))
            if gone is not None:
                now = now.masked_fill(gone[:, start + column], 0.0)
            errors[:, column] = (part[:, column] - now) / inner[column, column]
            part[:, column:] -= errors[:, column, None] * inner[column, column:]
            rounded[:, start + column] = now
        left[:, end:] -= errors @ factor[start:end, end:]
    return rounded[:, order.argsort()]


def adaround(
    weight: Tensor,
    scale: Tensor,
    top: int,
    products: Tensor,
    keep: Tensor | None = None,
    steps: int = 1000,
    lr: float = 0.01,
) -> Tensor:
    """Learn for each weight whether it is rounded up or down, by the error of the layer.

    How far up a weight goes is a rectified sigmoid of a number that is learned; a penalty that sharpens over the steps
    drives it to 0 or 1. Here the loss is the layer's error as a whole in each step, from XᵀX, relative to that of
    rounding to nearest, where the authors take samples of inputs. Their start, each weight where it is in float, is
    then a minimum, which only the penalty leaves: it has to be strong. In the end single weights go the other way as
    long as that lowers the error.

    Args:
        weight: `[outputs, inputs]`.
        scale: `[outputs]`.
        top: the greatest code.
        products: XᵀX `[inputs, inputs]`.
        keep: booleans `[outputs, inputs]`: the others are zero and stay it.
        steps: of Adam.
        lr: its learning rate.

    Returns:
        Weights on the grid, float64.

    References:
        Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or down? Adaptive rounding for post-training
        quantization" (2020).
    """
    weight, products, size = weight.detach().double(), products.double(), scale[:, None]
    exact = (weight / size).clamp(-top, top)
    down, plain = exact.floor(), nearest(weight, scale, top)
    before = error_of(plain - weight, products)
    if not bool((before > 0).any()):
        return plain
    # What is held at zero can go neither way.
    free = torch.ones_like(exact) if keep is None else keep.to(exact)
    rest = (exact - down).clamp(1e-4, 1 - 1e-4)
    raw = torch.logit((rest + 0.1) / 1.2).requires_grad_(True)
    optimizer = torch.optim.Adam([raw], lr=lr)
    for step in range(steps):
        up = (torch.sigmoid(raw) * 1.2 - 0.1).clamp(0.0, 1.0)
        now = ((down + up * free).clamp(-top, top) * size) - weight
        loss = error_of(now, products).sum() / before.sum()
        progress = (step / steps - 0.2) / 0.8
        if progress > 0:
            sharpness = 2.0 + 9.0 * (1.0 + math.cos(math.pi * progress))
            loss = loss + _PENALTY * (1.0 - (2.0 * up - 1.0).abs().pow(sharpness)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _flipped(weight, (raw.detach() > 0) * free, down, free, size, top, products)


@torch.no_grad()
def _flipped(
    weight: Tensor, up: Tensor, down: Tensor, free: Tensor, size: Tensor, top: int, products: Tensor
) -> Tensor:
    """Return the weights on the grid after single ones went the other way, input by input, while that helps."""
    ways = [(down + way * free).clamp(-top, top) * size for way in (0.0, 1.0)]
    now = torch.where(up > 0, ways[1], ways[0])
    slope = (now - weight) @ products
    for _ in range(_SWEEPS):
        changed = 0
        for column, curve in enumerate(products.diagonal()):
            other = ways[0][:, column] + ways[1][:, column] - now[:, column]
            move = other - now[:, column]
            move = torch.where(2 * move * slope[:, column] + move**2 * curve < 0, move, 0.0)
            rows = move != 0
            if bool(rows.any()):
                slope[rows] += move[rows, None] * products[column]
                now[:, column] += move
                changed += int(rows.sum())
        if not changed:
            break
    return now


def error_of(wrong: Tensor, products: Tensor) -> Tensor:
    """Return the error of each output of a layer whose weight is wrong by `wrong`."""
    return ((wrong @ products) * wrong).sum(1)
