"""Walking a model's ATen graph once, to learn which atom each element of each tensor disappears with.

What an operator does to atoms is said in `trimpoint.graph.operators`; an operator that is not known there keeps
everything that flows into it.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from trimpoint.graph.atoms import Atoms, Owner, compact, first_of, spread
from trimpoint.graph.trace import Trace

OUTPUT = "reaches the model's output"
NO_ATOMS = "reads values that no removable channel makes, such as the model's input"


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer in the graph, possibly transposed.

    Args:
        owner: path of the module and name of the parameter.
        shape: as it is seen here.
        dims: the parameter's own dimension for each dimension seen here.
    """

    owner: Owner
    shape: tuple[int, ...]
    dims: tuple[int, ...]


@dataclass
class Propagation:
    """Id tensors of a graph, filled node by node.

    Args:
        trace: the model.
        atoms: what is learnt.
        values: node → id tensor, `Parameter`, or a tuple of them; `None` for what is no tensor.
    """

    trace: Trace
    atoms: Atoms = field(default_factory=Atoms)
    values: dict[Node, Any] = field(default_factory=dict)

    def run(self) -> Atoms:
        """Propagate through the whole graph."""
        for node in self.trace.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
                self._watch(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self.keep(value, OUTPUT)
        return self.atoms

    def _placeholder(self, node: Node) -> Any:
        shape = shape_of(node)
        if shape is None:
            return None
        if node.name in self.trace.owners:
            return Parameter(self.trace.owners[node.name][0], shape, tuple(range(len(shape))))
        return self.nothing(shape)

    def _call(self, node: Node) -> Any:
        from trimpoint.graph.operators import rule_of

        if node.target is operator.getitem:
            source, index = cast(tuple[Node, int], node.args)
            value = self.values[source]
            return value[index] if isinstance(value, (tuple, list)) else self.none_of(node)
        handler = rule_of(node.target)
        if handler is None:
            return self.unknown(node)
        return handler(self, node)

    def _watch(self, node: Node) -> None:
        value = self.values[node]
        if isinstance(value, Tensor):
            path = self.trace.modules[node.name]
            self.atoms.watch(value, f"split by a reshape to fixed sizes (such as attention heads) in `{path}`")

    # What handlers use

    def ids(self, node: Any) -> Tensor:
        """Return the id tensor of a node that is a tensor."""
        value = self.values[node]
        if isinstance(value, Parameter):
            shape = tuple(value.shape[value.dims.index(dim)] for dim in range(len(value.dims)))
            return self.atoms.elements(value.owner, shape).permute(value.dims)
        if not isinstance(value, Tensor):
            raise TypeError(f"{node} is no tensor")
        return value

    def parameter(self, node: Any) -> Parameter | None:
        """Return the parameter that `node` is, or `None`."""
        value = self.values.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, Parameter) else None

    def dimension(self, parameter: Parameter, dim: int, role: Any) -> Tensor:
        """Return the atoms of a dimension of a parameter as it is seen here."""
        return self.atoms.dimension(parameter.owner, parameter.dims[dim], parameter.shape[dim], role)

    def nothing(self, shape: Sequence[int]) -> Tensor:
        """Return an id tensor without atoms."""
        return torch.full((1,) * len(shape), -1).expand(tuple(shape))

    def none_of(self, node: Node) -> Any:
        """Return id tensors without atoms for all that `node` returns."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(self.nothing(v.shape) if isinstance(v, Tensor) else None for v in value)
        return self.nothing(value.shape) if isinstance(value, Tensor) else None

    def keep(self, node: Node, reason: str) -> None:
        """Keep every atom of a node."""
        value = self.values[node]
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Parameter):
                if len(part.shape) > 1:
                    self.atoms.dimension(part.owner, part.dims.index(0), part.shape[part.dims.index(0)], "out")
                self.atoms.freeze_owner(part.owner, reason)
            elif isinstance(part, Tensor):
                self.atoms.freeze(part, reason)

    def unknown(self, node: Node, reason: str = "") -> Any:
        """Keep everything that flows into `node`; what comes out has no atoms."""
        for value in node.all_input_nodes:
            self.keep(value, reason or f"read by the operator {node.target}, through which channels are not followed")
        return self.none_of(node)

    def elementwise(self, node: Node, inputs: Sequence[Node]) -> Tensor:
        """Couple what meets at each position of the result of a broadcasting operator."""
        shape = shape_of(node) or ()
        result = self.nothing(shape)
        operands: list[tuple[Tensor, tuple[int, ...]]] = []
        for part in inputs:
            ids = self.ids(part)
            lead = len(shape) - ids.dim()
            own = tuple(d + lead for d in range(ids.dim()) if not (ids.shape[d] == 1 and shape[d + lead] > 1))
            wide = any(shape[d] > 1 for d in range(len(shape)) if d not in own)
            if wide and compact(ids).numel() == 1:
                # The one channel of a tensor that is broadcast over the others' channels.
                self.atoms.freeze(ids, "a single channel that is broadcast over others")
                ids = self.nothing(ids.shape)
            operands.append((ids.expand(shape), own))
        for ids, _ in operands:
            result = spread(first_of(result, ids), shape)
        for ids, own in operands:
            self.atoms.couple(result, ids)
            self.atoms.require_size(result, ids, own, "meets values of a fixed size in an elementwise operator")
        return result


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Return the shape of the tensor that a node makes; `None` if it makes none, or several."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


Handler = Callable[[Propagation, Node], Any]
