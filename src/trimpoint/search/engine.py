"""The search itself: straight-line code over trials that are remembered, so that to resume is to run it again.

Every decision is a function of recorded trials and of recorded decisions. A trial that has ended is never run twice,
whatever killed the process that ran it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from trimpoint.errors import StudyError
from trimpoint.method import Stage
from trimpoint.plan import Plan, Step
from trimpoint.progress import SILENT, Progress
from trimpoint.recover.recipe import Recovery
from trimpoint.search.contain import contained, words
from trimpoint.search.log import TrialLog
from trimpoint.search.pick import choose, line
from trimpoint.search.probe import Probe, probe
from trimpoint.search.rungs import Rung, effort_for, mean_cost, promote, training_cost, widths
from trimpoint.search.settings import Settings
from trimpoint.search.space import Structure, keeping, ladder, usable_methods
from trimpoint.search.surrogate import newcomer
from trimpoint.search.workbench import Workbench
from trimpoint.task import Task
from trimpoint.values import Trial

ONE_LINE = "one-line-int8"
CONTROL = "control: "
RESUMED = "resumed"
"""Decision that lists the first trial of each process that went on with a search: its time is not what it costs."""
WORTH_MORE = 1.5
"""By what factor one more rung must lengthen the training, to be worth it."""
CLOSING_SHARE = 0.04
"""Share of the budget that is kept for choosing, certifying and writing the artifact."""
PRECISIONS = ("float32", "bfloat16")
RUNG_SHARES = (0.2, 0.25, 1.0)
"""Share of what is left of the training time that each rung may use."""


@dataclass
class Engine:
    """One run over one study.

    Args:
        model: unmodified, in evaluation mode.
        task: what it is for.
        settings: what was asked for.
        log: where trials are kept.
        bench: what runs plans and measures them.
        progress: where it tells how far it is.
    """

    model: nn.Module
    task: Task
    settings: Settings
    log: TrialLog
    bench: Workbench
    progress: Progress = SILENT
    _done: dict[tuple[str, int], Trial] = field(default_factory=dict)
    _ran: bool = False
    _spent_before: float = 0.0
    _started: float = 0.0

    def run(self) -> None:
        """Run the search to its end, or to the end of its budget."""
        self._started = time.monotonic()
        self.log.close_interrupted()
        self._spent_before = float(self.log.settings().get("seconds", 0.0))
        self._done = {(t.plan_hash, t.rung): t for t in self.log.trials()}
        self.progress.phase("baseline")
        baseline = self._baseline()
        self._one_line_int8()
        self.progress.phase("probe")
        found = self._probe(baseline)
        self.progress.phase("search")
        self._halve(baseline, found)

    # Clock and memory

    @property
    def spent(self) -> float:
        """Seconds used so far, by this run and by those before it."""
        return self._spent_before + time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        """Seconds left for trials, or `None` without a limit in time."""
        budget = self.settings.seconds
        return None if budget is None else budget * (1 - CLOSING_SHARE) - self.spent

    def note_time(self) -> None:
        """Record the time used so far."""
        self.log.note("seconds", round(self.spent, 1))

    def trials(self) -> list[Trial]:
        """Return the trials that have ended, by number."""
        return sorted(self._done.values(), key=lambda t: t.number)

    def reference(self) -> Trial:
        """Return what drops are certified against: the baseline, or the original trained further if that is better."""
        baseline = next(t for t in self.trials() if t.role == "baseline")
        controls = [t for t in self.trials() if t.label.startswith(CONTROL) and t.quality and t.state == "complete"]
        better = [t for t in controls if t.quality and t.quality.drop_upper is not None and t.quality.drop_upper < 0]
        return max(better, key=lambda t: -(t.quality.drop or 0.0) if t.quality else 0.0, default=baseline)

    def _decide(self, key: str, decide: Callable[[], Any]) -> Any:
        """Return a decision: the recorded one, or a new one that is recorded before it is acted on."""
        known = self.log.settings()
        if key in known:
            return known[key]
        decision = decide()
        self.log.note(key, decision)
        self.note_time()
        return decision

    def _trial(
        self, plan_hash: str, rung: int, start: Trial, run: Callable[[Trial], Trial], *, fatal: bool = False
    ) -> Trial:
        if (known := self._done.get((plan_hash, rung))) is not None:
            return known
        if self._spent_before and not self._ran:  # A process that was killed may have done part of this trial.
            self.log.note(RESUMED, [*self.log.settings().get(RESUMED, ()), f"{plan_hash}/{rung}"])
        self._ran = True
        number = self.log.start()
        self.note_time()
        began = time.monotonic()
        trial = replace(start, number=number, plan_hash=plan_hash, rung=rung)
        done, error = contained(lambda: run(trial))
        if done is not None:
            trial = replace(done, state="complete")
        elif error is not None:
            trial = replace(trial, state="failed", error=words(error))
            if fatal:
                self.log.finish(replace(trial, seconds=time.monotonic() - began))
                raise error
        trial = replace(trial, seconds=round(time.monotonic() - began, 2))
        self.log.finish(trial)
        self.note_time()
        self._done[plan_hash, rung] = trial
        self.bench.trim(self.trials())
        self._tell(trial)
        return trial

    # The two trials that come first

    def _baseline(self) -> Trial:
        plan = Plan(seed=self.settings.seed)
        start = Trial(
            number=0, plan=plan.to_data(), plan_hash="", rung=0, state="running", role="baseline", label="unmodified"
        )
        trial = self._trial(plan.hash, 0, start, self.bench.baseline, fatal=True)
        if trial.state != "complete":
            raise StudyError(f"The unmodified model could not be measured: {trial.error}", "start a new study")
        self.bench.use_baseline(trial)
        return trial

    def _one_line_int8(self) -> Trial:
        start = Trial(
            number=0, plan={}, plan_hash="", rung=0, state="running", role="one_line_int8", label="one-line int8"
        )
        return self._trial(ONE_LINE, 0, start, self.bench.one_line_int8)

    # What to try

    def _probe(self, baseline: Trial) -> Probe:
        settings = self.settings
        kinds, left_out = usable_methods(self.task, (Stage.STRUCTURE, Stage.FACTORIZE))
        quantisers, more = usable_methods(self.task, (Stage.QUANTIZE,))
        found = probe(
            self.bench,
            kinds,
            quantisers,
            where=settings.where,
            aims=settings.goal.minimize,
            decide=self._decide,
            progress=self.progress,
        )
        self.log.note("space", {**left_out, **more, **found.left_out})
        base = {name: measured.value for name, measured in baseline.profile.items() if measured.value > 0}
        limits = {m: settings.goal.limit(m, base[m]) / base[m] for m in settings.goal.limits if m in base}
        return replace(found, structures=keeping(found.structures, found.start, limits))

    def _plan(self, structure: Structure, found: Probe, recovery: Recovery | None) -> Plan:
        steps = list(structure.steps)
        if recovery is not None:
            steps.append(Step(recovery))
        if found.quantiser is not None:
            steps.append(Step(found.quantiser, self.settings.where))
        return Plan(tuple(steps), self.settings.seed)

    def _halve(self, baseline: Trial, found: Probe) -> None:
        where, seed = self.settings.where, self.settings.seed
        if found.quantiser is not None:
            self._candidate(Plan((Step(found.quantiser, where),), seed), Rung(number=0, width=1, effort=1.0))
        recovery = self._recovery()
        full_seconds = self._decide("full_seconds", lambda: recovery[1])
        # A budget that was raised later is a decision of its own.
        key = f"widths/{self.settings.seconds}/{self.settings.trials}"
        spare = None if self._trials_left() is None else (self._trials_left() or 0) - self._with_control
        counts = self._decide(key, lambda: list(widths(self.left, spare)))
        if recovery[0] is None:  # Without training there is nothing that a later rung could show.
            counts = counts[:1]
        allowed = self.settings.goal.allowed_drop(baseline.quality.value if baseline.quality else 0.0)
        chosen = ladder(found.structures, self.bench.leaves, counts[0]) if counts else []
        racing = {
            plan.hash: (structure, plan) for structure in chosen if (plan := self._plan(structure, found, recovery[0]))
        }
        if not racing:
            return
        effort, growth, costs = 0.0, 1.0, dict[str, float]()
        tried: list[tuple[Structure, Trial, float]] = []
        for number, width in enumerate(counts):
            racing = dict(list(racing.items())[:width])
            if not racing:
                return
            cost = mean_cost({key: full_seconds * training_cost(s) for key, (s, _) in racing.items()}, costs)
            rung = self._rung(
                number, width if number == 1 else len(racing), effort, cost, last=number + 1 == len(counts)
            )
            before, effort, final = effort, rung.effort, growth * effort
            if number > 1 and effort <= before:
                break
            if number == 0 and self._affords_control(full_seconds * effort):
                self._control(rung, recovery[0])
            waiting, ended = list(racing), list[Trial]()
            while waiting:
                structure, plan = racing[waiting.pop(0)]
                if (plan.hash, number) in self._done or not self._out_of_time():
                    ended.append(self._candidate(plan, rung))
                    tried.append((structure, ended[-1], effort))
                    if number == 1 and not waiting and len(ended) < width:
                        fresh = newcomer(tried, found.structures, self.bench.leaves, allowed=allowed, final=final)
                        if fresh is not None and (plan := self._plan(fresh, found, recovery[0])):
                            racing[plan.hash] = (fresh, plan)
                            waiting.append(plan.hash)
            costs = {
                t.plan_hash: self._full_seconds(t, effort, before if t.plan_hash in costs else 0.0)
                for t in ended
                if t.state == "complete" and f"{t.plan_hash}/{t.rung}" not in self.log.settings().get(RESUMED, ())
            }
            if number + 1 < len(counts):
                growth = self._growth(rung, cost, counts[-1])
                places = counts[number + 1] if number else (counts[1] + 1) // 2
                rising = promote(ended, baseline, self.settings.goal, places, growth)
                racing = {trial.plan_hash: racing[trial.plan_hash] for trial in rising}
        while (longer := self._longer(rung.number + 1, effort, cost)) > effort:
            rung, effort = Rung(number=rung.number + 1, width=2, effort=longer), longer
            latest = {t.plan_hash: (t, s) for s, t, _ in tried}
            rising = promote([t for t, _ in latest.values()], baseline, self.settings.goal, 2, 1.0)
            of = {t.plan_hash: latest[t.plan_hash][1] for t in rising}
            racing = {key: (s, self._plan(s, found, recovery[0])) for key, s in of.items()}
            ended = [self._candidate(plan, rung) for _, plan in racing.values() if not self._out_of_time()]
            tried += [(racing[t.plan_hash][0], t, effort) for t in ended]
        trained = [racing[t.plan_hash] for t in ended if t.state == "complete" and t.plan_hash in racing]
        self._vary_last_step(trained, found, recovery[0], rung)

    def _full_seconds(self, trial: Trial, effort: float, before: float) -> float:
        """Return how long a recovery of full length takes, from how long that of a trial took."""
        return max(trial.seconds - self.bench.overhead_seconds, 1.0) / max(effort - before * self._kept, 1e-6)

    @property
    def _kept(self) -> float:
        """Share of a recovery that a longer one does not repeat."""
        return 0.0 if self.settings.recovery is None else 1 - self.settings.recovery.cooldown

    def _growth(self, rung: Rung, full_seconds: float, width: int) -> float:
        """Return by what factor the effort is expected to grow until the last rung."""

        def decide() -> float:
            if self.left is None or not full_seconds:
                return 1.0 / rung.effort
            final = effort_for(
                self.left * 0.7,
                width,
                full_seconds=full_seconds,
                before=rung.effort,
                overhead=self.bench.overhead_seconds,
                kept=self._kept,
            )
            return round(final / rung.effort, 2)

        return float(self._decide(f"growth/{rung.number}", decide))

    def _longer(self, number: int, effort: float, full_seconds: float) -> float:
        """Return the effort of one more rung where there is time for it, as after the budget was raised; 0 for none."""
        if f"longer/{number}" in self.log.settings():
            return float(self.log.settings()[f"longer/{number}"])
        if self.left is None or self.left <= 0 or not full_seconds:
            return 0.0
        overhead = self.bench.overhead_seconds
        more = effort_for(
            self.left, 2, full_seconds=full_seconds, before=effort, overhead=overhead, kept=self._kept, growth=1.0
        )
        return float(self._decide(f"longer/{number}", lambda: round(more, 4))) if more >= WORTH_MORE * effort else 0.0

    def _vary_last_step(
        self, racing: Sequence[tuple[Structure, Plan]], found: Probe, recovery: Recovery | None, rung: Rung
    ) -> None:
        """Try the trained finalists in float32 and with the quantiser's other settings: nothing is trained again."""
        if found.quantiser is None:
            return
        others = [m for m in type(found.quantiser).variants((), ()) if m != found.quantiser]
        for structure, _ in racing:
            for quantiser in (None, *others):
                plan = self._plan(structure, replace(found, quantiser=quantiser), recovery)
                if plan.steps and not self._out_of_budget():
                    self._candidate(plan, rung)

    def _recovery(self) -> tuple[Recovery | None, float]:
        """Return the recovery in the faster of its precisions on this machine, and its full length in seconds."""
        recovery = self.settings.recovery
        if recovery is None:
            return None, 0.0
        self.progress.update(text="timing a few training steps")

        def time_precisions() -> dict[str, float]:
            timed = {}
            for precision in PRECISIONS:
                tried = replace(recovery, precision=precision)
                seconds, error = contained(lambda tried=tried: self.bench.training_speed(tried))  # type: ignore[misc]
                if seconds is not None:
                    timed[precision] = seconds
                elif error is not None:
                    self.progress.message(f"training in {precision} does not work here: {words(error)}")
            return timed

        speeds = self._decide("training", time_precisions)
        best = min(speeds, key=lambda p: speeds[p] * (1.0 if p == recovery.precision else 1.1), default=None)
        return (None, 0.0) if best is None else (replace(recovery, precision=best), speeds[best])

    def _control(self, rung: Rung, recovery: Recovery | None) -> None:
        if recovery is not None and self.settings.control is not None:
            control = replace(self.settings.control, precision=recovery.precision)
            self._candidate(Plan((Step(control),), self.settings.seed), rung, label=CONTROL)

    @property
    def _with_control(self) -> bool:
        """Whether the original is to be trained further as well, to see if training alone helps."""
        return self.settings.control is not None and self.settings.seconds is not None

    def _affords_control(self, seconds: float) -> bool:
        return self._with_control and bool(self._decide("control", lambda: seconds < 0.1 * (self.left or 0.0)))

    def _rung(self, number: int, width: int, before: float, full_seconds: float, *, last: bool) -> Rung:
        def decide() -> Mapping[str, float]:
            if self.left is None or not full_seconds:
                return {"effort": 1.0 if last or self.settings.recovery is None else (1 / 9, 1 / 3)[number]}
            share = 1.0 if last else RUNG_SHARES[number]
            overhead = self.bench.overhead_seconds
            effort = effort_for(
                self.left * share, width, full_seconds=full_seconds, before=before, overhead=overhead, kept=self._kept
            )
            return {"effort": round(effort, 4)}

        return Rung(number=number, width=width, effort=self._decide(f"rung/{number}", decide)["effort"])

    def _candidate(self, plan: Plan, rung: Rung, *, label: str = "") -> Trial:
        start = Trial(
            number=0, plan=plan.to_data(), plan_hash="", rung=rung.number, state="running", label=label + str(plan)
        )
        return self._trial(plan.hash, rung.number, start, lambda trial: self.bench.candidate(trial, plan, rung.effort))

    def _out_of_time(self) -> bool:
        return self.left is not None and self.left <= 0

    def _trials_left(self) -> int | None:
        most = self.settings.trials
        return None if most is None else max(0, most - sum(t.role == "candidate" for t in self.trials()))

    def _out_of_budget(self) -> bool:
        return self._out_of_time() or self._trials_left() == 0

    def _tell(self, trial: Trial) -> None:
        baseline = next((t for t in self.trials() if t.role == "baseline"), None)
        if baseline is None or trial.state != "complete":
            self.progress.message(f"trial {trial.number}: {trial.label}: {trial.state} {trial.error}".rstrip())
            return
        best = choose(self.trials(), baseline, self.settings.goal)
        self.progress.message(line(trial, baseline, self.settings.goal))
        self.progress.update(
            fraction=None if self.settings.seconds is None else min(1.0, self.spent / self.settings.seconds),
            best="" if best is None else line(best, baseline, self.settings.goal),
            seconds_left=None if self.settings.seconds is None else max(0.0, self.settings.seconds - self.spent),
        )
