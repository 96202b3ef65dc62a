"""Layers whose int8 sums overflow 16 bits on CPUs without VNNI, planted in trained networks: is each one named?

A layer is loaded by giving two of its filters equal weights, all of which become the largest integer, and by making two
neighbouring channels of what it reads equal: that of the largest value is copied over the one beside it. Where that
value is reached, two products overflow. What really overflows is found by other means than those under test:
each layer is cut out of the fused graph and run by the kernel of this machine on what it reads of all calibration
images, and the same is computed from integers by code of its own, with sums of 16 bits and with exact ones. A layer is
flagged where a note of the lowering names it: that is a clean bill denied. Whether the note also says that overflows
were seen is counted apart: the product looks at 4,096 positions of a layer, this scenario at all, and at activations as
they are without any overflow, where this scenario takes those that the kernels before have made.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from benchmarks.checkpoints import lenet_mnist, resnet20_cifar10
from benchmarks.comparison import goal, kept
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.compress import compress
from trimpoint.measure.environment import instruction_set
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime, onnx_quantize
from trimpoint.runtimes.export import export
from trimpoint.runtimes.onnxruntime import module_of

QUESTION = "Is every layer named whose int8 sums overflow on a CPU without 8-bit dot products, and none called clean?"
IMAGES, BATCH, FILTERS = 64, 32, 2
ADDS_IN_16_BITS = "avx2" in instruction_set().split() and "vnni" not in instruction_set()
PLAIN = QuantizeStatic(reduce_range=False)
SAFE = QuantizeStatic()
NETWORKS: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "ResNet-20": (
        resnet20_cifar10,
        {
            "stem.conv": (),
            "stages.0.1.conv2": ("stages.0.1.conv1", "stages.0.1.norm1"),
            "stages.1.0.conv2": ("stages.1.0.conv1", "stages.1.0.norm1"),
            "stages.1.2.conv2": ("stages.1.2.conv1", "stages.1.2.norm1"),
            "stages.2.2.conv2": ("stages.2.2.conv1", "stages.2.2.norm1"),
        },
    ),
    "LeNet-300-100": (lenet_mnist, {"fc1": (), "fc2": ("fc1",), "fc3": ("fc2",)}),
}
"""Network → checkpoint, and the layers that are loaded, each with what makes the channels that it reads."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Quantise each network as it is and with each layer loaded in turn; compare the notes with kernel and integers."""
    rows = []
    for network, (checkpoint, layers) in NETWORKS.items():
        cases = [(None, PLAIN), (None, SAFE), *((layer, PLAIN) for layer in layers), (next(iter(layers)), SAFE)]
        for layer, method in cases:
            name = f"{network}, {layer or 'as trained'}, {7 if method.reduce_range else 8} bits"
            file = resume_dir / f"{name.lower().replace(' ', '-').replace(',', '')}.json"
            rows.append(
                kept(file, partial(_row, name, checkpoint, layer, layers.get(layer or "", ()), method, resume_dir))
            )
    return {"rows": rows, "goals": _goals(rows)}


def _goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    planted = [row for row in rows if row["loaded"] and row["weight_bits"] == 8]

    def share(key: str) -> float:
        return sum(row["loaded"] in row[key] for row in planted) / len(planted)

    def count(which: Callable[[Mapping[str, Any]], set[str]]) -> float:
        return float(sum(len(which(row)) for row in rows))

    missed = count(lambda row: set(row["overflowing"]) - set(row["flagged"]))
    unseen = count(lambda row: set(row["overflowing"]) - set(row["seen"]))
    invented = count(lambda row: set(row["seen"]) - set(row["overflowing"]))
    seven = count(lambda row: set(row["overflowing"] if row["weight_bits"] == 7 else ()))
    differs = count(lambda row: set(row["kernel_differs"]))
    return [
        goal("planted layers that overflow", share("overflowing"), 1.0, None, unit="1"),
        goal("planted layers that are flagged", share("flagged"), 1.0, None, unit="1"),
        goal("overflowing layers called clean", missed, 0.0, None, better="lower", unit="layers"),
        goal("overflowing layers, flagged, overflow not seen", unseen, None, 0.0, better="lower", unit="layers"),
        goal("layers said to have overflowed that did not here", invented, None, 0.0, better="lower", unit="layers"),
        goal("layers that overflow with 7 bits", seven, 0.0, None, better="lower", unit="layers"),
        goal("layers where kernel and integers differ", differs, 0.0, None, better="lower", unit="layers"),
    ]


