"""What to do to a model: an ordered tuple of steps. Pure data with a content hash, as TOML or JSON."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trimpoint.errors import PlanError, UnknownNameError, suggest
from trimpoint.filters import EVERYTHING, Filter, parse
from trimpoint.method import Method, Stage
from trimpoint.registry import make_method


@dataclass(frozen=True)
class Step:
    """A method and the modules that it applies to.

    Args:
        method: with its hyper-parameters.
        where: which modules, by their path in the unmodified model; text is read as in a recipe.
    """

    method: Method
    where: Filter = EVERYTHING

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            object.__setattr__(self, "where", parse(self.where))

    def to_data(self) -> dict[str, Any]:
        """Return the step as a JSON object: `method`, its parameters, and `where` unless it is everything."""
        data: dict[str, Any] = {"method": self.method.name}
        data |= {key: list(value) if isinstance(value, tuple) else value for key, value in self.method.params.items()}
        return data if self.where == EVERYTHING else data | {"where": str(self.where)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Step":
        """Read a step back.

        Raises:
            PlanError: if the step does not name its method, or not as text.
            UnknownNameError: if there is no such method or key.
        """
        if "method" not in data:
            raise PlanError(f"A step must name its `method`. Got {dict(data)!r}.")
        for key in ("method", "where"):
            if key in data and not isinstance(data[key], str):
                raise PlanError(f"`{key}` of a step must be text. Got {data[key]!r}.")
        params = {key: value for key, value in data.items() if key not in ("method", "where")}
        return cls(make_method(data["method"], params), parse(data["where"]) if "where" in data else EVERYTHING)

    def __str__(self) -> str:
        changed = {
            field.name: value
            for field in fields(self.method)
            if (value := getattr(self.method, field.name)) != field.default
        }
        text = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in changed.items()
        )
        where = "" if self.where == EVERYTHING else f" at {self.where}"
        return f"{self.method.name}({text}){where}"


@dataclass(frozen=True)
class Plan:
    """An ordered tuple of steps with a seed; equal plans have equal hashes on every machine.

    Example:
        >>> Plan().hash == Plan(seed=0).hash
        True
    """

    steps: tuple[Step, ...] = ()
    seed: int = 0

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON form, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def prefix(self, length: int) -> "Plan":
        """Return the plan of the first `length` steps."""
        return Plan(self.steps[:length], self.seed)

    def then(self, *steps: Step | Method) -> "Plan":
        """Return a plan with more steps at its end."""
        return Plan(self.steps + tuple(s if isinstance(s, Step) else Step(s) for s in steps), self.seed)

    def check_order(self) -> None:
        """Check that no transform stands after one of a later stage.

        Raises:
            PlanError: naming every pair that stands in the wrong order.
        """
        problems, latest = [], None
        for step in self.steps:
            stage = step.method.traits.stage
            if stage is Stage.RECOVER:
                continue
            if latest is not None and stage < latest.method.traits.stage:
                problems.append(
                    f"`{step.method.name}` ({stage.name.lower()}) must stand before "
                    f"`{latest.method.name}` ({latest.method.traits.stage.name.lower()})."
                )
            else:
                latest = step
        if problems:
            numbered = problems[0] if len(problems) == 1 else "\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1))
            raise PlanError(numbered, "order the steps: structure, factorize, sparsify, quantize; recovery anywhere")

    def to_data(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return {"seed": self.seed, "steps": [step.to_data() for step in self.steps]}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Plan":
        """Read a plan back.

        Raises:
            UnknownNameError: if there is a key, method or parameter that nothing here has.
            PlanError: if the data is no plan.
        """
        for key in data:
            if key not in ("seed", "steps"):
                raise UnknownNameError(f"A plan has no key {key!r}.", suggest(key, ["seed", "steps"]))
        steps, seed = data.get("steps", []), data.get("seed", 0)
        if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
            raise PlanError(
                f"`steps` of a plan must be a list of tables. Got {steps!r}.", "write each step as [[steps]]"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise PlanError(f"`seed` of a plan must be a whole number. Got {seed!r}.")
        plan = cls(tuple(Step.from_data(step) for step in steps), seed)
        plan.check_order()
        return plan

    def to_toml(self) -> str:
        """Return the plan as a TOML recipe; parameters that are `None` are left out."""
        import tomli_w

        data = self.to_data()
        data["steps"] = [{key: value for key, value in step.items() if value is not None} for step in data["steps"]]
        return tomli_w.dumps(data)

    @classmethod
    def from_toml(cls, text: str) -> "Plan":
        """Read a TOML recipe.

        Raises:
            PlanError: if the text is no TOML or no plan.
        """
        try:
            return cls.from_data(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"The recipe is no valid TOML: {error}.") from error

    def __str__(self) -> str:
        return " → ".join(map(str, self.steps)) or "unmodified"
