"""Putting a layer where another one was: checked by running, and only where it can be made again from data."""

import copy
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from trimpoint.errors import SurgeryError
from trimpoint.graph.edits import Edit, MaskEdit, ReplaceEdit, replace_everywhere_
from trimpoint.graph.layers import layer_from_data, layer_to_data
from trimpoint.graph.masks import Mask, ScheduledMask, masks_of, put_mask_, schedule_to_data
from trimpoint.graph.running import check_shapes, evaluating, run

_INTERNAL = {"training", "_parameters", "_buffers", "_modules"}
_Masks = dict[tuple[str, str], Mask]


def replace_(module: nn.Module, path: str, layer: nn.Module, inputs: Any) -> tuple[nn.Module, list[Edit]]:
    """Put `layer` wherever the module at `path` is used, in place, and check that the model runs and calls it.

    Masks of the module go over to the layer, where that has the same parameters.

    Args:
        module: the model.
        path: of the module; the model itself is `""`.
        layer: of the vocabulary of `trimpoint.graph.layers`, or the same as the module but for the values of its
            tensors.
        inputs: a batch to run the model on; `None` for no check.

    Returns:
        The model (another one where the whole of it was replaced), and the edits, to be replayed by `apply_edits_`.

    Raises:
        SurgeryError: if the layer could not be made again from its edits, or cannot take over a mask, or the model does
            not run with it, or never calls it; the model is then as it was.
    """
    old = module.get_submodule(path)
    _carry_masks_(old, layer)
    edits = _edits(module, path, old, layer)
    if inputs is None:
        return replace_everywhere_(module, path, layer), edits
    calls: list[None] = []
    with evaluating(module):
        before = run(module, inputs)
        changed = replace_everywhere_(module, path, layer)
        handle = layer.register_forward_hook(lambda *_: calls.append(None))
        reason = check_shapes(changed, inputs, before)
        handle.remove()
        if not reason and not calls:
            reason = "the model does not call the layer, at most it reads the weight"
        if reason:
            replace_everywhere_(changed, path, old)
            raise SurgeryError(f"With a {_name(layer)} in the place of `{path}` {reason}")
    layer.train(old.training)
    return changed, edits


def _name(layer: nn.Module) -> str:
    return type_before_parametrizations(layer).__name__


def _edits(module: nn.Module, path: str, old: nn.Module, layer: nn.Module) -> list[Edit]:
    """Return what makes `layer` of the module at `path`, but for the values of its tensors.

    Raises:
        SurgeryError: if nothing does.
    """
    others = _tensors_without(module, old)
    torn = _held(old, others) != _held(layer, others)
    if not torn and not difference(old, layer):
        return []
    if shared := [name for name, tensor in _named_tensors(layer) if id(tensor) in others]:
        raise SurgeryError(
            f"A {_name(layer)} in the place of `{path}` shares its {shared[0]} with other modules, which could not be "
            "made again.",
            "give it tensors of its own",
        )
    data = layer_to_data(layer)
    masks = _masks(layer)
    made = layer_from_data(data, old)
    for (inner, name), mask in masks.items():
        put_mask_(made.get_submodule(inner), name, copy.deepcopy(mask))
    if missing := difference(made, layer):
        raise SurgeryError(
            f"A {_name(layer)} in the place of `{path}` could not be made again from its sizes: {missing} differs.",
            "take a plain layer, or one that differs from the module in nothing but the values of its tensors",
        )
    edits: list[Edit] = [ReplaceEdit(path, data)]
    for (inner, name), mask in masks.items():
        schedule = mask.schedule if isinstance(mask, ScheduledMask) else None
        edits.append(MaskEdit(f"{path}.{inner}".strip("."), name, schedule_to_data(schedule)))
    return edits


# Masks


def _masks(module: nn.Module) -> _Masks:
    return {(path, name): mask for path, part in module.named_modules() for name, mask in masks_of(part).items()}


