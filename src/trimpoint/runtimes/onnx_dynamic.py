"""Realise dynamic int8 on an ONNX graph: weights stored as integers, activations rounded by their range in each call.

Each product is written as the operators into which ONNX Runtime itself fuses what `quantize_dynamic` makes. That
quantiser is not used: it has one setting for all modules, takes no scales, fails on the shapes that the exporter
records, and rewrites every `Gemm` of the model, also those that static int8 has its fast kernel for.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimpoint.quantization.grid import Grid
from trimpoint.runtimes import onnx_graph
from trimpoint.runtimes.base import Exported, Formats
from trimpoint.runtimes.onnx_quantize import grid_scales
from trimpoint.values import Format

DOMAIN = "com.microsoft"
WEIGHTED = ("Gather", "Gemm", "LSTM", "MatMul")
FLOAT_ONLY = ("Conv", "ConvTranspose", "GRU", "RNN")
"""Operators with weights for which there is no kernel of this kind, or a slow one."""
INPUT = Format(dtype="uint8", symmetric=False, dynamic=True)
"""The only format of an activation for which there are kernels."""
_OPSET = 1


@dataclass(kw_only=True)
class DynamicSelection:
    """What is quantised dynamically, and how.

    Args:
        weights: name of a node → the format of its weights.
        scales: name of a node → the scales, `[outputs]`, of which its weight is a multiple already.
        gates: name of an LSTM → the same for both of its weights, `[directions, 4 × hidden]`.
        unmapped: `path: reason` for formats that cannot be realised.
    """

    weights: dict[str, Format] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    gates: dict[str, list[np.ndarray]] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)


def select(model: ModelProto, exported: Exported, formats: Formats) -> DynamicSelection:
    """Choose the nodes that realise `formats`.

    Args:
        model: preprocessed.
        exported: that it was made of.
        formats: dynamic ones only.
    """
    result, scopes = DynamicSelection(), exported.scopes
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for path, tensors in formats.items():
        own = [node for node in model.graph.node if scopes.get(node.name) == path]
        nodes = [node for node in own if _weighted(node, stored)]
        lookup = [node.op_type for node in nodes] == ["Gather"]
        if reason := _refusal(tensors, lookup, path in exported.grids) or _missing(own, nodes, stored):
            result.unmapped.append(f"{path}: {reason}")
            continue
        for node in nodes:
            result.weights[node.name] = tensors["weight"]
            if isinstance(grid := exported.grids.get(path), Grid) and node.op_type != "LSTM":
                weight, axis = _matrix(node, stored)
                scale = grid_scales(grid, weight, axis)
                if isinstance(scale, str):
                    result.unmapped.append(f"{path}: {scale}, and is rounded anew")
                else:
                    result.scales[node.name] = scale
            elif node.op_type == "LSTM" and f"{path}.weight_ih_l0".lstrip(".") in exported.grids:
                found = _gate_scales(node, exported, path, stored)
                if found is None:
                    result.unmapped.append(f"{path}: its weight is not on its grid in the graph, and is rounded anew")
                else:
                    result.gates[node.name] = found
    return result


def quantize(model: ModelProto, selection: DynamicSelection) -> ModelProto:
    """Return the graph with the selected nodes computed on integers.

    An activation that several products read is rounded once. In terms of `DynamicQuantizeLinear`: its range, with zero
    in it, is divided into 255 steps, one of which is zero exactly.

    References:
        https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html;
        https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, `MatMulIntegerToFloat` and
        `DynamicQuantizeLSTM`.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made: list[NodeProto] = []
    rounded: dict[str, tuple[str, str, str]] = {}
    tensors: dict[str, TensorProto] = {}
    biases, absorbed = _biases(graph, selection, stored)
    for node in graph.node:
        if node.name not in selection.weights:
            made += [] if node.output[0] in absorbed else [node]
        elif node.op_type == "LSTM":
            wanted = selection.weights[node.name]
            made.append(_recurrent(node, wanted, stored, tensors, selection.gates.get(node.name)))
        else:
            scale, addition = selection.scales.get(node.name), biases.get(node.name)
            weight, axis = _matrix(node, stored)
            codes, scale = _integers(np.moveaxis(weight, axis, 0), selection.weights[node.name], scale)
            if node.op_type == "Gather":
                made += _lookup(node, codes, scale, tensors)
            else:
                made += _product(node, addition, codes.T, scale, tensors, rounded)
    del graph.node[:]
    graph.node.extend(made)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in (*graph.initializer, *tensors.values()) if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if selection.weights and DOMAIN not in {entry.domain for entry in result.opset_import}:
        result.opset_import.append(helper.make_opsetid(DOMAIN, _OPSET))
    return result


