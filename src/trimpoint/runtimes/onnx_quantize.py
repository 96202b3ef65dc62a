"""Realise int8 formats on an ONNX graph: our ranges, ONNX Runtime's own placement of quantisers.

The graph in quantise/dequantise form is what ONNX Runtime and OpenVINO run alike.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from trimpoint.errors import DataError, LoweringError
from trimpoint.quantization.grid import Grid
from trimpoint.quiet import quiet
from trimpoint.runtimes import onnx_graph
from trimpoint.runtimes.base import Exported, Formats
from trimpoint.runtimes.observe import float_tensors, observe
from trimpoint.runtimes.onnx_neighbours import GLUE, glue, same_numbers
from trimpoint.values import Format

WEIGHTED = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")
"""Operators with a weight that int8 can hold: those with fast kernels, and embeddings, which only get smaller."""
_EXACT = 1e-5
"""Share of a weight by which it may lie beside its grid, by rounding in float32."""


@dataclass(kw_only=True)
class Selection:
    """What is quantised and how, for `quantize_static`.

    Args:
        nodes: names of the nodes.
        per_channel: one scale per output channel of each weight.
        reduce_range: 7-bit weights.
        symmetric: zero points of activations in the middle of the range.
        overrides: tensor name → settings that differ from these.
        inputs: name of a node's input → its format; the other activations have that of the first of these.
        ranges: name of a node's input → its range, where that was learned.
        unmapped: `path: reason` for formats that cannot be realised.
    """

    nodes: list[str] = field(default_factory=list)
    per_channel: bool = True
    reduce_range: bool = False
    symmetric: bool = False
    overrides: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[str, Format] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hand out calibration batches one by one."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


_FUSED = "/MatMulAddFusion"
"""What ONNX Runtime appends to the name of a product that it fuses with the addition of its bias."""


def preprocess(model: ModelProto) -> ModelProto:
    """Return the model with constants folded, all shapes inferred and all nodes named, as the quantiser needs it.

    Raises:
        LoweringError: if ONNX Runtime cannot read the model.

    References:
        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#pre-processing
    """
    with tempfile.TemporaryDirectory() as directory, quiet():
        source, target = Path(directory) / "source.onnx", Path(directory) / "target.onnx"
        onnx.save(model, source)
        for symbolic in (True, False):
            try:
                # Where symbolic inference gives up it leaves the weights in the working directory.
                with chdir(directory):
                    quant_pre_process(source, target, skip_symbolic_shape=not symbolic)
                return _named(onnx.load(target))
            except Exception as error:
                # Symbolic inference raises a bare Exception for operators that it does not know; go on without it.
                if not symbolic:
                    raise LoweringError(f"ONNX Runtime cannot prepare the model for int8: {error}") from error
    raise LoweringError("ONNX Runtime cannot prepare the model for int8.")


def _named(model: ModelProto) -> ModelProto:
    """Name, in place, the nodes of functions that were expanded (such as `Mish`): nodes are chosen by their names.

    A product that was fused with the addition of its bias, as it is where all shapes are fixed, keeps its own.
    """
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        name = node.name.removesuffix(_FUSED) or f"{node.op_type}_{node.output[0]}"
        while name != node.name and name in taken:
            name += "_"
        node.name = name
        taken.add(name)
    return model


def select(model: ModelProto, exported: Exported, formats: Formats) -> Selection:
    """Choose the nodes that realise `formats`, and the settings of their tensors."""
    result, scopes = Selection(), exported.scopes
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = set(stored)
    nodes = {
        path: [n for n in model.graph.node if scopes.get(n.name) == path and n.op_type in WEIGHTED] for path in formats
    }
    chosen: dict[str, Mapping[str, Format]] = {}
    for path, tensors in formats.items():
        embedding = [node.op_type for node in nodes[path] if _weight(node, weights)] == ["Gather"]
        reason = _refusal(tensors, embedding, path in exported.grids)
        reason = reason or _missing(model, scopes, path, nodes[path], weights)
        reason = reason or next((why for node in nodes[path] if (why := onnx_graph.why_no_integers(node, stored))), "")
        if reason:
            result.unmapped.append(f"{path}: {reason}")
        else:
            chosen[path] = tensors
    taken = [(path, node) for path in chosen for node in nodes[path] if _weight(node, weights)]
    result.nodes = [node.name for _, node in taken]
    _settings(result, [tensors for tensors in chosen.values() if "input" in tensors])
    for path, node in taken:
        if node.op_type != "Gather":
            _overrides(result, path, node, chosen[path])
            if path in exported.ranges:
                for name in same_numbers(model, node.input[0]):
                    result.ranges.setdefault(name, exported.ranges[path])
            if isinstance(grid := exported.grids.get(path), Grid):
                _fix(result, path, node, grid, stored[node.input[1]])
    middle = [name for name, used in result.inputs.items() if used.symmetric and not result.symmetric]
    result.nodes += glue(model, set(result.nodes), weights, middle)
    return result


def quantize(
    model: ModelProto, selection: Selection, feeds: Iterator[dict[str, np.ndarray]], *, biases: bool = True
) -> ModelProto:
    """Return the quantised graph, in quantise/dequantise form; ranges of activations are taken from the feeds.

    Args:
        model: preprocessed.
        selection: what to quantise.
        feeds: input name → array, batch after batch; read one at a time.
        biases: round them too, to 32 bits at the scale of the sums that they are added to.

    Raises:
        DataError: if there are no feeds, or they lead to values that are not finite.
        LoweringError: if the quantiser fails.
    """
    wanted = _activations(model, selection)
    ranges = observe(model, wanted, feeds) | selection.ranges
    extremes = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    given = ModelProto()
    given.CopyFrom(model)
    with quiet():
        try:
            quantizer = QDQQuantizer(
                given,
                selection.per_channel,
                selection.reduce_range,
                QuantType.QInt8,
                QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, extremes),
                selection.nodes,
                [],
                [*WEIGHTED, *GLUE],
                {
                    "ActivationSymmetric": selection.symmetric,
                    "QuantizeBias": biases,
                    "TensorQuantOverrides": selection.overrides,
                },
            )
            quantizer.quantize_model()
        except Exception as error:
            raise LoweringError(f"ONNX Runtime cannot quantise the model: {type(error).__name__}: {error}") from error
    result = quantizer.model.model
    remaining = {node.name for node in result.graph.node}
    absorbed = {name for node in model.graph.node if node.name not in remaining for name in node.output}
    _keep_products(result, set(selection.nodes), absorbed)
    return result


def _activations(model: ModelProto, selection: Selection) -> dict[str, Format]:
    """Return the activations that are quantised, with their formats."""
    floats, chosen = float_tensors(model), set(selection.nodes)
    near = [n for node in model.graph.node if node.name in chosen for n in (*node.input, *node.output) if n in floats]
    usual = next(iter(selection.inputs.values()), Format(dtype="uint8", symmetric=False))
    return {name: selection.inputs.get(name, usual) for name in dict.fromkeys(near)}


def quantize_default(model: ModelProto, feeds: Iterator[dict[str, np.ndarray]]) -> ModelProto:
    """Return the graph as `quantize_static` makes it in one line, with the types its documentation gives for x86-64."""
    with tempfile.TemporaryDirectory() as directory, quiet():
        source, target = Path(directory) / "source.onnx", Path(directory) / "target.onnx"
        onnx.save(model, source)
        try:
            quantize_static(
                source, target, _Reader(feeds), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
            )
        except DataError:
            raise
        except Exception as error:
            raise LoweringError(f"ONNX Runtime cannot quantise the model: {type(error).__name__}: {error}") from error
        return onnx.load(target)


def fuse(model: ModelProto) -> ModelProto:
    """Return the graph with its quantised operators fused, as ONNX Runtime does it on opening.

    The file gets smaller (no conversions between operators, no scales for biases), the kernels stay the same.
    """
    with tempfile.TemporaryDirectory() as directory, quiet():
        path = str(Path(directory) / "fused.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = path
        onnxruntime.InferenceSession(onnx_graph.serialize(model), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def same_answers(first: bytes, second: bytes, feeds: Mapping[str, np.ndarray]) -> bool:
    """Return whether two models give bitwise equal outputs."""
    results = []
    for data in (first, second):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, dict(feeds)))
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*results, strict=True))


def _keep_products(model: ModelProto, chosen: set[str], absorbed: set[str]) -> None:
    """Take out, in place, the rounding of a matrix product whose result only float32 operators read.

    The kernel then writes float32 from its 32-bit sums: nothing is rounded, and one conversion less is run. Where
    rounding stands for a ReLU as well, since its range begins at zero, it stays.

    Args:
        model: quantised.
        chosen: names of the quantised nodes.
        absorbed: tensors that nodes made which the quantiser has taken out.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    read_by: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)
    dropped = []
    for rounding in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        product = made_by.get(rounding.input[0])
        readers = read_by.get(rounding.output[0], [])
        if product is None or product.op_type not in ("MatMul", "Gemm") or len(read_by[rounding.input[0]]) != 1:
            continue
        if rounding.input[0] in absorbed:
            continue
        last = [reader for back in readers for reader in read_by.get(back.output[0], [])]
        if len(readers) == 1 and not any(reader.name in chosen for reader in last):
            product.output[0] = readers[0].output[0]
            dropped += [rounding.name, readers[0].name]
    kept = [node for node in model.graph.node if node.name not in dropped]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _refusal(tensors: Mapping[str, Format], embedding: bool, on_grid: bool) -> str:
    """Return why static int8 cannot realise these formats, or nothing."""
    for tensor, wanted in tensors.items():
        if wanted.dtype not in ("int8", "uint8") and not (on_grid and tensor == "weight" and wanted.bits < 8):
            return f"static int8 has no {wanted.dtype} for its {tensor}"
        if wanted.granularity == "group" or (tensor != "weight" and wanted.granularity != "tensor"):
            return f"static int8 has no scale per {wanted.granularity} for its {tensor}"
    if embedding and "weight" in tensors:
        per_tensor = tensors["weight"].granularity == "tensor"
        return "" if per_tensor else "static int8 has one scale per tensor for an embedding"
    missing = [tensor for tensor in ("weight", "input") if tensor not in tensors]
    return f"static quantisation needs a format for its {missing[0]} too" if missing else ""


