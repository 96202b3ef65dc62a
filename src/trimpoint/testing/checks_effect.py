"""Checks of what a method achieves: on the outputs, on the exported file, under training."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trimpoint.graph import rebuild, save_structure
from trimpoint.method import Method
from trimpoint.testing import artifact_probe
from trimpoint.testing.applied import (
    answers,
    applied,
    core_answer,
    named_tensors,
    relative_error,
    tensor_bytes,
)
from trimpoint.testing.checks_record import same_answers
from trimpoint.testing.failure import ConformanceFailure, expect, few
from trimpoint.testing.zoo import ZooEntry

STEPS = 5
PARITY = 1e-4
AGREEMENT = 0.25
SLACK = 1.02


def check_rebuild(method: Method, entry: ZooEntry) -> None:
    """Saved by `save_structure` and rebuilt from the caller's factory, the result gives bitwise the same answers."""
    result = applied(method, entry)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        save_structure(Path(name), result.compressed.module, result.compressed.edits)
        again = rebuild(Path(name), lambda: entry.make()[0])
    one, other = named_tensors(result.compressed.module), named_tensors(again)
    expect(one.keys() == other.keys(), f"rebuilding gives other tensors: {few(set(one) ^ set(other))}.")
    differing = [name for name in one if tensor_bytes(one[name]) != tensor_bytes(other[name])]
    expect(not differing, f"rebuilding gives other values of {few(differing)}.")
    same = same_answers(answers(result.compressed.module, result.task), answers(again, result.task))
    expect(same, "the rebuilt model gives other answers.")


def check_better_than_zeroing(method: Method, entry: ZooEntry) -> None:
    """The error of the outputs is smaller than if the weights of what was changed were set to zero."""
    result = applied(_weak(method), entry)
    changed = [c.origin for c in result.compressed.changes if c.kind in ("replaced", "resized", "masked", "assigned")]
    if changed:
        error = _error(_weak(method), entry)
        reference = core_answer(result.model, result.task)
        zeroed = relative_error(core_answer(_zeroed(result.model, changed), result.task), reference)
        expect(
            error < zeroed, f"the outputs' relative error is {error:.3g}; zeroing the same layers gives {zeroed:.3g}."
        )


def check_error_falls(method: Method, entry: ZooEntry) -> None:
    """At the weaker value that a parameter declares, the outputs are nearer to the original's than at its default."""
    for field in dataclasses.fields(method):
        if "weak" in field.metadata:
            values = (field.default, field.metadata["weak"])
            strong, weak = (_error(dataclasses.replace(method, **{field.name: value}), entry) for value in values)
            text = f"{field.name}={values[1]!r} (weak) and {values[0]!r} (default)"
            expect(
                weak <= strong * SLACK, f"at {text} the relative errors of the outputs are {weak:.3g} and {strong:.3g}."
            )


def check_reductions_measured(method: Method, entry: ZooEntry) -> None:
    """Each metric that the method claims to reduce is smaller in the exported file, in the reference runtime.

    A model in which the method leaves everything alone says nothing; that there is another is a check of its own.
    """
    if all(change.kind == "skipped" for change in applied(method, entry).compressed.changes):
        return
    before, after = artifact_probe.probed_original(entry), artifact_probe.probed(method, entry)
    measures: dict[str, Callable[[artifact_probe.Probe], float]] = {
        "file_bytes": artifact_probe.file_bytes,
        "coded_bytes": artifact_probe.coded_bytes,
        "params": artifact_probe.count_params,
        "macs": artifact_probe.count_macs,
    }
    for metric in sorted(method.traits.reduces):
        if metric in measures:
            old, new = measures[metric](before), measures[metric](after)
        elif metric in ("latency_ms", "throughput_per_s"):
            old, new = artifact_probe.seconds_of_both(before, after, applied(method, entry).model)
        else:
            raise ConformanceFailure(f"it claims to reduce `{metric}`, which cannot be measured on models this small.")
        expect(new < old, f"it claims to reduce `{metric}`: {old:.6g} before, {new:.6g} after.")


def check_exportable(method: Method, entry: ZooEntry) -> None:
    """The exported file runs in the reference runtime and gives the module's answers."""
    compressed, probed = applied(method, entry).compressed, artifact_probe.probed(method, entry)
    expected = core_answer(compressed.module, probed.task)
    limit = AGREEMENT if any(compressed.formats.values()) else PARITY
    error = relative_error(probed.answer(compressed.module), expected)
    expect(error <= limit, f"file and module differ by {error:.3g} of the outputs' length; at most {limit} is allowed.")
    silent = [text for text in probed.lowered.unmapped if ":" not in text]
    expect(not silent, f"formats are not realised, without a reason: {few(silent)}.")


def check_trains_on(method: Method, entry: ZooEntry) -> None:
    """A bare PyTorch loop trains the result: a few steps on one batch change its weights and lower its loss."""
    result = applied(method, entry)
    module, task = copy.deepcopy(result.compressed.module), result.task
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not any(parameter.requires_grad for parameter in result.model.parameters()):
        return
    expect(bool(parameters), "nothing is left that can be trained.")
    batch = next(task.batches("train"))
    module.eval()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = task.loss_of(module, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    expect(all(map(_finite, losses)), f"the loss is not finite: {losses}.")
    expect(losses[-1] < losses[0], f"{STEPS} steps of AdamW on one batch do not lower the loss: {losses}.")


def _weak(method: Method) -> Method:
    """Return the method with every parameter that declares a weak value at that value."""
    values = {f.name: f.metadata["weak"] for f in dataclasses.fields(method) if "weak" in f.metadata}
    return dataclasses.replace(method, **values)


def _error(method: Method, entry: ZooEntry) -> float:
    """Return the relative error of the outputs: of the exported file where formats are assigned, else of the module."""
    result = applied(method, entry)
    if any(result.compressed.formats.values()):
        answer = artifact_probe.probed(method, entry).answer(result.model)
    else:
        answer = core_answer(result.compressed.module, result.task)
    return relative_error(answer, core_answer(result.model, result.task))


def _zeroed(model: nn.Module, origins: list[str]) -> nn.Module:
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for origin in origins:
            for name, parameter in zeroed.get_submodule(origin).named_parameters():
                if name.rpartition(".")[2].startswith("weight"):
                    parameter.zero_()
    return zeroed


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
