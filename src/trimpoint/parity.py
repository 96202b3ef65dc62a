"""Recorded inputs and outputs: what an artifact must answer wherever it is opened."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trimpoint.errors import ArtifactError
from trimpoint.signature import Signature, flatten

PARITY = "parity.safetensors"
Case = tuple[list[Any], list[Any]]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an output may be from the recorded one: `|output − expected| ≤ atol + rtol · |expected|`."""

    rtol: float = 1e-3
    atol: float = 1e-4


def parity_bytes(signature: Signature, parity: Sequence[tuple[Any, Any]], tolerance: Tolerance) -> bytes:
    """Return cases as the content of a safetensors file.

    Args:
        signature: of the model.
        parity: pairs of inputs and outputs, NumPy arrays in the module's structure.
        tolerance: recorded with them.

    Raises:
        ArtifactError: if a case has too few or too many tensors.
    """
    tensors = {}
    for index, (inputs, outputs) in enumerate(parity):
        for kind, specs, value in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
            leaves = flatten(value)
            if len(leaves) != len(specs):
                raise ArtifactError(f"Parity case {index} must have {len(specs)} {kind} tensors. Got {len(leaves)}.")
            for spec, leaf in zip(specs, leaves, strict=True):
                tensors[f"{index}.{kind}.{spec.name}"] = np.ascontiguousarray(leaf)
    # One key only: safetensors writes several in random order.
    about = {"cases": len(parity), "rtol": tolerance.rtol, "atol": tolerance.atol}
    return save(tensors, metadata={"trimpoint": json.dumps(about)})


def read_parity(directory: Path, signature: Signature) -> tuple[dict[str, Case], Tolerance]:
    """Return the recorded cases of an artifact, name → (inputs, outputs), flat in the signature's order.

    Raises:
        ArtifactError: if the file is not what `write_artifact` writes.
    """
    try:
        with safe_open(directory / PARITY, framework="numpy") as file:
            about = json.loads(file.metadata()["trimpoint"])
            cases = {
                str(index): (
                    [file.get_tensor(f"{index}.input.{spec.name}") for spec in signature.inputs],
                    [file.get_tensor(f"{index}.output.{spec.name}") for spec in signature.outputs],
                )
                for index in range(int(about["cases"]))
            }
            return cases, Tolerance(rtol=float(about["rtol"]), atol=float(about["atol"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{PARITY} does not hold the model's inputs and outputs: {error}.") from error


def compare(
    signature: Signature, case: str, outputs: Sequence[Any], expected: Sequence[Any], bound: Tolerance
) -> float:
    """Return the largest distance of a case's outputs from the recorded ones.

    Raises:
        ArtifactError: naming the output whose type, shape or values are not as recorded.
    """
    largest = 0.0
    for spec, got, want in zip(signature.outputs, outputs, expected, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ArtifactError(
                f"The output {spec.name!r} must be {want.dtype} of shape {list(want.shape)}. Got {got.dtype} of shape "
                f"{list(got.shape)} (case {case} of {PARITY})."
            )
        if got.size == 0:
            continue
        got, want = got.astype(np.float64), want.astype(np.float64)
        error = np.where(got == want, 0.0, np.abs(got - want))
        if not (error <= bound.atol + bound.rtol * np.abs(want)).all():
            raise ArtifactError(
                f"The output {spec.name!r} must be as recorded in {PARITY} (case {case}), within atol {bound.atol:g} "
                f"and rtol {bound.rtol:g}. Got a difference of {np.nanmax(error):.3g}.",
                "int8 results differ between instruction sets; certify again on this machine with `--data`",
            )
        largest = max(largest, float(error.max()))
    return largest