def _refusal(tensors: Mapping[str, Format], lookup: bool, on_grid: bool) -> str:
    """Return why ONNX Runtime cannot realise these formats, or nothing."""
    missing = [tensor for tensor in ("weight", "input") if tensor not in tensors and not (lookup and tensor == "input")]
    if missing:
        return f"dynamic quantisation needs a format for its {missing[0]} too"
    weight, source = tensors["weight"], tensors.get("input", INPUT)
    if weight.dtype != "int8" and not (on_grid and weight.bits < 8):
        return f"dynamic quantisation of ONNX Runtime has no {weight.dtype} for its weight"
    if weight.granularity == "group" or not weight.symmetric or weight.dynamic:
        return "dynamic quantisation of ONNX Runtime takes symmetric weights with a scale per tensor or channel"
    if source != INPUT:
        return "dynamic quantisation of ONNX Runtime rounds its input to uint8 with any zero point, per tensor"
    return ""


def _missing(own: Sequence[NodeProto], nodes: Sequence[NodeProto], stored: Mapping[str, TensorProto]) -> str:
    if not own:
        return "no operator in the exported graph comes from it"
    if nodes:
        return ""
    if reason := next((why for node in own if (why := onnx_graph.why_no_integers(node, stored))), ""):
        return reason
    kinds = sorted({node.op_type for node in own if node.op_type in FLOAT_ONLY})
    kind = ", ".join(kinds)
    return f"ONNX Runtime has no dynamic int8 kernel for {kind}" if kind else "it multiplies with no constant matrix"


def _weighted(node: NodeProto, stored: Mapping[str, TensorProto]) -> bool:
    """Return whether a node multiplies with constant float32 weights in a form that has an int8 kernel."""
    names = node.input[:1] if node.op_type == "Gather" else node.input[1 : 3 if node.op_type == "LSTM" else 2]
    if node.op_type not in WEIGHTED or not all(name in stored for name in names):
        return False
    if any(stored[name].data_type != TensorProto.FLOAT for name in names):
        return False
    if node.op_type == "LSTM":
        recurrent = stored[node.input[2]].dims
        return bool(recurrent[1] == 4 * recurrent[2])
    if node.op_type == "Gather":
        return len(stored[node.input[0]].dims) == 2 and not any(a.name == "axis" and a.i for a in node.attribute)
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    vector = all(name in stored and len(stored[name].dims) == 1 for name in node.input[2:])
    return plain and vector and len(stored[node.input[1]].dims) == 2


def _matrix(node: NodeProto, stored: Mapping[str, TensorProto]) -> tuple[np.ndarray, int]:
    """Return the weight of a product as it is stored, and its dimension of outputs."""
    if node.op_type == "Gather":
        return numpy_helper.to_array(stored[node.input[0]]), 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return numpy_helper.to_array(stored[node.input[1]]), 0 if transposed else 1


