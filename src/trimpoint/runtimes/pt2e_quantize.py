"""Realise int8 formats on an exported program by PT2E quantisation, with the quantiser of ExecuTorch's XNNPACK backend.

This module needs `executorch` and `torchao`; what opens an artifact does not import it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from trimpoint.errors import DataError, LoweringError
from trimpoint.quantization.grid import Grid
from trimpoint.quiet import quiet
from trimpoint.runtimes.base import Exported, Formats, calibration_feeds
from trimpoint.runtimes.calibration import batch_axes, samples, unpadded
from trimpoint.runtimes.pt2e_observers import activation_spec, weight_spec
from trimpoint.signature import Signature
from trimpoint.values import Format

with quiet():
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils import OP_TO_ANNOTATOR, propagate_annotation
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationConfig,
        SharedQuantizationSpec,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

PREFIX = "module."
_PIECE = 32
"""Samples that calibration runs at once."""
_ATEN = torch.ops.aten
_LINEAR = (_ATEN.linear.default,)
_CONV = (_ATEN.conv1d.default, _ATEN.conv2d.default)
_TRANSPOSED = (_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input)
WEIGHTED = (*_LINEAR, *_CONV, *_TRANSPOSED)
"""Operators with a weight for which XNNPACK has int8 kernels."""
_PATTERNS = ("linear_relu", "linear", "conv_relu", "conv", "conv_transpose_relu", "conv_transpose")
_DYNAMIC = ("linear", "conv", "conv_transpose")
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.mul.Tensor, _ATEN.mul_.Tensor)
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)
_SAME_NUMBERS = (
    *_RELU,
    _ATEN.hardtanh.default,
    _ATEN.hardtanh_.default,
    _ATEN.max_pool2d.default,
    _ATEN.mean.dim,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.squeeze.dim,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.slice.Tensor,
    _ATEN.flatten.using_ints,
    _ATEN.dropout.default,
    _ATEN.dropout_.default,
)
"""Operators whose output has the scale of its input, by `propagate_annotation`."""


@dataclass(kw_only=True)
class _Selection:
    """What is quantised: module → its formats and its nodes, by name; what cannot be, with its reason."""

    formats: dict[str, Mapping[str, Format]] = field(default_factory=dict)
    nodes: dict[str, set[str]] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)


class _Quantizer(XNNPACKQuantizer):  # type: ignore[misc]
    """Annotate the operators of chosen modules, each with its own formats, and what lies between int8 operators."""

    def __init__(self, selection: _Selection, grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self.selection, self.grids = selection, grids
        self.activations = cache(activation_spec)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Leave the graph as it is: numbers in sums stay numbers, whatever their type."""
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate the graph, module by module."""
        for path, tensors in self.selection.formats.items():
            chosen = _around([node for node in model.graph.nodes if node.name in self.selection.nodes[path]])
            config = self._config(path, tensors)
            for pattern in _PATTERNS if "input" in tensors else _DYNAMIC:
                OP_TO_ANNOTATOR[pattern](model, config, lambda node, inside=chosen: node in inside)
        usual = next((f["input"] for f in self.selection.formats.values() if "input" in f), None)
        if usual is not None:
            self._annotate_between(model, usual)
            propagate_annotation(model)
        return model

    def _config(self, path: str, tensors: Mapping[str, Format]) -> Any:
        weights = weight_spec(tensors["weight"], self.grids.get(path), path, self.selection.unmapped)
        if "input" not in tensors:
            dynamic = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True).input_activation
            return QuantizationConfig(dynamic, None, weights, None)
        spec = self.activations(tensors["input"])
        return QuantizationConfig(spec, spec, weights, None)

    def _annotate_between(self, model: fx.GraphModule, usual: Format) -> None:
        """Annotate sums, products and concatenations all of whose data come from int8 operators.

        The outputs of the model are left in float32, so that they are not rounded once more.
        """
        spec = self.activations(usual)
        config = QuantizationConfig(spec, spec, None, None)
        inside = {node for node in model.graph.nodes if _has_output_spec(node)}
        outputs = set(model.graph.output_node().all_input_nodes)
        between: set[fx.Node] = set()
        for node in model.graph.nodes:
            last = node in outputs or any(user in outputs and user.target in _RELU for user in node.users)
            given = node.all_input_nodes
            if node.target in _SAME_NUMBERS and given and given[0] in inside:
                inside.add(node)
            elif node.target in _SUMS and len(given) == len(node.args) and set(given) <= inside and not last:
                between |= {node, *(user for user in node.users if user.target in _RELU)}
                inside.add(node)
            elif node.target is _ATEN.cat.default and set(given) <= inside and not last:
                _annotate_cat(node, spec)
                inside.add(node)
        for pattern in ("add_relu", "add", "mul_relu", "mul"):
            OP_TO_ANNOTATOR[pattern](model, config, lambda node: node in between)


def quantize(
    program: ExportedProgram, exported: Exported, formats: Formats, calibration: Sequence[Any]
) -> tuple[ExportedProgram, tuple[str, ...], dict[str, str]]:
    """Return the program quantised where there are formats, `path: reason` for those that cannot be, and its weights.

    The last is the name of each weight that was quantised → its module.

    Modules with formats for weight and input are quantised statically. Those with a format for the weight alone have
    their input quantised as it comes (dynamically): XNNPACK has no kernel with int8 weights and float activations.

    Args:
        program: float32; stays as it is.
        exported: that the program is from.
        formats: number formats of modules.
        calibration: batches of inputs.

    Raises:
        DataError: if there is no calibration data for static formats, or it leads to values that are not finite.
        LoweringError: if the quantiser fails.

    References:
        https://docs.pytorch.org/ao/stable/tutorials_source/pt2e_quant_ptq.html;
        https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html
    """
    module = program.module(check_guards=False)
    selection = _select(module, exported, formats)
    grids = {path: grid for path, grid in exported.grids.items() if isinstance(grid, Grid)}
    told = "the quantiser of ExecuTorch takes no ranges, it calibrates anew"
    selection.unmapped += [f"{path}: {told}" for path in selection.formats if path in exported.ranges]
    if not selection.formats:
        return program, tuple(selection.unmapped), {}
    static = any("input" in tensors for tensors in selection.formats.values())
    # Without static formats nothing but the weights is looked at, and any run of the model shows those.
    feeds = calibration_feeds(exported.signature, calibration) if static else _example(program, exported.signature)
    result, owners = _quantized(program, module, _Quantizer(selection, grids), exported.signature, feeds)
    return result, tuple(selection.unmapped), owners


def _example(program: ExportedProgram, signature: Signature) -> Iterator[dict[str, np.ndarray]]:
    given, _ = program.example_inputs or ((), {})
    yield {spec.name: leaf.numpy() for spec, leaf in zip(signature.inputs, given, strict=True)}


def quantize_default(
    program: ExportedProgram, signature: Signature, calibration: Sequence[Any]
) -> tuple[ExportedProgram, dict[str, str]]:
    """Return the program as the XNNPACK quantiser makes it with its static setting for a scale per channel."""
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    feeds = calibration_feeds(signature, calibration)
    return _quantized(program, program.module(check_guards=False), quantizer, signature, feeds)


def _quantized(
    program: ExportedProgram, module: Any, quantizer: Any, signature: Signature, feeds: Iterator[dict[str, np.ndarray]]
) -> tuple[ExportedProgram, dict[str, str]]:
    owners = {node.name: weight_owner(node) for node in module.graph.nodes if node.target in WEIGHTED}
    try:
        with quiet(), torch.no_grad():
            prepared = prepare_pt2e(module, quantizer)
            for piece in _pieces(signature, feeds):
                prepared(*(torch.from_numpy(array) for array in piece))
            converted = convert_pt2e(prepared)
            weights = {_source(node): owners[node.name] for node in converted.graph.nodes if node.name in owners}
            return reexport(converted, program, signature), weights
    except DataError:
        raise
    except Exception as error:
        raise LoweringError(f"PT2E cannot quantise the model: {type(error).__name__}: {error}") from error


def reexport(module: Any, program: ExportedProgram, signature: Signature) -> ExportedProgram:
    """Return the program of a changed graph module, traced with the examples of the program it was made of."""
    dims = tuple(
        {dim: Dim.AUTO for dim, size in enumerate(spec.shape) if isinstance(size, str)} for spec in signature.inputs
    )
    example, _ = program.example_inputs or ((), {})
    return torch.export.export(module, example, dynamic_shapes=dims, strict=False)


def _pieces(signature: Signature, feeds: Iterator[dict[str, np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Yield the calibration data without padding, in the order of the inputs, at most `_PIECE` samples at once."""
    dims = {spec.name: [size if isinstance(size, str) else "" for size in spec.shape] for spec in signature.inputs}
    axes = batch_axes(dims)
    for feed in feeds:
        for piece, _ in unpadded(feed, dims, axes) if axes else [(feed, feed)]:
            count = next((piece[name].shape[axis] for name, axis in axes.items()), 1)
            for start in range(0, count, _PIECE if axes else count):
                some = samples(piece, axes, range(start, min(start + _PIECE, count))) if axes else piece
                yield [np.ascontiguousarray(some[spec.name]) for spec in signature.inputs]