def _row(
    name: str, checkpoint: Any, layer: str | None, before: tuple[str, ...], method: QuantizeStatic, directory: Path
) -> dict[str, Any]:
    model, task = checkpoint.model(), checkpoint.task()
    images = next(task.batches("calibrate", size=IMAGES))[0]
    if layer is not None:
        model = loaded(model, layer, before, images)
    exported = export(model, images[:2], {"input": {0: "batch"}})
    formats = compress(model, Plan().then(method), task).formats
    batches = [part.numpy() for part in images.split(BATCH)]
    out = directory / "file"
    out.mkdir(exist_ok=True)
    lowered = get_runtime("onnxruntime").lower(exported, out, formats=formats, calibration=batches)
    graph = onnx_quantize.fuse(onnx.load(out / "model.onnx"))
    found = {path: check(node, graph, read) for path, node, read in layers_of(graph, images.numpy(), lowered.scopes)}
    return {
        "system": name,
        "loaded": layer,
        "weight_bits": 7 if method.reduce_range else 8,
        "layers": len(found),
        "overflowing": sorted(path for path, (count, _, _) in found.items() if count),
        "overflows": {path: count for path, (count, _, _) in found.items() if count},
        "levels_off": {path: off for path, (_, off, _) in found.items() if off > 1},
        "flagged": sorted(note.partition(": ")[0] for note in lowered.notes),
        "seen": sorted(note.partition(": ")[0] for note in lowered.notes if " % did" in note),
        "kernel_differs": sorted(path for path, (_, _, differs) in found.items() if differs),
    }


def loaded(model: nn.Module, path: str, before: Sequence[str], images: Tensor) -> nn.Module:
    """Return a copy in which a layer has filters of equal weights, and reads two neighbouring channels that are equal.

    Args:
        model: trained.
        path: of the layer.
        before: paths of what makes the channels that it reads; none where it reads the input.
        images: by which the channel of the largest value is found.
    """
    model, read = deepcopy(model).eval(), []
    weight = model.get_submodule(path).weight
    with torch.no_grad():
        weight[:FILTERS] = weight[:FILTERS].abs().mean()  # type: ignore[index, operator]
        handle = model.get_submodule(path).register_forward_pre_hook(lambda _, given: read.append(given[0]))
        model(images)
        handle.remove()
        strongest = int(read[0].transpose(0, 1).flatten(1).amax(1).argmax())
        for name in before:
            layer = model.get_submodule(name)
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.ndim:
                    tensor[strongest ^ 1] = tensor[strongest]
    return model


def layers_of(
    graph: ModelProto, images: np.ndarray, scopes: Mapping[str, str]
) -> list[tuple[str, NodeProto, np.ndarray]]:
    """Return path, fused operator and what it reads, uint8, of every layer with an integer weight."""
    nodes = [node for node in graph.graph.node if node.op_type in ("QLinearConv", "QGemm")]
    watched = ModelProto()
    watched.CopyFrom(graph)
    del watched.graph.output[:]
    names = sorted({node.input[0] for node in nodes})
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    session = _session(watched)
    values = dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))
    return [(module_of(node.name, scopes) or module_of(node.output[0], scopes), node, values[node.input[0]])
            for node in nodes]  # fmt: skip


