"""Which scales PT2E gives to activations and weights: our rules and chosen integers, as observers of torchao.

This module needs `torchao`; what opens an artifact does not import it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimpoint.errors import DataError
from trimpoint.quantization.grid import Grid
from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import range_of
from trimpoint.quiet import quiet
from trimpoint.values import Format

with quiet():
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

_EXACT = 1e-5
"""Share of a weight by which it may lie beside its grid, by rounding in float32."""


def activation_spec(kind: Format) -> Any:
    """Return the specification of an activation. XNNPACK stores int8; uint8 with any zero point is the same shifted."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127 if kind.symmetric else -128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric if kind.symmetric else torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=Activations.with_args(kind=kind, eps=float(np.finfo(np.float32).tiny)),
    )


def weight_spec(kind: Format, grid: Grid | None, path: str, unmapped: list[str]) -> Any:
    """Return the specification of the weight of a module; where its integers cannot be kept, `unmapped` says why."""
    top = 2 ** ((7 if kind.reduce_range and grid is None else 8) - 1) - 1
    per_channel = grid is not None or kind.granularity == "channel"
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-top,
        quant_max=top,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=PerChannelWeights.with_args(path=path, grid=grid, unmapped=unmapped),
    )


class Activations(UniformQuantizationObserverBase):  # type: ignore[misc]
    """Watch an activation and give the range that its format's rule takes."""

    def __init__(self, kind: Format, **settings: Any) -> None:
        super().__init__(**settings)
        self.kind, self.histogram = kind, Histogram()

    def forward(self, x: Tensor) -> Tensor:
        """Count the values and return them.

        Raises:
            DataError: if one is not finite.
        """
        try:
            if self.kind.observer == "minmax":  # its two numbers are enough, and quicker to have
                extremes = torch.stack(torch.aminmax(x)).numpy() if x.numel() else np.zeros(2, np.float32)
                self.histogram.add(extremes)
            else:
                self.histogram.add(x.detach().numpy())
        except DataError as error:
            raise DataError(
                "The calibration data leads to values that are not finite.",
                "check the calibration data for outliers and NaNs",
            ) from error
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, of one element each."""
        low, high = range_of(self.histogram, self.kind) if self.histogram.count else (0.0, 0.0)
        if low == high:
            return torch.ones(1), torch.zeros(1, dtype=torch.int64)
        scale, zero = self._calculate_qparams(torch.tensor(low), torch.tensor(high))
        return scale, zero


class PerChannelWeights(UniformQuantizationObserverBase):  # type: ignore[misc]
    """Give a weight the scales of its largest entries, or those at which it consists of chosen integers.

    The quantiser tells `ch_axis` only to a class that has `PerChannel` in its name; this one is used per tensor too.
    Batch normalisation that was folded in has multiplied each channel by a number: integers stay, scales follow.
    """

    def __init__(self, path: str, grid: Grid | None, unmapped: list[str], ch_axis: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.path, self.grid, self.unmapped, self.ch_axis = path, grid, unmapped, ch_axis
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the weight and return it."""
        self.weight = x.detach()
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return one scale and zero point for each channel, or for all."""
        channels = self.weight.shape[self.ch_axis]
        rows = np.moveaxis(self.weight.double().numpy(), self.ch_axis, 0).reshape(channels, -1)
        scale = self._of_grid(rows) if self.grid is not None else None
        if scale is None:
            largest = abs(rows).max(1, initial=0.0)
            per_tensor = self.qscheme == torch.per_tensor_symmetric
            scale = (largest.max(initial=0.0, keepdims=True) if per_tensor else largest) / self.quant_max
        scale = np.where(scale == 0.0, 1.0, abs(scale))
        return torch.from_numpy(scale).float(), torch.zeros(len(scale), dtype=torch.int64)

    def _of_grid(self, rows: np.ndarray) -> np.ndarray | None:
        codes = self.grid.codes if self.grid is not None else np.empty(0)
        if codes.shape != tuple(self.weight.shape):
            self.unmapped.append(f"{self.path}: its weight has another shape in the graph, and is rounded anew")
            return None
        wanted = np.moveaxis(codes, self.ch_axis, 0).reshape(len(rows), -1).astype(np.float64)
        squares = (wanted**2).sum(1)
        scale = np.divide((rows * wanted).sum(1), squares, out=np.ones_like(squares), where=squares > 0)
        if abs(rows - scale[:, None] * wanted).max() > _EXACT * abs(rows).max():
            self.unmapped.append(f"{self.path}: its weight is not on its grid in the graph, and is rounded anew")
            return None
        return np.asarray(scale)
