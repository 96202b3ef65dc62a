import dataclasses
import json
import math

import pytest

from trimpoint.report.data import point, study_data
from trimpoint.search.record import StudyRecord
from trimpoint.values import Measurement, Profile

STUDY = [
    *("baseline", "one_line_int8", "best", "nearest", "frontier", "trials", "target", "goal", "seconds"),
    *("verdict", "binding", "finished", "warnings", "advice"),
]
POINT = [
    *("trial", "label", "plan", "artifact", "latency_ms", "latency_ratio", "latency_ratio_ci", "file_bytes"),
    *("peak_rss_bytes", "params", "macs", "score", "certificate"),
]


def test_keys_are_exactly_those_of_the_stable_interface(record: StudyRecord) -> None:
    data = study_data(record)
    assert list(data) == STUDY
    assert list(data["trials"]) == ["complete", "infeasible", "stopped", "failed"]
    for found in (data["baseline"], data["one_line_int8"], data["best"], *data["frontier"]):
        assert list(found) == POINT
        assert list(found["score"]) == ["name", "value", "n", "split"]
    assert list(data["best"]["certificate"]) == ["status", "margin", "drop", "upper95", "n", "level", "looks"]


def test_values_are_those_of_the_trials(record: StudyRecord) -> None:
    data, best = study_data(record), record.trials[7]
    assert data["best"] == point(record, best)
    assert data["best"]["artifact"] == "runs/nobody-made-this/artifacts/0007"
    assert data["best"]["latency_ratio"] == pytest.approx(1.24 / 0.301)
    assert data["best"]["latency_ratio_ci"] == pytest.approx([1.24 / 0.301 * 0.98, 1.24 / 0.301 * 1.02])
    assert data["best"]["score"] == {"name": "accuracy", "value": 0.9289, "n": 6_000, "split": "select"}
    assert data["best"]["certificate"]["upper95"] == 0.00512
    assert data["baseline"]["latency_ratio"] is None
    assert data["baseline"]["certificate"] is None
    assert isinstance(data["baseline"]["file_bytes"], int)
    assert [entry["trial"] for entry in data["frontier"]] == list(record.frontier)
    assert data["trials"] == {"complete": 17, "infeasible": 1, "stopped": 1, "failed": 1}
    assert sum(data["trials"].values()) == len(record.trials)


def test_every_kind_of_study_is_valid_json(variants: dict[str, StudyRecord]) -> None:
    for name, record in variants.items():
        text = json.dumps(study_data(record), allow_nan=False)
        assert list(json.loads(text)) == STUDY, name


def test_what_is_missing_is_null(variants: dict[str, StudyRecord]) -> None:
    assert study_data(variants["empty"])["baseline"] is None
    assert study_data(variants["no int8"])["one_line_int8"] is None
    unmet = study_data(variants["goal not met"])
    assert unmet["best"] is None
    assert unmet["nearest"]["trial"] == 8
    assert unmet["binding"].startswith("file size must be")
    assert study_data(variants["no certificate"])["best"]["certificate"] is None


def test_numbers_that_are_not_finite_become_null(record: StudyRecord) -> None:
    odd = Profile({"latency_ms": Measurement(value=math.inf, unit="ms")})
    trial = dataclasses.replace(
        record.trials[7],
        profile=odd,
        certificate=dataclasses.replace(record.trials[7].certificate, upper=math.nan),
    )
    found = point(record, trial)
    assert found["latency_ms"] is None
    assert found["file_bytes"] is None
    assert found["certificate"]["upper95"] is None
