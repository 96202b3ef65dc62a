"""Systems side by side: what drops are against, what is read back, and what is not mixed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.comparison import UNMODIFIED, Comparison, best_ratio, recovered
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import StudyError
from trimpoint.methods.distill import Distill
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


def network(noise=0.0):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 3)).eval()
    with torch.no_grad():
        made[0].weight.copy_(torch.eye(3, 6) + noise * torch.randn(3, 6))
        made[0].bias.zero_()
    return made


@pytest.fixture
def task():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return Task(train=data, calibrate=data, select=data, certify=data, loss=cross_entropy, batch_size=50)


def test_drops_are_against_the_best_of_the_original_and_the_control(tmp_path, task, monkeypatch):
    monkeypatch.setenv("TRIMPOINT_STATE", str(tmp_path / "state"))
    found = Comparison(tmp_path / "out", network(0.3), task)
    found.add("worse", lambda: network(0.6))
    found.add("control", network)
    assert found.refer_to("worse") == UNMODIFIED
    before = found.add("worse", lambda: pytest.fail("made again"))["drop_select"]
    assert found.refer_to("control") == "control"
    figures = {row["system"]: row for row in found.rows({})}
    assert figures["worse"]["drop_select"] == pytest.approx(1 - figures["worse"]["select"])
    assert figures["worse"]["drop_select"] > before
    assert figures["control"]["drop_select"] is None
    certificates = found.certify(["worse"], 0.01, "test")
    assert certificates["worse"].drop == pytest.approx(figures["worse"]["drop_select"])
    assert found.certify([UNMODIFIED], 0.01, "test") == certificates
    with pytest.raises(StudyError, match="named for"):
        found.certify(["worse"], 0.02, "test")


def test_the_expected_bound_comes_nearer_with_more_samples(tmp_path, task):
    few, _ = torch.utils.data.random_split(task.data("select"), [100, 300], torch.Generator().manual_seed(0))
    bounds = []
    for name, chosen in (("same", task), ("four times as many", task.with_(select=few))):
        found = Comparison(tmp_path / name, network(), chosen)
        figures = found.add("worse", lambda: network(0.6))
        bounds.append((figures["drop_select"], figures["drop_select_upper95"], found.expected_bound("worse")))
    assert bounds[0][2] == bounds[0][1]
    drop, upper, expected = bounds[1]
    assert expected == pytest.approx((drop + upper) / 2)


def test_the_fastest_that_passes_is_repeated_with_other_seeds(tmp_path, task, monkeypatch):
    monkeypatch.setenv("TRIMPOINT_STATE", str(tmp_path / "state"))
    found = Comparison(tmp_path / "out", network(), task)
    plans = {name: Plan((Step(PruneWeights(ratio=r)),)) for name, r in (("harsh", 0.95), ("mild", 0.5), ("less", 0.2))}
    for name, plan in plans.items():
        found.add(name, plan)
    timed = {name: SimpleNamespace(ratio=ratio) for name, ratio in (("harsh", 3.0), ("mild", 2.0), ("less", 1.0))}
    assert found.expected_bound("harsh") > 0.05 >= found.expected_bound("mild")
    certificates, best = found.examine(plans, timed, 0.05, "one")
    assert {name: certificate.status for name, certificate in certificates.items()} == dict.fromkeys(
        ("mild", "less"), "passed"
    )
    assert best == "mild"
    assert set(found.systems) == {UNMODIFIED, *plans, "mild, seed 1", "mild, seed 2"}
    assert found.examine({"harsh": plans["harsh"]}, timed, 0.05, "none") == ({}, None)


@pytest.mark.parametrize("views", [0, 2])
def test_a_network_of_any_origin_learns_as_in_a_plan(task, views):
    recipe = Distill(epochs=3.0, hints=0.0, views=views, alpha=0.7, temperature=3.0)
    by_plan = compress(network(0.3), Plan((Step(recipe),), seed=4), task).module
    by_hand = recovered(network(0.3), network(0.3), task, recipe, seed=4)
    assert not torch.equal(by_hand[0].weight, network(0.3)[0].weight)
    assert torch.equal(by_hand[0].weight, by_plan[0].weight)


def test_what_was_made_is_read_back_and_not_mixed(tmp_path, task, monkeypatch):
    first = Comparison(tmp_path, network(), task)
    plan = Plan().then(QuantizeStatic())
    figures = first.add("int8", plan, note=1)
    assert figures["plan"] == str(plan)
    again = Comparison(tmp_path, network(), task)
    monkeypatch.setattr("benchmarks.comparison.compress", lambda *_, **__: pytest.fail("made again"))
    assert again.add("int8", plan) == figures
    with pytest.raises(StudyError, match="another recipe"):
        again.add("int8", replace(plan, seed=1))
    with pytest.raises(StudyError, match="another recipe"):
        again.add("int8", network, "by hand")
    with pytest.raises(StudyError, match="another model"):
        Comparison(tmp_path, network(0.1), task)
    with pytest.raises(StudyError, match="another select"):
        Comparison(tmp_path, network(), task.with_(select=TensorDataset(torch.zeros(4, 6), torch.zeros(4).long())))


def test_the_best_ratio_is_that_of_the_unmodified_model_at_least():
    rows = [{"latency_ratio": r, "drop_select_upper95": d} for r, d in ((2.0, 0.02), (0.8, 0.005), (1.5, 0.009))]
    assert best_ratio(rows, 0.01) == 1.5
    assert best_ratio(rows[:2], 0.01) == 1.0
