"""Weights that share a few values: a parametrisation of the module that has them, as masks and grids are.

Which value a weight has is fixed; the values are trained. Before lowering they are baked in: the file has plain weights
of few different values, which a coder stores in few bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimpoint.errors import SurgeryError
from trimpoint.graph.held import Held, hold_, parameter_behind

MOST_VALUES = 255


class Codebook(Held):
    """Give each weight one of a few values, or zero.

    The gradient of a value is the sum of those of all weights that share it. The parameter behind takes none.

    Args:
        codes: of the weight's shape, uint8: 0 for zero, which stays, and i + 1 for `values[i]`.
        values: one-dimensional, at most 255.

    Attributes:
        codes: a buffer.
        values: a parameter.

    References:
        Han, Mao and Dally, "Deep Compression: compressing deep neural networks with pruning, trained quantization and
        Huffman coding" (2016).
    """

    order = 1
    codes: Tensor

    def __init__(self, codes: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shared values, in the weight's shape and type."""
        table = torch.cat([self.values.new_zeros(1), self.values])
        return table.index_select(0, self.codes.flatten().int()).view(self.codes.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight, which changes nothing."""
        return weight

    def extra_repr(self) -> str:
        """Show how many values there are."""
        return f"values={self.values.numel()}"


def share_(module: nn.Module, parameter: str, codes: Tensor, values: Tensor) -> dict[str, int]:
    """Let a parameter's weights share values, in place; it keeps its identity, a grid or codebook gives way.

    Args:
        module: that has the parameter.
        parameter: its name.
        codes: see `Codebook`.
        values: see `Codebook`.

    Returns:
        The JSON form, see `check_codebook`; codes and values are part of the module's state.

    Raises:
        SurgeryError: if the module has no such parameter, or codes or values do not fit it.
    """
    weight = parameter_behind(module, parameter)
    if not weight.is_floating_point():
        raise SurgeryError(f"A codebook needs floating-point weights. Got {weight.dtype}.")
    if codes.shape != weight.shape or codes.dtype != torch.uint8 or int(codes.max()) > len(values):
        raise SurgeryError(
            f"Codes must be uint8 of the shape {list(weight.shape)}, at most {len(values)}. "
            f"Got {codes.dtype} {list(codes.shape)}."
        )
    if values.ndim != 1 or not 1 <= len(values) <= MOST_VALUES:
        raise SurgeryError(f"A codebook has 1 to {MOST_VALUES} values. Got {list(values.shape)}.")
    book = Codebook(codes.to(weight.device).clone(), values.detach().to(weight).clone())
    book.values.requires_grad_(weight.requires_grad)
    hold_(module, parameter, book)
    return {"values": len(values)}


def share_stored_(module: nn.Module, parameter: str, data: Mapping[str, int]) -> None:
    """Hold a parameter to the codebook of sound JSON data, in place, all codes and values 0: the state has them."""
    weight = parameter_behind(module, parameter)
    share_(module, parameter, torch.zeros(weight.shape, dtype=torch.uint8), torch.zeros(data["values"]))


def wrong_codebooks(module: nn.Module) -> list[str]:
    """Return the paths of all codebooks with a code that stands for nothing, or a value that is not finite."""
    books = [(path, part) for path, part in module.named_modules() if isinstance(part, Codebook)]
    return [
        path
        for path, book in books
        if int(book.codes.max()) > book.values.numel() or not bool(torch.isfinite(book.values).all())
    ]


def check_codebook(data: Any) -> str:
    """Return what is wrong with the JSON form of a codebook, or `""`."""
    sound = isinstance(data, Mapping) and set(data) == {"values"} and type(data["values"]) is int
    return "" if sound and 1 <= data["values"] <= MOST_VALUES else f"a codebook has 1 to 255 values. Got {data!r}"
