"""What all parametrisations of ours have in common: they hold a weight to something, and can be baked into it."""

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize


class Held(nn.Module):
    """A parametrisation that survives any training loop, and after which the weight is a plain one again."""


def held_by(module: nn.Module) -> dict[str, Any]:
    """Return, by the tensor's name, the chains of a module's own tensors that consist of our parametrisations."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast(nn.ModuleDict, module.parametrizations).items()
    return {name: chain for name, chain in lists if all(isinstance(part, Held) for part in cast(nn.ModuleList, chain))}


def chain_of(module: nn.Module, parameter: str) -> Any:
    """Return the parametrisations of a tensor."""
    return cast(nn.ModuleDict, module.parametrizations)[parameter]


@torch.no_grad()
def bake_(module: nn.Module) -> None:
    """Make plain parameters of all weights that are held to something, in place, as they are in evaluation mode."""
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
    if not any(held_by(part) for part in module.modules()):
        return module
    copied = copy.deepcopy(module)
    bake_(copied)
    return copied