# Which nodes


def module_of(node: fx.Node, known: Mapping[str, Any]) -> str:
    """Return the module that a weighted node belongs to: the innermost one that was called, or its weight's owner.

    A parent may use its child's weight without calling the child, as multi-head attention does.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    called = str(stack[-1][0]).removeprefix("L['self'].").removeprefix(PREFIX) if stack else ""
    return called if called in known else weight_owner(node)


def _source(node: fx.Node) -> str:
    """Return the name of the stored weight of a weighted node, also through its dequantisation."""
    weight = node.args[1]
    while isinstance(weight, fx.Node) and weight.op == "call_function":
        weight = weight.args[0]
    return str(weight.target) if isinstance(weight, fx.Node) else ""


def weight_owner(node: fx.Node) -> str:
    """Return the module that owns the constant weight of a node, or nothing."""
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return ""
    return str(weight.target).removeprefix(PREFIX).rpartition(".")[0]


def _select(module: fx.GraphModule, exported: Exported, formats: Formats) -> _Selection:
    result = _Selection()
    found: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.target in WEIGHTED and weight_owner(node):
            found.setdefault(module_of(node, formats), []).append(node)
    for path, tensors in formats.items():
        nodes = found.get(path, [])
        reason = _refusal(tensors, path in exported.grids) or _missing(module, path, nodes, "input" in tensors)
        if reason:
            result.unmapped.append(f"{path}: {reason}")
        else:
            result.formats[path] = tensors
            result.nodes[path] = {node.name for node in nodes}
    return result


def _refusal(tensors: Mapping[str, Format], on_grid: bool) -> str:
    """Return why the quantiser cannot realise these formats, or nothing."""
    for tensor, wanted in tensors.items():
        if wanted.dtype not in ("int8", "uint8") and not (on_grid and tensor == "weight" and wanted.bits < 8):
            return f"XNNPACK's static quantisation has no {wanted.dtype} for its {tensor}"
        if wanted.granularity == "group" or (tensor != "weight" and wanted.granularity != "tensor"):
            return f"XNNPACK's static quantisation has no scale per {wanted.granularity} for its {tensor}"
    return "" if "weight" in tensors else "XNNPACK quantises an input only together with the weight"


def _missing(module: fx.GraphModule, path: str, nodes: Sequence[fx.Node], static: bool) -> str:
    if not nodes:
        own = [node for node in module.graph.nodes if node.op == "call_function" and _called(node) == path]
        if not own:
            return "no operator in the exported graph comes from it"
        return f"XNNPACK has no int8 kernel for {', '.join(sorted({str(node.target) for node in own}))}"
    for node in nodes:
        weight = cast(fx.Node, node.args[1]).meta["val"]
        if weight.dtype != torch.float32:
            return f"XNNPACK has int8 kernels for weights of float32, not {str(weight.dtype).removeprefix('torch.')}"
        grouped = node.target in _TRANSPOSED and len(node.args) > 6 and node.args[6] != 1
        if grouped:
            return "XNNPACK has no int8 kernel for a transposed convolution with groups"
        depthwise = node.target in _CONV and len(node.args) > 6 and node.args[6] != 1
        if not static and node.target not in _LINEAR and (weight.ndim != 4 or depthwise):
            return (
                "XNNPACK's dynamic quantisation has no kernel for it; static quantisation needs a format for its input"
            )
    return ""


def _called(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].").removeprefix(PREFIX) if stack else ""


def _around(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return nodes with their weights and biases, and the ReLU that alone reads one of them."""
    readers = {user for node in nodes if len(node.users) == 1 for user in node.users if user.target in _RELU}
    return {*nodes, *readers, *(arg for node in nodes for arg in node.args[1:3] if isinstance(arg, fx.Node))}


def _has_output_spec(node: fx.Node) -> bool:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None


def _annotate_cat(node: fx.Node, spec: Any) -> None:
    """Give all inputs of a concatenation and its output one scale."""
    first, *others = dict.fromkeys(node.all_input_nodes)
    shared = SharedQuantizationSpec((first, node))
    inputs = {first: spec} | dict.fromkeys(others, shared)
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=shared, _annotated=True)
