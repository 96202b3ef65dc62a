from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.filters import Glob
from trimpoint.method import Stage
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.factorize_linear import FactorizeLinear
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.parts import Block, Group, Member
from trimpoint.plan import Plan, Step
from trimpoint.runtimes.base import OperatorTime
from trimpoint.score import Accuracy
from trimpoint.search.space import (
    DAMAGE,
    MOST_STRUCTURES,
    Structure,
    forecast,
    keeping,
    ladder,
    parameter_leaves,
    proposals,
    share_of,
    structures,
    usable_methods,
    within,
    work_by_kind,
)
from trimpoint.task import Task, cross_entropy

MODEL = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(1, 16, 1)})])})
BLOCKS = tuple(Block(path=f"stages.{i}", shape=(1, 8), params=100, family="a") for i in range(4))
OUT = Member(path="stages.0.conv", parameter="weight", dim=0, indices=tuple((i,) for i in range(16)), role="out")
GROUPS = (Group(members=(OUT,), size=16),)
LEAVES = {"stem": 16, **{f"stages.{i}.conv": 81 for i in range(4)}, "head": 16}


def operators(ms=1.0):
    return [OperatorTime(name=path, kind="Conv", module=path, ms=ms) for path in LEAVES]


def samples(n=4):
    return [(torch.zeros(3), 0) for _ in range(n)]


def changed(damage, merit):
    step = Step(DropBlocks(blocks=(f"block.{damage}",)))
    return Structure(steps=(step,), shares={}, damage=damage, gains={"latency_ms": merit, "file_bytes": merit})


def test_methods_without_their_data_are_left_out_with_the_reason():
    bare = Task(select=samples(), score=Accuracy())
    usable, left_out = usable_methods(bare, (Stage.STRUCTURE, Stage.RECOVER))
    assert DropBlocks in usable
    assert "train" in left_out["distill"]
    full = Task(train=samples(), select=samples(), score=Accuracy(), loss=cross_entropy)
    usable, left_out = usable_methods(full, (Stage.RECOVER,))
    assert {kind.method_name() for kind in usable} == {"distill", "finetune"}
    assert all(reason.startswith("experimental") for reason in left_out.values())


def test_methods_that_are_not_allowed_are_left_out_with_the_reason_given():
    task = Task(select=samples(), score=Accuracy())
    usable, left_out = usable_methods(
        task, (Stage.STRUCTURE,), lambda method: "not today" if isinstance(method, DropBlocks) else ""
    )
    assert DropBlocks not in usable
    assert usable
    assert left_out["drop-blocks"] == "not today"


def test_every_combination_of_the_methods_variants_is_there_the_unmodified_first():
    found = structures([DropBlocks, PruneChannels], MODEL, BLOCKS, GROUPS, LEAVES)
    menus = [len(proposals(kind, MODEL, BLOCKS, GROUPS)) for kind in (DropBlocks, PruneChannels)]
    assert len(found) == (menus[0] + 1) * (menus[1] + 1)
    assert found[0].steps == ()
    assert found[0].damage == 0
    assert len({structure.steps for structure in found}) == len(found)


def test_a_long_menu_is_thinned_and_keeps_its_mildest_choice():
    many = tuple(Block(path=f"{family}.{i}", shape=(1,), params=1, family=family) for family in "abc" for i in range(5))
    kinds = [DropBlocks] * 2
    assert len(DropBlocks.variants(many, ())) ** 2 > MOST_STRUCTURES
    found = structures(kinds, MODEL, many, (), {block.path: 1 for block in many})
    assert len(found) <= MOST_STRUCTURES
    fewest = min(len(s.steps[0].method.blocks) for s in found if len(s.steps) == 1)
    assert fewest == 1


def test_steps_carry_what_may_be_changed():
    where = Glob("stages.*")
    found = structures([DropBlocks], MODEL, BLOCKS, GROUPS, LEAVES, where)
    assert all(step.where == where for structure in found for step in structure.steps)


def test_damage_counts_a_layer_by_the_fourth_root_of_its_parameters():
    found = {s.steps: s for s in structures([DropBlocks], MODEL, BLOCKS, GROUPS, LEAVES)}
    all_gone = next(s for s in found.values() if s.steps and len(s.steps[0].method.blocks) == 4)
    # 81 ** 0.25 = 3 for each of four, 16 ** 0.25 = 2 for stem and head.
    assert all_gone.damage == pytest.approx(12 / 16)


def test_what_is_left_of_a_module_is_the_product_over_its_parents():
    shares = {"a": 0.5, "a.b": 0.5, "a.b.c": 0.2, "ab": 0.0}
    assert share_of("a.b.c", shares) == pytest.approx(0.05)
    assert share_of("a.x", shares) == 0.5
    assert share_of("abc", shares) == 1.0


def test_only_modules_with_weights_of_two_dimensions_count_as_leaves():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert parameter_leaves(model) == {"0": 3 * 4 * 9 + 4, "3": 4 * 2 + 2}


def test_the_forecast_of_removed_blocks_is_what_their_operators_took():
    structure = Structure(steps=(), shares={"stages.1": 0.0, "stages.2": 0.0})
    gains = forecast(structure, operators(), LEAVES, overhead_ms=2.0)
    assert gains["latency_ms"] == pytest.approx((4 + 2) / (6 + 2))
    assert gains["file_bytes"] == pytest.approx((16 + 16 + 2 * 81) / (16 + 16 + 4 * 81))


