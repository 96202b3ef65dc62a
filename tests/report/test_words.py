import dataclasses
import doctest

import pytest

from trimpoint.report import words
from trimpoint.report.words import certificate_text, compared, file_size, goal_text, significant, verdict_text
from trimpoint.search.record import StudyRecord


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(words)
    assert result.attempted >= 8
    assert result.failed == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (98_496, "98.5 kB"), (5e9, "5.00 GB"), (3e15, "3,000 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert file_size(count) == text


def test_numbers_at_the_edges() -> None:
    assert significant(float("inf")) == "∞"
    assert significant(-0.5) == "-0.500"
    assert significant(1e-12) == "1.00e-12"
    assert compared(0.0, "faster", "slower") == ""


def test_a_passed_certificate_is_told_in_plain_words(record: StudyRecord) -> None:
    text = certificate_text(record.trials[7].certificate)
    for part in ("10,000 samples", "lost 148", "gained 119", "0.29 points", "at most 0.51 points", "95 %", "passed"):
        assert part in text
    assert "before" not in text


def test_an_unproven_certificate_says_how_many_samples_it_would_take(record: StudyRecord) -> None:
    text = certificate_text(dataclasses.replace(record.trials[7].certificate, status="unproven", looks=3))
    assert "too few samples" in text
    assert "About 2,900 samples" in text
    assert "certify 2 times before" in text


def test_a_failed_certificate_of_a_score_without_lost_and_gained(record: StudyRecord) -> None:
    certificate = dataclasses.replace(
        record.trials[7].certificate, status="failed", score="perplexity", lost=None, gained=None, drop=1.25, upper=1.5
    )
    text = certificate_text(certificate)
    assert "lost" not in text
    assert "a drop of 1.25" in text
    assert text.endswith("failed.")


def test_goal_and_verdict(variants: dict[str, StudyRecord]) -> None:
    assert goal_text(variants["finished"]) == (
        "Improve median latency and file size while accuracy drops by at most 1.00 points; median latency at most "
        "0.5× the original's."
    )
    assert verdict_text(variants["finished"]) == variants["finished"].verdict
    assert verdict_text(variants["empty"]) == "Nothing has been measured yet."
    assert verdict_text(variants["baseline only"]) == "0 candidates measured so far; none meets the goal yet."
    assert "7 candidates measured so far; the best meets the goal" in verdict_text(variants["unfinished"])
