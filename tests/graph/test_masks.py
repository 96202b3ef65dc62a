"""Masks as a part of a module: trained, copied, cast, saved, rebuilt and baked in."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import (
    Mask,
    MaskEdit,
    ScheduledMask,
    apply_edits_,
    bake_,
    baked,
    edits_from_data,
    edits_to_data,
    mask_,
    masks_of,
    rebuild,
    save_structure,
    trace,
    why_not_held,
)
from trimpoint.graph.masks import UPDATES, removed_at, schedule_to_data
from trimpoint.parts import MaskSchedule
from trimpoint.sparsity.ranking import least


def layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(8, 6)


def half(weight):
    return weight.abs() > weight.abs().median()


def masked(seed=0):
    module = layer(seed)
    mask_(module, "weight", half(module.weight.detach()))
    return module.eval()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_in_a_bare_loop_with_weight_decay_and_momentum(name):
    module = masked().train()
    keep = masks_of(module)["weight"].keep.clone()
    before = module.weight.detach().clone()
    optimizer = OPTIMIZERS[name](module.parameters())
    for step in range(20):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(x) - x[:, :6]).square().mean().backward()
        optimizer.step()
        assert torch.equal(module.weight == 0, ~keep)
    assert torch.equal(module.parametrizations.weight.original[~keep], torch.zeros(int((~keep).sum())))
    assert not torch.equal(module.weight, before)


def test_the_parameter_keeps_its_identity_and_its_flag():
    module = layer().requires_grad_(False)
    weight = module.weight
    mask_(module, "weight", half(weight))
    assert module.parametrizations.weight.original is weight
    assert not weight.requires_grad
    bake_(module)
    assert module.weight is weight
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == ["weight", "bias"]


def test_baking_a_copy_leaves_the_one_that_it_was_made_of():
    module = masked()
    copied = copy.deepcopy(module)
    assert type(copied) is type(module)
    bake_(copied)
    assert torch.equal(copied.weight, module.weight)
    assert torch.equal(copy.deepcopy(module).weight, module.weight)
    assert not parametrize.is_parametrized(copied)
    assert parametrize.is_parametrized(module, "weight")
    with torch.no_grad():
        module.parametrizations.weight.original += 1.0
    assert not torch.equal(copied.weight, module.weight)


def test_what_has_no_mask_is_not_copied():
    plain = nn.Sequential(layer())
    assert baked(plain) is plain
    model = nn.Sequential(masked())
    made = baked(model)
    assert made is not model
    x = torch.randn(2, 8)
    assert torch.equal(made(x), model(x))
    assert [name for name, _ in made.named_parameters()] == ["0.weight", "0.bias"]


def test_a_second_mask_takes_the_place_of_the_first():
    module = masked()
    keep = half(module.weight.detach()) & (torch.rand(6, 8) < 0.5)
    mask_(module, "weight", keep)
    assert len(module.parametrizations.weight) == 1
    assert torch.equal(masks_of(module)["weight"].keep, keep)


def test_it_goes_through_bfloat16_and_a_state_dict():
    module = masked().bfloat16()
    assert module.weight.dtype == torch.bfloat16
    assert masks_of(module)["weight"].keep.dtype == torch.bool
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = masked(seed=1).bfloat16()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, module.weight)


def test_the_memory_layout_does_not_depend_on_how_the_mask_was_made():
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    mask_(conv, "weight", (conv.weight.abs() > 0.05).detach())
    assert conv.weight.is_contiguous()
    assert masks_of(conv)["weight"].keep.is_contiguous()


@pytest.mark.parametrize(
    ("module", "keep", "words"),
    [
        (parametrizations.weight_norm(nn.Linear(8, 6)), None, "a parametrisation of its own"),
        (nn.utils.spectral_norm(nn.Linear(8, 6)), None, "no parameter"),
        (nn.Linear(8, 6), torch.ones(8, 6, dtype=torch.bool), r"booleans of the shape \[6, 8\]"),
        (nn.Linear(8, 6), torch.ones(6, 8), "booleans"),
        (nn.ReLU(), None, "no parameter"),
    ],
)
def test_what_cannot_be_masked_is_refused(module, keep, words):
    with pytest.raises(SurgeryError, match=words):
        mask_(module, "weight", keep)


def test_why_not_is_empty_where_it_can():
    assert why_not_held(layer(), "weight") == why_not_held(masked(), "weight") == ""


# Schedules


def scheduled(removed=36, **more):
    module = layer()
    mask_(module, "weight", schedule=MaskSchedule(removed=removed, **more))
    return module


def train(module, steps, lr=0.05, start=0):
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    counts = []
    for step in range(start, start + steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(x) - x[:, :6]).square().mean().backward()
        counts.append(int((~masks_of(module)["weight"].keep).sum()))
        optimizer.step()
    return counts


def test_the_cubic_schedule_is_the_formula_at_each_step():
    module = scheduled(steps=12)
    expected = [math.floor(0.75 * (1 - (1 - step / 12) ** 3) * 48 + 0.5) for step in range(1, 13)]
    assert train(module, 15) == [*expected, 36, 36, 36]


def test_a_long_schedule_is_ranked_a_hundred_times():
    module = scheduled(steps=10 * UPDATES)
    counts = train(module, 40)
    assert counts[:9] == [0] * 9
    assert counts[9] == counts[18] == removed_at(MaskSchedule(removed=36, steps=1000), 10, 48)
    assert counts[39] == removed_at(MaskSchedule(removed=36, steps=1000), 40, 48)


def test_in_evaluation_mode_the_schedule_has_ended():
    module = scheduled(steps=12)
    size = module.weight.detach().abs()
    assert int((module.eval().weight == 0).sum()) == 36
    assert float(size[module.weight == 0].max()) < float(size[module.weight != 0].min())
    train(module, 5)
    assert int((module.weight == 0).sum()) == int((~masks_of(module)["weight"].keep).sum()) < 36
    expected = module.eval().weight.detach().clone()
    assert int((expected == 0).sum()) == 36
    copied = copy.deepcopy(module).train()
    bake_(copied)
    assert torch.equal(copied.weight, expected)


def test_the_mask_stays_when_the_schedule_has_ended():
    module = scheduled(steps=5)
    train(module, 6)
    keep = masks_of(module)["weight"].keep.clone()
    train(module, 20, start=6)
    assert torch.equal(masks_of(module)["weight"].keep, keep)
    assert torch.equal(module.eval().weight == 0, ~keep)


def test_several_reads_in_a_step_and_passes_without_a_gradient_do_not_count():
    module = scheduled(steps=100).train()
    mask = masks_of(module)["weight"]
    assert int(mask.step) == 0
    for step in range(1, 4):
        loss = (module.weight.sum() + module.weight.square().sum()) * module(torch.ones(1, 8)).sum()
        with torch.no_grad():
            module(torch.ones(1, 8))
        loss.backward()
        assert int(mask.step) == step
    module.eval()
    module(torch.ones(1, 8)).sum().backward()
    assert int(mask.step) == 3


def test_movement_scores_are_those_of_a_reference_and_the_least_go():
    module = scheduled(removed=24, steps=4, rank="movement", curve="one-shot")
    plain = layer()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module.train(), plain)]
    # RMSprop with Adam's correction of the bias makes of the gradients of the scores what the scores are.
    expected = torch.zeros(6, 8, requires_grad=True)
    learner = torch.optim.Adam([expected], lr=1.0, betas=(0.0, 0.999), eps=0.0)
    for step in range(3):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((module, plain), optimizers, strict=True):
            optimizer.zero_grad()
            (m(x) - x[:, :6]).square().mean().backward()
            if m is plain:
                expected.grad = plain.weight.detach() * plain.weight.grad
                learner.step()
            optimizer.step()
    mask = masks_of(module)["weight"]
    torch.testing.assert_close(mask.scores, expected.detach())
    assert bool(mask.keep.all())
    module(x)
    assert int((~mask.keep).sum()) == 24
    size = plain.weight.detach().abs() / plain.weight.detach().square().mean().sqrt()
    ranked = size + expected.detach()  # 4 over 4 steps
    assert float(ranked[~mask.keep].max()) < float(ranked[mask.keep].min())
    assert not torch.equal(~mask.keep, least([size], 24))


def test_movement_that_is_noise_does_not_take_large_weights():
    module = nn.Linear(64, 64, bias=False)
    mask_(module, "weight", schedule=MaskSchedule(removed=2048, steps=50, rank="movement"))
    module.train()
    mask, generator = masks_of(module)["weight"], torch.Generator().manual_seed(0)
    size = module.parametrizations.weight.original.detach().abs()
    for step in range(1, 51):
        (module.weight * torch.randn(64, 64, generator=generator)).sum().backward()
        assert float(size[~mask.keep].mean()) < 0.8 * float(size[mask.keep].mean()), step
    assert not torch.equal(~mask.keep, least([size], 2048))


def test_a_gradient_that_overflowed_says_nothing():
    module = scheduled(removed=24, steps=8, rank="movement")
    train(module, 2, lr=0.0)
    mask = masks_of(module.train())["weight"]
    before = mask.scores.clone()
    (module(torch.full((1, 8), 1e30)).sum() * 1e30).backward()
    assert torch.equal(mask.scores, before)
    train(module, 1, lr=0.0, start=3)
    assert bool(torch.isfinite(mask.scores).all())
    assert not torch.equal(mask.scores, before)


def test_movement_goes_on_scoring_what_is_zero():
    module = scheduled(removed=24, steps=8, rank="movement")
    train(module, 4, lr=0.0)
    mask = masks_of(module)["weight"]
    assert bool((~mask.keep).any())
    before = mask.scores.clone()
    train(module, 1, lr=0.0, start=9)
    assert bool((mask.scores != before)[~mask.keep].all())


def test_movement_without_training_goes_by_magnitude():
    one, other = scheduled(rank="movement", steps=5), scheduled(steps=5)
    assert torch.equal(one.eval().weight, other.eval().weight)


def test_a_schedule_with_a_pattern_takes_equally_many_of_each_run():
    module = scheduled(removed=24, steps=4, of=4)
    assert [count % 12 for count in train(module, 5)] == [0] * 5
    assert bool(((module.eval().weight == 0).reshape(6, 2, 4).sum(-1) == 2).all())
    with pytest.raises(SurgeryError, match="no runs of 3"):
        mask_(layer(), "weight", schedule=MaskSchedule(removed=16, steps=1, of=3))


@pytest.mark.parametrize("rank", ["magnitude", "movement"])
def test_a_schedule_after_a_mask_keeps_what_is_zero(rank):
    module = masked()
    zero = module.weight == 0
    mask_(module, "weight", schedule=MaskSchedule(removed=36, steps=6, start=24, rank=rank))
    with torch.no_grad():
        assert torch.equal(module.train().weight == 0, zero)
    for count in train(module, 8)[1:]:
        assert 24 <= count <= 36
        assert bool((module.weight == 0)[zero].all())
    assert bool((module.eval().weight == 0)[zero].all())


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been():
    whole, parts = scheduled(steps=12, rank="movement"), scheduled(steps=12, rank="movement")
    train(whole, 5, lr=0.05)
    train(whole, 5, lr=0.05, start=5)
    train(parts, 5, lr=0.05)
    other = scheduled(steps=12, rank="movement")
    other.load_state_dict(parts.state_dict())
    train(other, 5, lr=0.05, start=5)
    for (name, one), two in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


# As data


SCHEDULES = [None, MaskSchedule(removed=36, steps=6), MaskSchedule(removed=24, steps=6, rank="movement", start=2, of=4)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_edit_makes_the_mask_again(schedule, tmp_path):
    module = nn.Sequential(layer())
    mask_(module[0], "weight", half(module[0].weight.detach()), schedule)
    edits = [MaskEdit("0", "weight", schedule_to_data(schedule))]
    assert edits_from_data(json.loads(json.dumps(edits_to_data(edits)))) == edits
    if schedule is not None:
        train(module[0], 3)
    save_structure(tmp_path, module, edits)
    again = rebuild(tmp_path, lambda: nn.Sequential(layer(1)))
    assert type(masks_of(again[0])["weight"]) is (Mask if schedule is None else ScheduledMask)
    assert torch.equal(again.eval()[0].weight, module.eval()[0].weight)
    assert again.state_dict().keys() == module.state_dict().keys()
    if schedule is not None:
        assert train(again[0], 4, start=3) == train(module[0], 4, start=3)
        assert torch.equal(again[0].weight, module[0].weight)


def test_edits_that_follow_each_other_end_in_the_last():
    edits = [MaskEdit("", "weight", schedule_to_data(SCHEDULES[1])), MaskEdit("", "weight")]
    made = apply_edits_(layer(), edits)
    assert type(masks_of(made)["weight"]) is Mask


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"parameter": "weight"}, "must have path"),
        ({"parameter": 3, "schedule": None}, "named by a word"),
        ({"parameter": "weight", "schedule": {"steps": 3}}, "a schedule has removed"),
        ({"parameter": "weight", "schedule": schedule_to_data(SCHEDULES[1]) | {"rank": "os"}}, "magnitude or movement"),
        ({"parameter": "weight", "schedule": schedule_to_data(SCHEDULES[1]) | {"steps": 0}}, "'steps' of a schedule"),
        ({"parameter": "weight", "schedule": schedule_to_data(SCHEDULES[1]) | {"of": True}}, "'of' of a schedule"),
    ],
)
def test_what_is_no_mask_is_refused(entry, words):
    with pytest.raises(ArtifactError, match=words):
        edits_from_data([{"edit": "mask", "path": "a", **entry}])


def test_an_edit_that_does_not_fit_is_refused():
    with pytest.raises(SurgeryError, match="no parameter"):
        apply_edits_(nn.Sequential(nn.ReLU()), [MaskEdit("0", "weight")])


def test_a_frozen_weight_has_all_its_zeros_in_training_too():
    layer = nn.Linear(8, 8)
    mask_(layer, "weight", schedule=MaskSchedule(removed=48, steps=10, rank="magnitude", curve="cubic"))
    layer.requires_grad_(False)
    zeros = {mode: int((layer.train(mode).weight == 0).sum()) for mode in (True, False)}
    assert zeros == {True: 48, False: 48}


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_with_a_schedule_is_traced_as_it_ends(steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    mask_(model[0], "weight", schedule=MaskSchedule(removed=64, steps=3, rank="magnitude", curve="cubic"))
    model.train()
    for _ in range(steps):
        model(torch.randn(4, 8)).sum().backward()
    model.eval()
    inputs = torch.randn(2, 8)
    traced = trace(model, inputs)
    with torch.no_grad():
        assert torch.equal(traced.program.module()(inputs), model(inputs))
    assert int((traced.module[0].weight == 0).sum()) == 64
    assert int(model[0].parametrizations.weight[0].step) == steps