def check(node: NodeProto, graph: ModelProto, read: np.ndarray) -> tuple[int, float, bool]:
    """Compare a layer's kernel with integers.

    Returns:
        how many 16-bit sums overflow; by how many levels of its output that is off at most (of its integer sums, where
        the output is float32); whether the kernel of this machine answers otherwise than sums of its kind.
    """
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    given = [stored.get(name) for name in node.input] + [None] * 2
    constant = [None if tensor is None else numpy_helper.to_array(tensor).copy() for tensor in given]
    convolution = node.op_type == "QLinearConv"
    x_scale, x_zero = constant[1], int(constant[2])  # type: ignore[arg-type]
    weight, w_scale = (constant[3], constant[4])
    bias, y_scale, y_zero = (constant[8], *constant[6:8]) if convolution else constant[6:9]
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if convolution:
        rows, matrix, shape = _columns(read, weight, x_zero, settings)
    else:
        rows, matrix = torch.from_numpy(read), torch.from_numpy(weight.T if settings.get("transB") else weight)
        shape = (len(read), matrix.shape[1])
    exact, narrow, count = _sums(rows.int(), matrix.int())
    offset = x_zero * matrix.int().sum(0)
    scale = torch.from_numpy(np.asarray(x_scale * w_scale, dtype=np.float64).reshape(-1))
    shift = 0 if bias is None else torch.from_numpy(bias.astype(np.int64).reshape(-1))

    def output(sums: Tensor) -> np.ndarray:
        real = (sums - offset + shift).double() * scale
        if y_scale is not None:
            real = (real / float(y_scale)).round().add(int(y_zero)).clamp(0, 255)
        placed = real.reshape(len(read), -1, real.shape[1]).transpose(1, 2)
        return placed.reshape(shape).numpy()

    kernel = _alone(node, stored, read)
    off = np.abs(output(narrow) - output(exact))
    difference = np.abs(kernel - output(narrow if ADDS_IN_16_BITS else exact))
    # Ties of rounding fall either way in float32; without a scale of the output, answers are compared as they are.
    differs = difference.max() > (1 if y_scale is not None else 1e-4 * np.abs(kernel).max())
    levels = float(off.max()) if y_scale is not None else float(off.max() / scale.min())
    return count, levels, bool(differs)


def _columns(
    read: np.ndarray, weight: np.ndarray, zero: int, settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return windows `[positions, inputs]`, the weight `[inputs, filters]` and the output's shape, channels fastest."""
    top, left, bottom, right = settings.get("pads", (0, 0, 0, 0))
    strides = settings.get("strides", (1, 1))
    filters, channels, *kernel = weight.shape
    padded = F.pad(torch.from_numpy(read).float(), (left, right, top, bottom), value=float(zero))
    windows = F.unfold(padded, kernel, stride=strides)  # [batch, channels · taps, positions]
    high, wide = ((size - span) // step + 1 for size, span, step in zip(padded.shape[2:], kernel, strides, strict=True))
    ordered = windows.unflatten(1, (channels, -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    matrix = torch.from_numpy(weight).flatten(2).permute(2, 1, 0).flatten(0, 1)
    return ordered, matrix, (len(read), filters, high, wide)


def _sums(rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return exact sums, sums whose neighbouring products are added in 16 bits, and how many of these overflow."""
    exact, lost, count = torch.zeros(len(rows), matrix.shape[1], dtype=torch.int64), 0, 0
    exact += (rows.double() @ matrix.double()).round().long()
    for first in range(0, rows.shape[1], 2):
        pair = rows[:, first : first + 2].float() @ matrix[first : first + 2].float()  # below 2¹⁷, exact in float32
        over = pair - pair.clamp(-(2**15), 2**15 - 1)
        if bool(over.any()):
            count += int((over != 0).sum())
            lost = lost + over.long()
    return exact, exact - lost, count


def _alone(node: NodeProto, stored: Mapping[str, TensorProto], read: np.ndarray) -> np.ndarray:
    """Return what the kernel of this machine makes of what a layer reads."""
    rounded = node.op_type == "QLinearConv" or (len(node.input) > 7 and bool(node.input[7]))
    kind = TensorProto.UINT8 if rounded else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(node.input[0], TensorProto.UINT8, ["batch", *read.shape[1:]])],
        [helper.make_tensor_value_info(node.output[0], kind, None)],
        [stored[name] for name in dict.fromkeys(node.input[1:]) if name],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    session = _session(helper.make_model(graph, opset_imports=sets, ir_version=9), optimise=True)
    return np.asarray(session.run(None, {node.input[0]: read})[0], dtype=np.float64)


def _session(model: ModelProto, *, optimise: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
