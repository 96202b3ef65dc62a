"""Which layers overflow the 16-bit sums of CPUs without 8-bit dot products, found by doing what those CPUs do.

On x86-64 without VNNI, kernels multiply unsigned activations with signed weights by `vpmaddubsw`: the products of two
neighbours are added in 16 bits, which saturate. With weights of 7 bits two products never reach the end. The order of
neighbours is that of ONNX Runtime's kernels: along the inputs of a matrix product, along the channels of a convolution.
Depthwise convolutions have a kernel of their own that does not, if a channel makes one and no more. Of a transposed
convolution, which OpenVINO alone computes on integers, the channels of one position are neighbours.

This module needs `onnx` (the full installation); what opens an artifact does not import it.

References:
    ONNX Runtime, "Quantize ONNX models", under "When and why do I need to try U8U8?"; Intel, "Intrinsics guide",
    `_mm256_maddubs_epi16`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimpoint.quiet import quiet
from trimpoint.runtimes import onnx_graph

LOW, HIGH, LARGEST = -(2**15), 2**15 - 1, 255
_POSITIONS = 4096
"""Positions of a layer's output that are looked at, at most."""
_SUMS = 1 << 24
"""Sums that are held at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """What 16-bit sums do to one layer.

    Args:
        node: name of the operator.
        possible: share of the pairs of weights whose sum overflows for some activations.
        seen: share of the sums that overflowed.
        sums: that were looked at.
    """

    node: str
    possible: float
    seen: float
    sums: int


@dataclass(frozen=True)
class _Layer:
    node: NodeProto
    sources: tuple[str, ...]  # quantised activations, uint8; of an LSTM, which rounds by itself, floats
    zero: int  # what stands for zero among them
    weights: list[np.ndarray]  # of each group, `[inputs, outputs]` in the kernel's order, int64


def saturations(
    model: ModelProto, feeds: Iterable[Mapping[str, np.ndarray]], *, transposed: bool = True
) -> list[Saturation]:
    """Return the layers whose 16-bit sums can overflow on a CPU without VNNI, and how many do on some inputs.

    A layer that is not returned cannot overflow, whatever it reads.

    Args:
        model: in quantise/dequantise form, uint8 activations and int8 weights, or with dynamic int8.
        feeds: input name → array, batch after batch; read one at a time, until enough of each layer was seen.
        transposed: whether the runtime computes transposed convolutions on integers, as OpenVINO does.
    """
    layers = [layer for layer in _layers(model, transposed) if _possible(layer.weights)]
    if not layers:
        return []
    counts = {layer.node.name: [0, 0, 0] for layer in layers}  # overflows, sums, positions
    session = _session(model, layers)
    names = [output.name for output in session.get_outputs()]
    for feed in feeds:
        found = dict(feed) | dict(zip(names, session.run(names, dict(feed)), strict=True))
        for layer in layers:
            count = counts[layer.node.name]
            for matrix, weight in zip(_rows(layer, found), layer.weights, strict=True):
                rows = _some(matrix, _POSITIONS - count[2] // len(layer.weights))
                count[0] += overflows(rows, weight)
                count[1] += len(rows) * ((weight.shape[0] + 1) // 2) * weight.shape[1]
                count[2] += len(rows)
        if all(count[2] >= _POSITIONS for count in counts.values()):
            break
    return [
        Saturation(
            node=layer.node.name,
            possible=_possible(layer.weights),
            seen=counts[layer.node.name][0] / max(1, counts[layer.node.name][1]),
            sums=counts[layer.node.name][1],
        )
        for layer in layers
    ]


def note(found: Saturation, path: str) -> str:
    """Say what a layer does on a CPU without VNNI, and how to rule it out."""
    seen = f"{100 * found.seen:.2g} % did" if found.seen else f"none of {found.sums:,} did"
    seen = f"on calibration data {seen}" if found.sums else "there is no calibration data to see whether they do"
    return (
        f"{path or found.node}: on a CPU without 8-bit dot products (VNNI) its 16-bit sums can overflow; "
        f"{seen}. Weights of 7 bits rule it out (`reduce_range=True`)"
    )


def saturating_product(activations: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply as a CPU without VNNI does.

    Args:
        activations: `[positions, inputs]`, uint8.
        weight: `[inputs, outputs]`, int8, in the kernel's order.

    Returns:
        `[positions, outputs]`, int64.
    """
    total = np.zeros((len(activations), weight.shape[1]), dtype=np.int64)
    for pair in _pairs(activations, weight):
        total += np.clip(pair, LOW, HIGH)
    return total