def _missing(
    model: ModelProto, scopes: Mapping[str, str], path: str, nodes: Sequence[NodeProto], weights: set[str]
) -> str:
    if any(_weight(node, weights) for node in nodes):
        return ""
    own = [node for node in model.graph.node if scopes.get(node.name) == path]
    if not own:
        return "no operator in the exported graph comes from it"
    kinds = sorted({node.op_type for node in own if any(name in weights for name in node.input[1:4])} - set(GLUE))
    return f"static int8 has no int8 kernel for {', '.join(kinds) or own[0].op_type}"


def _weight(node: NodeProto, weights: set[str]) -> str:
    """Return the name of the node's constant weight, or nothing."""
    name = node.input[0 if node.op_type == "Gather" else 1]
    return name if name in weights else ""


def _settings(selection: Selection, chosen: Sequence[Mapping[str, Format]]) -> None:
    if chosen:
        selection.per_channel = any(tensors["weight"].granularity == "channel" for tensors in chosen)
        selection.reduce_range = any(tensors["weight"].reduce_range for tensors in chosen)
        selection.symmetric = all(tensors["input"].symmetric for tensors in chosen)


def _overrides(selection: Selection, path: str, node: NodeProto, tensors: Mapping[str, Format]) -> None:
    """Record where a node's tensors differ from the settings for all."""
    weight, source = node.input[1], node.input[0]
    setting: dict[str, Any] = {"quant_type": QuantType.QInt8, "symmetric": True}
    setting["reduce_range"] = tensors["weight"].reduce_range
    # A transposed convolution in groups has several outputs for each position of its weight's dimension of channels.
    grouped = node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    channel = tensors["weight"].granularity == "channel" and not grouped
    if channel != selection.per_channel or setting["reduce_range"] != selection.reduce_range:
        if channel:
            setting["axis"] = _axis(node)
        selection.overrides[weight] = [setting]
    used = selection.inputs.setdefault(source, tensors["input"])
    if used != tensors["input"]:
        selection.unmapped.append(f"{path}: its input is also that of another module, whose settings are used")
    if used.symmetric != selection.symmetric:
        selection.overrides[source] = [{"symmetric": used.symmetric}]


