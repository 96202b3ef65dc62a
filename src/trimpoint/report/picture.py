"""The frontier as a picture: positions and labels are computed here, drawn by a template.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), which people of all types of colour vision can
tell apart; every family of plans has a shape of its own besides.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimpoint.report.data import frontier_trials, metric, trial_of
from trimpoint.report.words import METRIC_NAMES, significant, trial_text

if TYPE_CHECKING:
    from trimpoint.search.record import StudyRecord
    from trimpoint.values import Trial

SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross", "hexagon")
OTHERS = "other combinations"
WINDOW = 6.0
"""Trials whose score lies further below the baseline than this many allowed drops are drawn at the lower edge."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A line of the grid: its position in pixels and its label."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A trial in the picture; positions in pixels, bars as `(from, to)`."""

    x: float
    y: float
    path: str
    family: int
    number: int
    title: str
    role: str
    on_frontier: bool
    below: bool
    bar_x: tuple[float, float] | None
    bar_y: tuple[float, float] | None
    caption: str = ""
    caption_anchor: str = "start"
    caption_x: float = 0.0
    caption_y: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A frontier ready to be drawn; all positions in pixels of `width` × `height`."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    marks: tuple[Mark, ...]
    line: str
    floor: float | None
    floor_label: str
    legend: tuple[tuple[int, str, str], ...]
    below: int


@dataclass(frozen=True)
class Scale:
    """A linear map of values to pixels (of their logarithms where `log`); `low` may be above `high`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of `value`, held inside the picture."""
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            values = [m * 10.0**power for power in decades for m in (1, 2, 5)]
            inside = [value for value in values if self.low <= value <= self.high]
            if len(inside) >= 2:
                return inside
        low, high = sorted((self.low, self.high))
        raw = (high - low) / max(count, 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(low / step - 1e-9)
        return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def families(record: "StudyRecord", recovery: frozenset[str]) -> dict[int, str]:
    """Return for each trial which transforms its plan combines; plans that differ in strength are one family.

    Args:
        record: of the study.
        recovery: names of the methods that only recover quality; they make no family.
    """
    names = {"baseline": "unmodified", "one_line_int8": "one-line int8"}
    result = {}
    for trial in record.trials:
        steps = trial.plan.get("steps", [])
        used = dict.fromkeys(str(step.get("method")) for step in steps if step.get("method") not in recovery)
        result[trial.number] = names.get(trial.role) or " + ".join(used) or "recovery only"
    return result


def _staircase(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that have the best score of all that are as fast or faster, left to right."""
    best: list[Mark] = []
    for mark in sorted((m for m in marks if not m.below), key=lambda m: (m.x, m.y)):
        if not best or mark.y < best[-1].y:
            best.append(mark)
    return best