def overflows(activations: np.ndarray, weight: np.ndarray) -> int:
    """Return how many 16-bit sums overflow in a product, see `saturating_product`."""
    step = max(1, _SUMS // max(1, weight.shape[1]))
    parts = (activations[start : start + step] for start in range(0, len(activations), step))
    return sum(int(((pair < LOW) | (pair > HIGH)).sum()) for part in parts for pair in _pairs(part, weight))


def _pairs(activations: np.ndarray, weight: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sums of two neighbouring products, `[positions, outputs]`, before they saturate."""
    values, matrix = activations.astype(np.int64), weight.astype(np.int64)
    for at in range(0, len(matrix), 2):
        pair = values[:, at, None] * matrix[at]
        yield pair + values[:, at + 1, None] * matrix[at + 1] if at + 1 < len(matrix) else pair


def _possible(weights: list[np.ndarray]) -> float:
    """Return the share of pairs of weights that overflow for the worst activations."""
    hit = count = 0
    for weight in weights:
        padded = np.pad(weight, ((0, len(weight) % 2), (0, 0)))
        up, down = (np.maximum(side * padded, 0).reshape(-1, 2, padded.shape[1]).sum(1) for side in (1, -1))
        hit += int(((LARGEST * up > HIGH) | (-LARGEST * down < LOW)).sum())
        count += up.size
    return hit / max(1, count)


def _layers(model: ModelProto, transposed: bool) -> Iterator[_Layer]:
    made_by = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("DynamicQuantizeLSTM", "MatMulIntegerToFloat"):
            names = node.input[1:3] if node.op_type == "DynamicQuantizeLSTM" else node.input[1:2]
            arrays = [numpy_helper.to_array(stored[name]).astype(np.int64) for name in names]
            if node.op_type == "MatMulIntegerToFloat":
                yield _Layer(node, (node.input[0],), 0, arrays)
            else:
                sources = (node.input[0], _states_of(node), *(name for name in node.input[5:6] if name))
                yield _Layer(node, sources, 0, [array[way] for way in range(len(arrays[0])) for array in arrays])
            continue
        if node.op_type not in ("Conv", "Gemm", "MatMul", *(["ConvTranspose"] if transposed else [])):
            continue
        data, weight = (made_by.get(name) for name in node.input[:2])
        if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        tensor = stored.get(weight.input[0])
        if tensor is None or tensor.data_type != TensorProto.INT8 or data.input[0] not in made_by:
            continue
        matrices = _matrices(node, numpy_helper.to_array(tensor).astype(np.int64))
        zero = stored.get(data.input[2]) if len(data.input) > 2 else None
        if matrices:
            at = 0 if zero is None else int(numpy_helper.to_array(zero).flat[0])
            yield _Layer(node, (data.input[0],), at, matrices)


def _matrices(node: NodeProto, weight: np.ndarray) -> list[np.ndarray]:
    """Return the weight of each group, `[inputs, outputs]`; nothing for what other kernels compute."""
    if node.op_type == "Conv":
        groups = _attribute(node, "group", 1)
        if groups > 1 and weight.shape[1] == 1 and len(weight) == groups:
            return []
        rows = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
        return [part.T for part in np.split(rows, groups)]
    if node.op_type == "ConvTranspose":
        return np.split(weight.reshape(len(weight), -1), _attribute(node, "group", 1))
    if weight.ndim != 2:
        return []
    return [weight.T if node.op_type == "Gemm" and _attribute(node, "transB", 0) else weight]


def _rows(layer: _Layer, found: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield what each group of a layer multiplies its weight with, `[positions, inputs]`."""
    node, values = layer.node, found[layer.sources[0]]
    if node.op_type == "DynamicQuantizeLSTM":
        yield from _states(node, found)
        return
    if node.op_type == "ConvTranspose":
        for part in np.split(values, len(layer.weights), axis=1):
            yield np.moveaxis(part, 1, -1).reshape(-1, part.shape[1])
        return
    if node.op_type != "Conv":
        yield values.reshape(-1, values.shape[-1])
        return
    kernel = list(_attribute(node, "kernel_shape", ()))
    dims = len(kernel)
    strides, dilations = (list(_attribute(node, name, [1] * dims)) for name in ("strides", "dilations"))
    pads = list(_attribute(node, "pads", [0] * 2 * dims))
    border = [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)]
    padded = np.pad(values, border, constant_values=layer.zero)
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + dims)))
    places = tuple(slice(None, None, step) for step in strides)
    inner = tuple(slice(None, None, step) for step in dilations)
    windows = windows[(slice(None), slice(None), *places, *inner)]
    for part in np.split(windows, len(layer.weights), axis=1):
        # [batch, channels, *places, *kernel] → [positions, kernel × channels], channels running fastest
        yield np.moveaxis(part, 1, -1).reshape(-1, part.shape[1] * int(np.prod(kernel)))


