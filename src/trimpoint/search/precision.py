"""Which layers to compute in int8 and which in float32, for a limit on the latency of the file as it runs."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trimpoint.compress import examine
from trimpoint.errors import InvalidParameterError
from trimpoint.filters import EVERYTHING, Filter, Glob
from trimpoint.method import Context
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.progress import SILENT, Progress
from trimpoint.quantization.allocation import cheapest
from trimpoint.quantization.sensitivity import layer_costs
from trimpoint.quantization.weights import why_no_grid
from trimpoint.runtimes.base import OperatorTime
from trimpoint.search.workbench import Workbench
from trimpoint.target import Target
from trimpoint.task import Task

ROUNDS = 6
"""How often layers are chosen anew because the file took longer than its layers do one by one."""
SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is known of one layer, and what was decided.

    Args:
        path: in the model.
        cost: how far rounding it alone moves the answers, as a share of their variance.
        float32_ms: its operators in the file of the unmodified model.
        int8_ms: its operators in the file in which all layers are int8.
        int8: whether it is to be computed in int8.
    """

    path: str
    cost: float
    float32_ms: float
    int8_ms: float
    int8: bool


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A quantise step whose `where` names the layers to be computed in int8.

    Args:
        step: to put into a plan.
        layers: what it rests on.
        latency: of the file over that of the unmodified model's, timed in turns.
        tried: what else was lowered and timed, latency by number of int8 layers.
    """

    step: Step
    layers: tuple[Layer, ...]
    latency: float
    tried: tuple[tuple[int, float], ...] = ()


def precision_by_layer(
    model: nn.Module,
    task: Task,
    target: Target | None = None,
    *,
    latency: float,
    quantiser: QuantizeStatic | None = None,
    where: Filter = EVERYTHING,
    progress: Progress = SILENT,
) -> Precision:
    """Return the int8 layers that move the answers least and make the file as fast as asked for.

    The time of each layer in each format comes from the runtime's own profile of two files, one all float32 and one
    all int8; what rounding it costs comes from the model's answers on calibration data. Layers that int8 does not make
    faster stay in float32, unless only a file without any conversions is fast enough. Conversions between formats are
    in no layer's time, so the file that results is timed, and where it misses the limit, the limit on the layers is
    tightened by as much and they are chosen again.

    Args:
        model: unmodified, in evaluation mode.
        task: with `calibrate` data.
        target: runtime and conditions.
        latency: of the file, at most, over that of the unmodified model, in (0, 1).
        quantiser: how layers are quantised.
        where: which may be.
        progress: where to tell how far it is.

    Raises:
        InvalidParameterError: if the limit is out of range, or no choice of layers is as fast; it says how fast the
            fastest one is.
        DataError: if the task has no calibration data.

    References:
        Yao et al., "HAWQ-V3: dyadic neural network quantization" (2021), for the integer program under a latency limit.
    """
    if not isinstance(latency, (int, float)) or not 0 < latency < 1:
        raise InvalidParameterError(
            f"The 'latency' parameter of precision_by_layer must be in (0, 1). Got {latency!r}.",
            "0.5 asks for half of the unmodified model's latency",
        )
    quantiser = quantiser or QuantizeStatic()
    with tempfile.TemporaryDirectory(prefix="trimpoint-", ignore_cleanup_errors=True) as name:
        bench = Workbench(model, task, target or Target(), Path(name), "precision by layer", progress)
        progress.update(text="profiling layers in float32 and in int8")
        bench.use_unmodified()
        step = Step(quantiser, where)
        costs = examine(model, task, step, lambda ctx: _costs(ctx, quantiser))
        times = {
            "float32": _by_layer(bench.operators(Plan()), list(costs)),
            "int8": _by_layer(bench.operators(Plan((step,))), list(costs)),
        }
        return _chosen(bench, step, costs, times, latency)


def _costs(ctx: Context, quantiser: QuantizeStatic) -> dict[str, float]:
    paths = [site.path for site in ctx.modules() if not site.tied and not why_no_grid(site.module)]
    return layer_costs(ctx, paths, quantiser.formats["weight"], quantiser.formats["input"], SAMPLES)


def _by_layer(operators: Sequence[OperatorTime], paths: Sequence[str]) -> dict[str, float]:
    """Return the milliseconds of each layer's operators; under an empty path, those of all others."""
    times = dict.fromkeys(("", *paths), 0.0)
    for operator in operators:
        times[operator.module if operator.module in times else ""] += operator.ms
    return times


def _chosen(
    bench: Workbench, step: Step, costs: Mapping[str, float], times: Mapping[str, Mapping[str, float]], latency: float
) -> Precision:
    whole = sum(times["float32"].values())
    pays = {path for path in costs if times["int8"][path] < times["float32"][path]}
    choices = [(path, kind) for path in costs for kind in ("float32", "int8") if kind == "float32" or path in pays]
    price = {(path, kind): costs[path] if kind == "int8" else 0.0 for path, kind in choices}
    takes = {(path, kind): times[kind][path] for path, kind in choices}
    limit, tried, best = latency, [], None
    # Where the layers' own times do not allow it, all that gain are taken, then all there are, which has the fewest
    # conversions: the file may still be fast enough.
    last = [paths for paths in (sorted(pays), sorted(costs)) if paths]
    for number in range(ROUNDS + len(last)):
        found = cheapest(price, takes, limit * whole - times["float32"][""]) if number < ROUNDS else None
        if found is None and not last:
            break
        chosen = last.pop(0) if found is None else sorted(path for path, kind in found.items() if kind == "int8")
        if not chosen:
            break
        if chosen in last:
            last.remove(chosen)
        within = replace(step, where=step.where & _any(chosen) if step.where != EVERYTHING else _any(chosen))
        bench.progress.update(text=f"timing {len(chosen)} layers in int8")
        reached = bench.shape(Plan((within,)))["latency_ms"]
        tried.append((len(chosen), reached))
        if reached <= latency:
            best = within, chosen, reached
            break
        if found is None:
            continue
        own = sum(takes[key] for key in found.items()) + times["float32"][""]
        limit = min(limit * latency / reached, own / whole * (1 - 1e-6))  # never the same layers again
    if best is None:
        fastest = min((reached for _, reached in tried), default=1.0)
        raise InvalidParameterError(
            f"No choice of int8 layers takes {latency:g} of the unmodified model's time on this target: the fastest of "
            f"those tried takes {fastest:.3g}.",
            "ask for a higher `latency`, or make the model smaller first",
        )
    within, chosen, reached = best
    layers = tuple(
        Layer(
            path=path,
            cost=cost,
            float32_ms=times["float32"][path],
            int8_ms=times["int8"][path],
            int8=path in chosen,
        )
        for path, cost in costs.items()
    )
    return Precision(step=within, layers=layers, latency=reached, tried=tuple(tried))


def _any(paths: Sequence[str]) -> Filter:
    filters: list[Any] = [Glob(path) for path in paths]
    found = filters[0]
    for each in filters[1:]:
        found = found | each
    return found  # type: ignore[no-any-return]
