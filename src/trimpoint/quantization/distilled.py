"""Inputs made of what a network remembers of its training data: for calibration where there is none."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimpoint.errors import DataError
from trimpoint.losses import call

_LEAST = 1e-12


def distilled_inputs(
    model: nn.Module, example: Tensor, count: int = 64, *, steps: int = 200, lr: float = 0.1, seed: int = 0
) -> Tensor:
    """Return inputs on which the batch norms of a network see the means and variances that they saw in training.

    They start as noise and are moved by Adam until they do; they look like nothing, and are as good as data for the
    ranges of activations. No data is needed.

    Args:
        model: with batch norms that kept their statistics; it stays as it is.
        example: one input or a batch of them, `[batch, …]`, float: only its shape counts.
        count: of inputs; they are made together, so that `count` of them must fit into memory in training.
        steps: of Adam.
        lr: its learning rate.
        seed: of the noise.

    Returns:
        `[count, …]`, of the type of `example`.

    Raises:
        DataError: if the example is no float tensor, or no batch norm of the network sees anything.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> distilled_inputs(model, torch.zeros(1, 3, 8, 8), 5, steps=2).shape
        torch.Size([5, 3, 8, 8])

    References:
        Cai, Yao, Dong, Gholami, Mahoney and Keutzer, "ZeroQ: a novel zero shot quantization framework" (2020).
    """
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise DataError("Inputs can be distilled for models that take one tensor of floats.", "give real data")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    terms: list[Tensor] = []
    hooks = [norm.register_forward_hook(_watch(terms)) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *example.shape[1:], generator=generator).to(example).requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=lr)
    for _ in range(steps):
        terms.clear()
        with torch.enable_grad():
            call(model, inputs)
            if not terms:
                kept = "keeps the statistics of its training data" if hooks else "it has"
                raise DataError(f"No batch norm of the model sees anything: none {kept}.", "give real data")
            loss = torch.stack(terms).mean()
        if not bool(torch.isfinite(loss)):
            raise DataError("The model answers with values that are not finite on noise.", "give real data")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return inputs.detach()


def _watch(terms: list[Tensor]) -> Callable[..., None]:
    def hook(norm: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        """Note how far what comes in is from the statistics, as a share of their size."""
        if norm.running_mean is None:
            return
        rows = cast(Tensor, inputs[0]).movedim(1, 0).flatten(1)
        mean, deviation = norm.running_mean, norm.running_var.sqrt()
        wrong = (rows.mean(1) - mean).square().sum()
        wrong = wrong + (rows.var(1, unbiased=False).clamp_min(_LEAST).sqrt() - deviation).square().sum()
        terms.append(wrong / norm.running_var.sum().clamp_min(_LEAST))

    return hook
