"""What methods forecast, against what they do: parameters on models of the zoo, and products where those follow."""

import pytest

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.measure.static import count_macs, count_params
from trimpoint.plan import Plan, Step
from trimpoint.registry import make_method
from trimpoint.search.space import share_of
from trimpoint.testing import zoo

EXACT = 1e-9
TUCKER = 0.02
"""Of the model's parameters: which ranks within the share are best is seen in the weights alone."""
MACS = 0.05
"""Of the model's products: attention has some beside its weights, and the border of an image gives fewer of them."""

CASES = [
    ("prune-channels", {}, "cnn resnet separable tied dense transformer", EXACT),
    ("prune-channels", {"ratio": 0.3, "round_to": 1}, "resnet shared shuffle", EXACT),
    ("prune-heads", {}, "transformer tied_transformer", EXACT),
    ("prune-recurrent", {"round_to": 1}, "lstm gru_stack bidirectional", EXACT),
    ("drop-blocks", {}, "resnet transformer", EXACT),
    ("drop-blocks", {"rank": "last", "ratio": 0.25}, "resnet", EXACT),
    ("factorize-linear", {}, "transformer tied shared attention", EXACT),
    ("factorize-linear", {"rank_ratio": 0.35, "weighting": "none", "round_to": 2}, "dict_outputs", EXACT),
    ("factorize-conv", {}, "cnn resnet separable", TUCKER),
    ("factorize-conv", {"form": "spatial", "rank_ratio": 0.7}, "cnn separable", EXACT),
    ("factorize-embedding", {}, "transformer", EXACT),
    ("factorize-recurrent", {}, "lstm bidirectional", EXACT),
]


@pytest.mark.parametrize(
    ("name", "params", "entry", "tolerance"),
    [
        pytest.param(name, params, entry, tolerance, id=f"{name}-{entry}-{index}")
        for index, (name, params, entries, tolerance) in enumerate(CASES)
        for entry in entries.split()
    ],
)
def test_the_forecast_is_what_is_left(name, params, entry, tolerance):
    model, task = zoo()[entry].make()
    build = Build(module=model, given=model, task=task)
    groups = tuple(group for group in build.groups() if not group.reason)
    method = make_method(name, params)
    shares = method.forecast(model, build.blocks(), groups)
    assert shares
    assert all(0 <= share < 1 for share in shares.values())
    small = compress(model, Plan((Step(method),)), task).module
    before, after = count_params(model), count_params(small).total
    left = sum(count * share_of(path, shares) for path, count in before.by_module.items())
    assert left / before.total == pytest.approx(after / before.total, abs=tolerance)
    if "macs" in method.traits.reduces:
        inputs = task.example_batch(1)
        macs = count_macs(model, inputs)
        products = sum(count * share_of(path, shares) for path, count in macs.by_module.items())
        assert products / macs.total == pytest.approx(count_macs(small, inputs).total / macs.total, abs=MACS)


@pytest.mark.parametrize("rank", ["energy", "bayes"])
@pytest.mark.parametrize("name", ["factorize-linear", "factorize-conv", "factorize-embedding"])
def test_ranks_that_are_found_in_the_weights_are_not_forecast(name, rank):
    model, _ = zoo()["transformer"].make()
    assert make_method(name, {"rank": rank}).forecast(model, (), ()) == {}


def test_what_removes_no_parameters_forecasts_nothing():
    model, task = zoo()["resnet"].make()
    build = Build(module=model, given=model, task=task)
    for name in ("prune-weights", "quantize-static", "finetune", "distill"):
        assert make_method(name, {}).forecast(model, build.blocks(), build.groups()) == {}
