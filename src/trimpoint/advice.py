"""Advice against work that does not pay: before it, by what kernels are known to do; after it, by what was measured."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trimpoint.method import Stage
from trimpoint.plan import Plan, Step
from trimpoint.registry import all_methods
from trimpoint.runtimes.kernels import ONLY_CODED, drawback
from trimpoint.target import Target
from trimpoint.values import Measurement, Profile

if TYPE_CHECKING:
    from torch import nn

PAYS = 1.1
"""How many times as fast something must be, its interval above 1, to be worth another number format."""


def warnings_of(plan: Plan, target: Target, model: "nn.Module | None" = None, instructions: str = "") -> list[str]:
    """Return which steps of a plan will make nothing faster on a target; nothing is run.

    Args:
        plan: to be applied.
        target: where the model will run.
        model: unmodified; with it, layers are told apart that a runtime has no kernels for.
        instructions: vector extensions of the processor; those of this one by default.

    Raises:
        UnknownNameError: if there is no such runtime.
    """
    from trimpoint.measure.environment import instruction_set
    from trimpoint.runtimes import get_runtime

    runtime, instructions = get_runtime(target.runtime).name, instructions or instruction_set()
    found = []
    for step in plan.steps:
        if step.method.traits.reduces == {"coded_bytes"}:
            found.append(f"`{step.method.name}` {ONLY_CODED}")
        formats = step.method.formats
        if "weight" not in formats:
            continue
        why: dict[str, list[str]] = {}
        for layer in _layers(step, model):
            reason = drawback(runtime, formats, instructions=instructions, batch=target.batch, layer=layer)
            why.setdefault(reason, []).append(layer)
        what = f"`{step.method.name}` with weights of {formats['weight'].bits} bits"
        found += [f"{what} {reason} ({runtime}, {instructions})" for reason in why if reason]
    return found


def _layers(step: Step, model: "nn.Module | None") -> Iterable[str]:
    """Return the classes of the modules that a step applies to; one empty name where no model is given."""
    if model is None:
        return [""]
    from trimpoint.build import type_names

    named = [(path, type_names(module)) for path, module in model.named_modules(remove_duplicate=False)]
    targets = set(step.method.traits.targets)
    return dict.fromkeys(types[0] for path, types in named if targets & set(types) and step.where.matches(path, types))


def only_numbers(plan: Mapping[str, Any]) -> bool:
    """Return whether a plan, in its JSON form, changes nothing but number formats, besides training."""
    known = all_methods()
    named = [known.get(step["method"]) for step in plan.get("steps", ())]
    stages = [None if kind is None else kind.traits.stage for kind in named]
    return Stage.QUANTIZE in stages and all(stage in (Stage.QUANTIZE, Stage.RECOVER) for stage in stages)


def numbers_text(plan: Plan) -> str:
    """Return a plan's number format in a word or two, such as `int8`.

    Example:
        >>> from trimpoint.registry import make_method
        >>> numbers_text(Plan().then(make_method("quantize-weights", {"bits": 4})))
        'weights of 4 bits'
    """
    bits = {step.method.formats["weight"].bits for step in plan.steps if step.method.formats.get("weight") is not None}
    return "int8" if bits == {8} else f"weights of {min(bits)} bits" if bits else str(plan)


def measured_advice(profile: Mapping[str, Measurement], what: str = "int8") -> str:
    """Return advice against a number format that the artifact itself, timed beside float32, shows not to pay.

    Args:
        profile: of the artifact, with `latency_ratio`: the time of the unmodified model over its own.
        what: the number format.

    Returns:
        One sentence; nothing where the format pays, or where no ratio was measured.

    Example:
        >>> measured_advice({"latency_ratio": Measurement(value=0.97, unit="1", low=0.95, high=0.99)})
        "int8 does not pay here: 0.97× (0.95 – 0.99) of float32's speed; keep float32 unless the file's size counts"
    """
    speed = profile.get("latency_ratio")
    if speed is None:
        return ""
    low, high = (speed.value if end is None else end for end in (speed.low, speed.high))
    if low > 1 and speed.value >= PAYS:
        return ""
    busy = isinstance(profile, Profile) and any(note.startswith("timed on a busy machine") for note in profile.notes)
    verb = "do" if what.startswith("weights") else "does"
    return (
        f"{what} {verb} not pay here: {speed.value:.2f}× ({low:.2f} – {high:.2f}) of float32's speed; keep float32 "
        "unless the file's size counts" + (" (timed on a busy machine: measure again on a quiet one)" if busy else "")
    )


def trial_advice(plan: Mapping[str, Any], profile: Profile) -> str:
    """Return `measured_advice` of a trial whose plan changes nothing but number formats; else nothing.

    Args:
        plan: in its JSON form.
        profile: of its artifact.
    """
    return measured_advice(profile, numbers_text(Plan.from_data(plan))) if only_numbers(plan) else ""
