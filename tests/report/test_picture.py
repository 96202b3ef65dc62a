import dataclasses
import itertools
import re

import pytest

from trimpoint.report.picture import OTHERS, SHAPES, Scale, families, frontier_picture, shape_path
from trimpoint.search.record import StudyRecord
from trimpoint.target import Goal

RECOVERY = frozenset({"distill"})


def picture(record: StudyRecord):
    return frontier_picture(record, width=860, height=430, recovery=RECOVERY)


def test_every_measured_trial_is_inside_and_where_its_figures_say(record: StudyRecord) -> None:
    found = picture(record)
    measured = [t for t in record.trials if t.quality is not None]
    assert sorted(m.number for m in found.marks) == [t.number for t in measured]
    for mark in found.marks:
        assert found.left <= mark.x <= found.right
        assert found.top <= mark.y <= found.bottom
    by_number = {mark.number: mark for mark in found.marks}
    by_latency = sorted(measured, key=lambda t: t.profile["latency_ms"].value)
    assert [by_number[t.number].x for t in by_latency] == sorted(by_number[t.number].x for t in by_latency)
    shown = sorted((t for t in measured if not by_number[t.number].below), key=lambda t: t.quality.value)
    assert [by_number[t.number].y for t in shown] == sorted((by_number[t.number].y for t in shown), reverse=True)


def test_a_log_axis_maps_equal_ratios_to_equal_distances() -> None:
    scale = Scale(0.1, 10, 0, 100, True)
    assert scale(1) - scale(0.1) == pytest.approx(scale(10) - scale(1))
    assert scale.ticks(5) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.912, 0.934), (-3.0, 700.0), (24.1, 24.9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 1).ticks(5)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_a_collapsed_trial_is_drawn_at_the_edge_and_counted(record: StudyRecord) -> None:
    found = picture(record)
    assert {m.number for m in found.marks if m.below} == {16, 17}
    assert found.below == 2


def test_better_is_up_for_scores_to_be_minimised_too(record: StudyRecord) -> None:
    trials = tuple(
        t
        if t.quality is None
        else dataclasses.replace(
            t,
            quality=dataclasses.replace(
                t.quality, name="perplexity", value=30 - t.quality.value, better="lower", low=None
            ),
        )
        for t in record.trials
    )
    found = picture(dataclasses.replace(record, score="perplexity", trials=trials, goal=Goal(max_drop="1%")))
    assert "lower is better" in found.y_title
    by_number = {mark.number: mark for mark in found.marks}
    assert by_number[5].y < by_number[8].y


def test_families_are_sets_of_transforms(record: StudyRecord) -> None:
    names = families(record, RECOVERY)
    assert names[0] == "unmodified"
    assert names[2] == "drop-blocks"
    assert names[7] == "drop-blocks + quantize-static"
    assert names[14] == "drop-blocks + prune-channels + quantize-static"


def test_more_families_than_shapes_share_the_last_one(record: StudyRecord) -> None:
    trials = [
        dataclasses.replace(t, plan={"steps": [{"method": f"m{t.number}"}]}) if t.role == "candidate" else t
        for t in record.trials
    ]
    found = picture(dataclasses.replace(record, trials=tuple(trials)))
    assert len(found.legend) == len(SHAPES)
    assert found.legend[-1][1] == OTHERS


def test_captions_do_not_cover_each_other(variants: dict[str, StudyRecord]) -> None:
    for width, height in ((860, 430), (340, 380)):
        found = frontier_picture(variants["finished"], width=width, height=height, recovery=RECOVERY)
        captions = [mark for mark in found.marks if mark.caption]
        assert sorted(m.caption for m in captions) == ["chosen", "one-line int8", "original"]
        for one in captions:
            for other in captions:
                apart = abs(one.caption_y - other.caption_y) >= 12 or abs(one.caption_x - other.caption_x) >= 60
                assert one is other or apart


def test_one_trial_is_a_picture_and_none_is_not(variants: dict[str, StudyRecord]) -> None:
    assert picture(variants["empty"]) is None
    assert len(picture(variants["baseline only"]).marks) == 1


@pytest.mark.parametrize("family", range(len(SHAPES)))
def test_shapes_are_closed_paths_around_their_point(family: int) -> None:
    path = shape_path(family, 100, 50, 10)
    assert path.startswith("M")
    assert path.endswith("z")
    if SHAPES[family] != "circle":
        corners = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]
        area = abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, [*corners[1:], corners[0]], strict=True))) / 2
        assert area == pytest.approx(314, rel=0.15)
