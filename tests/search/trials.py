"""Trials made by hand, for tests of what reads them."""

from trimpoint.values import Measurement, Profile, Quality, Trial


def trial(
    number,
    latency=1.0,
    size=1000.0,
    score=0.9,
    *,
    ratio=None,
    drop=None,
    upper=None,
    forecast=None,
    role="candidate",
    state="complete",
    rung=0,
    better="higher",
    **more,
):
    metrics = {
        "latency_ms": Measurement(value=latency, unit="ms", low=latency * 0.98, high=latency * 1.02),
        "file_bytes": Measurement(value=size, unit="bytes"),
    }
    if ratio is not None:
        metrics["latency_ratio"] = Measurement(value=ratio, unit="1", better="higher")
    quality = Quality(
        name="accuracy",
        value=score,
        n=1000,
        split="select",
        better=better,
        drop=drop,
        drop_upper=upper,
        drop_forecast=forecast,
    )
    return Trial(
        number=number,
        plan={"seed": 0, "steps": []},
        plan_hash=f"plan{number}",
        rung=rung,
        state=state,
        role=role,
        label=f"plan {number}",
        profile=Profile(metrics),
        quality=quality,
        **more,
    )


BASELINE = trial(0, latency=4.0, size=4000.0, score=0.94, role="baseline")
INT8 = trial(1, latency=2.0, size=1100.0, score=0.938, ratio=2.0, drop=0.002, upper=0.004, role="one_line_int8")
