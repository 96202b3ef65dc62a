"""The demo's search, ten minutes on ResNet-20 and Fashion-MNIST, against the one-line int8 of the runtime."""

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.comparison import goal

from trimpoint.demo import GOAL
from trimpoint.measure.latency import LatencyResult, measure_latency
from trimpoint.search import open_study, resume, search
from trimpoint.search.delivery import files_of
from trimpoint.search.frontier import SCORE, Frontier
from trimpoint.search.log import FILE
from trimpoint.search.pick import ratio, speed
from trimpoint.target import Target
from trimpoint.values import Trial

QUESTION = "How small and fast does ten minutes of search make a ResNet-20 on Fashion-MNIST, at one point of accuracy?"
BUDGET = "10m"
NEAR = 0.05
"""Trials within so much of the baseline's accuracy count as points of the frontier."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Search, or go on with the search, and compare."""
    out = resume_dir / "study"
    if (out / FILE).exists():
        resume(out)
    else:
        search(
            "trimpoint.demo:model",
            "trimpoint.demo:task",
            target=Target(),
            goal=GOAL,
            budget=BUDGET,
            out=out,
        )
    record = open_study(out).record
    baseline, one_liner, best = record.baseline, record.one_line_int8, record.chosen
    if baseline is None or one_liner is None or best is None:
        raise RuntimeError(f"The search came to nothing: {record.verdict}")
    control = next((t for t in record.trials if t.label.startswith("control")), None)
    named = {
        "unmodified, ONNX Runtime": baseline,
        "one-line int8, ONNX Runtime": one_liner,
        "trimpoint": best,
        "unmodified, trained as long as a first-rung candidate": control,
    }
    timed = _together(out, {"unmodified": baseline, "one-line int8": one_liner, "trimpoint": best})
    certificate = best.certificate
    near = _near(record.trials, baseline)
    return {
        "rows": [_row(name, trial, baseline) for name, trial in named.items() if trial is not None]
        + [
            {
                "system": f"timed together: {name}",
                "latency_ms": found.median_ms,
                "latency_ratio": found.ratio,
                "latency_ratio_ci": [found.ratio_low, found.ratio_high],
            }
            for name, found in timed.items()
        ]
        + [_row(f"frontier: trial {t.number}, {t.label}", t, baseline) for t in near],
        "goals": [
            goal("times faster than unmodified", timed["trimpoint"].ratio, 3.0, 5.0),
            goal("times smaller than unmodified", 1 / ratio(best, baseline, "file_bytes"), 6.0, 12.0),
            goal(
                "upper bound of the certified drop, points",
                None if certificate is None else certificate.upper * 100,
                1.0,
                0.5,
                better="lower",
                unit="points",
            ),
            goal(
                "times faster than the one-line int8", timed["trimpoint"].ratio / timed["one-line int8"].ratio, 1.4, 2.0
            ),
            goal("times smaller than the one-line int8", 1 / ratio(best, one_liner, "file_bytes"), 1.6, 3.0),
            goal("points on the frontier within 5 points of accuracy", len(near), 5, None, unit="trials"),
            goal("methods among them", len(_methods(near)), 3, None, unit="methods"),
        ],
    }


def _together(study: Path, trials: dict[str, Trial]) -> dict[str, LatencyResult]:
    """Time artifacts interleaved in one process: the study timed each with the baseline at a moment of its own."""
    image = np.random.default_rng(0).standard_normal((1, 1, 28, 28), dtype=np.float32)
    files = {name: files_of(study, trial) for name, trial in trials.items()}
    timed = measure_latency(files, Target(), {"image": image}, baseline="unmodified", rounds=31)
    return {name: shapes["image"] for name, shapes in timed.items()}


def _near(trials: tuple[Trial, ...], baseline: Trial) -> list[Trial]:
    floor = baseline.quality.value - NEAR if baseline.quality else 0.0
    frontier = Frontier.of(trials, ("latency_ms", "file_bytes", SCORE))
    return [t for t in frontier if t.quality is not None and t.quality.value >= floor]


def _methods(trials: list[Trial]) -> set[str]:
    return {step["method"] for trial in trials for step in trial.plan.get("steps", [])}


def _row(name: str, trial: Trial, baseline: Trial) -> dict[str, Any]:
    quality, certificate, profile = trial.quality, trial.certificate, trial.profile
    interval = profile.get("latency_ratio")
    return {
        "system": name,
        "latency_ms": profile["latency_ms"].value,
        "latency_ratio": speed(trial, baseline),
        "latency_ratio_ci": None if interval is None else [interval.low, interval.high],
        "file_bytes": profile["file_bytes"].value,
        "params": profile["params"].value,
        "macs": profile["macs"].value,
        "peak_rss_bytes": profile["peak_rss_bytes"].value,
        "accuracy_select": None if quality is None else quality.value,
        "drop_select": None if quality is None else quality.drop,
        "drop_select_upper95": None if quality is None else quality.drop_upper,
        "accuracy_test": None if certificate is None else certificate.value,
        "drop_test": None if certificate is None else certificate.drop,
        "drop_test_upper": None if certificate is None else certificate.upper,
        "certificate": None if certificate is None else certificate.status,
    }
