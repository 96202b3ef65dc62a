"""The interface of an exported model: names, types and shapes of its tensors, and the structure they come in.

Nothing here imports torch. A structure is JSON data: `"tensor"`, `None`, `{"tuple": [...]}` or `{"dict": {...}}`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimpoint.errors import DataError

BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output tensor.

    Args:
        name: in the exported graph.
        dtype: NumPy name, such as `"float32"`.
        shape: sizes; a string is a named dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs of a model, flat, with the structures that they are taken from and returned in.

    Args:
        inputs: in order.
        outputs: in order.
        input_structure: that the inputs come in.
        output_structure: that the outputs are returned in.
        limits: dynamic dimension → the largest size that its memory was planned for, in runtimes that plan ahead.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: Any = "tensor"
    output_structure: Any = "tensor"
    limits: Mapping[str, int] = field(default_factory=dict)


def structure_of(value: Any) -> Any:
    """Return the structure of nested tuples, lists and mappings; anything else is a tensor.

    Example:
        >>> structure_of({"a": 1, "b": (2, None)})
        {'dict': {'a': 'tensor', 'b': {'tuple': ['tensor', None]}}}
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {"dict": {str(key): structure_of(item) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple": [structure_of(item) for item in value]}
    return "tensor"


def flatten(value: Any) -> list[Any]:
    """Return the tensors of a nested value, in order; `None` is left out."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in flatten(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def leaf_names(value: Any, stem: str) -> list[str]:
    """Return a name for each tensor of a nested value: its keys joined, `stem` and positions where there are none.

    Example:
        >>> leaf_names((1, {"mask": 2}), "input")
        ['input_0', 'mask']
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [name for key, item in value.items() for name in leaf_names(item, str(key))]
    if isinstance(value, (tuple, list)):
        return [name for index, item in enumerate(value) for name in leaf_names(item, f"{stem}_{index}")]
    return [stem]


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """Put flat tensors back into `structure`: the inverse of `flatten`.

    Raises:
        DataError: if there are too few or too many tensors.
    """
    if len(leaves) != (wanted := _count(structure)):
        few_or_many = "few" if len(leaves) < wanted else "many"
        raise DataError(f"Too {few_or_many} tensors for the structure {structure}. Got {len(leaves)}.")
    iterator = iter(leaves)

    def build(part: Any) -> Any:
        if part is None:
            return None
        if part == "tensor":
            return next(iterator)
        if "tuple" in part:
            return tuple(build(item) for item in part["tuple"])
        return {key: build(item) for key, item in part["dict"].items()}

    return build(structure)


def _count(structure: Any) -> int:
    if structure is None:
        return 0
    if structure == "tensor":
        return 1
    return sum(map(_count, structure["tuple"] if "tuple" in structure else structure["dict"].values()))


def check_inputs(specs: Sequence[TensorSpec], arrays: Sequence[Any], limits: Mapping[str, int] | None = None) -> None:
    """Check arrays against their specification: number, type, rank, sizes, and equal sizes for equal names.

    Args:
        specs: what is expected.
        arrays: what is given, in the same order.
        limits: dynamic dimension → its largest size.

    Raises:
        DataError: naming the first input that does not fit.
    """
    if len(specs) != len(arrays):
        raise DataError(f"The model takes {len(specs)} inputs ({', '.join(s.name for s in specs)}). Got {len(arrays)}.")
    sizes: dict[str, int] = {}
    for spec, array in zip(specs, arrays, strict=True):
        shape = tuple(array.shape)
        fits = len(shape) == len(spec.shape) and all(
            sizes.setdefault(want, got) == got if isinstance(want, str) else want == got
            for want, got in zip(spec.shape, shape, strict=True)
        )
        if not fits or str(array.dtype) != spec.dtype:
            raise DataError(
                f"The input {spec.name!r} must be {spec.dtype} of shape {list(spec.shape)}. Got {array.dtype} of shape "
                f"{list(shape)}."
            )
    for name, limit in (limits or {}).items():
        if sizes.get(name, 0) > limit:
            raise DataError(
                f"The dimension {name!r} must be at most {limit}, for which the memory of the file was planned. Got "
                f"{sizes[name]}.",
                "give smaller batches or shorter inputs, or lower the model with a longer example",
            )
