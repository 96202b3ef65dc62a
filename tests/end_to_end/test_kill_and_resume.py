"""A search that is killed at any moment goes on where it was, and comes to the result of one that was left alone."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.driver import MOMENTS, TRIALS
from trimpoint.errors import StudyError
from trimpoint.search import open_study, resume, search
from trimpoint.search.study import alone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return what `tests.end_to_end.driver` found; its two studies lie beside it."""
    directory = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.driver", str(directory)],
        cwd=ROOT,
        env={**os.environ, "TRIMPOINT_STATE": str(directory / "state")},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "killed.json").read_text(encoding="utf-8")), directory


def test_it_was_killed_at_every_moment_and_then_ended(killed) -> None:
    kills = killed[0]["kills"]
    assert {k["moment"]: k["code"] for k in kills} == {**dict.fromkeys(MOMENTS, -9), "none": 0}


def test_no_completed_trial_is_lost_repeated_or_changed(killed) -> None:
    kills = killed[0]["kills"]
    for before, after in pairwise(kills):
        kept = after["trials"][: len(before["trials"])]
        assert [{**t, "certificate": None} for t in kept] == [{**t, "certificate": None} for t in before["trials"]]
    last = kills[-1]["trials"]
    assert len({(t["plan_hash"], t["rung"]) for t in last}) == len(last)
    assert [t["number"] for t in last] == sorted({t["number"] for t in last})


def test_what_was_stored_is_never_written_again(killed) -> None:
    kills = killed[0]["kills"]
    for before, after in pairwise(kills):
        assert {name: after["files"].get(name) for name in before["files"]} == before["files"], after["moment"]


def test_the_result_is_that_of_a_search_left_alone(killed) -> None:
    records, directory = killed[0]["records"], killed[1]
    whole, broken = records["whole"], records["killed"]
    numbers = dict(zip([t["number"] for t in broken["trials"]], [t["number"] for t in whole["trials"]], strict=True))

    def comparable(trial):
        # Training that went on from a kept state says so; what came of it is the same.
        changes = [{**c, "after": "", "reason": ""} if c["kind"] == "trained" else c for c in trial["changes"]]
        return {**trial, "number": 0, "seconds": 0.0, "changes": changes}

    assert [comparable(t) for t in broken["trials"]] == [comparable(t) for t in whole["trials"]]
    assert [numbers[n] for n in broken["frontier"]] == whole["frontier"]
    assert numbers[broken["best"]] == whole["best"]
    assert broken["finished"]
    for name in ("model.onnx", "parity.safetensors", "plan.json", "certificate.json"):
        assert (directory / "killed/best" / name).read_bytes() == (directory / "whole/best" / name).read_bytes()


def test_nothing_half_written_is_left(killed) -> None:
    left = [p.name for p in (killed[1] / "killed").rglob("*") if p.name.startswith((".new-", ".old-", ".best-"))]
    left += [p.name for p in (killed[1] / "killed").rglob("*.partial")]
    assert left == []


def test_a_finished_study_has_nothing_left_to_do_until_it_gets_more_trials(killed) -> None:
    directory = killed[1] / "whole"
    messages: list[str] = []

    class Listener:
        phase = update = staticmethod(lambda *_, **__: None)
        message = staticmethod(messages.append)

    before = open_study(directory).record
    with tiny.replayed():
        study = resume(directory, model=tiny.model(), task=tiny.task(), progress=Listener())
        assert study.record.trials == before.trials
        assert messages == ["nothing was left to try within this budget; give a larger one to go on"]
        more = resume(directory, model=tiny.model(), task=tiny.task(), trials=TRIALS + 2)
    assert more.record.trials[: len(before.trials)] == before.trials
    assert len(more.record.trials) > len(before.trials)
    assert more.record.budget == f"{TRIALS + 2} trials"


def test_a_study_is_worked_on_by_one_process_at_a_time(killed) -> None:
    directory = killed[1] / "killed"
    code = (
        "import sys\nfrom pathlib import Path\nfrom trimpoint.search.study import alone\n"
        "with alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="Another process is working on") as caught:
            resume(directory, model=tiny.model(), task=tiny.task())
        assert caught.value.hint
        assert open_study(directory).record.finished
        other.communicate("")
    with alone(directory):
        pass


@pytest.mark.parametrize(
    ("model", "task", "part"),
    [
        (lambda: tiny.untrained(1), tiny.task, "another model"),
        (tiny.model, lambda: tiny.task().with_(select=tiny.samples(300, 9)), "another `select` data"),
        (tiny.model, lambda: tiny.task().with_(version="2"), "another task version"),
        (tiny.model, lambda: tiny.task().with_(loss=lambda outputs, targets: outputs.sum()), "another code"),
    ],
)
def test_a_study_of_something_else_is_refused_with_the_part_that_differs(killed, model, task, part: str) -> None:
    directory = killed[1] / "killed"
    with pytest.raises(StudyError, match=f"was made with {part}") as caught:
        resume(directory, model=model(), task=task())
    assert "start a new study" in caught.value.hint


def test_a_directory_that_holds_a_study_is_not_searched_again(killed) -> None:
    with pytest.raises(StudyError, match="already holds a study") as caught:
        search(tiny.model(), tiny.task(), trials=1, out=killed[1] / "killed")
    assert "trimpoint resume" in caught.value.hint


def test_objects_cannot_be_made_again_from_a_study(killed) -> None:
    with pytest.raises(StudyError, match="started with objects") as caught:
        resume(killed[1] / "killed")
    assert "model=model" in caught.value.hint
