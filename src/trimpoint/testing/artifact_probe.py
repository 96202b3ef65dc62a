"""Measure what a method claims on the exported file, executed by the reference runtime."""

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from trimpoint.data import as_numpy
from trimpoint.errors import TrimpointError
from trimpoint.measure.process import ArtifactFiles
from trimpoint.measure.profile import coded_profile
from trimpoint.method import Method
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Lowered, Session
from trimpoint.runtimes.export import export
from trimpoint.task import Task
from trimpoint.testing.applied import applied, core_inputs, inputs_of, joined
from trimpoint.testing.zoo import ZooEntry
from trimpoint.values import Format

RUNTIME = "onnxruntime"
REPEATS, ROUNDS = 16, 25
Formats = Mapping[str, Mapping[str, Format]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """An exported model that can be run and measured.

    Args:
        directory: of its files; removed with this value.
        lowered: what the runtime made of it.
        session: it is open in.
        task: it was made for.
    """

    directory: Path
    lowered: Lowered
    session: Session
    task: Task

    def answer(self, model: nn.Module) -> Tensor:
        """Return the outputs for one batch, as one float64 vector; `model` only serves to make the core's inputs."""
        return joined(self.session(as_numpy(core_inputs(model, self.task, inputs_of(self.task)))))

    def files(self) -> list[Path]:
        """Return the files that the runtime loads."""
        return [self.directory / name for names in self.lowered.files.values() for name in names]


@lru_cache(maxsize=16)
def probed_original(entry: ZooEntry) -> Probe:
    """Return the exported, unmodified model of a zoo entry."""
    return probe(*entry.make())


@lru_cache(maxsize=16)
def probed(method: Method, entry: ZooEntry) -> Probe:
    """Return the exported model of a zoo entry after `method`."""
    result = applied(method, entry)
    return probe(result.compressed.module, result.task, result.compressed.formats)


def probe(model: nn.Module, task: Task, formats: Formats | None = None) -> Probe:
    """Export the core of a model, lower it and open it, in a temporary directory.

    Args:
        model: in PyTorch.
        task: of the model.
        formats: assigned number formats, keyed by path in the model.

    Raises:
        ExportError: if the model cannot be exported.
        LoweringError: if the runtime cannot realise it.
    """
    runtime = get_runtime(RUNTIME)
    calibration: tuple[Any, ...] = ()
    if formats and task.calibrate is not None:
        calibration = tuple(as_numpy(core_inputs(model, task, batch)) for batch, _ in task.batches("calibrate"))
    exported = export(task.core_of(model), core_inputs(model, task, inputs_of(task)), task.dynamic_dims())
    directory = Path(tempfile.mkdtemp(prefix="trimpoint-"))
    try:
        lowered = runtime.lower(exported, directory, formats=_of_core(formats, task), calibration=calibration)
        session = runtime.open(directory, lowered, threads=1)
    except TrimpointError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    probed = Probe(directory=directory, lowered=lowered, session=session, task=task)
    weakref.finalize(probed, shutil.rmtree, directory, ignore_errors=True)
    return probed


def file_bytes(probed: Probe) -> float:
    """Return the size of the files that the runtime loads, bytes."""
    return float(sum(path.stat().st_size for path in probed.files()))


def coded_bytes(probed: Probe) -> float:
    """Return the size of one coded file that restores what the runtime loads, bytes."""
    return float(coded_profile(ArtifactFiles(directory=probed.directory, lowered=probed.lowered))["coded_bytes"].value)


def count_params(probed: Probe) -> float:
    """Return the number of weights in the file: elements of initialisers of two or more dimensions."""
    return float(sum(array.size for array in _initializers(probed).values() if array.ndim >= 2))


def count_macs(probed: Probe) -> float:
    """Return the products with weights that the file's convolutions and matrix products take for one sample."""
    import onnx

    total = 0.0
    for path in _graphs(probed):
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        shapes = {value.name: _shape(value) for value in [*model.graph.value_info, *model.graph.output]}
        weights = {name: array.shape for name, array in _initializers(probed).items()}
        sources = {output: node for node in model.graph.node for output in node.output}
        for node in model.graph.node:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                shape = weights.get(_weight_name(node.input[1], sources))
                if shape is not None and node.output[0] in shapes:
                    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
                    inner = shape[1:] if node.op_type.startswith("Conv") or transposed else shape[-2:-1]
                    total += math.prod(shapes[node.output[0]]) * math.prod(inner)
    return total


def seconds_of_both(one: Probe, other: Probe, model: nn.Module) -> tuple[float, float]:
    """Return the shortest call of each of two models with a large batch, taken in turns, seconds."""
    inputs = _repeated(as_numpy(core_inputs(model, one.task, inputs_of(one.task))), REPEATS)
    times = [(_seconds(one, inputs), _seconds(other, inputs)) for _ in range(ROUNDS)]
    return min(first for first, _ in times), min(second for _, second in times)


def _seconds(probed: Probe, inputs: Any) -> float:
    start = time.perf_counter()
    probed.session(inputs)
    return time.perf_counter() - start


def _of_core(table: Mapping[str, Any] | None, task: Task) -> dict[str, Any] | None:
    if table is None or task.core is None:
        return None if table is None else dict(table)
    prefix = f"{task.core}."
    return {path.removeprefix(prefix): value for path, value in table.items() if path.startswith(prefix)}


def _graphs(probed: Probe) -> list[Path]:
    return [path for path in probed.files() if path.suffix == ".onnx"]


def _initializers(probed: Probe) -> dict[str, Any]:
    import onnx

    found = {}
    for path in _graphs(probed):
        for tensor in onnx.load(path).graph.initializer:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return found


def _weight_name(name: str, sources: Mapping[str, Any]) -> str:
    """Return the initialiser that a weight comes from, through what dequantises or moves it."""
    while name in sources and sources[name].op_type in ("DequantizeLinear", "Transpose", "Identity", "Cast"):
        name = sources[name].input[0]
    return name


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else 1 for dim in value.type.tensor_type.shape.dim)


def _repeated(value: Any, times: int) -> Any:
    if isinstance(value, np.ndarray):
        return np.concatenate([value] * times)
    if isinstance(value, Mapping):
        return {key: _repeated(item, times) for key, item in value.items()}
    return tuple(_repeated(item, times) for item in value)
