"""What recurrent layers do to atoms: a hidden unit runs through all gates, the recurrence and whatever reads it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from trimpoint.graph.atoms import spread
from trimpoint.graph.propagate import NO_ATOMS, Handler, Parameter, Propagation

_aten = torch.ops.aten
_ZEROS = (_aten.zeros, _aten.zeros_like, _aten.new_zeros)
_SAME = (
    *(_aten.expand, _aten.repeat, _aten.view, _aten.reshape, _aten.unsqueeze, _aten.squeeze, _aten.transpose),
    *(_aten.to, _aten._to_copy, _aten.clone, _aten.contiguous, _aten.detach),
)
_ACROSS = "a recurrent layer runs over these channels"
_COMPUTED = "the weights of a recurrent layer are computed, not parameters"
_STATE = "the initial state of its layer is given by the caller, or has a size of its own"


def _recurrent(p: Propagation, node: Node) -> Any:
    """Follow the hidden units of `lstm.input`, `gru.input`, `rnn_tanh.input` and `rnn_relu.input`."""
    if cast(Any, node.target)._overloadname != "input":
        return p.unknown(node, "a recurrent layer reads packed sequences, in which units are not followed")
    source, states, tensors, biased, layers, _, _, both, _ = cast(Any, node.args)
    parameters = [parameter for tensor in tensors if (parameter := p.parameter(tensor))]
    if len(parameters) != len(tensors):
        return p.unknown(node, _COMPUTED)
    sets, each = layers * (2 if both else 1), 4 if biased else 2
    if len(parameters) != sets * each:
        return p.unknown(node, "a recurrent layer projects its state (`proj_size`)")
    ids = p.ids(source)
    p.atoms.require_constant(ids, [0, 1], _ACROSS)
    reads, units = ids[0, 0], []
    for layer in range(layers):
        width = sets // layers
        starts = range(layer * width * each, (layer + 1) * width * each, each)
        made = [_layer(p, reads, parameters[start : start + each]) for start in starts]
        reads = torch.cat(made)
        units += made
    for part in units:
        p.atoms.mark(part, "hidden", parameters[0].owner[0])
    stacked = torch.stack(units).unsqueeze(1)
    for state in states if isinstance(states, (list, tuple)) else [states]:
        if not _zero(state):
            p.atoms.couple_strictly(p.ids(state), stacked, _STATE)
    output, *final = p.none_of(node)
    return spread(reads, output.shape), *(spread(stacked, state.shape) for state in final)


def _cell(p: Propagation, node: Node) -> Any:
    """Follow the hidden units of one step: `lstm_cell`, `gru_cell`, `rnn_tanh_cell` and `rnn_relu_cell`."""
    source, states, *tensors = cast(Any, node.args)
    tensors = [tensor for tensor in tensors if tensor is not None]
    parameters = [parameter for tensor in tensors if (parameter := p.parameter(tensor))]
    if len(parameters) != len(tensors):
        return p.unknown(node, _COMPUTED)
    ids = p.ids(source)
    p.atoms.require_constant(ids, [0], _ACROSS)
    units = _layer(p, ids[0], parameters)
    p.atoms.mark(units, "hidden")
    for state in states if isinstance(states, (list, tuple)) else [states]:
        if not _zero(state):
            p.atoms.couple_strictly(p.ids(state), units.unsqueeze(0), _STATE)
    made = p.none_of(node)
    return tuple(spread(units, part.shape) for part in made) if isinstance(made, tuple) else spread(units, made.shape)


def _layer(p: Propagation, reads: Tensor, parameters: Sequence[Parameter]) -> Tensor:
    """Couple what belongs to each unit of one layer and direction, and return the units, `[hidden]`.

    Args:
        p: to be told.
        reads: atoms of the features of one position, `[features]`.
        parameters: `weight_ih [gates·hidden, features]`, `weight_hh [gates·hidden, hidden]` and, where there are any,
            `bias_ih` and `bias_hh`.
    """
    weight_ih, weight_hh = parameters[:2]
    hidden = weight_hh.shape[1]
    gates = [p.dimension(parameter, 0, "out").view(-1, hidden) for parameter in parameters]
    units = gates[0][0]
    p.atoms.couple(units, *gates)
    p.atoms.couple(units, p.dimension(weight_hh, 1, "in"))
    p.atoms.consume(reads, p.dimension(weight_ih, 1, "in"), NO_ATOMS)
    return units


def _zero(node: Node) -> bool:
    """Return whether a tensor is made as zeros."""
    operator = getattr(node.target, "overloadpacket", None)
    return operator in _ZEROS or (operator in _SAME and _zero(cast(Node, node.args[0])))


_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT: dict[str, Handler] = {
    **dict.fromkeys(_NAMES, _recurrent),
    **dict.fromkeys((f"{name}_cell" for name in _NAMES), _cell),
}
"""Operator → what handles it."""
