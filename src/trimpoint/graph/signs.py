"""Binary and ternary weights: a parametrisation of the module that has them, as masks and grids are.

The parameter behind stays in float and is trained; which value a weight has is read from it in each step. Before
lowering the values are baked in: the file has plain weights of two or three values, which a coder stores in few bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trimpoint.graph.held import Held


class OnSigns(Held):
    """Give each weight a positive or a negative value by its sign, and zero if it is small.

    With computed values a·{−1, 0, 1}, a is the mean magnitude of the weights that are not small, which is the best for
    them, and the gradient passes as if nothing had been rounded. Learned values have the gradients of trained ternary
    quantization: that of a value is the sum over the weights that have it, and that of a weight is multiplied by the
    magnitude of its value, by 1 where that is zero.

    Args:
        values: 2, in which case no weight is small, or 3.
        threshold: up to which a weight is small, as a share of the mean magnitude, or for learned values of the
            largest; weights that are exactly zero, as those of a mask, do not count in the mean. 0 with two values.
        scales: how many channels have values of their own: all along `axis`, or 1 for one of the whole weight.
        axis: the dimension of the output channels.
        learned: whether training learns the values, begun with the mean of the weights that have them.

    Attributes:
        threshold: a buffer.
        positive, negative: parameters `[scales]`, where they are learned.

    References:
        Rastegari et al., "XNOR-Net: ImageNet classification using binary convolutional neural networks" (2016), section
        3.1, binary weight networks; Li and Liu, "Ternary weight networks" (2016); Zhu, Han, Mao and Dally, "Trained
        ternary quantization" (2017).
    """

    order = 1
    threshold: Tensor

    def __init__(
        self, values: int = 3, threshold: float = 0.7, scales: int = 1, axis: int = 0, *, learned: bool = False
    ) -> None:
        super().__init__()
        self.values, self.scales, self.axis, self.learned = values, scales, axis, learned
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        if learned:
            self.positive = nn.Parameter(torch.ones(scales))
            self.negative = nn.Parameter(-torch.ones(scales))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the values of the weights, in their shape and type."""
        latent = weight.float()
        high, low = self._signs(latent.detach())
        if self.learned:
            positive, negative = self._along(self.positive, latent), self._along(self.negative, latent)
            passed = torch.where(high, positive.abs(), torch.where(low, negative.abs(), 1.0)).detach()
        else:
            positive = self._mean(latent.detach().abs(), high | low)
            negative, passed = -positive, torch.ones_like(positive)
        found = torch.where(high, positive, torch.where(low, negative, 0.0))
        # The difference is zero exactly, so that no third digit of a value is lost; its gradient is not.
        return (found + (latent - latent.detach()) * passed).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    @torch.no_grad()
    def begin_(self, weight: Tensor) -> None:
        """Let learned values begin with the mean of the weights that have them; a sign without weights as the other."""
        if not self.learned:
            return
        latent = weight.detach().float()
        high, low = self._signs(latent)
        up, down = self._mean(latent, high), self._mean(latent, low)
        self.positive.copy_(torch.where(self._any(high), up, -down).flatten())
        self.negative.copy_(torch.where(self._any(low), down, -up).flatten())

    @property
    def levels(self) -> int:
        """The number of values."""
        return self.values

    def _signs(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return which weights have the positive value, and which the negative one."""
        if self.values == 2:
            return latent >= 0, latent < 0
        sizes = latent.abs()
        of = sizes.amax(self._dims(latent), keepdim=True) if self.learned else self._mean(sizes, latent != 0)
        small = sizes <= self.threshold.float() * of
        return ~small & (latent > 0), ~small & (latent < 0)

    def _mean(self, numbers: Tensor, which: Tensor) -> Tensor:
        """Return the mean of some numbers for each scale, in a shape that broadcasts; 0 of none."""
        dims = self._dims(numbers)
        total = torch.where(which, numbers, 0.0).sum(dims, keepdim=True)
        return total / which.sum(dims, keepdim=True).clamp_min(1)

    def _any(self, which: Tensor) -> Tensor:
        return which.sum(self._dims(which), keepdim=True) > 0

    def _dims(self, weight: Tensor) -> list[int]:
        return [dim for dim in range(weight.ndim) if self.scales == 1 or dim != self.axis]

    def _along(self, values: Tensor, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return values.float().view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnSigns":
        """Follow the module to another device, but keep the threshold's type: a shorter one is another threshold."""
        before = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.threshold = before.to(self.threshold.device)
        return self

    def sound(self) -> bool:
        """Return whether all numbers are finite, and the threshold is not negative."""
        own = [self.threshold, *self.parameters()]
        return all(bool(torch.isfinite(each).all()) for each in own) and float(self.threshold) >= 0

    def extra_repr(self) -> str:
        """Show how many values there are."""
        kind = "learned" if self.learned else "computed"
        return f"values={self.values}, {kind}, scales={self.scales:,}, threshold={float(self.threshold):.3g}"
