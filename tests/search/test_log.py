import subprocess
import sys
import textwrap

import pytest

from tests.search.trials import INT8, trial
from trimpoint.errors import StudyError
from trimpoint.search.log import TrialLog
from trimpoint.values import Certificate


def test_trials_come_back_as_they_were(tmp_path):
    log = TrialLog.in_directory(tmp_path, create=True)
    written = trial(log.start(), drop=0.01, upper=0.02)
    log.finish(written)
    assert TrialLog.in_directory(tmp_path).trials() == (written,)


def test_a_failed_trial_keeps_its_message(tmp_path):
    log = TrialLog.in_directory(tmp_path, create=True)
    written = trial(log.start(), state="failed", error="it broke")
    log.finish(written)
    assert log.trials()[0].error == "it broke"


def test_certificates_are_joined_to_their_trials(tmp_path):
    log = TrialLog.in_directory(tmp_path, create=True)
    number = log.start()
    log.finish(trial(number))
    certificate = Certificate(
        status="passed", score="accuracy", margin=0.01, drop=0.0, upper=0.004, level=0.95, n=10, baseline=0.9, value=0.9
    )
    log.certify(number, certificate)
    assert TrialLog.in_directory(tmp_path).trials()[0].certificate == certificate


def test_settings_are_replaced_whole(tmp_path):
    log = TrialLog.in_directory(tmp_path, create=True)
    log.note("key", {"a": 1})
    log.note("key", [2.5, None])
    assert TrialLog.in_directory(tmp_path).settings()["key"] == [2.5, None]


def test_no_study_is_a_clear_error(tmp_path):
    with pytest.raises(StudyError, match="no study"):
        TrialLog.in_directory(tmp_path)


def test_a_killed_process_loses_only_what_it_was_doing(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from tests.search.trials import trial
        from trimpoint.search.log import TrialLog
        log = TrialLog.in_directory(Path(sys.argv[1]), create=True)
        log.finish(trial(log.start()))
        log.start()
        os.kill(os.getpid(), 9)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=False)
    assert ended.returncode == -9
    log = TrialLog.in_directory(tmp_path)
    assert [t.number for t in log.trials()] == [0]
    assert log.close_interrupted() == [1]
    number = log.start()
    log.finish(trial(number))
    assert [t.number for t in log.trials()] == [0, 2]


def test_the_file_is_an_ordinary_optuna_study(tmp_path):
    import optuna

    log = TrialLog.in_directory(tmp_path, create=True)
    log.finish(trial(log.start(), latency=3.0, size=70.0, score=0.8))
    assert INT8.role == "one_line_int8"
    study = optuna.load_study(study_name="trimpoint", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.trials[0].values == [3.0, 70.0, -0.8]


INTERRUPTED = """
import signal, sys
from pathlib import Path
from sqlalchemy import event
from trimpoint.search.log import TrialLog
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore interrupts
log, pressed = TrialLog.in_directory(Path(sys.argv[1]), create=True), int(sys.argv[2])
def press(*_):
    global pressed
    while pressed > 0:
        pressed -= 1
        signal.raise_signal(signal.SIGINT)
event.listen(log._storage.engine, "before_cursor_execute", press)
try:
    log.note("key", 1)
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize(("pressed", "kept"), [(1, True), (2, False)])
def test_an_interrupt_waits_for_the_statement_and_a_second_one_does_not(tmp_path, pressed, kept):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(pressed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert ("key" in TrialLog.in_directory(tmp_path).settings()) is kept
