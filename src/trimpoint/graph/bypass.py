"""What stands in the place of a block that was removed."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from trimpoint.errors import SurgeryError

PLAIN = (bool, int, float, str, type(None))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


class Bypass(nn.Module):
    """Hand the first input on, in the structure that the block in its place returned.

    Args:
        structure: JSON data: `"first"` for the first tensor among the inputs, `None`, `{"value": plain value}`,
            `{"argument": position or name}` for another input, `{"tuple": [...]}`, `{"list": [...]}`,
            `{"dict": {...}}`.
        replaced: the block; its plain attributes stay readable, since some parents ask their children for them.

    Example:
        >>> import torch
        >>> Bypass({"tuple": ["first", None]})(torch.ones(1))
        (tensor([1.]), None)
    """

    def __init__(self, structure: Any = "first", replaced: nn.Module | None = None) -> None:
        super().__init__()
        self.structure = structure
        self._attributes = _plain_attributes(replaced) if replaced is not None else SimpleNamespace()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor among the inputs, in the recorded structure."""
        first = next(tensors_in([*args, *kwargs.values()]))
        return _build(self.structure, first, args, kwargs)

    def extra_repr(self) -> str:
        """Show the structure where it is more than one tensor."""
        return "" if self.structure == "first" else repr(self.structure)

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes")
        if attributes is not None and hasattr(attributes, name):
            return getattr(attributes, name)
        return super().__getattr__(name)


def _plain_attributes(module: nn.Module) -> SimpleNamespace:
    values = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "training"
        and (isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(v, PLAIN) for v in value)))
    }
    return SimpleNamespace(**values, **{name: _plain_attributes(child) for name, child in module.named_children()})


def _build(structure: Any, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if structure is None:
        return None
    if structure == "first":
        return first
    ((kind, content),) = structure.items()
    if kind == "value":
        return content
    if kind == "argument":
        return args[content] if isinstance(content, int) else kwargs.get(content)
    if kind == "dict":
        return {key: _build(item, first, args, kwargs) for key, item in content.items()}
    items = [_build(item, first, args, kwargs) for item in content]
    return tuple(items) if kind == "tuple" else items


def returned_structure(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Describe what a block returned, so that a `Bypass` can return it without the block.

    Args:
        path: of the block.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.
        output: what it returned.

    Raises:
        SurgeryError: if its first output has not the shape of its first input, or another output, be it a tensor or a
            number, is none of its inputs.
    """
    first_in, main = next(tensors_in([*args, *kwargs.values()]), None), next(tensors_in(output), None)
    if first_in is None or main is None or first_in.shape != main.shape:
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (first_in, main)]
        raise SurgeryError(
            f"The block `{path}` cannot be bypassed: its output must have the shape of its first input {shapes[0]}. "
            f"Got {shapes[1]}."
        )
    named = [*enumerate(args), *kwargs.items()]

    def describe(value: Any) -> Any:
        if value is main:
            return "first"
        if value is None:
            return None
        if isinstance(value, (bool, str)):
            return {"value": value}
        for key, argument in named:
            if argument is value:
                return {"argument": key}
        if isinstance(value, (int, float)):
            raise SurgeryError(
                f"The block `{path}` cannot be bypassed: it also returns the number {value}, which may be another one "
                "for other inputs.",
                "let the part of the model that reads the number compute it",
            )
        if isinstance(value, Mapping):
            return {"dict": {str(key): describe(item) for key, item in value.items()}}
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": [describe(item) for item in value]}
        raise SurgeryError(
            f"The block `{path}` cannot be bypassed: it also returns a {type(value).__name__} that is none of its "
            "inputs.",
            "ask the model not to return it (attention weights, caches)",
        )

    return describe(output)
