"""Export LSTM and GRU layers for sequences of any length.

PyTorch finds the shapes of `lstm` and `gru` by running them step by step, which fixes the number of steps in the
exported program. While a module is traced they are therefore replaced by operators that know their shapes, and that
are translated as the originals are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SCHEMA = (
    "(Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first) -> "
)
_library = torch.library.Library("trimpoint", "DEF")  # type: ignore[no-untyped-call]
_library.define("lstm" + _SCHEMA + "(Tensor, Tensor, Tensor)")  # type: ignore[no-untyped-call]
_library.define("gru" + _SCHEMA + "(Tensor, Tensor)")  # type: ignore[no-untyped-call]


def _shapes(
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],  # noqa: ARG001
    has_biases: bool,  # noqa: ARG001
    num_layers: int,  # noqa: ARG001
    dropout: float,  # noqa: ARG001
    train: bool,  # noqa: ARG001
    bidirectional: bool,
    batch_first: bool,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    """Return empty tensors of the output's and the final states' shapes."""
    wide = hx[0].shape[-1] * (2 if bidirectional else 1)
    return input.new_empty(*input.shape[:-1], wide), *(torch.empty_like(state) for state in hx)


torch.library.register_fake("trimpoint::lstm", _shapes, lib=_library)
torch.library.register_fake("trimpoint::gru", _shapes, lib=_library)


class AnyLength(TorchFunctionMode):
    """While it lasts, LSTM and GRU layers in evaluation mode on padded batches leave the number of steps open."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call a function, or what stands for it."""
        name = {torch.lstm: "lstm", torch.gru: "gru"}.get(func) if callable(func) else None
        # The layers call these with positions only; with packed sequences their fourth argument is a list.
        if name is None or kwargs or len(args) != 9 or not isinstance(args[3], bool) or args[0].ndim != 3:
            return func(*args, **(kwargs or {}))
        states = list(args[1]) if name == "lstm" else [args[1]]
        return getattr(torch.ops.trimpoint, name)(args[0], states, *args[2:])


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what the ONNX exporter is to write for these operators: what it writes for PyTorch's own."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_gru, aten_lstm

    def gru(source: Any, states: Any, *rest: Any) -> Any:
        return aten_gru(source, states[0], *rest)

    return {torch.ops.trimpoint.lstm.default: aten_lstm, torch.ops.trimpoint.gru.default: gru}
