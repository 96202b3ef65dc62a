"""Run a model step by step, its state carried from call to call. Nothing here imports torch."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trimpoint.errors import DataError
from trimpoint.signature import BATCH, Signature, TensorSpec, unflatten


class Stream:
    """A model that goes on where its last call ended.

    Its last input is the state (a tensor, or a tuple or mapping of tensors), and its last output is the state
    afterwards: so do models made by `trimpoint.streaming`, and any other that takes `(x, state)` and returns
    `(y, state)`. It starts at zeros.

    Args:
        run: the opened model.
        signature: of the model.
        batch: sequences that run side by side.

    Attributes:
        state: as it is now, NumPy arrays in the model's structure; it may be kept and set.

    Raises:
        DataError: if the model has no state, or its shape is not known.
    """

    def __init__(self, run: Callable[[Any], Any], signature: Signature, *, batch: int = 1) -> None:
        self._run, self._structure = run, signature.input_structure
        specs = list(signature.inputs)
        self._form = _last(signature.input_structure)
        count = _count(self._form)
        after = signature.outputs[len(signature.outputs) - count :]
        alike = self._form == _last(signature.output_structure) and _same(specs[-count:], after)
        if not (0 < count < len(specs) and alike):
            raise DataError(
                "The last input of a streaming model must be its state, and its last output the state afterwards. "
                f"Got inputs {[spec.name for spec in specs]} and outputs {[spec.name for spec in signature.outputs]}.",
                "make it with `trimpoint.streaming(model, example)` before it is exported",
            )
        self._specs, self.batch = specs[-count:], batch
        self.reset()

    def reset(self) -> None:
        """Go back to the state before the first step: zeros."""
        self.state = unflatten(self._form, [np.zeros(self._shape(spec), spec.dtype) for spec in self._specs])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run one chunk: the model's inputs without the state; return its outputs without the state.

        Raises:
            DataError: if the inputs do not fit the signature.
        """
        if isinstance(self._structure, Mapping) and "dict" in self._structure:
            given: Any = {**named, list(self._structure["dict"])[-1]: self.state}
        else:
            given = (*inputs, self.state)
        *outputs, state = _items(self._run(given))
        self.state = state
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        open_dims = [size for size in spec.shape if isinstance(size, str) and size != BATCH]
        if open_dims:
            raise DataError(
                f"The state {spec.name!r} has an open dimension {open_dims[0]!r}, so its start is not known."
            )
        return tuple(self.batch if size == BATCH else int(size) for size in spec.shape)


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value)


def _last(structure: Any) -> Any:
    """Return the structure of the last of several entries, `None` where there is only one."""
    if not isinstance(structure, Mapping):
        return None
    items = list(structure["tuple"] if "tuple" in structure else structure["dict"].values())
    return items[-1] if len(items) > 1 else None


def _count(structure: Any) -> int:
    """Return how many tensors a structure has."""
    if structure is None or structure == "tensor":
        return int(structure is not None)
    return sum(map(_count, structure["tuple"] if "tuple" in structure else structure["dict"].values()))


def _same(before: Any, after: Any) -> bool:
    return [(spec.dtype, spec.shape) for spec in before] == [(spec.dtype, spec.shape) for spec in after]
