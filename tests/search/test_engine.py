"""The search over a bench without a model: a clock that only moves when something is trained or measured."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tests.search.trials import trial
from trimpoint.errors import TrainingError
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Step
from trimpoint.search import engine as module
from trimpoint.search.engine import CONTROL, RESUMED, Engine
from trimpoint.search.probe import Probe
from trimpoint.search.settings import Settings
from trimpoint.search.space import Structure
from trimpoint.target import Goal, Target
from trimpoint.values import Quality

SIZES = {f"blocks.{i}": size for i, size in enumerate([100, 100, 100, 400, 400, 400, 1600, 1600, 1600])}
ALLOWED = 0.01


class Killed(BaseException):
    """As if the process had died."""


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def monotonic(self):
        return self.now


class Log:
    """Trials and decisions in memory, through JSON as on disk."""

    def __init__(self):
        self.kept, self.ended, self.numbers = {}, [], 0

    def close_interrupted(self):
        return []

    def settings(self):
        return json.loads(json.dumps(self.kept))

    def note(self, key, value):
        self.kept[key] = value

    def start(self):
        self.numbers += 1
        return self.numbers - 1

    def finish(self, ended):
        self.ended.append(ended)

    def trials(self):
        return tuple(self.ended)


class Bench:
    """Training takes `full` seconds at full length and is kept by plan and effort; measuring takes four."""

    leaves = SIZES

    def __init__(self, clock, kept, full, kill=None, breaks=None):
        self.clock, self.kept, self.full, self.kill, self.breaks = clock, kept, full, kill, breaks
        self.overhead_seconds, self.count = 8.0, 0

    def baseline(self, start):
        self.clock.now += 5
        found = trial(0, latency=4.0, size=4000.0, score=0.94, role="baseline")
        return replace(found, number=start.number, plan_hash=start.plan_hash)

    def use_baseline(self, baseline):
        pass

    def trim(self, trials):
        pass

    def one_line_int8(self, start):
        self.clock.now += 5
        found = trial(0, latency=2.0, size=1100.0, ratio=2.0, drop=0.002, upper=0.004, role="one_line_int8")
        return replace(found, number=start.number, plan_hash=start.plan_hash)

    def training_speed(self, recovery):
        if recovery.precision == "bfloat16":
            raise RuntimeError("index_add does not take bfloat16")
        self.clock.now += 5
        return self.full

    def candidate(self, start, plan, effort):
        self.count += 1
        steps = [step for step in plan.steps if not isinstance(step.method, QuantizeStatic)]
        key = (str(steps), round(effort, 6))
        if any(isinstance(step.method, (Distill, Finetune)) for step in steps) and key not in self.kept:
            self.clock.now += self.full * effort
            if self.breaks is not None and effort > self.breaks:
                raise TrainingError("the loss is not finite")
            self.kept.add(key)
        if self.count == self.kill:
            raise Killed
        self.clock.now += 4
        self.overhead_seconds = 4.0
        removed = sum(len(step.method.blocks) for step in steps if isinstance(step.method, DropBlocks))
        drop = 0.001 + 0.0006 * removed * max(effort, 1e-3) ** -0.3
        quality = Quality(
            name="accuracy", value=0.94 - drop, n=5000, split="select", drop=drop, drop_upper=drop + 0.003
        )
        profile = trial(9, size=1000.0 * (1 - 0.08 * removed), ratio=2.0 + removed).profile
        return replace(start, profile=profile, quality=quality)


def every_structure():
    weights = {path: size**0.25 for path, size in SIZES.items()}
    found = [Structure(steps=(), shares={}, gains={"latency_ms": 1.0, "file_bytes": 1.0})]
    for count in range(1, 8):
        for paths in combinations(SIZES, count):
            left = 1 - sum(SIZES[path] for path in paths) / sum(SIZES.values())
            found.append(
                Structure(
                    steps=(Step(DropBlocks(blocks=paths)),),
                    shares=dict.fromkeys(paths, 0.0),
                    damage=sum(weights[path] for path in paths) / sum(weights.values()),
                    gains={"latency_ms": 1 - 0.1 * count, "file_bytes": left},
                )
            )
    return found[::3]


@pytest.fixture
def search(monkeypatch):
    """Return a function that runs a search over a log and says how long it took."""
    clock, structures = Clock(), every_structure()
    found = Probe(structures=structures, quantiser=QuantizeStatic(), start={})
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "probe", lambda *_, **__: found)
    monkeypatch.setattr(module, "usable_methods", lambda *_: ([], {}))

    def run(log, kept, *, seconds=None, trials=None, trains=True, full=300.0, **bench):
        settings = Settings(
            target=Target(),
            goal=Goal(max_drop=ALLOWED),
            seconds=seconds,
            trials=trials,
            recovery=Distill(epochs=30.0) if trains else None,
            control=Finetune(epochs=30.0) if trains else None,
        )
        started = clock.now
        bench = Bench(clock, kept, full, **bench)
        Engine(model=None, task=None, settings=settings, log=log, bench=bench).run()
        return clock.now - started

    return run


def candidates(log):
    return [(t.label, t.rung) for t in log.ended if t.role == "candidate"]


@pytest.mark.parametrize("full", [300.0, 3_000.0])
def test_the_budget_is_used_and_kept(search, full):
    log = Log()
    took = search(log, set(), seconds=600.0, full=full)
    assert 0.75 * 600 < took < 1.1 * 600 or all(t.state == "complete" for t in log.ended if t.rung == 2)
    assert took < 1.1 * 600


def test_a_finalist_is_found_that_keeps_to_the_drop(search):
    log = Log()
    search(log, set(), seconds=600.0)
    feasible = [t for t in log.ended if t.rung == 2 and t.quality.drop_upper <= ALLOWED]
    assert feasible
    assert max(t.profile["latency_ratio"].value for t in feasible) >= 4


@pytest.mark.parametrize("kill", range(1, 13))
def test_a_killed_search_goes_on_as_if_nothing_had_happened(search, kill):
    whole, log, kept = Log(), Log(), set()
    search(whole, set(), trials=14)
    assert {rung for _, rung in candidates(whole)} == {0, 1, 2}
    with pytest.raises(Killed):
        search(log, kept, trials=14, kill=kill)
    search(log, kept, trials=14)
    assert candidates(log) == candidates(whole)
    assert log.kept.keys() - {RESUMED} == whole.kept.keys()


@pytest.mark.parametrize("kill", range(1, 13))
def test_a_kill_does_not_make_training_look_free(search, kill):
    log, kept = Log(), set()
    with pytest.raises(Killed):
        search(log, kept, seconds=600.0, full=3_000.0, kill=kill)
    assert search(log, kept, seconds=600.0, full=3_000.0) < 1.3 * 600


def test_no_trial_is_run_twice_when_there_is_nothing_to_train(search):
    log = Log()
    search(log, set(), trials=12, trains=False)
    labels = [label for label, _ in candidates(log)]
    assert len(labels) == len(set(labels)) > 3


def test_nothing_is_repeated_once_all_are_fully_trained(search):
    log = Log()
    search(log, set(), seconds=36_000.0, full=30.0)
    labels = [label for label, rung in candidates(log) if rung == 2]
    assert not any("quantize-static()" in label for label in labels)


def test_a_finalist_whose_training_breaks_down_is_not_trained_again(search):
    log = Log()
    search(log, set(), seconds=600.0, breaks=0.3)
    last = [t for t in log.ended if t.rung == 2]
    assert [t.state for t in last] == ["failed"]
    assert "the loss is not finite" in last[0].error


def test_a_precision_that_does_not_work_is_passed_over(search):
    log = Log()
    search(log, set(), seconds=600.0)
    assert list(log.kept["training"]) == ["float32"]
    assert not any("bfloat16" in label for label, _ in candidates(log))


def test_the_control_is_the_original_trained_further(search):
    log = Log()
    search(log, set(), seconds=600.0)
    (control,) = [label for label, _ in candidates(log) if label.startswith(CONTROL)]
    assert "finetune" in control
    assert np.isfinite(log.kept["seconds"])


@pytest.mark.parametrize("full", [300.0, 3_000.0])
def test_a_larger_budget_trains_the_finalists_longer(search, full):
    log, kept = Log(), set()
    search(log, kept, seconds=600.0, full=full)
    before = len(log.ended)
    took = search(log, kept, seconds=3_600.0, full=full)
    assert took < 1.1 * 3_000
    fresh = log.ended[before:]
    assert fresh
    assert max(t.rung for t in fresh) > 2 or full == 300.0
    again = len(log.ended)
    assert search(log, kept, seconds=3_600.0, full=full) < 100
    assert all("control" not in t.label for t in log.ended[again:])


@pytest.mark.parametrize("trials", range(1, 16))
def test_the_number_of_trials_is_kept_and_the_last_ones_are_fully_trained(search, trials):
    for seconds in (None, 36_000.0):
        log = Log()
        search(log, set(), trials=trials, seconds=seconds, full=30.0)
        found = candidates(log)
        assert len(found) <= trials
        last = max(rung for _, rung in found)
        assert log.kept.get(f"rung/{last}", {"effort": 1.0})["effort"] == 1.0
