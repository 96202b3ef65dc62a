"""What a method may do, and what is recorded of it: masks, and parts of what was replaced."""

import copy
import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import trimpoint
from trimpoint.compress import compress
from trimpoint.graph import LowRank, masks_of
from trimpoint.method import Method, Stage, Traits
from trimpoint.methods.factorize_linear import FactorizeLinear
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.registry import all_methods
from trimpoint.report.html import group_changes
from trimpoint.task import Task
from trimpoint.testing import zoo
from trimpoint.testing.applied import answers, named_tensors


@dataclass(frozen=True, kw_only=True)
class Scripted(Method):
    """A method that runs what a test gives it."""

    traits: ClassVar[Traits] = Traits(stage=Stage.STRUCTURE, targets=("Linear",))
    script: ClassVar = None

    def apply(self, ctx):
        type(self).script(ctx)


def scripted(function, **traits):
    return type("Scripted", (Scripted,), {"script": staticmethod(function), "traits": Traits(**traits)})()


STRUCTURE = {"stage": Stage.STRUCTURE, "targets": ("Linear",)}


@pytest.fixture(scope="module")
def masked():
    model, task = zoo()["cnn"].make()
    return compress(model, Plan().then(PruneWeights()), task).module, task


# Masks


def test_replacing_a_masked_layer_keeps_its_zeros(masked):
    model, task = masked

    def script(ctx):
        layer = nn.Linear(16, 4)
        ctx.replace("6", layer, "other values")

    made = compress(model, Plan().then(scripted(script, **STRUCTURE)), task)
    (change,) = [c for c in made.changes if c.kind != "skipped"]
    assert (change.origin, change.kind) == ("6", "replaced")
    assert torch.equal(made.module[6].weight == 0, model[6].weight == 0)
    assert torch.equal(masks_of(made.module[6])["weight"].keep, masks_of(model[6])["weight"].keep)


def test_a_layer_that_cannot_take_the_mask_over_is_skipped_and_the_mask_is_named(masked):
    model, task = masked
    thin = scripted(lambda ctx: ctx.replace("6", LowRank(nn.Linear(16, 2), nn.Linear(2, 4))), **STRUCTURE)
    made = compress(model, Plan().then(thin), task)
    (change,) = [c for c in made.changes if c.origin == "6"]
    assert change.kind == "skipped"
    assert change.reason.startswith("A mask holds 32 of the 64 numbers of its weight at zero")
    assert torch.equal(answers(made.module, task), answers(model, task))


@pytest.mark.parametrize("method", [PruneChannels(), FactorizeLinear()], ids=lambda m: m.name)
def test_what_needs_plain_weights_names_the_mask(masked, method):
    model, task = masked
    made = compress(model, Plan().then(method), task)
    assert {c.kind for c in made.changes} == {"skipped"}
    for change in made.changes:
        assert change.reason.startswith(f"a mask holds weights of `{change.origin}` at zero"), change
        assert "trimpoint.bake" in change.reason
        assert "parametrizations" not in change.origin


def test_channels_that_run_into_a_masked_layer_stay_and_name_it():
    model, task = zoo()["cnn"].make()
    plan = Plan().then(scripted(lambda ctx: ctx.mask("2", torch.rand(16, 16, 3, 3) > 0.5), **STRUCTURE))
    made = compress(compress(model, plan, task).module, Plan().then(PruneChannels()), task)
    (change,) = [c for c in made.changes if c.origin == "0"]
    assert change.kind == "skipped"
    assert change.reason.startswith("a mask holds weights of `2` at zero")


def test_baked_masks_go_wherever_plain_weights_go(masked):
    model, task = masked
    names = list(model.state_dict())
    baked = trimpoint.bake(model)
    plain, _ = zoo()["cnn"].make()
    assert list(model.state_dict()) == names
    assert list(baked.state_dict()) == list(plain.state_dict())
    assert [type(part) for part in baked.modules()] == [type(part) for part in plain.modules()]
    assert not {id(t) for t in named_tensors(baked).values()} & {id(t) for t in named_tensors(model).values()}
    stream = io.BytesIO()
    torch.save(baked.state_dict(), stream)
    stream.seek(0)
    plain.load_state_dict(torch.load(stream, weights_only=True))
    stream = io.BytesIO()
    torch.save(baked, stream)
    stream.seek(0)
    whole = torch.load(stream, weights_only=False)
    for other in (baked, plain, whole, copy.deepcopy(baked)):
        assert torch.equal(answers(other, task), answers(model, task))
    made = compress(baked, Plan().then(PruneChannels()), task)
    assert "resized" in {c.kind for c in made.changes}


