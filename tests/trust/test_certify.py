"""Certificates: what passes, what fails, what is not proven, and what a look at the data costs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.errors import DataError, InvalidParameterError, StorageError
from trimpoint.score import F1, Accuracy, MeanSquaredError, RocAuc
from trimpoint.task import Task
from trimpoint.trust.bounds import exact_paired_upper, samples_needed
from trimpoint.trust.certify import certify, certify_runs
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate, from_data, to_data


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


def right(n, lost, gained, correct=0.9):
    """Records of a reference and an artifact that disagree on exactly so many samples."""
    before = (np.arange(n) < round(correct * n)).astype(float)
    after = before.copy()
    after[:lost] = 0
    after[n - gained :] = 1
    return before[:, None], after[:, None]


def check(ledger, n, lost, gained, margin=0.01, digest="a", **more):
    more = {"data_hash": "data", "artifact_digest": digest} | more
    return certify(*right(n, lost, gained), Accuracy(), margin, ledger=ledger, **more)


def test_passed(ledger):
    found = check(ledger, 10_000, 60, 50, runtime="onnxruntime 1.31.1", instruction_set="avx512_vnni")
    assert found.status == "passed"
    assert (found.lost, found.gained, found.n) == (60, 50, 10_000)
    assert found.drop == pytest.approx(0.001)
    assert found.upper == exact_paired_upper(60, 50, 10_000)
    assert found.drop < found.upper <= found.margin
    assert (found.baseline, found.value) == (pytest.approx(0.9), pytest.approx(0.899))
    assert (found.score, found.level, found.looks, found.data) == ("accuracy", 0.95, 1, "data")
    assert (found.runtime, found.instruction_set) == ("onnxruntime 1.31.1", "avx512_vnni")
    assert "exact" in found.method
    assert from_data(Certificate, to_data(found)) == found


def test_unproven_names_how_many_samples_it_takes(ledger):
    found = check(ledger, 500, 15, 13)
    assert found.status == "unproven"
    assert found.drop < found.margin < found.upper
    assert found.needed == samples_needed(28 / 500, 0.01, 2 / 500)
    assert found.needed > 500


def test_needed_is_never_fewer_than_there_are(ledger):
    found = check(ledger, 290, 0, 0, margin=0.01)
    assert found.status == "unproven"
    assert found.needed > 290


def test_failed_where_the_estimate_exceeds_the_margin(ledger):
    assert check(ledger, 500, 30, 20).status == "failed"
    proven = check(ledger, 10_000, 700, 100, digest="b")
    assert proven.status == "failed"
    assert proven.needed is None


def test_a_better_artifact_passes_even_a_margin_of_zero(ledger):
    found = check(ledger, 10_000, 20, 120, margin=0.0)
    assert found.status == "passed"
    assert found.upper < 0
    assert check(ledger, 10_000, 0, 0, margin=0.0, digest="same").status == "unproven"


def test_every_look_weakens_the_next(ledger):
    found = [check(ledger, 10_000, 100, 80, digest=digest) for digest in "abca"]
    assert [c.looks for c in found] == [1, 2, 3, 1]
    assert [c.level for c in found] == pytest.approx([0.95, 0.975, 1 - 0.05 / 3, 0.95])
    assert found[0].upper < found[1].upper < found[2].upper
    assert found[3] == found[0]
    assert found[2].upper == exact_paired_upper(100, 80, 10_000, 1 - 0.05 / 3)


def test_finalists_share_the_error_from_the_first_on(ledger):
    found = [check(ledger, 10_000, 100, 80, digest=digest, finalists=3, batch="study") for digest in "abc"]
    assert {c.looks for c in found} == {3}
    assert {c.upper for c in found} == {exact_paired_upper(100, 80, 10_000, 1 - 0.05 / 3)}


def test_family_wise_error_of_three_finalists(tmp_path):
    """Three artifacts whose true drop is the margin: any of them passes in at most 5 % of 300 repetitions."""
    rng = np.random.default_rng(3)
    n, margin, passed = 600, 0.02, 0
    before = np.ones((n, 1))
    for repetition in range(300):
        ledger = Ledger(tmp_path / f"{repetition}.jsonl")
        found = [
            certify(
                before,
                (rng.random((n, 1)) >= margin).astype(float),
                Accuracy(),
                margin,
                data_hash="data",
                ledger=ledger,
                artifact_digest=str(i),
                finalists=3,
                batch="study",
            )
            for i in range(3)
        ]
        passed += any(c.status == "passed" for c in found)
    assert passed <= 26  # 99.9 % quantile of 300 draws at 5 %


def regression(n, worse, seed=0):
    rng = np.random.default_rng(seed)
    error = rng.normal(size=n)
    return np.square(error)[:, None], np.square(error + worse * rng.normal(size=n))[:, None]


def test_a_score_that_is_no_proportion(ledger):
    before, after = regression(4_000, 0.1)
    found = certify(before, after, MeanSquaredError(), 0.05, data_hash="data", ledger=ledger, artifact_digest="a")
    assert found.status == "passed"
    assert found.drop == pytest.approx(after.mean() - before.mean())
    # The bound of the mean of paired differences, by the central limit theorem.
    difference = (after - before)[:, 0]
    assert found.upper == pytest.approx(difference.mean() + 1.645 * difference.std() / math.sqrt(4_000), rel=0.05)
    assert (found.lost, found.gained) == (None, None)
    assert "bootstrap" in found.method
    assert found.baseline < found.value


def test_samples_needed_of_a_bootstrap_do_suffice(ledger):
    before, after = regression(300, 0.3)
    margin = float((after - before).mean()) + 0.03
    found = certify(before, after, MeanSquaredError(), margin, data_hash="data", ledger=ledger, artifact_digest="a")
    assert found.status == "unproven"
    difference = (after - before)[:, 0]
    needed = (2.486 * difference.std() / 0.03) ** 2
    assert needed < found.needed < 1.5 * needed
    times = math.ceil(found.needed / 300)
    more = certify(
        np.tile(before, (times, 1)),
        np.tile(after, (times, 1)),
        MeanSquaredError(),
        margin,
        data_hash="more data",
        ledger=ledger,
        artifact_digest="a",
    )
    assert more.status == "passed"


def test_identical_answers(ledger):
    labels = np.random.default_rng(0).integers(0, 4, 5_000)
    records = np.stack([labels, np.roll(labels, 1)], axis=1).astype(float)
    found = certify(records, records.copy(), F1(), 0.01, data_hash="data", ledger=ledger, artifact_digest="a")
    assert found.status == "passed"
    assert found.drop == 0
    assert 0 < found.upper < 0.01


def test_the_certificate_is_repeatable(tmp_path):
    before, after = regression(500, 0.2)
    found = [
        certify(
            before,
            after,
            MeanSquaredError(),
            0.1,
            data_hash="data",
            ledger=Ledger(tmp_path / name),
            artifact_digest="a",
        )
        for name in "xy"
    ]
    assert found[0] == found[1]


def call(ledger, before, after, score=None, margin=0.1, **more):
    more = {"data_hash": "data", "artifact_digest": "a", "ledger": ledger} | more
    return certify(before, after, score or MeanSquaredError(), margin, **more)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (np.ones((3, 1)), np.ones((4, 1)), "same samples"),
        (np.ones((0, 1)), np.ones((0, 1)), "at least one"),
        (np.ones(3), np.ones(3), "same samples"),
        (np.ones((3, 1)), np.array([[1], [np.nan], [2]]), "finite records"),
    ],
)
def test_records_that_do_not_fit_are_no_look(ledger, before, after, message):
    with pytest.raises(DataError, match=message) as caught:
        call(ledger, before, after)
    assert caught.value.hint
    assert ledger.entries() == []


def test_a_score_that_is_undefined(ledger):
    records = np.column_stack([np.arange(5.0), np.zeros(5)])
    with pytest.raises(DataError, match="not defined") as caught:
        call(ledger, records, records, RocAuc())
    assert "every class" in caught.value.hint


@pytest.mark.parametrize("margin", [-0.01, math.nan, math.inf])
def test_margins_out_of_range(ledger, margin):
    with pytest.raises(InvalidParameterError, match="margin"):
        call(ledger, np.ones((3, 1)), np.ones((3, 1)), margin=margin)
    with pytest.raises(InvalidParameterError, match="level"):
        call(ledger, np.ones((3, 1)), np.ones((3, 1)), level=1.0)
    assert ledger.entries() == []


def test_no_certificate_without_a_ledger(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="ledger"):
        call(Ledger(tmp_path / "file" / "ledger.jsonl"), np.ones((3, 1)), np.ones((3, 1)))


def linear_task(n=400):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 4, generator=generator))
        model.bias.zero_()
    inputs = torch.randn(n, 4, generator=generator)
    targets = model(inputs).argmax(1)
    return model, Task(certify=TensorDataset(inputs, targets))


def test_runs_are_compared_on_the_certify_role_only(ledger):
    model, task = linear_task()
    artifact = nn.Linear(4, 3)
    artifact.load_state_dict(model.state_dict())
    with torch.no_grad():
        artifact.weight[0] += 0.05

    class Forbidden:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise RuntimeError("another role was opened")

    task = task.with_(train=Forbidden(), calibrate=Forbidden(), select=Forbidden())
    found = certify_runs(model, artifact, task, 0.1, ledger=ledger, artifact_digest="digest", runtime="torch")
    predicted = torch.stack([task.certify[i][0] for i in range(400)])
    lost = int((model(predicted).argmax(1) != artifact(predicted).argmax(1)).sum())
    assert found.status == "passed"
    assert (found.lost, found.gained, found.baseline) == (lost, 0, 1.0)
    assert found.data == task.fingerprint("certify")
    assert [look.artifact for look in ledger.entries(found.data)] == ["digest"]
    assert found == certify_runs(model, artifact, task, 0.1, ledger=ledger, artifact_digest="digest", runtime="torch")


def test_the_look_is_recorded_before_a_model_sees_the_data(ledger):
    model, task = linear_task(20)

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.looks = model, []

        def forward(self, x):
            self.looks.append(len(ledger.entries()))
            return self.inner(x)

    watching = Watching()
    certify_runs(watching, model, task, 0.1, ledger=ledger, artifact_digest="digest")
    assert set(watching.looks) == {1}


def test_runs_without_certify_data(ledger):
    model, task = linear_task(20)
    with pytest.raises(DataError, match="no `certify` data"):
        certify_runs(model, model, dataclasses.replace(task, certify=None), 0.1, ledger=ledger, artifact_digest="a")
    assert ledger.entries() == []
