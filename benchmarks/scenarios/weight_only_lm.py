"""Weights of 4, 3 and 2 bits in a small language model: what GPTQ, AWQ and HQQ save of what rounding loses.

The peers are ONNX Runtime's own quantisers of matrices, to nearest and HQQ, with as many bits and as large blocks.
All linear layers are quantised, the embeddings are not. Modules are scored in PyTorch, whose weights are the file's
integers; files are scored in ONNX Runtime on one thread.
"""

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from benchmarks.checkpoints.decoder_wikitext2 import loss, model, perplexity
from benchmarks.comparison import goal
from benchmarks.datasets.text import wikitext2
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch.utils.data import TensorDataset

from trimpoint.compress import Compressed, compress
from trimpoint.graph import baked
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.plan import Plan
from trimpoint.quiet import quiet
from trimpoint.runtimes import get_runtime, onnx_graph
from trimpoint.runtimes.base import Exported, Lowered, Session
from trimpoint.runtimes.export import export
from trimpoint.runtimes.onnxruntime import FILE
from trimpoint.task import Task

QUESTION = "How much of what rounding to few bits costs a language model do GPTQ, AWQ and HQQ save?"
RULES: dict[str, dict[str, Any]] = {
    "to nearest, range by the largest": {"rounding": "nearest", "scale": "largest"},
    "to nearest": {"rounding": "nearest"},
    "GPTQ": {"rounding": "gptq"},
    "AWQ": {"rounding": "awq"},
    "HQQ": {"rounding": "hqq", "scale": "largest"},
}
PLAIN = next(iter(RULES))
WINDOWS, GROUP, ROUNDS = 256, 32, 5
"""Windows of 128 words of the test text that all are scored on: the first ones."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Score all rules at all widths, and the files of the runtime at 4 bits in groups."""
    network, roles = model(), wikitext2()[0]
    task = Task(calibrate=roles["calibrate"], loss=loss, batch_size=16)
    test = TensorDataset(*(tensor[:WINDOWS] for tensor in roles["test"].tensors))
    found = {("float32", 32, 0): perplexity(network, test)}
    for bits in (3, 4, 2):
        for group in (0, GROUP):
            for name, params in RULES.items():
                made = _made(network, task, bits=bits, group=group, **params)
                found[name, bits, group] = perplexity(baked(made.module), test)
                print(name, bits, group, f"{found[name, bits, group]:.2f}", flush=True)
    exact = found["float32", 32, 0]
    rows: list[dict[str, Any]] = [
        {
            "system": name,
            "bits": bits,
            "group": group,
            "perplexity": value,
            "gap_closed": None if bits == 32 else 1 - (value - exact) / (found[PLAIN, bits, group] - exact),
        }
        for (name, bits, group), value in found.items()
    ]
    files = _files(network, task, test, resume_dir)
    rows += [{"system": f"file, {name}", **numbers} for name, numbers in files.items()]
    ours, peers = files["GPTQ"], [numbers for name, numbers in files.items() if name.startswith("peer")]
    closed = {(row["system"], row["bits"], row["group"]): row["gap_closed"] for row in rows if "gap_closed" in row}
    return {
        "rows": rows,
        "goals": [
            goal("share of the gap of 3 bits per channel that GPTQ closes", closed["GPTQ", 3, 0], 0.7, 0.85),
            goal(f"the same in groups of {GROUP}", closed["GPTQ", 3, GROUP], 0.7, 0.85),
            goal(
                "perplexity of the file at 4 bits ÷ that of the best peer",
                ours["perplexity"] / min(peer["perplexity"] for peer in peers),
                1.0,
                None,
                better="lower",
            ),
            goal(
                "bytes of the file ÷ those of the smallest peer",
                ours["bytes"] / min(peer["bytes"] for peer in peers),
                1.0,
                None,
                better="lower",
            ),
            goal(
                "speed of the file ÷ that of the fastest peer",
                min(peer["ms"] for peer in peers) / ours["ms"],
                1.0,
                None,
            ),
        ],
    }


def _made(network: torch.nn.Module, task: Task, **params: Any) -> Compressed:
    return compress(network, Plan().then(QuantizeWeights(**params)), task)


def _files(network: torch.nn.Module, task: Task, test: TensorDataset, resume_dir: Path) -> dict[str, dict[str, float]]:
    """Return bytes, perplexity and the median time of one window for each file, timed in turns."""
    runtime, batch = get_runtime("onnxruntime"), test.tensors[0][:2]
    dims = {"input": {0: "batch"}}
    plain = export(network, batch, dims)
    made = _made(network, task, bits=4, group=GROUP)
    sessions: dict[str, Session] = {}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=resume_dir) as scratch:
        for name in ("float32", "GPTQ", "peer, to nearest", "peer, HQQ"):
            out = Path(scratch) / name
            out.mkdir()
            if name.startswith("peer"):
                lowered = _peer(plain, out, "HQQ" in name)
            elif name == "GPTQ":
                lowered = runtime.lower(export(made.module, batch, dims), out, formats=made.formats)
            else:
                lowered = runtime.lower(plain, out)
            sessions[name] = runtime.open(out, lowered)
            found[name] = {"bytes": (out / FILE).stat().st_size, "perplexity": _perplexity(sessions[name], test)}
            print(name, found[name], flush=True)
        one = np.asarray(test.tensors[0][:1])
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS * 4):
            for name, session in sessions.items():
                start = time.perf_counter()
                for _ in range(5):
                    session(one)
                seconds[name].append((time.perf_counter() - start) / 5)
    return {name: numbers | {"ms": 1e3 * statistics.median(seconds[name])} for name, numbers in found.items()}


def _peer(exported: Exported, directory: Path, by_hqq: bool) -> Lowered:
    """Lower with ONNX Runtime's quantiser of matrices."""
    config = (
        HQQWeightOnlyQuantConfig(block_size=GROUP, bits=4)
        if by_hqq
        else DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False, accuracy_level=4, bits=4)
    )
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            onnx_graph.parse(exported.onnx), block_size=GROUP, is_symmetric=False, accuracy_level=4, algo_config=config
        )
        quantizer.process()
    onnx.save(quantizer.model.model, directory / FILE)
    return Lowered(runtime="onnxruntime", files={"main": (FILE,)}, signature=exported.signature)


def _perplexity(session: Session, test: TensorDataset) -> float:
    pieces = zip(*(torch.split(tensor, 16) for tensor in test.tensors), strict=True)
    total = sum(float(loss(torch.from_numpy(session(x.numpy())), y)) * y.numel() for x, y in pieces)
    return math.exp(total / test.tensors[1].numel())
