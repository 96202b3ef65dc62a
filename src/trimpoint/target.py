"""Where a model must run and what it must reach. Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from trimpoint.errors import InvalidParameterError, UnknownNameError, suggest
from trimpoint.values import Better

METRICS: dict[str, Better] = {
    "latency_ms": "lower",
    "throughput_per_s": "higher",
    "file_bytes": "lower",
    "coded_bytes": "lower",
    "peak_rss_bytes": "lower",
    "params": "lower",
    "macs": "lower",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """The runtime and the conditions under which a model will run.

    Args:
        runtime: name of a runtime (`"onnxruntime"`, `"openvino"`, `"executorch"`).
        threads: that the runtime may use for one call.
        batch: samples in one call.
        lengths: named dimension → its sizes to measure at; by default those that occur in the data (shortest, median,
            95th percentile).
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidParameterError(
                    f"The {name!r} parameter of Target must be a whole number ≥ 1. Got {value!r}."
                )
        object.__setattr__(self, "lengths", {key: tuple(value) for key, value in self.lengths.items()})


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What to shrink and what must hold.

    Args:
        minimize: metrics to improve, the first one decides between equals.
        limits: metric → the most it may be (the least, where higher is better): a number, or `"0.5x"` of the baseline.
        max_drop: how much the score may drop: a number in the score's unit, or `"1%"` of the baseline's score.
    """

    minimize: tuple[str, ...] = ("latency_ms", "file_bytes")
    limits: Mapping[str, float | str] = field(default_factory=dict)
    max_drop: float | str = 0.01

    def __post_init__(self) -> None:
        for name in (*self.minimize, *self.limits):
            if name not in METRICS:
                raise UnknownNameError(f"There is no metric {name!r}.", suggest(name, list(METRICS)))
        if not self.minimize:
            raise InvalidParameterError("The 'minimize' parameter of Goal must name at least one metric.")
        for name in self.limits:
            self.limit(name, 1.0)
        self.allowed_drop(1.0)

    def limit(self, metric: str, baseline: float) -> float:
        """Return the limit on `metric` as a number, given the baseline's value.

        Raises:
            InvalidParameterError: if the limit is neither a positive number nor a ratio such as `"0.5x"`.
        """
        limit = self.limits[metric]
        number = _number(limit.removesuffix("x") if isinstance(limit, str) else limit)
        if number is None or number <= 0 or (isinstance(limit, str) and not limit.endswith("x")):
            raise InvalidParameterError(
                f"The limit on {metric!r} must be a number > 0 or a ratio to the baseline. Got {limit!r}.",
                'write a ratio like "0.5x"',
            )
        return number * baseline if isinstance(limit, str) else number

    def allowed_drop(self, baseline: float) -> float:
        """Return the allowed drop in the score's own unit, given the baseline's score.

        Raises:
            InvalidParameterError: if `max_drop` is neither a number ≥ 0 nor a share such as `"1%"`.
        """
        drop = self.max_drop
        number = _number(drop.removesuffix("%") if isinstance(drop, str) else drop)
        if number is None or number < 0 or (isinstance(drop, str) and not drop.endswith("%")):
            raise InvalidParameterError(
                f"The 'max_drop' parameter of Goal must be a number ≥ 0 or a share of the baseline. Got {drop!r}.",
                'write one point of accuracy as 0.01, one percent of any score as "1%"',
            )
        return number / 100 * abs(baseline) if isinstance(drop, str) else number


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") and not isinstance(value, bool) else None