# Parts of what was replaced


def factorised():
    torch.manual_seed(0)
    model, task = zoo()["cnn"].make()
    thin = scripted(lambda ctx: ctx.replace("6", LowRank(nn.Linear(16, 2), nn.Linear(2, 4)), "thin"), **STRUCTURE)
    return model, task, Plan().then(thin)


@pytest.mark.parametrize("method", [PruneWeights(), QuantizeStatic()], ids=lambda m: m.name)
def test_both_parts_of_a_low_rank_layer_are_on_record(method):
    model, task, plan = factorised()
    made = compress(model, plan.then(method), task)
    found = [c for c in made.changes if c.origin == "6" and c.method == method.name]
    assert [c.before for c in found] == ["its `0`, Linear 16→2", "its `1`, Linear 2→4"]
    assert {c.kind for c in found} == {"masked" if isinstance(method, PruneWeights) else "assigned"}
    if isinstance(method, QuantizeStatic):
        assert set(made.formats["6.0"]) == set(made.formats["6.1"]) == {"weight", "input"}
    listed = [entry for group in group_changes(made.changes) for entry in group.entries]
    assert any(entry.startswith("6: its `0`, Linear 16→2 → ") for entry in listed)
    assert any(entry.startswith("6: its `1`, Linear 2→4 → ") for entry in listed)


def test_a_part_that_is_skipped_beside_one_that_is_changed_is_told():
    model, task, plan = factorised()

    def script(ctx):
        ctx.skip("6.0", "one")
        ctx.mask("6.1", torch.eye(4, 2, dtype=torch.bool))
        ctx.skip("6.1", "two")

    made = compress(model, plan.then(scripted(script, **STRUCTURE)), task)
    found = [(c.kind, c.reason) for c in made.changes if c.origin == "6"][1:]
    assert found == [("skipped", "one"), ("masked", "")]


def test_one_reason_for_all_parts_is_told_once():
    model, task, plan = factorised()
    twice = scripted(lambda ctx: [ctx.skip(path, "no") for path in ("6.0", "6.1", "6")], **STRUCTURE)
    made = compress(model, plan.then(twice), task)
    assert [c.reason for c in made.changes if c.origin == "6"][1:] == ["no"]


def test_what_a_step_replaces_and_then_resizes_is_one_change():
    model, task = zoo()["attention"].make()
    from trimpoint.methods.prune_heads import PruneHeads

    made = compress(model, Plan().then(PruneHeads(), PruneHeads(ratio=0.5)), task)
    first = [c for c in made.changes if c.origin == "attention" and c.kind != "skipped"]
    assert [c.kind for c in first] == ["replaced"]


def test_a_root_that_was_replaced_has_parts_too():
    model, task = zoo()["root_linear"].make()
    thin = scripted(lambda ctx: ctx.replace("", LowRank(nn.Linear(16, 2), nn.Linear(2, 4))), **STRUCTURE)
    made = compress(model, Plan().then(thin, PruneWeights()), task)
    assert [(c.origin, c.before) for c in made.changes] == [
        ("", "Linear 16→4"),
        ("", "its `0`, Linear 16→2"),
        ("", "its `1`, Linear 2→4"),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["cast-weights", "quantize-dynamic", "quantize-static", "quantize-weights"])
def test_number_formats_are_for_float32(name, dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()
    task = Task(calibrate=TensorDataset(torch.randn(8, 8, dtype=dtype), torch.zeros(8)))
    made = compress(model, Plan().then(all_methods()[name]()), task)
    assert not made.formats
    kind = str(dtype).removeprefix("torch.")
    reasons = {change.origin: change.reason for change in made.changes}
    assert reasons == dict.fromkeys("02", f"its weight is {kind}, and number formats are for float32 (`model.float()`)")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.module.parameters(), strict=True))
