"""Everything a study knows, as one immutable value: what reports and the command line read."""

from dataclasses import dataclass, field

from trimpoint.target import Goal, Target
from trimpoint.values import Trial


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A snapshot of a study, finished or not.

    Args:
        directory: where it lives; the paths of artifacts are relative to it.
        model: reference (`package.module:attribute`) or class name of the model.
        task: reference or a short description of the task.
        score: name of the score.
        target: where the model must run.
        goal: what it must reach.
        trials: all trials by number; the first is the baseline, the second the one-line int8 if it could be made.
        frontier: numbers of the non-dominated, complete trials, fastest first.
        best: number of the chosen trial, `None` if none met the goal.
        nearest: number of the trial that came nearest to the goal where none met it.
        verdict: one sentence: what came out, and what the search added over the one-line int8.
        binding: why nothing met the goal: the limit that binds.
        seconds: the search took, all sessions of it.
        budget: as it was given.
        finished: whether the search came to its end.
        command: that reproduces it.
        environment: CPU, cores, instruction set, versions, as name → value.
        warnings: what a reader must know.
        space: what the search could not use and why (methods removed, metrics not measurable here), name → reason.
    """

    directory: str
    model: str
    task: str
    score: str
    target: Target
    goal: Goal
    trials: tuple[Trial, ...] = ()
    frontier: tuple[int, ...] = ()
    best: int | None = None
    nearest: int | None = None
    verdict: str = ""
    binding: str = ""
    seconds: float = 0.0
    budget: str = ""
    finished: bool = False
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    space: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> Trial | None:
        """The unmodified model, exported and measured."""
        return next((trial for trial in self.trials if trial.role == "baseline"), None)

    @property
    def one_line_int8(self) -> Trial | None:
        """The runtime's own one-line int8."""
        return next((trial for trial in self.trials if trial.role == "one_line_int8"), None)

    @property
    def chosen(self) -> Trial | None:
        """The trial that was handed over."""
        return next((trial for trial in self.trials if trial.number == self.best), None)
