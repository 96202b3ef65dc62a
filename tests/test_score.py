"""Scores against scikit-learn and independent formulas; and what every score must satisfy to be resampled."""

import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics

from trimpoint.errors import DataError, InvalidParameterError, ModelError
from trimpoint.score import (
    F1,
    Accuracy,
    EntityF1,
    MeanAbsoluteError,
    MeanSquaredError,
    Perplexity,
    Precision,
    Recall,
    RocAuc,
    Score,
    SumScore,
    main_output,
)

TAGS = ("O", "B-city", "I-city", "B-date", "I-date")
N = 60


def classification(classes, seed=0, n=N):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(n, classes)).astype(np.float32) + 1.5 * np.eye(classes, dtype=np.float32)[labels], labels


def tagging(seed=0, n=N, tokens=12):
    rng = np.random.default_rng(seed)
    tags = rng.integers(0, len(TAGS), (n, tokens))
    logits = rng.normal(size=(n, tokens, len(TAGS))) + 3.0 * np.eye(len(TAGS))[tags]
    tags[rng.random((n, tokens)) < 0.2] = -100
    return logits, tags


def regression(seed=0, n=N):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.normal(size=(n, 3))


def language(seed=0, n=N):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 7, (n, 5))
    targets[rng.random((n, 5)) < 0.3] = -100
    return rng.normal(size=(n, 5, 7)), targets


CASES = {
    "accuracy": (Accuracy(), classification(4)),
    "precision": (Precision(), classification(4)),
    "recall-micro": (Recall(average="micro", classes=(1, 2)), classification(4)),
    "f1-macro": (F1(), classification(4)),
    "f1-micro": (F1(average="micro"), classification(4)),
    "f1-positive": (F1(classes=(1,)), classification(2)),
    "auc-binary": (RocAuc(), classification(2)),
    "auc-many": (RocAuc(), classification(4)),
    "mse": (MeanSquaredError(), regression()),
    "mae": (MeanAbsoluteError(), regression()),
    "entity-f1": (EntityF1(labels=TAGS), tagging()),
    "perplexity": (Perplexity(), language()),
}
each_score = pytest.mark.parametrize(("score", "batch"), CASES.values(), ids=CASES)


@each_score
def test_weights_are_multiplicities(score: Score, batch):
    records = score.records(*batch)
    rng = np.random.default_rng(1)
    resamples = np.array([np.bincount(rng.integers(0, N, N), minlength=N) for _ in range(8)], dtype=float)
    resamples = np.vstack([resamples, np.r_[np.ones(3), np.zeros(N - 3)]])  # few samples: whole classes are missing
    expected = [score.aggregate(np.repeat(records, row.astype(int), axis=0)) for row in resamples]
    np.testing.assert_allclose([score.aggregate(records, row) for row in resamples], expected, rtol=1e-12)
    np.testing.assert_allclose(score.aggregate_many(records, resamples), expected, rtol=1e-12)
    np.testing.assert_allclose(Score.aggregate_many(score, records, resamples), expected, rtol=1e-12)


@each_score
def test_records_do_not_depend_on_the_batch(score: Score, batch):
    outputs, targets = batch
    whole = score.records(outputs, targets)
    parts = [score.records(outputs[i : i + 7], targets[i : i + 7]) for i in range(0, N, 7)]
    assert whole.shape[0] == N
    assert whole.dtype == np.float64
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert score.aggregate(whole) == pytest.approx(score.aggregate(whole[::-1]), rel=1e-12)


@each_score
def test_worse_answers_score_worse(score: Score, batch):
    outputs, targets = batch
    noise = np.random.default_rng(5).normal(size=outputs.shape)
    good = score.aggregate(score.records(outputs, targets))
    bad = score.aggregate(score.records(outputs + 30 * noise, targets))
    assert (bad < good) if score.better == "higher" else (bad > good)


@each_score
def test_nan_outputs_are_named(score: Score, batch):
    outputs, targets = batch
    outputs = outputs.copy()
    outputs[0] = np.nan
    if targets.ndim == 2 and targets.dtype.kind == "i":
        targets = np.abs(targets) % 5
    with pytest.raises(ModelError, match=r"NaN for .* outputs") as caught:
        score.records(outputs, targets)
    assert caught.value.hint


@each_score
def test_outputs_of_another_length_are_refused(score: Score, batch):
    with pytest.raises(ModelError, match="needs"):
        score.records(batch[0][:-1], batch[1])