def _fix(selection: Selection, path: str, node: NodeProto, grid: Grid, stored: TensorProto) -> None:
    """Give a weight the scales of its grid, so that the file holds just its integers."""
    axis = _axis(node)
    scale = grid_scales(grid, numpy_helper.to_array(stored), axis)
    if isinstance(scale, str):
        selection.unmapped.append(f"{path}: {scale}, and is rounded anew")
        return
    zero = np.int8(0)
    settings = [{"quant_type": QuantType.QInt8, "scale": value, "zero_point": zero} for value in scale]
    settings[0]["axis"] = axis
    selection.overrides[node.input[1]] = settings


def grid_scales(grid: Grid, weight: np.ndarray, axis: int) -> np.ndarray | str:
    """Return the scales at which a weight of the graph consists of a grid's integers, or why it does not.

    On the way to the graph a weight may have been transposed, and each of its channels multiplied by a number, as
    batch normalisation does when it is folded in: integers stay, scales are multiplied by it.

    Args:
        grid: that the weight was held on.
        weight: as it is stored in the graph.
        axis: its dimension of output channels.

    Returns:
        `[channels]`, float32.
    """
    codes = grid.codes if weight.shape == grid.codes.shape and axis == grid.axis else np.swapaxes(grid.codes, 0, 1)
    if codes.shape != weight.shape:
        return "its weight has another shape in the graph"
    rows = [np.moveaxis(each, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64) for each in (weight, codes)]
    squares = (rows[1] ** 2).sum(1)
    scale = np.divide((rows[0] * rows[1]).sum(1), squares, out=np.ones_like(squares), where=squares > 0)
    if abs(rows[0] - scale[:, None] * rows[1]).max() > _EXACT * abs(rows[0]).max():
        return "its weight is not on its grid in the graph"
    return np.where(scale == 0.0, 1.0, abs(scale)).astype(np.float32)


def _axis(node: NodeProto) -> int:
    """Return the dimension of the output channels of a node's weight."""
    return 1 if node.op_type in ("ConvTranspose", "MatMul") or not _transposed(node) else 0


def _transposed(node: NodeProto) -> bool:
    """Return whether the output channels are the first dimension of the node's weight."""
    if node.op_type != "Gemm":
        return bool(node.op_type == "Conv")
    return "transB" in {attribute.name for attribute in node.attribute if attribute.i == 1}
