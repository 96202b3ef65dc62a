"""Which ranges the tensors of an ONNX graph take on calibration data, read as a stream in bounded memory.

This module needs `onnx` (the full installation); what opens an artifact does not import it.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from trimpoint.errors import DataError, LoweringError
from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import Range, range_of
from trimpoint.quiet import quiet
from trimpoint.runtimes import onnx_graph
from trimpoint.runtimes.calibration import Feed, batch_axes, samples, unpadded
from trimpoint.values import Format

MEMORY = 64 * 2**20
"""Bytes of activations that are held at once, at most, unless one sample has more."""


def float_tensors(model: ModelProto) -> set[str]:
    """Return the float32 tensors that are computed, by the shapes that were inferred before."""
    constants = {tensor.name for tensor in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT} - constants


def observe(model: ModelProto, wanted: Mapping[str, Format], feeds: Iterable[Feed]) -> dict[str, Range]:
    """Return the range of each tensor by the rule of its format.

    Batches are cut into pieces whose activations fit in `MEMORY`, if all inputs that change have a dimension of the
    same name, the samples. Where a mask tells padding, see `trimpoint.padding`, samples are cut to their own length
    first, so that padding is not seen; those too short for the model are seen with it. What is kept of a tensor does
    not grow with the data.

    Args:
        model: float32, with shapes inferred; stays as it is.
        wanted: tensor name → format.
        feeds: input name → array, batch after batch; read one at a time.

    Raises:
        DataError: if there are no samples, or a tensor is not finite on one, naming it.
        LoweringError: if ONNX Runtime cannot run the model.
    """
    extremes = [name for name, kind in wanted.items() if kind.observer == "minmax"]
    counted = {name: Histogram() for name in wanted if name not in extremes}
    session = _session(model, extremes, list(counted))
    seen: dict[str, Range] = {}
    outputs = [output.name for output in session.get_outputs()]
    pieces = 0
    for piece in _pieces(model, session, feeds):
        found = dict(zip(outputs, _run(session, outputs, piece), strict=True))
        pieces += 1
        for name in extremes:
            low, high = float(found[_extreme(name, "Min")]), float(found[_extreme(name, "Max")])
            if not np.isfinite((low, high)).all() or np.isnan(found[_extreme(name, "SumSquare")]):
                raise DataError(_not_finite(model, name), "check the calibration data for outliers and NaNs")
            before = seen.get(name, (0.0, 0.0))
            seen[name] = min(before[0], low), max(before[1], high)
        for name, histogram in counted.items():
            try:
                histogram.add(found[name])
            except DataError as error:
                raise DataError(_not_finite(model, name), "check the calibration data for outliers and NaNs") from error
    if not pieces:
        raise DataError("Calibration needs at least one sample that is not all padding. Got none.")
    return seen | {name: range_of(histogram, wanted[name]) for name, histogram in counted.items()}


def _session(model: ModelProto, extremes: list[str], whole: list[str]) -> onnxruntime.InferenceSession:
    """Return a session whose outputs are the extremes of some tensors, and others whole."""
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in extremes:
        for kind in ("Min", "Max", "SumSquare"):  # extremes may pass NaNs over, a sum of squares does not
            watched.graph.node.append(helper.make_node(f"Reduce{kind}", [name], [_extreme(name, kind)], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(_extreme(name, kind), TensorProto.FLOAT, []))
    for name in whole:
        watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        with quiet():
            return onnxruntime.InferenceSession(
                onnx_graph.serialize(watched), options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:
        raise LoweringError(f"ONNX Runtime cannot run the model to calibrate it: {error}") from error


def _extreme(name: str, kind: str) -> str:
    return f"{name}::{kind}"


def _not_finite(model: ModelProto, name: str) -> str:
    made = next((node.op_type for node in model.graph.node if name in node.output), "input")
    return f"The calibration data leads to values that are not finite at `{name}` ({made})."


def _pieces(model: ModelProto, session: onnxruntime.InferenceSession, feeds: Iterable[Feed]) -> Iterator[Feed]:
    """Yield the batches in pieces without padding, as many samples in each as `MEMORY` allows."""
    dims = {value.name: [d.dim_param for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    taken = {entry.name for entry in session.get_inputs()}
    axes = batch_axes(dims)
    sizes: dict[tuple[tuple[int, ...], ...], int] = {}

    def at_once(feed: Feed) -> int:
        one = samples(feed, axes, [0])
        shape = tuple(array.shape for array in one.values())
        if shape not in sizes:
            sizes[shape] = _samples_at_once(session, one)
        return sizes[shape]

    for feed in feeds:
        read = {name: array for name, array in feed.items() if name in taken}
        if not axes:
            yield read
            continue
        if 0 in (array.shape[axes[name]] for name, array in read.items() if name in axes):
            continue
        for piece, padded in unpadded(read, dims, axes):
            try:
                step, same = at_once(piece), piece
            except LoweringError:
                if piece is padded:
                    raise
                step, same = at_once(padded), padded
            first = next(iter(axes))
            count = same[first].shape[axes[first]]
            for start in range(0, count, step):
                yield samples(same, axes, range(start, min(start + step, count)))


def _run(session: onnxruntime.InferenceSession, outputs: list[str], feed: Feed) -> list[np.ndarray]:
    try:
        return list(session.run(outputs, feed))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise LoweringError(f"ONNX Runtime cannot run the model on calibration data ({shapes}): {error}") from error


def _samples_at_once(session: onnxruntime.InferenceSession, sample: Feed) -> int:
    found = _run(session, [output.name for output in session.get_outputs()], sample)
    return max(1, MEMORY // max(1, sum(int(array.nbytes) for array in found)))