@each_score
def test_no_records(score: Score, batch):
    with pytest.raises(DataError, match="at least one record"):
        score.aggregate(score.records(*batch)[:0])


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize(
    ("score", "reference"),
    [(Precision, metrics.precision_score), (Recall, metrics.recall_score), (F1, metrics.f1_score)],
)
@pytest.mark.parametrize("classes", [None, (1,), (0, 2), (2, 9)])
def test_counts_against_scikit_learn(score, reference, average, classes):
    for seed, kinds in ((0, 3), (1, 5), (2, 8)):
        logits, labels = classification(kinds, seed)
        labels[labels == 0] = 1  # a class that is predicted but never there
        chosen = score(average=average, classes=classes)
        expected = reference(labels, logits.argmax(1), labels=classes, average=average, zero_division=0)
        assert chosen.aggregate(chosen.records(logits, labels)) == pytest.approx(expected, abs=1e-12)


def test_accuracy_against_scikit_learn():
    logits, labels = classification(6)
    score = Accuracy()
    assert score.aggregate(score.records(logits, labels)) == metrics.accuracy_score(labels, logits.argmax(1))
    assert score.proportion
    assert isinstance(score, SumScore)


@pytest.mark.parametrize("decimals", [8, 0])  # with rounding to whole numbers most pairs are ties
def test_roc_auc_against_scikit_learn(decimals):
    score = RocAuc()
    logits, labels = classification(2, seed=3)
    logits = np.round(logits.astype(float), decimals)
    expected = metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    assert score.aggregate(score.records(logits, labels)) == pytest.approx(expected, abs=1e-12)
    one_logit = logits[:, 1:] - logits[:, :1]
    assert score.aggregate(score.records(one_logit, labels[:, None])) == pytest.approx(expected, abs=1e-12)
    logits, labels = classification(5, seed=4)
    logits = np.round(logits.astype(float), decimals)
    odds = np.exp(logits)
    expected = metrics.roc_auc_score(labels, odds / odds.sum(1, keepdims=True), multi_class="ovr", average="macro")
    assert score.aggregate(score.records(logits, labels)) == pytest.approx(
        expected, abs=2e-3 if decimals == 0 else 1e-9
    )


def test_roc_auc_of_saturated_logits_keeps_its_order():
    logits = np.array([[0.0, 800.0], [0.0, 900.0], [0.0, -900.0], [0.0, -800.0]])
    score = RocAuc()
    assert score.aggregate(score.records(logits, np.array([0, 1, 0, 1]))) == 0.75


def test_roc_auc_of_one_class_is_undefined():
    score = RocAuc()
    logits, _ = classification(2)
    assert math.isnan(score.aggregate(score.records(logits, np.zeros(N, dtype=int))))


def test_regression_against_scikit_learn():
    predicted, wanted = regression()
    squared, absolute = MeanSquaredError(), MeanAbsoluteError()
    assert squared.aggregate(squared.records(predicted, wanted)) == pytest.approx(
        metrics.mean_squared_error(wanted, predicted)
    )
    assert absolute.aggregate(absolute.records(predicted, wanted)) == pytest.approx(
        metrics.mean_absolute_error(wanted, predicted)
    )
    assert squared.better == absolute.better == "lower"
    assert not squared.bounded
    assert not absolute.bounded


def test_one_output_per_sample_is_paired_and_not_broadcast():
    score = MeanSquaredError()
    assert score.records(np.array([[1.0], [5.0]]), np.array([1.0, 3.0])).tolist() == [[0.0], [4.0]]


def chunks(tags):
    """conlleval's rules, written out tag by tag: the set of (type, first, last)."""
    found, start, kind = [], None, None
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if start is not None and (prefix in ("O", "B") or name != kind):
            found.append((kind, start, position - 1))
            start = None
        if prefix != "O" and start is None:
            start, kind = position, name
    return set(found)


@pytest.mark.parametrize("labels", [TAGS, ("I-b", "O", "B-a", "I-a", "B-b", "B-c")])
def test_entity_f1_against_conlleval_rules(labels):
    rng = np.random.default_rng(11)
    counts = np.zeros(3)
    tags = rng.integers(0, len(labels), (400, 9))
    guesses = np.where(rng.random(tags.shape) < 0.3, rng.integers(0, len(labels), tags.shape), tags)
    tags[rng.random(tags.shape) < 0.25] = -100
    expected = []
    for guess, tag in zip(guesses, tags, strict=True):
        there = chunks([labels[i] for i in tag if i != -100])
        found = chunks([labels[g] for g, i in zip(guess, tag, strict=True) if i != -100])
        expected.append([len(there & found), len(found - there), len(there - found)])
    score = EntityF1(labels=labels)
    records = score.records(np.eye(len(labels))[guesses], tags)
    np.testing.assert_array_equal(records, expected)
    counts = np.sum(expected, axis=0)
    precision, recall = counts[0] / (counts[0] + counts[1]), counts[0] / (counts[0] + counts[2])
    assert score.aggregate(records) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    ("true", "found", "record"),
    [
        # From the documentation of seqeval and the conlleval script.
        ("O O O B-city I-city I-city O", "O O B-city I-city I-city I-city O", [0, 1, 1]),
        ("B-city I-city O", "B-city I-city O", [1, 0, 0]),
        ("I-city I-city O", "B-city I-city O", [1, 0, 0]),
        ("B-city B-city", "B-city I-city", [0, 1, 2]),
        ("B-city I-date", "B-city B-date", [2, 0, 0]),
        ("O O", "O O", [0, 0, 0]),
        ("B-city I-city", "B-city I-city", [1, 0, 0]),
    ],
)
def test_entity_f1_by_hand(true, found, record):
    tags, guess = ([TAGS.index(tag) for tag in text.split()] for text in (true, found))
    assert EntityF1(labels=TAGS).records(np.eye(5)[[guess]], np.array([tags])).tolist() == [record]