def frontier_picture(
    record: "StudyRecord", *, width: int, height: int, recovery: frozenset[str] = frozenset()
) -> Picture | None:
    """Return the picture of a study: latency to the right, score upwards (better is always up).

    Returns:
        The picture, or `None` where fewer than one trial has both a latency and a score.
    """
    trials = [t for t in record.trials if t.quality is not None and metric(t, "latency_ms") is not None]
    if not trials:
        return None
    box = (62.0, width - 14.0, 14.0, height - 46.0)
    x, y, floor = _scales(record, trials, box)
    kinds, order = _numbered_families(record, trials, recovery)
    marks = [_mark(record, trial, x, y, kinds[trial.number]) for trial in trials]
    quality = trials[0].quality
    better = "higher" if quality is None else quality.better
    split = "" if quality is None else f" on {quality.split}"
    percent = record.score == "accuracy"
    frontier = {mark.number: mark for mark in marks if mark.on_frontier}
    chain = [frontier[t.number] for t in frontier_trials(record) if t.number in frontier]
    return Picture(
        width=width,
        height=height,
        left=box[0],
        right=box[1],
        top=box[2],
        bottom=box[3],
        x_ticks=tuple(Tick(at=x(v), label=f"{v:.4g}") for v in x.ticks(max(3, width // 110))),
        y_ticks=tuple(Tick(at=y(v), label=_score_tick(v, percent)) for v in y.ticks(max(4, height // 60))),
        x_title=f"{METRIC_NAMES['latency_ms']} in ms{', logarithmic' if x.log else ''} (left is better)",
        y_title=f"{record.score}{split}{' in %' if percent else ''} ({better} is better)",
        marks=tuple(_captioned(marks, record, box, None if floor is None else y(floor))),
        line=" ".join(f"{mark.x},{mark.y}" for mark in _staircase(chain)),
        floor=None if floor is None else y(floor),
        floor_label="allowed drop",
        legend=tuple((number, name, shape_path(number, 9, 9, 6)) for name, number in order.items()),
        below=sum(mark.below for mark in marks),
    )


def _scales(
    record: "StudyRecord", trials: "Sequence[Trial]", box: tuple[float, float, float, float]
) -> tuple[Scale, Scale, float | None]:
    left, right, top, bottom = box
    latencies = [value for trial in trials if (value := metric(trial, "latency_ms"))]
    low, high = min(latencies), max(latencies)
    log = high > 5 * low
    pad = 1.12 if log else 0.06 * (high - low or high)
    x = Scale(low / pad, high * pad, left, right, True) if log else Scale(max(low - pad, 0), high + pad, left, right)
    scores = {trial.number: trial.quality.value for trial in trials if trial.quality is not None}
    better = next(trial.quality.better for trial in trials if trial.quality is not None)
    sign = 1.0 if better == "higher" else -1.0
    base = scores.get(record.baseline.number) if record.baseline is not None else None
    kept = [sign * value for value in scores.values()]
    floor = None
    if base is not None:
        allowed = record.goal.allowed_drop(base)
        floor = base - sign * allowed
        shown = {
            t.number
            for t in (record.baseline, record.one_line_int8, record.chosen, trial_of(record, record.nearest))
            if t is not None
        }
        edge = sign * base - WINDOW * max(allowed, 0.002 * abs(base))
        kept = [sign * v for n, v in scores.items() if n in shown or sign * v >= edge] + [sign * floor]
    kept += [
        max(sign * end for end in (q.low, q.high) if end is not None)
        for t in trials
        if (q := t.quality) is not None and q.low is not None and (t.role != "candidate" or t.number in record.frontier)
    ]
    worst, best = min(kept), max(kept)
    margin = 0.06 * (best - worst or abs(best) or 1.0)
    return x, Scale(sign * (worst - margin), sign * (best + margin), bottom, top), floor


def _numbered_families(
    record: "StudyRecord", trials: "Sequence[Trial]", recovery: frozenset[str]
) -> tuple[dict[int, int], dict[str, int]]:
    names = families(record, recovery)
    counts = Counter(names[trial.number] for trial in trials if trial.role == "candidate")
    order = {name: index for index, (name, _) in enumerate(counts.most_common(len(SHAPES) - 1))}
    if len(counts) > len(order):
        order[OTHERS] = len(SHAPES) - 1
    return {t.number: order.get(names[t.number], order.get(OTHERS, 0)) for t in trials}, order


def _mark(record: "StudyRecord", trial: "Trial", x: Scale, y: Scale, family: int) -> Mark:
    quality, latency = trial.quality, trial.profile["latency_ms"]
    value = quality.value if quality is not None else 0.0
    worse_edge, better_edge = y.low, y.high
    below = value < worse_edge if worse_edge < better_edge else value > worse_edge
    at = (x(latency.value), y(value) - (6.0 if below else 0.0))
    size = metric(trial, "file_bytes")
    biggest = max((s for t in record.trials if (s := metric(t, "file_bytes"))), default=None)
    radius = 6.0 if not size or not biggest else 3.5 + 5.5 * math.sqrt(size / biggest)
    bars = quality is not None and quality.low is not None and quality.high is not None and not below
    return Mark(
        x=at[0],
        y=at[1],
        path=shape_path(family, at[0], at[1], radius),
        family=family,
        number=trial.number,
        title=f"#{trial.number} {trial_text(trial)}",
        role="chosen" if trial.number == record.best else trial.role,
        on_frontier=trial.number in record.frontier,
        below=below,
        bar_x=None if latency.low is None or latency.high is None else (x(latency.low), x(latency.high)),
        bar_y=(y(quality.low), y(quality.high))
        if bars and quality is not None and quality.low is not None and quality.high is not None
        else None,
    )


def _captioned(
    marks: Sequence[Mark], record: "StudyRecord", box: tuple[float, float, float, float], floor: float | None
) -> list[Mark]:
    """Give the original, the one-line int8 and the chosen trial captions that cover as few other marks as possible."""
    names = {"baseline": "original", "one_line_int8": "one-line int8", "chosen": "chosen"}
    placed = [] if floor is None else [(box[0], box[0] + 85, floor - 17, floor)]
    result = []
    for mark in sorted(marks, key=lambda m: (m.role in names, m.number == record.best)):
        name = names.get(mark.role) or ("nearest" if mark.number == record.nearest else "")
        if not name:
            result.append(mark)
            continue
        length = 7.2 * len(name)
        options = []
        for reach in (14.0, 26.0, 42.0, 60.0):
            for side, up in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
                at_x, at_y = mark.x + side * 9, mark.y - up * reach + 4
                area = (at_x if side > 0 else at_x - length, at_x + length if side > 0 else at_x, at_y - 11, at_y + 3)
                options.append((_covered(area, marks, placed, box) + reach / 100, at_x, at_y, side, area))
        _, at_x, at_y, side, area = min(options)
        placed.append(area)
        result.append(
            replace(mark, caption=name, caption_x=at_x, caption_y=at_y, caption_anchor="start" if side > 0 else "end")
        )
    return result


def _covered(
    area: tuple[float, float, float, float],
    marks: Sequence[Mark],
    placed: Sequence[tuple[float, float, float, float]],
    box: tuple[float, float, float, float],
) -> float:
    """Return how much a caption at `area` (left, right, top, bottom) would cover; lower is better."""
    left, right, top, bottom = area
    outside = 20.0 * (left < box[0] or right > box[1] or top < box[2] - 8 or bottom > box[3])
    dots = sum(left - 7 < m.x < right + 7 and top - 7 < m.y < bottom + 7 for m in marks)
    words = sum(left < b and a < right and top < d and c < bottom for a, b, c, d in placed)
    return outside + dots + 5.0 * words


def _score_tick(value: float, percent: bool) -> str:
    return f"{100 * value:.4g}" if percent else f"{value:.4g}" if abs(value) < 1e4 else significant(value)


def shape_path(family: int, x: float, y: float, r: float) -> str:
    """Return the SVG path of a family's shape around a point, its area about that of a circle of radius `r`."""
    shape = SHAPES[family % len(SHAPES)]
    if shape == "circle":
        return f"M{x - r:.1f},{y:.1f}a{r:.1f},{r:.1f} 0 1,0 {2 * r:.1f},0a{r:.1f},{r:.1f} 0 1,0 {-2 * r:.1f},0z"
    corners = {
        "square": [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        "triangle": [(0, -1.5), (1.3, 0.75), (-1.3, 0.75)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "down": [(0, 1.5), (1.3, -0.75), (-1.3, -0.75)],
        "cross": [
            *((-0.4, -1.15), (0.4, -1.15), (0.4, -0.4), (1.15, -0.4), (1.15, 0.4), (0.4, 0.4)),
            *((0.4, 1.15), (-0.4, 1.15), (-0.4, 0.4), (-1.15, 0.4), (-1.15, -0.4), (-0.4, -0.4)),
        ],
        "hexagon": [(math.sin(k * math.pi / 3) * 1.1, math.cos(k * math.pi / 3) * 1.1) for k in range(6)],
    }[shape]
    return "M" + "L".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners) + "z"
