"""What all parametrisations of ours have in common: they hold a weight to something, and can be baked into it."""

import copy
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from trimpoint.errors import SurgeryError
from trimpoint.graph.input_grids import input_ranges, take_off_grids_


class Held(nn.Module):
    """A parametrisation that survives any training loop, and after which the weight is a plain one again.

    Attributes:
        order: its place among those of one tensor, which has at most one of each.
    """

    order: ClassVar[int]


def held_by(module: nn.Module) -> dict[str, Any]:
    """Return, by the tensor's name, the chains of a module's own tensors that consist of our parametrisations."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast(nn.ModuleDict, module.parametrizations).items()
    return {name: chain for name, chain in lists if all(isinstance(part, Held) for part in cast(nn.ModuleList, chain))}


def why_not_held(module: nn.Module, parameter: str) -> str:
    """Return why a tensor of a module cannot be held to something, or `""`."""
    if parametrize.is_parametrized(module) and set(cast(nn.ModuleDict, module.parametrizations)) != set(
        held_by(module)
    ):
        return "it has a parametrisation of its own"
    return "" if _behind(module, parameter) is not None else f"its {parameter} is no parameter"


def parameter_behind(module: nn.Module, parameter: str) -> nn.Parameter:
    """Return the parameter that is trained, whether the tensor of this name is held to something or not.

    Raises:
        SurgeryError: if the tensor cannot be held.
    """
    if reason := why_not_held(module, parameter):
        raise SurgeryError(f"A {type_before(module)} cannot hold its {parameter} to anything: {reason}.")
    return cast(nn.Parameter, _behind(module, parameter))


def hold_(module: nn.Module, parameter: str, step: Held) -> None:
    """Hold a tensor to something more, in place; the parameter keeps its identity, one of the same order gives way.

    Raises:
        SurgeryError: if the tensor cannot be held.
    """
    parameter_behind(module, parameter)
    chain = held_by(module).get(parameter)
    step.eval()  # it is called once to be checked, which is no training step
    if chain is None:
        with torch.no_grad():
            parametrize.register_parametrization(module, parameter, step)
    elif any(old.order == step.order for old in chain):
        chain[next(place for place, old in enumerate(chain) if old.order == step.order)] = step
    else:
        chain.insert(sum(old.order < step.order for old in chain), step)
    cast(nn.ModuleDict, module.parametrizations).train(module.training)
    if isinstance(module, nn.RNNBase):
        cast(Any, type(module)).__deepcopy__ = _copy_recurrent  # of a class that this module alone and its copies have


def _copy_recurrent(module: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """Copy a held recurrent layer without the weights that it computed last: with their graph they cannot be."""
    replica: nn.RNNBase = module.__new__(type(module))
    memo[id(module)] = replica
    module._flat_weights = [None] * len(module._flat_weights_names)  # computed anew in each call
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica


def type_before(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before anything of it was held."""
    return parametrize.type_before_parametrizations(module).__name__


def _behind(module: nn.Module, parameter: str) -> nn.Parameter | None:
    chain = held_by(module).get(parameter)
    found = module._parameters.get(parameter) if chain is None else chain.original
    return found if isinstance(found, nn.Parameter) else None


@torch.no_grad()
def bake_(module: nn.Module) -> None:
    """Make plain parameters of all weights that are held to something, in place, as they are in evaluation mode.

    What layers read is no longer rounded.
    """
    for part in module.modules():
        chains = held_by(part)
        if not chains:
            continue
        plain: dict[str, nn.Parameter | None] = {}
        for name, chain in chains.items():
            original = cast(nn.Parameter, chain.original)
            for step in chain:
                original.data = step.eval()(original.data)
            plain[name] = original
        # Copies of a parametrised module share its class, so that is left alone and not used any more.
        part.__class__ = parametrize.type_before_parametrizations(part)
        del part._modules["parametrizations"]
        part._parameters = {**plain, **part._parameters}
        if isinstance(part, nn.RNNBase):
            part._parameters = {name: part._parameters[name] for name in part._flat_weights_names}
            part._init_flat_weights()
    take_off_grids_(module)


def baked(module: nn.Module) -> nn.Module:
    """Return a copy of a module in which masks and grids have become plain weights: with zeros, on the grid.

    Its classes, the names in its `state_dict` and what it computes in evaluation mode are those of a module that was
    never touched, so it can be saved, copied and handed on without trimpoint. Neither zeros nor grids survive more
    training.

    Args:
        module: any; it stays as it is, and is itself returned where nothing is held.

    Example:
        >>> from trimpoint.graph.masks import mask_
        >>> layer = nn.Linear(2, 2)
        >>> mask_(layer, "weight", torch.eye(2, dtype=torch.bool))
        >>> list(layer.state_dict())
        ['bias', 'parametrizations.weight.original', 'parametrizations.weight.0.keep']
        >>> list(baked(layer).state_dict())
        ['weight', 'bias']
    """
    if not input_ranges(module) and not any(held_by(part) for part in module.modules()):
        return module
    copied = copy.deepcopy(module)
    bake_(copied)
    return copied
