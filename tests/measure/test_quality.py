from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from trimpoint.errors import DataError, ModelError
from trimpoint.measure.intervals import paired_score_upper, wilson
from trimpoint.measure.quality import (
    discordant,
    drop_upper,
    evaluate,
    forecast_upper,
    generalisation_gap,
    quality,
)
from trimpoint.runtimes.base import Session
from trimpoint.score import Accuracy, Score, main_output
from trimpoint.signature import Signature, TensorSpec
from trimpoint.task import Task
from trimpoint.values import Quality


@dataclass(frozen=True, kw_only=True)
class Absolute(Score):
    name: ClassVar[str] = "absolute"
    better: ClassVar[str] = "lower"
    bounded: ClassVar[bool] = False

    def records(self, outputs, targets):
        return np.abs(main_output(outputs).reshape(len(targets), -1) - np.asarray(targets).reshape(len(targets), -1))

    def aggregate(self, records, weights=None):
        return float(np.average(records[:, 0], weights=weights))


class NumpySession(Session):
    """Runs a function of arrays as if a runtime had opened it."""

    def __init__(self, function, batch="batch"):
        spec = TensorSpec(name="input", dtype="float32", shape=(batch, 4))
        super().__init__("test", Signature(inputs=(spec,), outputs=(spec,)))
        self.function = function

    def run_flat(self, arrays):
        return [self.function(*arrays)]


def samples(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    noise = torch.randn(n, generator=generator)
    return [(row, int(row[0] + row[1] + 0.5 * e > 0)) for row, e in zip(x, noise, strict=True)]


def linear(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, -1, 0, 0], [1, 1, 0, 0]]))
        model.bias.zero_()
    return model


def as_session(model, batch="batch"):
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    return NumpySession(lambda x: x @ weight.T + bias, batch)


@pytest.mark.parametrize("batch", ["batch", 1, 7])
def test_module_and_session_give_the_same_records(batch):
    model, task = linear().train(), Task(select=samples(), batch_size=64)
    module, session = evaluate(model, task, "select"), evaluate(as_session(model, batch), task, "select")
    np.testing.assert_array_equal(module.records, session.records)
    expected = np.mean([int(model(x).argmax()) == y for x, y in samples()])
    assert module.value == session.value == pytest.approx(expected)
    assert module.n == session.n == 300
    assert model.training


def test_limit_takes_the_first_samples():
    task = Task(select=samples())
    full, part = evaluate(linear(), task, "select"), evaluate(linear(), task, "select", limit=130)
    np.testing.assert_array_equal(full.records[:130], part.records)


def test_predict_surrounds_the_core_alike():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = linear()

        def forward(self, x):
            raise AssertionError("only `predict` runs the core")

    def predict(run, inputs):
        assert isinstance(inputs, torch.Tensor)
        first, second = run(inputs), run(inputs.flip(1))
        return (first + second) / 2

    task = Task(select=samples(), core="core", predict=predict)
    model = Wrapped()
    module, session = evaluate(model, task, "select"), evaluate(as_session(model.core), task, "select")
    np.testing.assert_array_equal(module.records, session.records)
    assert 0.4 < module.value < 0.95


def test_quality_of_a_proportion_is_wilson_and_tango():
    task = Task(select=samples())
    baseline, other = linear(), linear()
    with torch.no_grad():
        other.weight[:, 2] += torch.tensor([0.7, -0.7])
    first, second = evaluate(baseline, task, "select"), evaluate(other, task, "select")
    lost, gained = discordant(second, first)
    result = quality(second, first)
    right = int(second.records.sum())
    assert (result.low, result.high) == wilson(right, 300)
    assert result.drop == pytest.approx(first.value - second.value) == pytest.approx((lost - gained) / 300)
    assert result.drop_upper == paired_score_upper(lost, gained, 300)
    assert quality(first).drop is None
    assert (result.name, result.split, result.n, result.better) == ("accuracy", "select", 300, "higher")


def test_quality_of_an_unbounded_score_is_bootstrapped_in_pairs():
    data = [(x, x.sum()) for x, _ in samples()]
    task = Task(select=data, score=Absolute())
    exact, off = nn.Linear(4, 1), nn.Linear(4, 1)
    with torch.no_grad():
        for model, weight in ((exact, 0.9), (off, 0.8)):
            model.weight.fill_(weight)
            model.bias.zero_()
    first, second = evaluate(exact, task, "select"), evaluate(off, task, "select")
    result = quality(second, first)
    assert result.drop == pytest.approx(second.value - first.value)
    assert 0 < result.drop < result.drop_upper < 2 * result.drop
    assert result.low < result.value < result.high
    assert drop_upper(first, second)[1] < 0


