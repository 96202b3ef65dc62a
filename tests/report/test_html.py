import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trimpoint.errors import StorageError
from trimpoint.report.html import PATHS_SHOWN, group_changes, render, write_report
from trimpoint.search.record import StudyRecord
from trimpoint.values import Change

VOID = {"meta", "br", "line", "circle", "path"}


class Page(HTMLParser):
    """Collects text, identifiers and links, and checks that every tag is closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_every_kind_of_study_gives_a_sound_page(variants: dict[str, StudyRecord]) -> None:
    for name, record in variants.items():
        html = render(record)
        page = Page(html)
        assert len(html.encode()) < 1_000_000, name
        assert "None" not in page.text, name
        assert "nan" not in page.text.split(), name
        marks = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
        rows = {f"#{attrs['id']}" for tag, attrs in page.tags if tag == "tr" and attrs.get("id")}
        assert marks <= rows, name


def test_it_loads_nothing_and_runs_nothing(record: StudyRecord) -> None:
    html = render(record)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs), tag
        for key in ("src", "href"):
            assert (attrs.get(key) or "#").startswith("#")
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_it_opens_with_the_verdict_and_holds_what_a_reader_needs(record: StudyRecord) -> None:
    page = Page(render(record))
    text = " ".join(page.text.split())
    assert text.index(record.verdict) < text.index("The frontier") < text.index("Before and after")
    for part in (
        *("lost 148 samples", "gained 119", "one-sided score interval", "4.12× faster", "5.75× less"),
        *("stages.1.0", "its output shape differs from its input's", "AMD EPYC 9R14", record.command),
        *("The loss of `distill` is not finite", "openvino", "median latency in ms", "accuracy on select in %"),
    ):
        assert part in text, part
    svgs = [attrs for tag, attrs in page.tags if tag == "svg" and "role" in attrs]
    assert [attrs["class"] for attrs in svgs] == ["wide", "narrow"]


def test_a_goal_that_nothing_met_names_the_nearest_and_the_limit(variants: dict[str, StudyRecord]) -> None:
    text = " ".join(Page(render(variants["goal not met"])).text.split())
    assert "Nothing met the goal: file size must be at most 100 kB" in text
    assert "The nearest is trial 8" in text
    assert "The nearest plan, step by step" in text


def test_an_unfinished_study_says_how_to_go_on(variants: dict[str, StudyRecord]) -> None:
    assert "trimpoint resume runs/nobody-made-this" in render(variants["unfinished"])
    assert "trimpoint resume" not in render(variants["finished"])
    assert "could not be made: no supported operator" in render(variants["no int8"])


def test_markup_in_names_is_shown_as_text(record: StudyRecord) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    trials = [
        dataclasses.replace(
            trial,
            label=evil,
            error=evil,
            plan={"seed": 0, "steps": [{"method": evil, evil: evil, "where": evil}]},
            changes=(Change(method=evil, origin=evil, kind="skipped", reason=evil),),
        )
        for trial in record.trials
    ]
    html = render(
        dataclasses.replace(
            record,
            **dict.fromkeys(("model", "task", "verdict", "command", "directory", "budget"), evil),
            trials=tuple(trials),
            environment={evil: evil},
            warnings=(evil,),
            space={evil: evil},
        )
    )
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") > 20


def test_a_study_of_thousands_of_modules_and_trials_stays_small(record: StudyRecord) -> None:
    many = tuple(
        Change(method="quantize-static", origin=f"model.layers.{i}.attention.projection", kind="skipped", reason="r")
        for i in range(5_000)
    )
    best = dataclasses.replace(record.trials[7], changes=many)
    trials = [best if t.number == 7 else t for t in record.trials]
    trials += [dataclasses.replace(record.trials[4], number=20 + i) for i in range(3_000)]
    html = render(dataclasses.replace(record, trials=tuple(trials)))
    assert len(html.encode()) < 1_000_000
    assert f"and {5_000 - PATHS_SHOWN} more" in html
    assert 'id="trial-7"' in html


def test_changes_are_grouped_by_what_happened_and_why() -> None:
    changes = [
        Change(method="m", origin="a", kind="skipped", reason="x"),
        Change(method="m", origin="b", kind="replaced", before="Linear 4→4", after="Linear 4→2"),
        Change(method="m", origin="c", kind="skipped", reason="x"),
    ]
    groups = group_changes(changes)
    assert [(g.kind, g.reason, g.count, g.entries) for g in groups] == [
        ("skipped", "x", 2, ("a", "c")),
        ("replaced", "", 1, ("b: Linear 4→4 → Linear 4→2",)),
    ]


def test_a_report_that_cannot_be_written_leaves_the_old_one(record: StudyRecord, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir()
    with pytest.raises(StorageError, match="could not be written") as caught:
        write_report(record, path)
    assert caught.value.hint == "name another file with --out"
    assert list(tmp_path.iterdir()) == [path]
    written = write_report(record, tmp_path / "other.html")
    assert written.read_text(encoding="utf-8") == render(record)
