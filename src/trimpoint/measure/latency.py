"""Latency and throughput: artifacts timed in turns with a baseline, in a process that does nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import InvalidParameterError, MeasurementError, UnknownNameError, suggest
from trimpoint.measure.process import ArtifactFiles, measuring, run_child
from trimpoint.signature import flatten
from trimpoint.target import Target

# Student's t for a two-sided 95 % interval with 2, 3 and 4 degrees of freedom.
_STUDENT = {3: 4.302653, 4: 3.182446, 5: 2.776445}
_ROUNDS_MORE = 3


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """How long one call of one artifact takes at one shape.

    Args:
        median_ms: median over rounds of the median call of each round.
        low_ms: lower end of its 95 % interval.
        high_ms: upper end of it.
        p95_ms: 95th percentile over all calls.
        spread_ms: distance between the first and third quartile of all calls.
        throughput_per_s: samples per second: median over rounds of samples ÷ time.
        ratio: time of the baseline ÷ time of this, median over rounds; above 1 is faster.
        ratio_low: lower end of its 95 % interval.
        ratio_high: upper end of it.
        rounds: how many were used.
        calls: how many were timed in them.
        how: how it was taken.
        notes: what a reader must know, such as that the machine was disturbed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    p95_ms: float
    spread_ms: float
    throughput_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    calls: int
    how: str
    notes: tuple[str, ...] = ()


def measure_latency(
    candidates: Mapping[str, ArtifactFiles],
    target: Target,
    inputs_by_shape: Mapping[str, Any],
    *,
    baseline: str,
    rounds: int = 15,
    turn_ms: float = 30.0,
    tolerance: float = 0.1,
    seed: int = 0,
    timeout: float = 600.0,
    on_wait: Callable[[str], None] | None = None,
) -> dict[str, dict[str, LatencyResult]]:
    """Time artifacts against a baseline, at each shape.

    One new process opens them all with the target's threads. In every round each artifact has one turn of many calls,
    in random order, so that what disturbs the machine disturbs all of them; ratios are formed within a round. Rounds
    in which the baseline was slower than its own fastest round by more than `tolerance` are repeated, up to three
    times as many rounds in all; if that does not help, all rounds count and the result says so.

    Intervals over rounds are order-statistic intervals of the median (at least 95 %, distribution-free; Conover,
    "Practical Nonparametric Statistics", section 3.2), below six rounds Student's t interval of the logarithms.

    Args:
        candidates: name → files; the baseline is one of them.
        target: gives the threads.
        inputs_by_shape: name of the shape → one batch, NumPy arrays in the module's structure.
        baseline: name of the baseline.
        rounds: at least 3.
        turn_ms: length that a turn should have, milliseconds.
        tolerance: how much slower the baseline may be in a round that counts, as a share.
        seed: of the order of the turns.
        timeout: seconds after which measuring is given up.
        on_wait: called with a message if another process is measuring; standard error by default.

    Returns:
        name → shape → result.

    Raises:
        MeasurementError: if the measuring process crashes or does not come to an end.
        InvalidParameterError: if there are fewer than 3 rounds or nothing to run.
        UnknownNameError: if the baseline is not among the candidates.
    """
    if rounds < 3:
        raise InvalidParameterError(f"The 'rounds' of a latency measurement must be at least 3. Got {rounds}.")
    if not inputs_by_shape:
        raise InvalidParameterError("A latency measurement needs inputs of at least one shape. Got none.")
    if baseline not in candidates:
        raise UnknownNameError(f"There is no candidate {baseline!r}.", suggest(baseline, list(candidates)))
    with measuring(on_wait) if on_wait else measuring():
        result, arrays = run_child(
            "latency",
            candidates,
            inputs_by_shape,
            threads=target.threads,
            timeout=timeout,
            baseline=baseline,
            rounds=rounds,
            max_rounds=rounds * _ROUNDS_MORE,
            turn_ms=turn_ms,
            tolerance=tolerance,
            seed=seed,
        )
    results: dict[str, dict[str, LatencyResult]] = {name: {} for name in candidates}
    for at, (shape, inputs) in enumerate(inputs_by_shape.items()):
        used = result["used"][shape]
        times = {name: [arrays[f"{at}_{i}_{turn}"] for turn in used] for i, name in enumerate(candidates)}
        notes = _notes(times[baseline], tolerance)
        for name in candidates:
            results[name][shape] = _summary(times[name], times[baseline], _samples(inputs), target.threads, notes)
    return results


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the median of a few positive numbers and its 95 % interval.

    Example:
        >>> median_interval(np.array([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]))
        (3.5, 1.0, 6.0)
    """
    ordered, n = np.sort(values), len(values)
    middle = float(np.median(ordered))
    if n in _STUDENT:
        logs = np.log(ordered)
        half = _STUDENT[n] * float(logs.std(ddof=1)) / n**0.5
        centre = float(logs.mean())
        return middle, min(middle, float(np.exp(centre - half))), max(middle, float(np.exp(centre + half)))
    rank, below, share = 0, 0.0, 0.5**n
    while below + share <= 0.025 and rank < n // 2:
        below += share
        rank += 1
        share *= (n - rank + 1) / rank
    rank = max(rank - 1, 0)
    return middle, float(ordered[rank]), float(ordered[n - 1 - rank])


def _summary(
    turns: list[NDArray[np.int64]], base: list[NDArray[np.int64]], samples: int, threads: int, notes: tuple[str, ...]
) -> LatencyResult:
    medians = np.array([np.median(turn) for turn in turns]) / 1e6
    reference = np.array([np.median(turn) for turn in base]) / 1e6
    if not (medians > 0).all():
        raise MeasurementError("A call took no measurable time. Expected at least a nanosecond.", "check the clock")
    median, low, high = median_interval(medians)
    ratio, ratio_low, ratio_high = median_interval(reference / medians)
    calls = np.concatenate(turns) / 1e6
    quartiles = np.quantile(calls, [0.25, 0.75, 0.95])
    return LatencyResult(
        median_ms=median,
        low_ms=low,
        high_ms=high,
        p95_ms=float(quartiles[2]),
        spread_ms=float(quartiles[1] - quartiles[0]),
        throughput_per_s=float(np.median([samples * len(turn) / (turn.sum() / 1e9) for turn in turns])),
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        rounds=len(turns),
        calls=len(calls),
        how=f"median of {len(turns)} rounds interleaved with the baseline, {len(calls):,} calls, batch {samples}, "
        f"{threads} thread{'s' if threads > 1 else ''}",
        notes=notes,
    )


def _notes(base: list[NDArray[np.int64]], tolerance: float) -> tuple[str, ...]:
    medians = [float(np.median(turn)) for turn in base]
    drift = max(medians) / min(medians) - 1
    if drift <= tolerance:
        return ()
    return (
        f"the machine was disturbed: the baseline's rounds differ by {drift:.0%} after {len(base)} rounds; trust the "
        "ratios more than the times",
    )


def _samples(inputs: Any) -> int:
    return next((int(leaf.shape[0]) for leaf in flatten(inputs) if np.ndim(leaf)), 1)