@pytest.mark.parametrize(("lost", "gained", "here", "there"), [(0.02, 0.015, 6_000, 10_000), (0.05, 0.03, 1_000, 800)])
def test_a_bound_that_is_forecast_holds_in_four_of_five_draws(lost, gained, here, there):
    rng = np.random.default_rng(0)
    draws = rng.multinomial(here, [lost, gained, 1 - lost - gained], size=1_500)
    later = rng.multinomial(there, [lost, gained, 1 - lost - gained], size=1_500)
    held = 0
    for (minus, plus, _), (minus_later, plus_later, _) in zip(draws, later, strict=True):
        upper = paired_score_upper(int(minus), int(plus), here)
        found = Quality(name="a", value=0.9, n=here, split="s", drop=(minus - plus) / here, drop_upper=upper)
        held += paired_score_upper(int(minus_later), int(plus_later), there) <= forecast_upper(found, there)
    assert held / 1_500 == pytest.approx(0.8, abs=0.035)


def test_nothing_is_forecast_of_a_score_without_a_reference():
    assert forecast_upper(Quality(name="a", value=0.9, n=10, split="select"), 100) is None


def test_the_gap_is_that_of_train_minus_select():
    wrong = [(x, 1 - y) for x, y in samples(200, seed=5)]
    task = Task(train=samples(500, seed=9), select=samples(200, seed=5))
    gap = generalisation_gap(linear(), task, evaluate(linear(), task, "select"))
    assert gap.n == 200
    assert gap.low < gap.value < gap.high
    assert abs(gap.value) < 0.15
    flipped = task.with_(select=wrong)
    worse = generalisation_gap(linear(), flipped, evaluate(linear(), flipped, "select"))
    assert worse.low > 0.4
    # Newcombe's method 10 on the same counts.
    train_value = worse.value + evaluate(linear(), flipped, "select").value
    low, high = wilson(train_value * 200, 200)
    other = evaluate(linear(), flipped, "select").value
    other_low, other_high = wilson(other * 200, 200)
    assert worse.low == pytest.approx(worse.value - np.hypot(train_value - low, other_high - other))
    assert worse.high == pytest.approx(worse.value + np.hypot(high - train_value, other - other_low))


def test_outputs_that_are_not_numbers_are_a_model_error():
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN\) for 128 of 128 samples of `select`; the first is sample 0"):
        evaluate(model, Task(select=samples()), "select")


def test_infinite_outputs_are_counted_where_the_score_bears_them():
    masked = NumpySession(lambda x: np.where([[True, False]], x[:, :2], -np.inf).astype(np.float32))
    evaluation = evaluate(masked, Task(select=samples()), "select")
    assert evaluation.infinite == evaluation.n == 300
    unbounded = NumpySession(lambda x: np.full((len(x), 1), np.inf, np.float32))
    with pytest.raises(ModelError, match="absolute of 128 of 128 samples"):
        evaluate(unbounded, Task(select=samples(), score=Absolute()), "select")


def test_outputs_that_do_not_fit_the_targets_are_a_data_error():
    task = Task(select=[(x, torch.zeros(3)) for x, _ in samples()], score=Absolute())
    with pytest.raises(DataError, match=r"outputs of shape \[128, 2\], targets of shape \[128, 3\]"):
        evaluate(linear(), task, "select")
    with pytest.raises(DataError, match=r"accuracy"):
        evaluate(linear(), task.with_(score=Accuracy()), "select")
    with pytest.raises(ModelError, match=r"does not run on a batch of \[128, 4\] float32"):
        evaluate(nn.Linear(3, 2), Task(select=samples()), "select")
    with pytest.raises(DataError, match="no `certify` data"):
        evaluate(linear(), Task(select=samples()), "certify")


def test_only_like_is_compared_with_like():
    task = Task(select=samples(), certify=samples(200, 3))
    with pytest.raises(DataError, match="300 samples of `select` and accuracy on 200 samples of `certify`"):
        quality(evaluate(linear(), task, "certify"), evaluate(linear(), task, "select"))
