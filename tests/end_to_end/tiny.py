"""A network that trains and exports in a second, its task, and measurements that are the same every time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint import Task
from trimpoint.measure.latency import LatencyResult
from trimpoint.measure.memory import MemoryResult
from trimpoint.methods.distill import Distill
from trimpoint.runtimes.base import OperatorTime
from trimpoint.search import workbench


class Residual(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def untrained(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 32), Residual(32), Residual(32), Residual(32), nn.Linear(32, 3)).eval()


def samples(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :3] * 2 + x[:, 3:6]).argmax(1))


def model() -> nn.Module:
    torch.set_num_threads(1)
    made = untrained().train()
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    x, y = samples(512, 0).tensors
    for _ in range(6):
        for start in range(0, len(x), 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(x[start : start + 64]), y[start : start + 64]).backward()
            optimizer.step()
    return made.eval()


def task() -> Task:
    return Task.classification(samples(512, 0), samples(300, 1), samples(400, 2), batch_size=64)


def recovery() -> Distill:
    return Distill(epochs=2.0, lr=2e-3)


# What can be wrong


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def branching() -> nn.Module:
    return nn.Sequential(untrained(), Branch())


def not_finite() -> nn.Module:
    made = untrained()
    with torch.no_grad():
        made[0].weight[0, 0] = float("nan")
    return made


@contextmanager
def replayed() -> Iterator[None]:
    """Replace what is timed by functions of the files, so that two runs measure the same."""

    def latency(candidates: Mapping[str, Any], target: Any, inputs_by_shape: Mapping[str, Any], *, baseline: str, **_):
        base = candidates[baseline].bytes

        def result(size: int) -> LatencyResult:
            ms, ratio = size * 1e-6, base / size
            return LatencyResult(
                median_ms=ms,
                low_ms=ms,
                high_ms=ms,
                p95_ms=ms,
                spread_ms=0.0,
                throughput_per_s=1e3 / ms,
                ratio=ratio,
                ratio_low=ratio,
                ratio_high=ratio,
                rounds=3,
                calls=3,
                how="replayed",
            )

        return {name: dict.fromkeys(inputs_by_shape, result(files.bytes)) for name, files in candidates.items()}

    def memory(files: Any, *_, **__) -> MemoryResult:
        return MemoryResult(peak_rss_bytes=10 * files.bytes, increase_bytes=files.bytes, how="replayed")

    def operators(bench: Any, plan: Any) -> list[OperatorTime]:
        return [OperatorTime(name=p, kind="Gemm", module=p, ms=count * 1e-6) for p, count in bench.leaves.items()]

    speeds = mock.patch.object(workbench.Workbench, "training_speed", return_value=1.0)
    with (
        mock.patch.object(workbench, "measure_latency", latency),
        mock.patch.object(workbench, "measure_memory", memory),
        mock.patch.object(workbench.Workbench, "operators", operators),
        speeds,
    ):
        yield
