"""A study as a search would leave it: a ResNet-20 with its one-line int8 and twenty candidates."""

import dataclasses
import math
from collections.abc import Callable

import pytest

from trimpoint.search.record import StudyRecord
from trimpoint.target import Goal, Target
from trimpoint.values import Certificate, Change, Measurement, Profile, Quality, Trial

CPU = "AMD EPYC 9R14, onnxruntime 1.31.1"
BASE_MS, BASE_BYTES, BASE_SCORE, N = 1.24, 1_105_000, 0.9312, 6_000


def measured(value: float, unit: str, spread: float = 0.0, n: int = 1, better="lower", how="") -> Measurement:
    ends = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
    return Measurement(value=value, unit=unit, better=better, n=n, low=ends[0], high=ends[1], how=how, where=CPU)


def profile(ms: float, size: float, params: int, macs: float, *, baseline: bool = False) -> Profile:
    metrics = {
        "latency_ms": measured(ms, "ms", 0.03, 300, how="median of 5 interleaved rounds"),
        "latency_p95_ms": measured(ms * 1.14, "ms", n=300),
        "throughput_per_s": measured(1000 / ms, "1/s", better="higher"),
        "file_bytes": measured(size, "bytes"),
        "peak_rss_bytes": measured(62e6 + 4 * size, "bytes"),
        "params": measured(params, "1"),
        "macs": measured(macs, "1", better="lower"),
    }
    if not baseline:
        metrics["latency_ratio"] = measured(BASE_MS / ms, "1", 0.02, 5, better="higher")
    return Profile(metrics, {"energy_j": "this machine has no readable energy counter"})


def quality(value: float, *, baseline: bool = False) -> Quality:
    half = 1.96 * math.sqrt(value * (1 - value) / N)
    drop = None if baseline else BASE_SCORE - value
    upper = None if drop is None else drop + 0.003
    return Quality(
        name="accuracy",
        value=value,
        n=N,
        split="select",
        low=value - half,
        high=value + half,
        drop=drop,
        drop_upper=upper,
    )


def steps(ratio: float, width: float, int8: bool) -> list[dict]:
    found: list[dict] = []
    if ratio:
        found.append({"method": "drop-blocks", "ratio": ratio})
    if width:
        found.append({"method": "prune-channels", "ratio": width, "round_to": 8, "where": "stages.*"})
    if found:
        found.append({"method": "distill", "epochs": 2.0, "temperature": 4.0})
    return found + ([{"method": "quantize-static", "granularity": "channel"}] if int8 else [])


def candidate(
    number: int, ratio: float, width: float, int8: bool, ms: float, share: float, score: float, **more
) -> Trial:
    plan = {"seed": 0, "steps": steps(ratio, width, int8)}
    label = " → ".join(f"{s['method']}({s['ratio']:g})" if "ratio" in s else s["method"] for s in plan["steps"])
    return Trial(
        number=number,
        plan=plan,
        plan_hash=f"{number:064x}",
        rung=more.pop("rung", 1),
        state=more.pop("state", "complete"),
        label=label,
        profile=profile(ms, BASE_BYTES * share, round(272_474 * share * (4 if int8 else 1)), 31e6 * share),
        quality=quality(score),
        seconds=30 + 2 * number,
        artifact=f"artifacts/{number:04d}",
        **more,
    )


CHANGES = (
    *(
        Change(method="drop-blocks", origin=f"stages.{s}.{b}", kind="bypassed", before="BasicBlock", after="Bypass")
        for s, b in ((0, 1), (0, 2), (1, 1), (1, 2))
    ),
    *(
        Change(
            method="quantize-static",
            origin=f"stages.{s}.0.conv{c}",
            kind="assigned",
            before="float32",
            after="int8 per channel",
        )
        for s in range(3)
        for c in (1, 2)
    ),
    Change(
        method="drop-blocks", origin="stages.1.0", kind="skipped", reason="its output shape differs from its input's"
    ),
    Change(
        method="drop-blocks", origin="stages.2.0", kind="skipped", reason="its output shape differs from its input's"
    ),
    Change(method="quantize-static", origin="pool", kind="skipped", reason="no weights to quantise"),
)
CERTIFICATE = Certificate(
    status="passed",
    score="accuracy",
    margin=0.01,
    drop=0.0029,
    upper=0.00512,
    level=0.95,
    n=10_000,
    baseline=0.9301,
    value=0.9272,
    lost=148,
    gained=119,
    needed=2_900,
    method="one-sided score interval for paired proportions",
    data="0" * 64,
    runtime="onnxruntime 1.31.1",
    instruction_set="AVX-512 VNNI",
)


@pytest.fixture
def record() -> StudyRecord:
    return make_record()


