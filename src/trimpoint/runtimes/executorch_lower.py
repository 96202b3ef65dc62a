"""Turn an exported program into an ExecuTorch file, delegated to XNNPACK wherever that has a kernel.

This module needs `executorch` and `torch` in full; what opens an artifact does not import it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from trimpoint.errors import LoweringError
from trimpoint.quiet import quiet
from trimpoint.runtimes import export_errors
from trimpoint.signature import BATCH, Signature, TensorSpec

with quiet():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.tensor import TensorSpec as PlannedSpec

MOST_SAMPLES, LEAST_LENGTH = 64, 128
"""Samples that a batch may have, unless they take too much memory; size that any other open dimension may have."""
PLANNED = 32 * 2**20
"""Bytes that a file may set aside for activations, unless even a single sample takes more."""
PREFIX = "module."
_WEIGHTED = re.compile(r"aten[._](convolution|linear|addmm)\b|aten[._](convolution|linear)[._]")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """An ExecuTorch program.

    Args:
        data: the bytes of the file.
        signature: with dimensions fixed that cannot stay open, and the largest sizes of those that can.
        scopes: `delegate.position` of a weighted operator, both counted from 0 → module.
        notes: which dimensions lowering has fixed, and for what sizes memory was planned.
    """

    data: bytes
    signature: Signature
    scopes: Mapping[str, str]
    notes: tuple[str, ...]


class _Sizes(PassBase):
    """Plan memory for the largest size of each open dimension.

    The pass that ExecuTorch brings takes the size of the example where a dimension has no bound, and does not see the
    bounds of a program that was decomposed.
    """

    def __init__(self, ranges: Mapping[Any, ValueRanges[Any]]) -> None:
        super().__init__()
        self.ranges = dict(ranges)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for module in graph_module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                for spec in pytree.tree_leaves(node.meta.get("spec", [])):
                    if isinstance(spec, PlannedSpec):
                        spec.shape = [self.largest(size) for size in spec.shape]
                        spec.stride = [self.largest(size) for size in spec.stride]
        return PassResult(graph_module, True)

    def largest(self, size: Any) -> int:
        """Return the largest that a size, a number or a formula of open dimensions, can be."""
        if isinstance(size, int):
            return size
        ranges = {**size.node.shape_env.var_to_range, **self.ranges}
        upper = bound_sympy(size.node.expr, ranges).upper
        if not upper.is_Integer:
            raise LoweringError(
                f"The size {size} of a tensor depends on the data without a bound; ExecuTorch plans memory ahead.",
                "bound it with `torch._check`, or export only the part before it with `Task(core=...)`",
            )
        return int(upper)


def compile_program(program: ExportedProgram, signature: Signature, owners: Mapping[str, str]) -> Compiled:
    """Lower a program to XNNPACK and, for the rest, to ExecuTorch's own operators.

    Args:
        program: float32, or quantised by PT2E; stays as it is.
        signature: of the module that it is from.
        owners: name of a weight in the program → module, where the name does not say so.

    Raises:
        LoweringError: if an operator has no counterpart in ExecuTorch, or a size has no bound.

    References:
        https://docs.pytorch.org/executorch/stable/using-executorch-export.html
    """
    try:
        with quiet():
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            lowered = edge.exported_program()
            signature, notes = _settled(lowered, signature)
            limits = _limits(lowered, signature, (program.example_inputs or ((), {}))[0])
            needed = _activation_bytes(lowered, _Sizes(_ranges(lowered, signature, limits)))
            if needed > PLANNED and BATCH in limits:
                limits[BATCH] = _smaller(limits[BATCH], needed)
            made = edge.to_executorch(
                ExecutorchBackendConfig(
                    sym_shape_eval_pass=_Sizes(_ranges(lowered, signature, limits)),
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
                )
            )
    except LoweringError:
        raise
    except Exception as error:
        reason = export_errors.first_line(error)
        raise LoweringError(
            f"ExecuTorch cannot lower the model: {type(error).__name__}: {reason}",
            "choose another runtime, or export only the part that it can run with `Task(core=...)`",
        ) from error
    return Compiled(
        data=bytes(made.buffer),
        signature=replace(signature, limits=limits),
        scopes=_scopes(lowered, owners),
        notes=(*notes, *(f"{name}: memory is planned for at most {size}" for name, size in limits.items())),
    )


def _settled(program: ExportedProgram, signature: Signature) -> tuple[Signature, tuple[str, ...]]:
    """Return the signature with the sizes of dimensions that lowering has fixed, and a note on each."""
    nodes = {node.name: node for node in program.graph.nodes}
    fixed: dict[str, int] = {}
    for spec, name in zip(signature.inputs, program.graph_signature.user_inputs, strict=True):
        for size, found in zip(spec.shape, nodes[str(name)].meta["val"].shape, strict=True):
            if isinstance(size, str) and (number := _number(found)) is not None:
                fixed[size] = number
    if not fixed:
        return signature, ()

    def settle(spec: TensorSpec, name: Any) -> TensorSpec:
        found = nodes[str(name)].meta["val"].shape
        known = [fixed.get(str(size), _number(now)) for size, now in zip(spec.shape, found, strict=True)]
        shape = tuple(now if size is None else size for size, now in zip(known, spec.shape, strict=True))
        return replace(spec, shape=shape)

    given, made = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    settled = replace(
        signature,
        inputs=tuple(map(settle, signature.inputs, given)),
        outputs=tuple(map(settle, signature.outputs, made)),
    )
    return settled, tuple(f"{name} is fixed at {size}: ExecuTorch cannot leave it open" for name, size in fixed.items())


def _number(size: Any) -> int | None:
    number = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if number is None else int(number)


def _limits(program: ExportedProgram, signature: Signature, example: Sequence[Any]) -> dict[str, int]:
    """Return the largest size of each open dimension: what the model allows, at most what is usual."""
    limits: dict[str, int] = {}
    for spec, leaf, symbols in zip(signature.inputs, example, _symbols(program), strict=True):
        for dim, (size, symbol) in enumerate(zip(spec.shape, symbols, strict=True)):
            if isinstance(size, str):
                usual = MOST_SAMPLES if size == BATCH else max(LEAST_LENGTH, 4 * leaf.shape[dim])
                allowed = program.range_constraints.get(symbol)
                bounded = allowed is not None and allowed.upper.is_Integer
                limit = min(usual, int(allowed.upper)) if allowed is not None and bounded else usual
                limits[size] = min(limit, limits.get(size, limit))
    return limits


def _symbols(program: ExportedProgram) -> list[list[Any]]:
    nodes = {node.name: node for node in program.graph.nodes}
    shapes = [nodes[str(name)].meta["val"].shape for name in program.graph_signature.user_inputs]
    return [[None if isinstance(size, int) else size.node.expr for size in shape] for shape in shapes]


def _ranges(program: ExportedProgram, signature: Signature, limits: Mapping[str, int]) -> dict[Any, ValueRanges[Any]]:
    return {
        symbol: ValueRanges(1, limits[size])
        for spec, symbols in zip(signature.inputs, _symbols(program), strict=True)
        for size, symbol in zip(spec.shape, symbols, strict=True)
        if isinstance(size, str)
    }


def _activation_bytes(program: ExportedProgram, sizes: _Sizes) -> int:
    """Return how many bytes of tensors live at once outside of delegates, at most."""
    nodes = list(program.graph.nodes)
    last = {given: index for index, node in enumerate(nodes) for given in node.all_input_nodes}
    ends: dict[int, int] = {}
    live = most = 0
    for index, node in enumerate(nodes):
        value = node.meta.get("val") if node.op == "call_function" else None
        if isinstance(value, Tensor):
            taken = value.element_size() * math.prod(map(sizes.largest, value.shape))
            live += taken
            ends[last.get(node, index)] = ends.get(last.get(node, index), 0) + taken
        most = max(most, live)
        live -= ends.pop(index, 0)
    return most


def _smaller(batch: int, needed: int) -> int:
    """Return the largest power of two that fits, since what is needed grows with the batch; at least 1."""
    fitting = int(PLANNED * batch / needed)
    return max(1, 2 ** (fitting.bit_length() - 1)) if fitting else 1


def _scopes(program: ExportedProgram, owners: Mapping[str, str]) -> dict[str, str]:
    """Return the module of each weighted operator, in the order in which a delegate runs them."""
    scopes = {}
    delegates = [node for node in program.graph.nodes if node.op == "get_attr" and "lowered_module" in str(node.target)]
    for number, delegate in enumerate(delegates):
        inner = getattr(program.graph_module, str(delegate.target)).original_module
        given = inner.graph_signature
        names = {**given.inputs_to_parameters, **given.inputs_to_buffers, **given.inputs_to_lifted_tensor_constants}
        weighted = [
            node for node in inner.graph.nodes if node.op == "call_function" and _WEIGHTED.search(str(node.target))
        ]
        for position, node in enumerate(weighted):
            weight = names.get(_placeholder(node.args[1]), "")
            path = owners.get(weight, weight.removeprefix(PREFIX).rpartition(".")[0])
            if path:
                scopes[f"{number}.{position}"] = path
    return scopes


def _placeholder(source: Any) -> str:
    """Return the name of the placeholder that a weight comes from, also through its dequantisation."""
    while isinstance(source, fx.Node) and source.op == "call_function":
        source = source.args[0]
    return source.name if isinstance(source, fx.Node) else ""