def test_entity_f1_without_entities_is_zero():
    score = EntityF1(labels=TAGS)
    assert score.aggregate(np.zeros((3, 3))) == 0.0


def test_perplexity_against_scipy():
    from scipy.special import log_softmax

    logits, targets = language(3)
    counted = targets != -100
    picked = np.take_along_axis(log_softmax(logits, axis=-1), np.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    score = Perplexity()
    assert score.aggregate(score.records(logits, targets)) == pytest.approx(math.exp(-picked[counted].mean()))
    uniform = score.records(np.zeros((2, 3, 50), dtype=np.float32), np.zeros((2, 3), dtype=int))
    assert score.aggregate(uniform) == pytest.approx(50)
    assert not score.bounded
    assert score.better == "lower"


def test_perplexity_without_counted_tokens():
    score = Perplexity()
    records = score.records(np.zeros((1, 3, 4)), np.full((1, 3), -100))
    assert records.tolist() == [[0.0, 0.0]]
    assert math.isnan(score.aggregate(records))


def test_main_output():
    tensor = np.ones((2, 3))
    assert main_output({"loss": 0, "logits": tensor}) is tensor
    assert main_output({"hidden": tensor, "other": 0}) is tensor
    assert main_output((tensor, 0)) is tensor
    assert main_output([(tensor,), 0]) is tensor


@pytest.mark.parametrize(
    ("score", "outputs", "targets", "message"),
    [
        (Accuracy(), np.zeros((2, 3)), np.array([0.5, 1.0]), "one class index per sample"),
        (Accuracy(), np.zeros((2, 4, 3)), np.zeros((2, 4), dtype=int), "one class index per sample"),
        (MeanSquaredError(), np.zeros((2, 1)), np.array([np.nan, 1.0]), "finite targets"),
        (EntityF1(labels=TAGS), np.zeros((1, 2, 5)), np.array([[1, 5]]), "indices below 5"),
        (EntityF1(labels=TAGS), np.zeros((1, 2, 5)), np.array([1, 2]), r"\[samples, tokens\]"),
        (Perplexity(), np.zeros((1, 2, 5)), np.array([[1, -1]]), "or -100"),
    ],
)
def test_targets_that_do_not_fit(score, outputs, targets, message):
    with pytest.raises(DataError, match=message):
        score.records(outputs, targets)


@pytest.mark.parametrize(
    ("score", "outputs", "targets"),
    [
        (Accuracy(), np.zeros((2, 4, 3)), np.array([0, 1])),
        (EntityF1(labels=TAGS), np.zeros((1, 2, 4)), np.array([[1, 2]])),
        (Perplexity(), np.zeros((2, 4)), np.array([[1], [2]])),
        (MeanAbsoluteError(), np.zeros((3, 2)), np.zeros((2, 3))),
    ],
)
def test_outputs_that_do_not_fit(score, outputs, targets):
    with pytest.raises(ModelError, match="Got") as caught:
        score.records(outputs, targets)
    assert "predict" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: F1(average="weighted"), "must be 'macro' or 'micro'"),
        (lambda: Recall(classes=()), "at least one"),
        (lambda: Recall(classes=(1, 1)), "distinct"),
        (lambda: EntityF1(labels=("O", "city")), "distinct tags"),
        (lambda: EntityF1(labels=("O", "O")), "distinct tags"),
        (lambda: EntityF1(labels=()), "distinct tags"),
    ],
)
def test_parameters_that_do_not_fit(make, message):
    with pytest.raises(InvalidParameterError, match=message):
        make()


def test_scores_are_values():
    assert F1(average="micro", classes=[0, 1]) == F1(average="micro", classes=(0, 1))
    assert hash(EntityF1(labels=list(TAGS))) == hash(EntityF1(labels=TAGS))


def test_scores_need_no_torch():
    code = "import sys, trimpoint.score; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
