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
from torch.fx import Graph, Node

from trimpoint.graph.atoms import Atoms, Owner, compact, first_of, spread, ties, varies
from trimpoint.graph.masks import MASKED, masks_of, owner_of
from trimpoint.graph.trace import Trace

SHARED = "shared by all heads of attention"
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
        shaped: id tensors that were given their shape by the code of a module, with the module's path.
        live: the nodes that the output depends on; others run, but what they compute is of no account.
        heads: for each atom its head, or −1, where they are known from an earlier propagation.
    """

    trace: Trace
    atoms: Atoms = field(default_factory=Atoms)
    values: dict[Node, Any] = field(default_factory=dict)
    shaped: list[tuple[Tensor, str]] = field(default_factory=list)
    live: set[Node] = field(default_factory=set)
    heads: Tensor | None = None

    def run(self) -> Atoms:
        """Propagate through the whole graph."""
        graph = self.trace.program.graph
        self.live = _live(graph)
        for node in graph.nodes:
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
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor) and _shapes(node):
                self.shaped.append((compact(part).expand(part.shape), self.trace.modules[node.name]))

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

    def computed(self, weight: Any, kind: str) -> str:
        """Say why what reads a weight that is no parameter is kept: a mask, or whatever computes it."""
        path = self.trace.modules.get(weight.name, "") if isinstance(weight, Node) else ""
        owner = owner_of(path)
        if owner != path and masks_of(self.trace.module.get_submodule(owner)):
            return f"{MASKED.format(owner)}, with which channels cannot go"
        return f"the weight of a {kind} is computed, not a parameter"

    def elementwise(self, node: Node, inputs: Sequence[Node]) -> Tensor:
        """Couple what meets at each position of the result of a broadcasting operator."""
        return self.meet(shape_of(node) or (), [self.ids(part) for part in inputs])

    def meet(self, shape: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
        """Couple the atoms of `inputs` that meet when they are broadcast to `shape`, and return those of the result."""
        result = self.nothing(shape)
        operands: list[tuple[Tensor, tuple[int, ...]]] = []
        for ids in self.apart(inputs):
            lead = len(shape) - ids.dim()
            own = tuple(d + lead for d in range(ids.dim()) if not (ids.shape[d] == 1 and shape[d + lead] > 1))
            wide = any(shape[d] > 1 for d in range(len(shape)) if d not in own)
            if wide and compact(ids).numel() == 1:
                # The one channel of a tensor that is broadcast over the others' channels.
                self.atoms.freeze(ids, "a single channel that is broadcast over others")
                operands.append((result, own))
            else:
                operands.append((ids.expand(tuple(shape)), own))
        for ids in self._by_detail([ids for ids, _ in operands]):
            result = spread(first_of(result, ids), shape)
        for ids, own in operands:
            self.atoms.couple(result, ids)
            self.atoms.require_size(result, ids, own, "meets values of a fixed size in an elementwise operator")
        return result

    def _by_detail(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return ids of one shape, those that vary along more dimensions first, elements of parameters last."""
        counts = [sum(varies(ids, dim) for dim in range(ids.dim())) for ids in inputs]
        if len({count for count in counts if count}) > 1:
            counts = [0 if self.atoms.are_elements(ids) else n for ids, n in zip(inputs, counts, strict=True)]
            return [inputs[at] for at in sorted(range(len(inputs)), key=lambda at: -counts[at])]
        return list(inputs)

    def apart(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return ids that meet; where heads are known, without those that would tie heads to each other.

        Such are values that all heads read alike: rotary positions, masks, a norm of queries and keys.
        """
        if self.heads is None:
            return list(inputs)
        result = []
        for index, ids in enumerate(inputs):
            shared = any(ties(ids, other, self.heads) for at, other in enumerate(inputs) if at != index)
            if shared:
                self.atoms.freeze(ids, SHARED)
            result.append(self.nothing(ids.shape) if shared else ids)
        return result


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Return the shape of the tensor that a node makes; `None` if it makes none, or several."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def argument(node: Node, name: str, default: Any = None) -> Any:
    """Return an argument of a call by its name in the operator's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, entry in enumerate(cast(Any, node.target)._schema.arguments):
        if entry.name == name:
            return node.args[position] if position < len(node.args) else entry.default_value
    return default


def _live(graph: Graph) -> set[Node]:
    """Return the nodes that the output depends on, and those that write into their arguments."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        writes = schema is not None and schema.is_mutable
        if node.op == "output" or writes or any(user in live for user in node.users):
            live.add(node)
    return live


def _shapes(node: Node) -> bool:
    """Return whether sizes are arguments of a call."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(str(entry.type) in ("List[int]", "int") for entry in schema.arguments)


Handler = Callable[[Propagation, Node], Any]
