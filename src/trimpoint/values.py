"""The immutable values that flow through trimpoint, and their JSON form.

Nothing here imports torch: values are read where only numpy and a runtime are installed.
"""

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trimpoint.errors import TrimpointError

T = TypeVar("T")
Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured number with what is needed to believe it.

    Args:
        value: the number (a median where `n` > 1 and `how` does not say otherwise).
        unit: such as `"ms"`, `"bytes"`, `"1"`.
        better: whether lower or higher is better, or neither.
        n: how many observations it rests on.
        low: lower end of its 95 % interval, where one was taken.
        high: upper end of that interval.
        how: how it was taken, in a few words.
        where: the machine and runtime it holds for.
    """

    value: float
    unit: str
    better: Better = "lower"
    n: int = 1
    low: float | None = None
    high: float | None = None
    how: str = ""
    where: str = ""

    def __str__(self) -> str:
        spread = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{spread} {'' if self.unit == '1' else self.unit}".rstrip()


@dataclass(frozen=True)
class Profile(Mapping[str, Measurement]):
    """What was measured of one artifact on one target: metric name → `Measurement`.

    Args:
        metrics: the measurements, under the field's names (`latency_ms`, `file_bytes`, `params`, `macs`, …).
        missing: metric name → why it could not be measured here.
        notes: what a reader must know to read the numbers, such as what was not counted.
    """

    metrics: dict[str, Measurement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measurement:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def __or__(self, other: "Profile") -> "Profile":
        """Return both profiles as one; where both have a metric, `other` counts."""
        return Profile(
            {**self.metrics, **other.metrics},
            {name: why for name, why in {**self.missing, **other.missing}.items() if name not in other.metrics},
            tuple(dict.fromkeys(self.notes + other.notes)),
        )


ChangeKind = Literal["replaced", "resized", "bypassed", "masked", "assigned", "trained", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one method did to one module, or why it did nothing.

    Args:
        method: name of the method, such as `"drop-blocks"`.
        origin: path of the module in the *unmodified* model.
        kind: what happened.
        before: the module before, in a few words (`"Conv2d 16→16"`).
        after: the module afterwards; empty when skipped.
        reason: why it was skipped, or how it was chosen.
    """

    method: str
    origin: str
    kind: ChangeKind
    before: str = ""
    after: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format for one tensor.

    Args:
        dtype: `"int8"`, `"uint8"`, `"float32"` (later ones: `"int4"`, `"bfloat16"`, …).
        granularity: one scale per tensor, per channel or per group.
        symmetric: whether the zero point is zero.
        reduce_range: use 7 of the 8 bits (safe on CPUs whose 16-bit accumulation saturates).
        observer: how the range of an activation is taken from what was seen of it.
        percentile: of its values that the range holds, where `observer` says so.
        dynamic: the range of an activation is that of its values in each call, and nothing is observed beforehand.
    """

    dtype: str
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    symmetric: bool = True
    reduce_range: bool = False
    observer: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    percentile: float = 99.99
    dynamic: bool = False

    @property
    def bits(self) -> int:
        """The number of bits of a value.

        Example:
            >>> Format(dtype="uint8").bits, Format(dtype="float32").bits
            (8, 32)
        """
        return int("".join(letter for letter in self.dtype if letter.isdigit()))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A score on one role of the task's data, paired with the baseline's.

    Args:
        name: of the score.
        value: the score.
        n: number of samples.
        split: the role of the data (`"select"`, `"certify"`, …).
        better: whether a higher or a lower score is better.
        low: lower end of the 95 % interval of `value`.
        high: upper end of that interval.
        drop: how much worse than the baseline, positive is worse; `None` for the baseline itself.
        drop_upper: one-sided 95 % upper bound of `drop`.
        drop_forecast: upper bound, or a lower one, that a certificate states in four of five draws of its data.
    """

    name: str
    value: float
    n: int
    split: str
    better: Literal["lower", "higher"] = "higher"
    low: float | None = None
    high: float | None = None
    drop: float | None = None
    drop_upper: float | None = None
    drop_forecast: float | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A statement about the quality of one artifact on data that took no part in making it.

    Args:
        status: `passed` (upper bound within the margin), `unproven` (too few samples to tell), `failed` (the drop is
            proven to exceed the margin, or its estimate does).
        score: name of the score.
        margin: the drop that was allowed, in the score's own unit.
        drop: the estimated drop against the reference; positive is worse.
        upper: one-sided upper bound of the drop at `level`.
        level: of the bound, after correction for `looks`.
        n: number of samples.
        baseline: score of the reference.
        value: score of the artifact.
        lost: samples that the reference got right and the artifact wrong; `None` where the score is no proportion.
        gained: the reverse.
        needed: samples needed to pass if the true drop were the estimated one (80 % power); `None` if none suffice.
        looks: how often this data had been opened to certify, this time and the finalists declared with it included.
        reference: what the drop is measured against.
        method: the interval that was used.
        data: SHA-256 of the certification data.
        runtime: the runtime and its version.
        instruction_set: of the CPU on which the answers were computed.
    """

    status: Literal["passed", "unproven", "failed"]
    score: str
    margin: float
    drop: float
    upper: float
    level: float
    n: int
    baseline: float
    value: float
    lost: int | None = None
    gained: int | None = None
    needed: int | None = None
    looks: int = 1
    reference: str = "the unmodified model in the same runtime"
    method: str = ""
    data: str = ""
    runtime: str = ""
    instruction_set: str = ""


TrialState = Literal["running", "complete", "infeasible", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Trial:
    """One plan at one rung, and what came of it.

    Args:
        number: position in the study.
        role: the unmodified model, the runtime's own one-line int8, or a candidate of the search.
        plan: the plan in its JSON form.
        plan_hash: content hash of the plan.
        rung: how far its last recovery went, 0 the shortest.
        state: how it ended. `infeasible`: its shape cannot meet the limits. `stopped`: not promoted or cut off.
        label: the plan in a few words.
        profile: what was measured.
        quality: on `select`.
        changes: what the plan did to the model.
        seconds: it took.
        error: message of what went wrong.
        artifact: directory of its artifact, relative to the study.
        certificate: where it was a finalist.
    """

    number: int
    plan: dict[str, Any]
    plan_hash: str
    rung: int
    state: TrialState
    role: Literal["baseline", "one_line_int8", "candidate"] = "candidate"
    label: str = ""
    profile: Profile = field(default_factory=Profile)
    quality: Quality | None = None
    changes: tuple[Change, ...] = ()
    seconds: float = 0.0
    error: str = ""
    artifact: str | None = None
    certificate: Certificate | None = None

    def __repr__(self) -> str:
        parts = [str(self.number), self.label, self.state]
        parts += [f"{name} {self.profile[name]}" for name in ("latency_ratio", "file_bytes") if name in self.profile]
        parts += [f"{self.quality.name} {self.quality.value:.4g}"] if self.quality else []
        parts += [f"certificate {self.certificate.status}"] if self.certificate else []
        return f"Trial({', '.join(part for part in parts if part)})"


def to_data(value: Any) -> Any:
    """Return `value` as JSON data: dataclasses as objects, tuples as lists, numbers that are not finite as strings.

    Example:
        >>> to_data(Format(dtype="int8"))["granularity"]
        'tensor'
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_data(kind: type[T], data: Any) -> T:
    """Return the value of type `kind` whose `to_data` is `data`.

    Raises:
        TrimpointError: if `data` has keys or types that `kind` has not.
    """
    return typing.cast(T, _read(kind, data, kind.__name__))


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _read_union([arg for arg in args if arg is not type(None)], data, where)
    if origin is Literal:
        if data not in args:
            raise TrimpointError(f"{where} must be one of {', '.join(map(repr, args))}. Got {data!r}.")
        return data
    if origin is tuple:
        _expect(data, list, where)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(args[0], item, where) for item in data)
        return tuple(_read(arg, item, where) for arg, item in zip(args, data, strict=True))
    if origin in (dict, Mapping) or kind is dict:
        _expect(data, dict, where)
        item_kind = args[1] if args else Any
        return {key: _read(item_kind, item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), data, where)
    if kind is float:
        if not isinstance(data, (int, float, str)) or isinstance(data, bool):
            raise TrimpointError(f"{where} must be a number. Got {data!r}.")
        try:
            return float(data)
        except ValueError:
            raise TrimpointError(f"{where} must be a number. Got {data!r}.") from None
    if isinstance(kind, type):
        _expect(data, kind, where)
    return data


def _read_union(kinds: list[Any], data: Any, where: str) -> Any:
    """Read `data` as the first of `kinds` that it fits."""
    for kind in kinds[:-1]:
        try:
            return _read(kind, data, where)
        except TrimpointError:
            continue
    return _read(kinds[-1], data, where)


def _read_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(data, dict, where)
    hints = get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - fields):
        raise TrimpointError(f"{where} has no field {unknown[0]!r}. Its fields are {', '.join(sorted(fields))}.")
    try:
        return kind(**{key: _read(hints[key], item, f"{where}.{key}") for key, item in data.items()})
    except TypeError as error:
        raise TrimpointError(f"{where} is incomplete: {error}.") from error


def _expect(data: Any, kind: type, where: str) -> None:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise TrimpointError(f"{where} must be a {kind.__name__}. Got {data!r}.")


def dumps(value: Any) -> str:
    """Return `value` as indented JSON with a final newline, keys in their own order."""
    return json.dumps(to_data(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
