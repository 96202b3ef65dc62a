"""Quantisers of others, on the same exported graph and calibration batches as ours, as `Comparison` takes them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
from benchmarks.comparison import Lower
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from trimpoint.quiet import quiet
from trimpoint.runtimes import onnx_graph, onnx_quantize
from trimpoint.runtimes.base import Exported, Lowered, calibration_feeds
from trimpoint.runtimes.onnxruntime import FILE

CALIBRATORS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
"""Those of ONNX Runtime."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantize_static_by(observer: str = "minmax", *, per_channel: bool = True, reduce_range: bool = True) -> Lower:
    """Return `quantize_static` of ONNX Runtime with one of its calibrators."""

    def lower(exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        with tempfile.TemporaryDirectory() as scratch, quiet():
            source = Path(scratch) / "source.onnx"
            onnx.save(onnx_quantize.preprocess(onnx_graph.parse(exported.onnx)), source)
            quantize_static(
                source,
                directory / FILE,
                _Reader(list(calibration_feeds(exported.signature, calibration))),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                reduce_range=reduce_range,
                calibrate_method=CALIBRATORS[observer],
            )
        return Lowered(runtime="onnxruntime", files={"main": (FILE,)}, signature=exported.signature)

    return lower


def quantize_dynamic_by(*, per_channel: bool = False, reduce_range: bool = False) -> Lower:
    """Return `quantize_dynamic` of ONNX Runtime, in one line by default."""

    def lower(exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:  # noqa: ARG001
        with tempfile.TemporaryDirectory() as scratch, quiet():
            source = Path(scratch) / "source.onnx"
            model = onnx_quantize.preprocess(onnx_graph.parse(exported.onnx))
            del model.graph.value_info[:]  # it fails on some of the shapes that are recorded
            onnx.save(model, source)
            quantize_dynamic(
                source,
                directory / FILE,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                reduce_range=reduce_range,
            )
        return Lowered(runtime="onnxruntime", files={"main": (FILE,)}, signature=exported.signature)

    return lower


def nncf_by(*, transformer: bool = False) -> Lower:
    """Return NNCF's post-training quantisation of the ONNX graph, with its defaults.

    Its defaults equalise channels, correct biases and have weights of 8 bits with a scale per channel.
    """

    def lower(exported: Exported, directory: Path, calibration: Sequence[Any]) -> Lowered:
        feeds = list(calibration_feeds(exported.signature, calibration))
        kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        with quiet():
            model = onnx_quantize.preprocess(onnx_graph.parse(exported.onnx))
            quantised = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), **kind)
        onnx.save(quantised, directory / FILE)
        return Lowered(runtime="onnxruntime", files={"main": (FILE,)}, signature=exported.signature)

    return lower
