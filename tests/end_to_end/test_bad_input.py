"""Whatever is wrong ends in one clear message with a hint and the right exit code, and loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import trimpoint.artifact
from tests.end_to_end import tiny
from trimpoint.cli import main
from trimpoint.errors import (
    DataError,
    ExportError,
    InvalidParameterError,
    ModelError,
    StorageError,
    StudyError,
    UnknownNameError,
)
from trimpoint.search import open_study, resume, search
from trimpoint.search.log import TrialLog
from trimpoint.search.workbench import Workbench
from trimpoint.target import Target

TASK = "tests.end_to_end.tiny:task"


def relabelled(shift: int) -> TensorDataset:
    x, y = tiny.samples(100, 3).tensors
    return TensorDataset(x, y + shift)


def of_width(width: int) -> TensorDataset:
    return TensorDataset(torch.randn(100, width), torch.zeros(100, dtype=torch.long))


def with_nan() -> TensorDataset:
    x, y = tiny.samples(100, 3).tensors
    return TensorDataset(x.masked_fill(torch.arange(100)[:, None] == 7, float("nan")), y)


def overlapping() -> dict[str, Subset]:
    data = tiny.samples(100, 3)
    return {"select": Subset(data, range(60)), "certify": Subset(data, range(50, 100))}


EMPTY = TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"select": None}, "A search needs `select` data"),
        ({"select": EMPTY}, "The `select` data of the task is empty"),
        ({"train": EMPTY}, "The `train` data of the task is empty"),
        ({"select": with_nan()}, "Sample 7 of `select` has a value that is not finite"),
        ({"train": with_nan()}, "Sample 7 of `train` has a value that is not finite"),
        (overlapping(), "Item 50 of one data set is both in `select` and in `certify`"),
        ({"select": of_width(9)}, r"The `select` data does not fit the model: .* inputs of shape \[64, 9\]"),
        ({"calibrate": of_width(9)}, "The `calibrate` data does not fit the model: "),
        ({"train": of_width(9)}, "The `train` data does not fit the model and the loss: "),
        ({"train": relabelled(5)}, "The `train` data does not fit the model and the loss: The targets must be"),
    ],
)
def test_data_that_does_not_do_is_told_before_anything_is_written(roles, message, tmp_path) -> None:
    task = tiny.task().with_(**roles)
    with pytest.raises(DataError, match=message) as caught:
        search(tiny.untrained(), task, trials=1, out=tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (tiny.not_finite, ModelError, "The parameter `0.weight` has 1 values of 256 that are not finite"),
        (tiny.branching, ExportError, r"control flow of the model depends on its data in module '1', at .*tiny.py:\d+"),
        (lambda: nn.Linear(9, 3), DataError, "The `select` data does not fit the model: RuntimeError"),
    ],
)
def test_a_model_that_does_not_do_leaves_nothing_behind(model, kind, message, tmp_path) -> None:
    with pytest.raises(kind, match=message) as caught:
        search(model(), tiny.task(), trials=1, out=tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_study_in_a_directory_with_other_things_takes_only_its_own_away(tmp_path) -> None:
    (tmp_path / ".keep").touch()
    with pytest.raises(ExportError):
        search(tiny.branching(), tiny.task(), trials=1, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".keep"]
    (tmp_path / "mine.txt").touch()
    with pytest.raises(StudyError, match="is not empty"):
        search(tiny.untrained(), tiny.task(), trials=1, out=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "tests.end_to_end.tiny:not_finite", TASK, "--trials", "1"], 1, "that are not finite"),
        (["search", "tests.end_to_end.tiny:branching", TASK, "--trials", "1"], 1, "control flow"),
        (["search", "tests.end_to_end.tiny:untraind", TASK], 1, "did you mean `untrained`?"),
        (["search", "tests.end_to_end.tiny:untrained", TASK, "--runtime", "onxruntime"], 1, "did you mean `onnxrunti"),
        (["search", "tests.end_to_end.tiny:untrained", TASK, "--runtime", "openvino"], 1, "pip install"),
    ],
)
def test_the_command_line_says_it_once_and_writes_nothing(
    arguments, code, message, tmp_path, monkeypatch, capsys
) -> None:
    if "openvino" in arguments:
        monkeypatch.setitem(sys.modules, "openvino", None)
    assert main([*arguments, "--quiet", "--out", str(tmp_path / "out")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert err.count("\n\nhint: ") == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_parameters_of_a_search(tmp_path) -> None:
    for arguments, kind, message in (
        ({"trials": 0}, InvalidParameterError, "must be a whole number ≥ 1"),
        ({"budget": "soon"}, InvalidParameterError, "A duration must be"),
        ({"limits": {"latency": 1}}, UnknownNameError, "There is no metric 'latency'"),
        ({"target": Target(runtime="tensorrt")}, UnknownNameError, "There is no runtime 'tensorrt'"),
    ):
        with pytest.raises(kind, match=message):
            search(tiny.untrained(), tiny.task(), out=tmp_path / "out", **arguments)
    with pytest.raises(InvalidParameterError, match=r"must be a torch\.nn\.Module"):
        search(lambda x: x, tiny.task(), trials=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_goal_that_nothing_meets(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    with tiny.replayed():
        arguments = ["tests.end_to_end.tiny:untrained", TASK, "--trials", "1", "--limit", "file_bytes=0.001x"]
        assert main(["search", *arguments, "--out", str(out), "--format", "json", "--quiet"]) == 3
    printed = capsys.readouterr()
    assert f"hint: `trimpoint resume {out} --trials N` goes on from here" in printed.err
    shown = json.loads(printed.out)
    assert shown["best"] is None
    assert shown["nearest"]["trial"] >= 0
    study = open_study(out)
    assert study.best is None
    assert "file_bytes ≤" in study.record.binding
    assert "Nothing met the goal" in study.record.verdict
    assert not (out / "best").exists()
    assert (out / "report.html").is_file()
    assert main(["show", str(out)]) == 0
    assert main(["pick", str(out), "--trial", "1"]) == 0
    assert main(["verify", str(out / "best")]) == 0


# A full disk


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def once(owner: object, name: str, at: int, error: Exception, monkeypatch) -> list[int]:
    """Have `owner.name` raise `error` at its `at`-th call; return the list that counts the calls."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **more):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(*args, **more)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def test_a_full_disk_loses_nothing_and_the_search_goes_on_when_there_is_space(tmp_path, monkeypatch) -> None:
    import sqlite3

    import optuna
    from sqlalchemy.exc import OperationalError

    out, model, task = tmp_path / "out", tiny.model(), tiny.task()
    locked = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    locked.__cause__ = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    no_space = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    places = [
        (optuna.storages.RDBStorage, "set_study_user_attr", 1, locked),
        (np, "savez", 1, FULL),
        (Path, "write_bytes", 1, FULL),
        (np, "save", 1, FULL),
        (optuna.storages.RDBStorage, "set_trial_state_values", 2, locked),
        (safetensors.torch, "save_file", 1, no_space),
        (trimpoint.artifact, "_write", 3, FULL),
    ]
    before: tuple = ()
    with tiny.replayed():
        for owner, name, at, error in places:
            with monkeypatch.context() as patch:
                calls = once(owner, name, at, error, patch)
                with pytest.raises(StorageError, match=r"cannot be (read or )?written|could not be written") as caught:
                    begin_or_resume(model, task, out)
                assert len(calls) >= at, name
            assert caught.value.hint, name
            assert not list(out.glob("store/.new-*")), name
            assert not list(out.glob("**/*.partial")), name
            found = TrialLog.in_directory(out).trials() if (out / "study.db").exists() else ()
            assert found[: len(before)] == before, name
            before = found
        assert not (out / "best").exists()
        study = begin_or_resume(model, task, out)
    assert study.record.finished
    assert study.record.trials[: len(before)] == before
    assert study.best is not None
    trimpoint.artifact.verify_artifact(study.best.directory, clean_process=False)


def begin_or_resume(model, task, out):
    if (out / "study.db").exists():
        return resume(out, model=model, task=task)
    return search(model, task, trials=2, out=out, recovery=tiny.recovery())


def test_the_command_line_on_a_full_disk(tmp_path, monkeypatch, capsys) -> None:
    once(Workbench, "baseline", 1, FULL, monkeypatch)
    arguments = ["search", "tests.end_to_end.tiny:untrained", TASK, "--trials", "1", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "No space left on device" in err
    assert "hint: free some space" in err


# Ctrl-C


def test_an_interrupted_search_says_so_and_goes_on(tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["tests.end_to_end.tiny:untrained", TASK, "--trials", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimpoint", "search", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    waited = time.monotonic() + 300
    while not (out / "study.db").exists() and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert printed == ""
    assert "Traceback" not in err
    assert err.endswith(
        f"\ninterrupted: every trial that had ended is kept in {out}\n\nhint: go on with `trimpoint resume {out}`\n"
    )
    assert main(["show", str(out)]) == 0
    with tiny.replayed():
        assert main(["resume", str(out), "--quiet"]) in (0, 3)
    assert open_study(out).record.finished