def _states(node: NodeProto, found: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield for each direction of an LSTM what it multiplies with its weights: the inputs, and the hidden states.

    The kernel rounds all inputs of a call by one range, and the hidden states of each step by theirs. A first state
    that is zero overflows nothing.
    """
    inputs, states = found[node.input[0]], found[_states_of(node)]  # [steps, batch, …], [steps, directions, batch, …]
    begin = found.get(node.input[5]) if len(node.input) > 5 else None
    for way in range(states.shape[1]):
        yield _rounded(inputs).reshape(-1, inputs.shape[-1])
        ordered = states[::-1, way] if way or _attribute(node, "direction", b"") == b"reverse" else states[:, way]
        before = [*([] if begin is None else [begin[way]]), *ordered[:-1]]
        yield np.concatenate([_rounded(each) for each in before] or [np.zeros((0, states.shape[-1]), np.uint8)])


def _states_of(node: NodeProto) -> str:
    """Return the name of all hidden states of an LSTM, which it need not have in the graph."""
    return str(node.output[0]) or f"{node.name}_states"


def _rounded(values: np.ndarray) -> np.ndarray:
    """Return activations as dynamic int8 rounds them: by their range, with zero in it."""
    low, high = min(float(values.min(initial=0)), 0.0), max(float(values.max(initial=0)), 0.0)
    scale = (high - low) / LARGEST or 1.0
    codes: np.ndarray = np.clip(np.rint(values / scale) + round(-low / scale), 0, LARGEST).astype(np.uint8)
    return codes


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` rows, evenly spread."""
    if count <= 0:
        return rows[:0]
    return rows[:: max(1, -(-len(rows) // count))]


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _session(model: ModelProto, layers: Iterable[_Layer]) -> onnxruntime.InferenceSession:
    """Return a session whose outputs are what the layers read, without fusions that would take it away."""
    seen = ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    for node in seen.graph.node:
        if node.op_type == "DynamicQuantizeLSTM":
            node.output[0] = _states_of(node)
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    watched = {name: layer.node.op_type == "DynamicQuantizeLSTM" for layer in layers for name in layer.sources}
    for name in sorted(set(watched) - known):
        kind = TensorProto.FLOAT if watched[name] else TensorProto.UINT8
        seen.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with quiet():
        return onnxruntime.InferenceSession(onnx_graph.serialize(seen), options, providers=["CPUExecutionProvider"])