def _carry_masks_(old: nn.Module, layer: nn.Module) -> None:
    """Give `layer` the masks of `old` that it has not yet, in place.

    Raises:
        SurgeryError: naming a mask that does not fit it.
    """
    parts, new = dict(old.named_modules()), dict(layer.named_modules())
    own, wanted = _masks(layer), _masks(old)
    for (path, name), mask in wanted.items():
        part = new.get(path)
        if (path, name) in own:
            continue
        tensor = None if part is None else part._parameters.get(name)
        alike = part is not None and type(part) is type_before_parametrizations(parts[path])
        if not alike or tensor is None or tensor.shape != mask.keep.shape:
            inner = f"{path}.{name}".lstrip(".")
            raise SurgeryError(
                f"A mask holds {mask.removed:,} of the {mask.keep.numel():,} numbers of its {inner} at zero, and does "
                f"not fit a {_name(layer)} of other parts or sizes",
                "mask weights after the structure has been changed, or make plain weights of them first: "
                "`trimpoint.bake`",
            )
    for (path, name), mask in wanted.items():
        if (path, name) not in own:
            put_mask_(new[path], name, copy.deepcopy(mask))


# What a layer is, but for the values of its tensors


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensors_without(module: nn.Module, cut: nn.Module) -> set[int]:
    """Return the tensors that a model still holds where one of its modules is cut out."""
    if module is cut:
        return set()
    own = {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    return own.union(*(_tensors_without(child, cut) for child in module._modules.values() if child is not None))


def _held(module: nn.Module, others: set[int]) -> set[frozenset[str]]:
    """Return the names of tensors that are one, and each that is one with something else, with its identity."""
    names: dict[int, set[str]] = {}
    for name, tensor in _named_tensors(module):
        names.setdefault(id(tensor), {str(id(tensor))} if id(tensor) in others else set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def difference(one: nn.Module, other: nn.Module) -> str:
    """Return what two modules differ in, other than the values of what `state_dict` holds, or `""`."""
    parts, others = dict(one.named_modules(remove_duplicate=False)), dict(other.named_modules(remove_duplicate=False))
    if parts.keys() != others.keys():
        return f"`{sorted(parts.keys() ^ others.keys())[0]}`"
    for path, part in parts.items():
        if name := _own_difference(part, others[path]):
            return f"`{path}.{name}`".replace("`.", "`")
    return ""


def _own_difference(one: nn.Module, other: nn.Module) -> str:
    if type_before_parametrizations(one) is not type_before_parametrizations(other):
        return "its class"
    saved = [_saved(part) for part in (one, other)]
    if saved[0] != saved[1]:
        return next(
            name for name in {**saved[0], **saved[1]} if saved[0].get(name, _ABSENT) != saved[1].get(name, _ABSENT)
        )
    for name in one._non_persistent_buffers_set:
        if not _equal(one._buffers[name], other._buffers[name]):
            return name
    values = [_attributes(part) for part in (one, other)]
    every = {**values[0], **values[1]}
    return next((n for n in every if not _equal(values[0].get(n, _ABSENT), values[1].get(n, _ABSENT))), "")


_ABSENT = object()


def _saved(part: nn.Module) -> dict[str, Any]:
    """Return kind, shape and type of the tensors that a module holds itself; of buffers whether they are saved."""
    found: dict[str, Any] = {}
    for name, parameter in part._parameters.items():
        found[name] = None if parameter is None else (parameter.shape, parameter.dtype)
    for name, buffer in part._buffers.items():
        kept = name not in part._non_persistent_buffers_set
        found[name] = None if buffer is None else (buffer.shape, buffer.dtype, kept)
    return found


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return what a module holds besides tensors and parts; of its hooks those that change what it computes."""
    own = {id(tensor) for tensor in (*part._parameters.values(), *part._buffers.values())}
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            found[name] = list(value.values())
        elif "hook" not in name and name not in _INTERNAL and id(value) not in own:
            listed = isinstance(value, list) and any(id(item) in own for item in value)  # the weights of an LSTM
            found[name] = len(value) if listed else value
    return found


def _alike(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan()) if one.is_floating_point() else one == other


def _equal(one: Any, other: Any, met: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Return whether two attributes are the same value; objects are, if all that they hold is."""
    if one is other or (id(one), id(other)) in met:
        return True
    if type(one) is not type(other):
        return False
    met |= {(id(one), id(other))}
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(_alike(one, other).all())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, nn.Module):
        return not difference(one, other) and _equal(one.state_dict(), other.state_dict(), met)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b, met) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key], met) for key in one)
    if isinstance(one, functools.partial):
        return _equal((one.func, one.args, one.keywords), (other.func, other.args, other.keywords), met)
    try:
        same = one == other
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it did not say that they are the same
        same = False
    if isinstance(one, weakref.ref) or (isinstance(same, bool) and same):
        return True
    holds = hasattr(one, "__dict__") and not callable(one)
    return holds and _equal(vars(one), vars(other), met)
