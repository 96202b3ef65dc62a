"""How far an artifact's answers are from those of the module it was made of, and of the same plan's other artifacts."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimpoint.data import as_numpy
from trimpoint.errors import TrimpointError
from trimpoint.measure.inputs import CoreInputs, capture
from trimpoint.runtimes import get_runtime, runtime_names
from trimpoint.runtimes.base import Exported, Formats, Runtime, Session
from trimpoint.runtimes.verify import Parity, check_agreement, check_parity
from trimpoint.signature import BATCH
from trimpoint.task import Role, Task
from trimpoint.values import Measurement, Profile

SAMPLES, BATCH_SIZE = 64, 16
_CLEAN = 300.0
"""Decibels that stand for answers without any difference."""
_NOISY = 10.0
"""Decibels below which rounding is said to have spoilt the answers: their error is a third of their size."""


def sample_inputs(model: nn.Module, task: Task, inputs: CoreInputs, session: Session) -> list[Any]:
    """Return a few batches of data as the exported module takes them; its shapes, where the batch is fixed.

    Args:
        model: unmodified.
        task: its data for selection, calibration or training are read, the first that there are.
        inputs: of the exported module.
        session: its signature says which dimensions are open.
    """
    sizes = {size for spec in session.signature.inputs for size in spec.shape}
    roles: tuple[Role, ...] = ("select", "calibrate")
    role = next((role for role in roles if task.has(role)), None)
    limits = session.signature.limits
    if role is None or BATCH not in sizes or limits.get(BATCH, BATCH_SIZE) < BATCH_SIZE:
        return [as_numpy(batch) for batch in inputs.shapes.values()]
    batches = task.batches(role, size=BATCH_SIZE, limit=SAMPLES)
    return [as_numpy(capture(model, task, batch)) for batch, _ in batches]


def simulation_profile(module: nn.Module, session: Session, inputs: Sequence[Any], *, choices: bool) -> Profile:
    """Return how far an artifact is from the module that it was made of, which rounds what a plan rounds in it.

    Where the runtime alone rounds, as in static int8 to nearest, this is all that rounding costs; where it costs more
    than `_NOISY` allows, a note says where that may come from.

    Args:
        module: what was exported.
        session: the artifact, opened.
        inputs: batches of data.
        choices: the largest entry of a row of the main output is an answer: count equal ones.

    Raises:
        ParityError: if an answer of the artifact is not finite where the module's is.
    """
    how = "the module that the plan made, against these files"
    parity = check_parity(module, session, inputs)
    spoilt = (
        f"rounding has spoilt the answers of these files ({parity.sqnr_db:.2g} dB above their error): calibration data "
        'unlike the data or with outliers (take them out, or `observer="percentile"` and a lower `percentile`), or '
        "layers that need to stay in float32 (`keep_float`)",
    )
    return _profile("", parity, how, choices) | Profile(notes=spoilt if parity.sqnr_db < _NOISY else ())


def other_runtimes_profile(
    runtime: Runtime,
    session: Session,
    exported: Exported,
    formats: Formats,
    calibration: Sequence[Any],
    inputs: Sequence[Any],
    *,
    choices: bool,
) -> Profile:
    """Return how far the same plan's files for other runtimes are from these, for those that take the same export.

    Args:
        runtime: of the artifact.
        session: the artifact, opened.
        exported: what it was lowered from.
        formats: that it was lowered with.
        calibration: likewise.
        inputs: batches of data.
        choices: see `simulation_profile`.
    """
    result = Profile()
    for other in (get_runtime(name) for name in runtime_names() if name != runtime.name):
        if other.source != runtime.source:
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="trimpoint-") as name:
                lowered = other.lower(exported, Path(name), formats=formats or None, calibration=calibration)
                parity = check_agreement(session, other.open(Path(name), lowered), inputs)
        except TrimpointError as error:
            result |= Profile(missing={f"sqnr_db[{other.name}]": error.message})
            continue
        result |= _profile(f"[{other.name}]", parity, f"these files, against the same plan's for {other.name}", choices)
        left = f"in {other.name} {len(lowered.unmapped)} formats could not be realised: {'; '.join(lowered.unmapped)}"
        result |= Profile(notes=(left,) if lowered.unmapped else ())
    return result


def _profile(suffix: str, parity: Parity, how: str, choices: bool) -> Profile:
    size = f"{parity.batches} batches of data"
    ratio = min(max(parity.sqnr_db, -_CLEAN), _CLEAN)
    metrics = {
        f"sqnr_db{suffix}": Measurement(
            value=ratio, unit="dB", better="higher", n=parity.batches, how=f"answers ÷ their difference: {how}, {size}"
        )
    }
    if choices:
        metrics[f"agreement{suffix}"] = Measurement(
            value=parity.agreement, unit="1", better="higher", n=parity.rows, how=f"equal answers: {how}, {size}"
        )
    return Profile(metrics)