def _integers(rows: np.ndarray, wanted: Format, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return weights `[…, outputs, inputs]` as int8, and their scales: `[…, outputs]`, or `[…]` where there is one.

    With 7 bits, two products of a weight and an activation fit into the 16 bits in which some processors add them.
    """
    if scale is None:
        axes = -1 if wanted.granularity == "channel" else (-2, -1)
        scale = (abs(rows).max(axis=axes) / (64 if wanted.reduce_range else 127)).astype(np.float32)
        scale = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1.0))
    steps = scale.reshape(scale.shape + (1,) * (rows.ndim - scale.ndim))
    return np.rint(np.clip(rows / steps, -127, 127)).astype(np.int8), scale.astype(np.float32)


def _product(
    node: NodeProto,
    addition: NodeProto | None,
    weight: np.ndarray,
    scale: np.ndarray,
    tensors: dict[str, TensorProto],
    rounded: dict[str, tuple[str, str, str]],
) -> Iterator[NodeProto]:
    """Yield what stands for a matrix product: the rounding of its input, where that is not there yet, and itself."""
    source, bias, output = node.input[0], list(node.input[2:]), node.output
    if source not in rounded:
        rounded[source] = (f"{source}_quantized", f"{source}_scale", f"{source}_zero_point")
        yield helper.make_node("DynamicQuantizeLinear", [source], rounded[source], f"{source}_DynamicQuantizeLinear")
    if addition is not None:
        bias, output = [name for name in addition.input if name != node.output[0]], addition.output
    quantized, factor, zero = rounded[source]
    codes, sizes = _stored(f"{node.name}_{node.input[1]}", tensors, quantized=weight, scale=scale)
    inputs = [quantized, codes, factor, sizes, zero, "", *bias]
    yield helper.make_node("MatMulIntegerToFloat", inputs, output, node.name, domain=DOMAIN)


def _lookup(
    node: NodeProto, codes: np.ndarray, scale: np.ndarray, tensors: dict[str, TensorProto]
) -> Iterator[NodeProto]:
    """Yield what stands for an embedding: the integers of a row, times its scale; nothing else is rounded."""
    ids, output = node.input[1], node.output[0]
    stem = f"{node.name}_{node.input[0]}"
    table, sizes = _stored(stem, tensors, quantized=codes, scale=scale.reshape(-1, 1) if scale.ndim else scale)
    yield helper.make_node("Gather", [table, ids], [f"{output}_codes"], f"{node.name}_codes")
    yield helper.make_node("Cast", [f"{output}_codes"], [f"{output}_float"], f"{node.name}_float", to=TensorProto.FLOAT)
    if scale.ndim:
        # Not `_scale`, which is what the range of this output in a call has, where a product reads it.
        yield helper.make_node("Gather", [sizes, ids], [f"{output}_row_scale"], f"{node.name}_row_scale")
        sizes = f"{output}_row_scale"
    yield helper.make_node("Mul", [f"{output}_float", sizes], node.output, node.name)


def _gate_scales(
    node: NodeProto, exported: Exported, path: str, stored: Mapping[str, TensorProto]
) -> list[np.ndarray] | None:
    """Return the scales of an LSTM's weights, `[directions, 4 × hidden]` each, from the layer whose integers fit it."""
    weights = [numpy_helper.to_array(stored[node.input[position]]) for position in (1, 2)]
    for layer in range(len(exported.grids)):
        found: list[np.ndarray] = []
        for weight, kind in zip(weights, ("ih", "hh"), strict=True):
            names = [f"{path}.weight_{kind}_l{layer}{way}".lstrip(".") for way in ("", "_reverse")[: len(weight)]]
            grids = [grid for name in names if isinstance(grid := exported.grids.get(name), Grid)]
            if len(grids) < len(weight):
                return None
            fits = [_as_stored(grid, part) for grid, part in zip(grids, weight, strict=True)]
            found += (
                [np.stack(scales)] if len(scales := [each for each in fits if each is not None]) == len(fits) else []
            )
        if len(found) == len(weights):
            return found
    return None


def _as_stored(grid: Grid, weight: np.ndarray) -> np.ndarray | None:
    """Return the scales of an LSTM's rows in the order of ONNX: input, output, forget and cell gate."""
    codes = np.concatenate([np.split(grid.codes, 4)[place] for place in (0, 3, 1, 2)])
    scale = grid_scales(Grid(codes=codes, scale=grid.scale, axis=0, bits=grid.bits), weight, 0)
    return None if isinstance(scale, str) else scale


def _recurrent(
    node: NodeProto,
    wanted: Format,
    stored: Mapping[str, TensorProto],
    tensors: dict[str, TensorProto],
    scales: Sequence[np.ndarray] | None = None,
) -> NodeProto:
    """Return what stands for an LSTM; its input and its hidden state are each rounded within the operator."""
    names, settings = list(node.input) + [""] * (8 - len(node.input)), list[str]()
    for position in (1, 2):
        given = None if scales is None else scales[position - 1]
        codes, scale = _integers(numpy_helper.to_array(stored[node.input[position]]), wanted, given)
        codes, zero = np.swapaxes(codes, 1, 2), np.zeros(scale.shape, np.int8)
        stem = f"{node.name}_{node.input[position]}"
        names[position], *rest = _stored(stem, tensors, quantized=codes, scale=scale, zero_point=zero)
        settings += rest
    made = helper.make_node("DynamicQuantizeLSTM", [*names, *settings], node.output, node.name, domain=DOMAIN)
    made.attribute.extend(attribute for attribute in node.attribute if attribute.name != "layout")
    return made


def _stored(stem: str, tensors: dict[str, TensorProto], **parts: np.ndarray) -> list[str]:
    """Store arrays and return their names; a weight that several operators share is stored for each of them."""
    for part, array in parts.items():
        tensors[f"{stem}_{part}"] = numpy_helper.from_array(np.ascontiguousarray(array), f"{stem}_{part}")
    return [f"{stem}_{part}" for part in parts]


def _biases(
    graph: GraphProto, selection: DynamicSelection, stored: Mapping[str, TensorProto]
) -> tuple[dict[str, NodeProto], set[str]]:
    """Return the addition of a constant vector that alone reads a selected product, by the product's name; and which.

    The kernel adds it to its 32-bit sums by itself.
    """
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    made = {n.output[0]: n for n in graph.node if n.op_type == "MatMul" and n.name in selection.weights}
    found: dict[str, NodeProto] = {}
    for node in graph.node:
        for name, bias in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            product = made.get(name)
            if product is None or readers[name] > 1 or product.name in found or bias not in stored:
                continue
            if list(stored[bias].dims) == list(stored[product.input[1]].dims[1:]):
                found[product.name] = node
    return found, {node.output[0] for node in found.values()}
