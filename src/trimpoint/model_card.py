"""The README of an artifact: what it is, before and after, what is certified, how to run it."""

from collections.abc import Iterable, Mapping
from typing import Any

from trimpoint.runtimes.base import Lowered
from trimpoint.signature import TensorSpec
from trimpoint.values import Certificate, Measurement, Profile


def model_card(
    name: str,
    plan: Mapping[str, Any],
    lowered: Lowered,
    profile: Profile,
    baseline: Profile | None,
    certificate: Certificate | None,
    environment: Mapping[str, str],
    extra: Iterable[str],
) -> str:
    """Return the model card of an artifact as Markdown.

    Args:
        name: of the artifact.
        plan: what was done to make it, in its JSON form.
        lowered: the runtime's files.
        profile: what was measured of it.
        baseline: what was measured of the unmodified model.
        certificate: of its quality.
        environment: where it was made.
        extra: names of the files that go along.
    """
    steps = [step["method"] for step in plan.get("steps", [])]
    made = " → ".join(f"`{step}`" for step in steps) or "the unmodified model, exported"
    parts = [
        f"# {name}",
        f"A neural network for {lowered.runtime}, made by trimpoint: {made}. Every figure was measured on these files.",
        "## Before and after" if baseline else "## Measured",
        _table(profile, baseline),
        "## Certificate",
        certificate_sentence(certificate),
        "## Run it",
        _with_trimpoint(lowered.signature.inputs),
        *([_with_onnxruntime(lowered)] if lowered.runtime == "onnxruntime" else []),
        "## Inputs and outputs",
        _tensors("in", lowered.signature.inputs) + "\n" + _tensors("out", lowered.signature.outputs),
        *(["## Files that go along", "\n".join(f"- `extra/{entry}`" for entry in sorted(extra))] if extra else []),
        "## Made on",
        "\n".join(f"- {key}: {value}" for key, value in environment.items()),
        "`trimpoint verify` checks every byte of this directory and runs the recorded inputs again.",
    ]
    return "\n\n".join(parts) + "\n"


def certificate_sentence(certificate: Certificate | None) -> str:
    """Return what a certificate says, in a sentence or two.

    Example:
        >>> certificate_sentence(None)
        'None: the quality of this artifact was not certified on data that took no part in making it.'
    """
    if certificate is None:
        return "None: the quality of this artifact was not certified on data that took no part in making it."
    c = certificate
    verdicts = {
        "passed": "Passed",
        "unproven": "Unproven: there were too few samples to tell",
        "failed": "Failed",
    }
    return (
        f"{verdicts[c.status]}. On {c.n:,} samples that took no part in making it, the {c.score} is {c.value:.4g} "
        f"({c.baseline:.4g} for {c.reference}): a drop of {c.drop:.4g}, at most {c.upper:.4g} with {c.level:.1%} "
        f"confidence, where {c.margin:.4g} was allowed. It holds for {c.runtime or 'this runtime'} on "
        f"{c.instruction_set or 'the processor it was made on'}."
    )


def _table(profile: Profile, baseline: Profile | None) -> str:
    if baseline is None:
        rows = [f"| {name} | {_cell(value)} |" for name, value in profile.items()]
        return "\n".join(["| | measured |", "| --- | --- |", *rows])
    rows = [
        f"| {name} | {_cell(baseline.get(name))} | {_cell(value)} | {_change(baseline.get(name), value)} |"
        for name, value in profile.items()
    ]
    return "\n".join(["| | before | after | |", "| --- | --- | --- | --- |", *rows])


def _cell(value: Measurement | None) -> str:
    if value is None:
        return "–"
    if value.unit in ("bytes", "1") and value.value == int(value.value) and abs(value.value) >= 100:
        return f"{int(value.value):,}{' bytes' if value.unit == 'bytes' else ''}"
    return str(value)


def _change(before: Measurement | None, after: Measurement) -> str:
    if before is None or before.value <= 0 or after.value <= 0:
        return ""
    if before.unit != after.unit or (after.unit == "1" and before.value < 100):
        return ""
    ratio = after.value / before.value
    return f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.3f}×"


def _with_trimpoint(inputs: tuple[TensorSpec, ...]) -> str:
    return "\n".join(
        [
            "```python",
            "import numpy as np",
            "import trimpoint",
            "",
            'model = trimpoint.open(".")  # this directory',
            f"outputs = model({_example(inputs)})",
            "```",
        ]
    )


def _with_onnxruntime(lowered: Lowered) -> str:
    feeds = ", ".join(f'"{spec.name}": {_zeros(spec)}' for spec in lowered.signature.inputs)
    return "\n".join(
        [
            "or without trimpoint:",
            "",
            "```python",
            "import numpy as np",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{lowered.files["main"][0]}")',
            f"outputs = session.run(None, {{{feeds}}})",
            "```",
        ]
    )


def _example(inputs: tuple[TensorSpec, ...]) -> str:
    if len(inputs) == 1:
        return _zeros(inputs[0])
    return "{" + ", ".join(f'"{spec.name}": {_zeros(spec)}' for spec in inputs) + "}"


def _zeros(spec: TensorSpec) -> str:
    shape = ", ".join("1" if isinstance(size, str) else str(size) for size in spec.shape)
    return f'np.zeros([{shape}], "{spec.dtype}")'


def _tensors(direction: str, specs: tuple[TensorSpec, ...]) -> str:
    return "\n".join(f"- {direction}: `{spec.name}` {spec.dtype} {list(spec.shape)}" for spec in specs)