def make_record() -> StudyRecord:
    empty = {"seed": 0, "steps": []}
    first = Trial(
        number=0,
        role="baseline",
        plan=empty,
        plan_hash="0" * 64,
        rung=0,
        state="complete",
        label="unmodified",
        profile=profile(BASE_MS, BASE_BYTES, 272_474, 31e6, baseline=True),
        quality=quality(BASE_SCORE, baseline=True),
        seconds=14.0,
        artifact="artifacts/0000",
    )
    one_line = Trial(
        number=1,
        role="one_line_int8",
        plan=empty,
        plan_hash="1" * 64,
        rung=0,
        state="complete",
        label="one-line int8",
        profile=profile(0.571, 324_000, 272_474, 31e6),
        quality=quality(0.9303),
        seconds=11.0,
        artifact="artifacts/0001",
    )
    rows = [
        (0.22, 0.0, False, 1.02, 0.86, 0.9330, {}),
        (0.44, 0.0, False, 0.71, 0.66, 0.9292, {}),
        (0.67, 0.0, False, 0.46, 0.44, 0.9038, {}),
        (0.22, 0.0, True, 0.452, 0.242, 0.9318, {}),
        (0.33, 0.0, True, 0.395, 0.214, 0.9309, {}),
        (0.44, 0.0, True, 0.301, 0.174, 0.9289, {"changes": CHANGES, "certificate": CERTIFICATE}),
        (0.55, 0.0, True, 0.262, 0.152, 0.9189, {}),
        (0.67, 0.0, True, 0.203, 0.118, 0.9017, {}),
        (0.0, 0.25, True, 0.52, 0.20, 0.9271, {}),
        (0.0, 0.50, True, 0.31, 0.10, 0.9109, {}),
        (0.0, 0.50, False, 0.60, 0.30, 0.9141, {}),
        (0.33, 0.25, True, 0.33, 0.135, 0.9244, {}),
        (0.44, 0.25, True, 0.27, 0.105, 0.9201, {}),
        (0.44, 0.50, True, 0.17, 0.055, 0.8873, {}),
        (0.67, 0.50, True, 0.12, 0.038, 0.8402, {}),
        (0.78, 0.50, True, 0.10, 0.027, 0.5533, {"rung": 0, "state": "stopped"}),
    ]
    trials = [candidate(index, *row[:6], **row[6]) for index, row in enumerate(rows, 2)]
    failed = Trial(
        number=18,
        plan={"seed": 0, "steps": steps(0.9, 0, True)},
        plan_hash="f" * 64,
        rung=0,
        state="failed",
        label="drop-blocks(0.9) → distill → quantize-static",
        seconds=3.0,
        error="The loss of `distill` is not finite after 12 steps.",
    )
    infeasible = dataclasses.replace(failed, number=19, state="infeasible", error="", label="drop-blocks(0.11)")
    return StudyRecord(
        directory="runs/nobody-made-this",
        model="trimpoint.demo:model",
        task="trimpoint.demo:task",
        score="accuracy",
        target=Target(),
        goal=Goal(limits={"latency_ms": "0.5x"}, max_drop=0.01),
        trials=(first, one_line, *trials, failed, infeasible),
        frontier=(16, 15, 9, 8, 7, 6, 5, 2),
        best=7,
        nearest=None,
        verdict="4.12× faster and 5.7× smaller than the original, accuracy 92.72 % against 93.01 %; over the one-line "
        "int8 the search made it 1.90× faster and 1.7× smaller.",
        seconds=561.0,
        budget="10m",
        finished=True,
        command="trimpoint search trimpoint.demo:model trimpoint.demo:task --max-drop 0.01 --limit latency_ms=0.5x "
        "--budget 10m --threads 1 --seed 0 --out runs/demo",
        environment={
            "cpu": "AMD EPYC 9R14",
            "cores": "2",
            "instruction set": "AVX-512 VNNI, BF16",
            "system": "Linux 6.1, Python 3.11.2",
            "versions": "torch 2.13.0, onnxruntime 1.31.1, onnx 1.22.0",
        },
        space={"openvino": "not installed", "energy": "this machine has no readable energy counter"},
    )


@pytest.fixture
def variants(record: StudyRecord) -> dict[str, StudyRecord]:
    return make_variants(record)


def make_variants(record: StudyRecord) -> dict[str, StudyRecord]:
    """The shapes of study that a report must survive."""
    change: Callable[..., StudyRecord] = dataclasses.replace
    bare = [change(trial, certificate=None) for trial in record.trials]
    no_int8 = dataclasses.replace(
        record.trials[1], state="failed", profile=Profile(), quality=None, artifact=None, error="no supported operator"
    )
    return {
        "finished": record,
        "empty": change(record, trials=(), frontier=(), best=None, verdict="", finished=False),
        "baseline only": change(
            record, trials=record.trials[:1], frontier=(0,), best=None, verdict="", finished=False, command=""
        ),
        "unfinished": change(
            record, trials=record.trials[:9], best=7, frontier=(8, 7, 6, 5, 2), verdict="", finished=False
        ),
        "goal not met": change(
            record,
            best=None,
            nearest=8,
            binding="file size must be at most 100 kB; the smallest has 168 kB",
        ),
        "no int8": change(record, trials=(record.trials[0], no_int8, *record.trials[2:])),
        "no certificate": change(record, trials=tuple(bare)),
        "baseline is best": change(record, trials=record.trials[:2], frontier=(1, 0), best=0),
    }
