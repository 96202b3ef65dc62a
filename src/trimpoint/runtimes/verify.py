"""Does a lowered model give the answers of the module that it came from?"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trimpoint.data import as_numpy, as_tensors
from trimpoint.errors import DataError, ParityError
from trimpoint.runtimes.base import Session
from trimpoint.signature import BATCH, flatten, unflatten
from trimpoint.task import call


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How near the answers of a session are to those of a module, over all batches.

    Args:
        max_abs: largest absolute difference.
        max_rel: the same in relation to the largest magnitude of that output.
        cosine: smallest cosine between the two answers, over the outputs.
        agreement: share of rows of the main output whose largest entry is at the same place.
        sqnr_db: signal to quantisation noise ratio of the main output in decibels; infinite where they are equal.
        rows: rows of the main output that were compared.
        batches: number of batches compared.
        where: output and batch of `max_rel`.
    """

    max_abs: float
    max_rel: float
    cosine: float
    agreement: float
    sqnr_db: float
    rows: int
    batches: int
    where: str


def check_parity(module: nn.Module, session: Session, inputs: Sequence[Any]) -> Parity:
    """Compare a session with the module it was lowered from.

    Args:
        module: in evaluation mode or not; it is not changed.
        session: of any runtime.
        inputs: batches of inputs in the module's structure; give several shapes and batch sizes where they are open.

    Raises:
        DataError: if there are no batches.
        ParityError: if an output has another shape or is not finite where the module's is.
    """
    reference = copy.deepcopy(module).eval().cpu()

    def answers(batch: Any) -> list[np.ndarray]:
        with torch.no_grad():
            return _leaves(call(reference, as_tensors(batch)))

    return _compared(answers, session, inputs)


def check_agreement(first: Session, second: Session, inputs: Sequence[Any]) -> Parity:
    """Compare two sessions of one signature, such as a model in two runtimes.

    Args:
        first: whose answers count as the signal.
        second: the other one.
        inputs: batches of inputs (see `check_parity`).

    Raises:
        DataError: if there are no batches.
        ParityError: if an output has another shape or is not finite where that of the first is.
    """
    return _compared(lambda batch: flatten(first(as_numpy(batch))), second, inputs)


def _compared(answers: Callable[[Any], list[np.ndarray]], session: Session, inputs: Sequence[Any]) -> Parity:
    if len(inputs) == 0:
        raise DataError("Parity needs at least one batch of inputs. Got none.")
    tally = _Tally()
    for index, batch in enumerate(inputs):
        wanted, got = answers(batch), flatten(session(as_numpy(batch)))
        for spec, want, have in zip(session.signature.outputs, wanted, got, strict=True):
            tally.add(want, have, f"output {spec.name!r}, batch {index}")
        tally.compare_main(wanted, got, [spec.name for spec in session.signature.outputs])
    return tally.parity(len(inputs))


def require_parity(module: nn.Module, session: Session, inputs: Sequence[Any], *, tolerance: float = 1e-3) -> Parity:
    """Check that a float32 lowering gives the module's answers.

    Args:
        module: what was exported.
        session: the float32 lowering, opened.
        inputs: batches of inputs (see `check_parity`).
        tolerance: allowed difference, as a share of the largest magnitude of the output.

    Raises:
        ParityError: if the difference is larger.
    """
    parity = check_parity(module, session, inputs)
    if not parity.max_rel <= tolerance:
        raise ParityError(
            f"The answers in {session.runtime} must be within {tolerance:g} of the model's largest output. Got "
            f"{parity.max_rel:.3g} ({parity.where}).",
            "look for randomness in the model's forward pass, or for a branch on the shape of its inputs",
        )
    return parity


def parity_batches(
    inputs: Any,
    session: Session,
    *,
    batches: Sequence[int] = (1, 3),
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> list[Any]:
    """Return a batch of inputs cut and repeated to other sizes of the dimensions that the session leaves open.

    Args:
        inputs: a batch in the module's structure.
        session: its signature says which dimensions are open.
        batches: batch sizes.
        lengths: named dimension → sizes, such as the shortest, median and longest of the data (`Task.lengths`).
    """
    signature = session.signature
    arrays = session.flat_inputs(as_numpy(inputs))
    turns = max((len(sizes) for sizes in (lengths or {}).values()), default=1)
    open_dims = {size for spec in signature.inputs for size in spec.shape if isinstance(size, str)}
    results = []
    for turn in range(turns):
        sizes = {name: values[min(turn, len(values) - 1)] for name, values in (lengths or {}).items()}
        for batch in batches if BATCH in open_dims else batches[:1]:
            wanted = sizes | {BATCH: batch}
            leaves = [
                _resized(array, [wanted.get(size) if isinstance(size, str) else None for size in spec.shape])
                for spec, array in zip(signature.inputs, arrays, strict=True)
            ]
            results.append(unflatten(signature.input_structure, leaves))
    return results


def _resized(array: np.ndarray, shape: Sequence[int | None]) -> np.ndarray:
    for dim, size in enumerate(shape):
        if size is not None:
            array = array.take(np.arange(size) % array.shape[dim], axis=dim)
    return array


class _Tally:
    """Collect differences over outputs and batches."""

    def __init__(self) -> None:
        self.max_abs, self.max_rel, self.cosine, self.where = 0.0, 0.0, 1.0, ""
        self.rows, self.same, self.signal, self.noise = 0, 0, 0.0, 0.0

    def add(self, want: np.ndarray, have: np.ndarray, where: str) -> None:
        if want.shape != have.shape:
            raise ParityError(f"The shape of {where} must be {list(want.shape)}. Got {list(have.shape)}.")
        if want.size == 0:
            return
        a, b = want.astype(np.float64).ravel(), have.astype(np.float64).ravel()
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
            raise ParityError(f"The values of {where} must be finite where the model's are. Got others.")
        a, b = a[finite], b[finite]
        if a.size == 0:
            return
        difference = float(np.abs(a - b).max())
        relative = difference / scale if (scale := float(np.abs(a).max())) > 0 else difference
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        self.max_abs = max(self.max_abs, difference)
        self.cosine = min(self.cosine, float(a @ b) / norm if norm > 0 else float(difference == 0))
        if relative >= self.max_rel:
            self.max_rel, self.where = relative, where

    def compare_main(self, wanted: Sequence[np.ndarray], got: Sequence[np.ndarray], names: Sequence[str]) -> None:
        main = names.index("logits") if "logits" in names else 0
        want, have = (np.atleast_1d(leaves[main]).astype(np.float64) for leaves in (wanted, got))
        finite = np.isfinite(want)
        self.signal += float(np.square(want[finite]).sum())
        self.noise += float(np.square(want[finite] - have[finite]).sum())
        if want.shape[-1] > 0:
            agree = want.argmax(-1) == have.argmax(-1)
            self.rows, self.same = self.rows + agree.size, self.same + int(agree.sum())

    def parity(self, batches: int) -> Parity:
        ratio = self.signal / self.noise if self.noise > 0 else math.inf
        return Parity(
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            cosine=self.cosine,
            agreement=self.same / self.rows if self.rows else 1.0,
            sqnr_db=10 * math.log10(ratio) if ratio > 0 else -math.inf,
            rows=self.rows,
            batches=batches,
            where=self.where,
        )


def _leaves(outputs: Any) -> list[np.ndarray]:
    """Return the tensors among the outputs, as they are exported."""
    return [as_numpy(leaf) for leaf in flatten(outputs) if isinstance(leaf, torch.Tensor)]
