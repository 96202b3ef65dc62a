"""What the scenarios on single weights share: export, run the file, count its zeros."""

import gzip
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from trimpoint.measure.quality import evaluate
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.score import Score
from trimpoint.task import Role, Task

Row = dict[str, Any]


def measured(module: nn.Module, task: Task, scores: tuple[Score, ...], roles: tuple[Role, ...]) -> Row:
    """Export a module and return the scores, the bytes and the zeros of the file that ONNX Runtime runs.

    Args:
        module: to be exported.
        task: its data.
        scores: to take.
        roles: of the data to take them on.

    Returns:
        `<score>_<role>`; `file_bytes`; `gzip_bytes`: of the file after gzip; `zero_share`: of the elements of all
        initialisers of two or more dimensions.
    """
    runtime = get_runtime("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="trimpoint-", ignore_cleanup_errors=True) as name:
        out = Path(name)
        lowered = runtime.lower(export(module, task.example_batch(2), task.dynamic_dims()), out)
        session = runtime.open(out, lowered, threads=1)
        row: Row = {
            f"{score.name}_{role}": evaluate(session, task.with_(score=score), role).value
            for score in scores
            for role in roles
        }
        return row | _contents([out / name for names in lowered.files.values() for name in names])


def _contents(files: list[Path]) -> Row:
    import onnx

    graphs = [onnx.load(path).graph for path in files if path.suffix == ".onnx"]
    tensors = [onnx.numpy_helper.to_array(tensor) for graph in graphs for tensor in graph.initializer]
    weights = [tensor for tensor in tensors if tensor.ndim >= 2]
    return {
        "file_bytes": sum(path.stat().st_size for path in files),
        "gzip_bytes": sum(len(gzip.compress(path.read_bytes(), mtime=0)) for path in files),
        "zero_share": sum(int(np.count_nonzero(w == 0)) for w in weights) / sum(w.size for w in weights),
    }