def test_the_forecast_without_any_operator_promises_nothing():
    assert forecast(Structure(steps=(), shares={"a": 0.0}), [], {}) == {"latency_ms": 1.0, "file_bytes": 1.0}


def test_the_ladder_is_evenly_spaced_between_its_ends_and_holds_the_best_at_each_damage():
    candidates = [Structure(steps=(), shares={})]
    for i in range(1, 100):
        damage = i / 100
        candidates += [changed(damage, 1 - damage), changed(damage + 0.001, 1 - damage / 2)]
    rungs = ladder(candidates, LEAVES, 6)
    assert [s.damage for s in rungs] == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5, 0.55], abs=0.026)
    assert all(s.merit == pytest.approx(1 - s.damage) for s in rungs)


def test_few_candidates_are_all_taken():
    candidates = [changed(0.1, 0.9), changed(0.9, 0.1), changed(0.5, 0.95)]
    assert [s.damage for s in ladder(candidates, LEAVES, 5)] == [0.1, 0.5, 0.9]


def test_the_ladder_does_not_remove_one_kind_of_layer_only():
    leaves = {**{f"a.{i}": 100 for i in range(4)}, **{f"b.{i}": 10_000 for i in range(4)}}
    blocks = [Block(path=path, shape=(1,), params=1, family=path[0]) for path in leaves]
    every = structures([DropBlocks], MODEL, blocks, (), leaves)
    # Removing from `b` always looks a little better; in the band, the other kind must have its turn.
    weigh = {s.steps: s.damage + 0.05 * work_by_kind(s, leaves)[1] for s in every}
    forecasts = [replace(s, gains={"latency_ms": 1 - weigh[s.steps]}) for s in every]
    rungs = ladder(forecasts, leaves, 5)
    assert len(rungs) == 5
    assert all(sum(work_by_kind(s, leaves)[kind] for s in rungs) > 0.3 for kind in (0, 1))
    assert len({tuple(np.sign(work_by_kind(s, leaves))) for s in rungs}) > 1


def test_work_by_kind_adds_up_to_the_damage():
    for structure in structures([DropBlocks], MODEL, BLOCKS, GROUPS, LEAVES):
        assert work_by_kind(structure, LEAVES).sum() == pytest.approx(structure.damage)


def test_no_structure_is_chosen_twice():
    candidates = [changed(0.3 + 0.001 * i, 0.9 - 0.01 * i) for i in range(7)]
    rungs = ladder(candidates, LEAVES, 5)
    assert len({s.damage for s in rungs}) == 5
    assert [s.damage for s in rungs] == sorted(s.damage for s in rungs)


def test_one_place_goes_to_the_middle():
    candidates = [changed(i / 100, 1 - i / 100) for i in range(1, 100)]
    assert DAMAGE[0] <= ladder(candidates, LEAVES, 1)[0].damage <= DAMAGE[1]


def test_variants_that_would_change_nothing_are_not_proposed():
    # A quarter less of 16 channels is 16 again at multiples of 8.
    assert next(method.ratio for method in PruneChannels.variants(BLOCKS, GROUPS)) == 0.25
    assert [method.ratio for method in proposals(PruneChannels, MODEL, BLOCKS, GROUPS)] == [0.5, 0.75]
    assert proposals(PruneChannels, MODEL, BLOCKS, ()) == []


def test_structures_that_are_forecast_to_break_a_limit_are_not_tried():
    start = {"latency_ms": 0.5, "file_bytes": 0.25}
    candidates = [Structure(steps=(), shares={}), *(changed(0.3, merit) for merit in (0.9, 0.6, 0.3))]
    kept = keeping(candidates, start, {"file_bytes": 0.15, "peak_rss_bytes": 0.1})
    assert [s.merit for s in kept if s.steps] == pytest.approx([0.6, 0.3])
    assert keeping(candidates, start, {"latency_ms": 0.1}) == candidates
    assert keeping(candidates, start, {}) == candidates


def test_forecasts_hold_to_what_may_be_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    task = Task(calibrate=[(torch.zeros(8), 0)] * 4, loss=cross_entropy)
    groups = Build(module=model, given=model, task=task).groups()
    for where in (Glob("0"), Glob("2"), Glob("*")):
        blocks, inside = within(model, (), groups, where)
        found = structures([PruneChannels], model, blocks, inside, parameter_leaves(model), where)[-1]
        (step,) = found.steps
        made = compress(model, Plan((step,)), task).module
        left = sum(p.numel() for p in made.parameters()) / sum(p.numel() for p in model.parameters())
        assert forecast(found, (), parameter_leaves(model))["file_bytes"] == pytest.approx(left, abs=1e-6)
    assert not proposals(PruneChannels, model, (), within(model, (), groups, Glob("4"))[1], Glob("4"))
    assert [m.rank_ratio for m in proposals(FactorizeLinear, model, (), groups, Glob("2"))] == [0.75, 0.5, 0.35]
    assert not proposals(FactorizeLinear, model, (), groups, Glob("1"))


def test_shares_of_the_model_itself_count_for_everything_below():
    assert share_of("a.b", {"": 0.5, "a": 0.5, "a.b": 0.5}) == 0.125
    assert share_of("", {"": 0.5}) == 0.5
