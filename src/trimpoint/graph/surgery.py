"""Structural edits of a model in place: bypassing blocks, removing units of coupled groups; each checked by running."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import SurgeryError, UnknownNameError, suggest
from trimpoint.graph.alike import check_alike, together
from trimpoint.graph.bypass import Bypass, returned_structure
from trimpoint.graph.edits import (
    AttributeEdit,
    BypassEdit,
    Edit,
    ReplaceEdit,
    ResizeEdit,
    apply_edits_,
    edits_from_data,
    edits_to_data,
    is_size,
    replace_everywhere_,
)
from trimpoint.graph.head_sizes import head_sizes, says_heads
from trimpoint.graph.replacement import replace_
from trimpoint.graph.running import UNCHECKED, Probe, check_shapes, check_values, evaluating, probing, run, run_probe
from trimpoint.parts import Group

__all__ = [
    "AttributeEdit",
    "Bypass",
    "BypassEdit",
    "Edit",
    "ReplaceEdit",
    "ResizeEdit",
    "apply_edits_",
    "bypass_",
    "edits_from_data",
    "edits_to_data",
    "remove_units_",
    "replace_",
]

_FIXED = "; how many heads there are stands in the code, or where this model's modules share it"
_RECURRENT = {"input_size": "weight_ih", "hidden_size": "weight_hh"}


# Blocks


def bypass_(module: nn.Module, path: str, inputs: Any) -> list[Edit]:
    """Replace the block at `path` by a `Bypass`, in place.

    Args:
        module: the model.
        path: of a block, such as `find_blocks` returns.
        inputs: a batch on which the block's output is recorded and the result is checked.

    Returns:
        The edits, to be replayed by `apply_edits_`.

    Raises:
        SurgeryError: if the block's outputs cannot be made without it, or the model no longer runs; the model is then
            as it was.
    """
    if not path:
        raise SurgeryError("The whole model cannot be bypassed.", "name one of its blocks")
    try:
        block = module.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in module.named_modules() if name]
        raise SurgeryError(f"The model has no module `{path}`.", suggest(path, names)) from error
    recorded: list[Any] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorded.append(returned_structure(path, args, kwargs, output))

    with evaluating(module):
        handle = block.register_forward_hook(record, with_kwargs=True)
        try:
            before = run(module, inputs)
        finally:
            handle.remove()
        if not recorded:
            raise SurgeryError(f"The block `{path}` was not called for these inputs.")
        bypass = Bypass(recorded[0], block)
        replace_everywhere_(module, path, bypass)
        reason = check_shapes(module, inputs, before)
        if reason:
            replace_everywhere_(module, path, block)
            raise SurgeryError(f"Without the block `{path}` {reason}")
    bypass.train(block.training)
    return [BypassEdit(path, recorded[0])]


# Units of groups


def remove_units_(
    module: nn.Module, groups: Sequence[Group], removals: Mapping[str, Sequence[int]], inputs: Any
) -> tuple[list[Edit], dict[str, str]]:
    """Remove units from coupled groups, in place, and check the result by running it.

    The model must run, keep the shapes of its outputs, and compute what it computes with all weights of the removed
    channels at zero; the samples of `inputs` but the first are drawn anew for that, see `drawn_around`. Groups for
    which it does not, or cannot be told, are left whole.

    Args:
        module: the model that `groups` belong to.
        groups: from `coupled_groups`.
        removals: group name → units to remove.
        inputs: a batch to run the model on.

    Returns:
        The edits, to be replayed by `apply_edits_`, and for each group that was left whole the reason.

    Raises:
        SurgeryError: if a group would lose all its units, must not be touched, or has no such unit, or if groups that
            are `alike` would lose unequal numbers of units.
        UnknownNameError: if there is no such group.
    """
    chosen = _checked(groups, removals)
    if not chosen:
        return [], {}
    failed: dict[str, str] = {}
    accepted: list[str] = []
    stated: list[Edit] = []

    def attempt(names: list[str], probe: Probe) -> str:
        wanted = {name: chosen[name] for name in [*accepted, *names]}
        reference, reason = _masked_outputs(module, wanted, probe), ""
        for sizes in head_sizes(module, {name: chosen[name] for name in names}):
            found = _attempt(module, wanted, [*stated, *sizes], probe, reference)
            if not found:
                # An attribute of another name that is not needed has this value for a reason of its own.
                for other in dict.fromkeys(edit.name for edit in sizes if not says_heads(edit.name)):
                    fewer = [edit for edit in sizes if edit.name != other]
                    sizes = sizes if _attempt(module, wanted, [*stated, *fewer], probe, reference) else fewer
                stated.extend(sizes)
                return ""
            reason = reason or found
        return reason

    def settle(sets: list[list[str]], probe: Probe) -> None:
        names = [name for alike in sets for name in alike]
        reason = attempt(names, probe) if names else ""
        if not reason:
            accepted.extend(names)
        elif len(sets) == 1:
            heads = any(chosen[name][0].kind == "heads" for name in names) and reason != UNCHECKED
            failed.update(dict.fromkeys(names, reason + _FIXED * heads))
        else:
            settle(sets[: len(sets) // 2], probe)
            settle(sets[len(sets) // 2 :], probe)

    with evaluating(module), probing(module, inputs) as probe:
        if probe.tells:
            settle(together([group for group, _ in chosen.values()]), probe)
        else:
            failed.update(dict.fromkeys(chosen, UNCHECKED))
    edits = [*_edits(module, {name: chosen[name] for name in accepted}), *stated]
    apply_edits_(module, edits)
    return edits, failed


_Choice = dict[str, tuple[Group, list[int]]]


def _checked(groups: Sequence[Group], removals: Mapping[str, Sequence[int]]) -> _Choice:
    known = {group.name: group for group in groups}
    chosen: _Choice = {}
    for name, units in removals.items():
        if name not in known:
            raise UnknownNameError(f"There is no group {name!r}.", suggest(name, list(known)))
        group, wanted = known[name], sorted({int(unit) for unit in units})
        if not wanted:
            continue
        if group.reason:
            raise SurgeryError(f"The group {name!r} must not be touched: {group.reason}.")
        if wanted[0] < 0 or wanted[-1] >= group.size:
            raise SurgeryError(f"The group {name!r} has units 0 to {group.size - 1}. Got {wanted[0]} to {wanted[-1]}.")
        if len(wanted) == group.size:
            raise SurgeryError(
                f"All {group.size} units of the group {name!r} would be removed.", "keep one, or bypass the block"
            )
        chosen[name] = (group, wanted)
    check_alike(groups, {name: len(units) for name, (_, units) in chosen.items()})
    return chosen


def _positions(chosen: _Choice) -> dict[tuple[str, str, int], set[int]]:
    """Return the positions to remove along each dimension of each parameter."""
    removed: dict[tuple[str, str, int], set[int]] = {}
    for group, units in chosen.values():
        for member in group.members:
            found = removed.setdefault((member.path, member.parameter, member.dim), set())
            found.update(position for unit in units for position in member.indices[unit])
    return removed


def tensor_of(module: nn.Module, path: str, name: str) -> Tensor:
    """Return a parameter or buffer by the path of its module and its name."""
    part: Any = module
    for child in path.split(".") if path else ():
        part = part._modules[child]  # get_submodule is slow
    return cast(Tensor, getattr(part, name))


def _edits(module: nn.Module, chosen: _Choice) -> list[Edit]:
    edits: list[Edit] = []
    sizes: dict[int, list[int]] = {}
    for (path, name, dim), positions in _positions(chosen).items():
        tensor = tensor_of(module, path, name)
        keep = tuple(position for position in range(tensor.shape[dim]) if position not in positions)
        edits.append(ResizeEdit(path, name, dim, keep))
        sizes.setdefault(id(tensor), list(tensor.shape))[dim] = len(keep)
    seen = set()
    for path, part in module.named_modules():
        if id(part) not in seen:
            seen.add(id(part))
            values = _attributes(part, sizes)
            edits += [AttributeEdit(path, k, v) for k, v in values.items() if is_size(part, k) and vars(part)[k] != v]
    return edits


def _attributes(part: nn.Module, sizes: Mapping[int, list[int]]) -> dict[str, int | tuple[int, ...]]:
    """Return the attributes of a module that state the sizes of its resized tensors, by their names."""
    tensors = {
        name: sizes[id(tensor)]
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and id(tensor) in sizes
    }
    has = {name for name in vars(part) if not name.startswith("_")}
    if {"input_size", "hidden_size"} <= has:
        found = {key: tensors.get(f"{name}_l0") or tensors.get(name) for key, name in _RECURRENT.items()}
        return {key: shape[1] for key, shape in found.items() if shape is not None}
    shape = tensors.get("weight") or tensors.get("running_mean")
    if shape is None:
        return {}
    if {"in_channels", "out_channels", "groups"} <= has:
        return _convolution_attributes(part, shape)
    if {"in_features", "out_features"} <= has and len(shape) == 2:
        return {"out_features": shape[0], "in_features": shape[1]}
    if {"embedding_dim", "num_embeddings"} <= has:
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if {"num_groups", "num_channels"} <= has:
        channels, groups = cast(int, part.num_channels), cast(int, part.num_groups)
        return {"num_channels": shape[0], "num_groups": groups * shape[0] // channels}
    if {"nf"} <= has and len(shape) == 2:
        return {"nf": shape[1], "nx": shape[0]} if "nx" in has else {"nf": shape[1]}
    if "normalized_shape" in has:
        return {"normalized_shape": tuple(shape)}
    sized: dict[str, int | tuple[int, ...]] = {}
    for name in ("num_features", "num_parameters"):
        if name in has:
            sized[name] = shape[0]
    return sized


def _convolution_attributes(part: Any, shape: Sequence[int]) -> dict[str, int | tuple[int, ...]]:
    depthwise, transposed = part.in_channels == part.groups > 1, bool(getattr(part, "transposed", False))
    if transposed:
        groups = shape[0] if depthwise else part.groups
        return {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
    groups = shape[0] * part.groups // part.out_channels if depthwise else part.groups
    return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}


def _attempt(
    module: nn.Module, chosen: _Choice, stated: Sequence[Edit], probe: Probe, reference: Sequence[Tensor]
) -> str:
    """Remove units, compare with the outputs of the model that does not read them, undo; return what is wrong."""
    edits = [*_edits(module, chosen), *stated]
    tensors = {
        id(t): (t, t.data) for e in edits if isinstance(e, ResizeEdit) for t in [tensor_of(module, e.path, e.parameter)]
    }
    values = [(module.get_submodule(e.path), e.name) for e in edits if isinstance(e, AttributeEdit)]
    attributes = [(part, name, getattr(part, name)) for part, name in values]
    try:
        apply_edits_(module, edits)
        return check_values(module, probe, reference)
    finally:
        for tensor, data in tensors.values():
            tensor.data = data
        for part, name, value in attributes:
            setattr(part, name, value)


def _masked_outputs(module: nn.Module, chosen: _Choice, probe: Probe) -> list[Tensor]:
    """Run the model with zeros wherever the chosen units are made, passed on or read."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    for group, units in chosen.values():
        for member in group.members:
            tensor = tensor_of(module, member.path, member.parameter)
            if member.parameter in ("running_mean", "running_var"):
                continue
            if id(tensor) not in saved:
                saved[id(tensor)] = (tensor, tensor.data)
                tensor.data = tensor.data.clone()
            positions = [position for unit in units for position in member.indices[unit]]
            tensor.data.index_fill_(member.dim, torch.tensor(positions, device=tensor.device), 0)
    try:
        return run_probe(module, probe)
    finally:
        for tensor, data in saved.values():
            tensor.data = data
