"""Validate, copy, apply, recover: what holds for every plan."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.errors import DataError, InvalidParameterError, ModelError, PlanError, TraceError, UnknownNameError
from trimpoint.filters import Glob, Type
from trimpoint.graph import LowRank, apply_edits_
from trimpoint.method import Fact, Method, Stage, Traits
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.factorize_linear import FactorizeLinear
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


def make_data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


@pytest.fixture(scope="module")
def task():
    return Task(train=make_data(48), calibrate=make_data(8, 1), loss=cross_entropy, batch_size=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResNet(widths=(4, 8), depth=2, classes=2)


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


QUICK = {"epochs": 1.0, "lr": 0.01}
FULL = Plan().then(DropBlocks(), PruneChannels(round_to=2), Distill(**QUICK), QuantizeStatic())


def test_whole_plan(model, task):
    model.head.requires_grad_(False)
    model.train()
    before, modes = tensors(model), [m.training for m in model.modules()]
    told = []
    made = compress(model, FULL, task, progress=lambda step, text, share: told.append((step, share)))
    assert same(before, tensors(model))
    assert [m.training for m in model.modules()] == modes
    assert type(made.module) is ResNet
    assert not any(m.training for m in made.module.modules())
    assert not made.module.head.weight.requires_grad
    assert made.module.stem.conv.weight.requires_grad
    assert torch.equal(made.module.head.bias, model.head.bias)
    assert {change.method for change in made.changes} == {step.method.name for step in FULL.steps}
    assert all(change.reason for change in made.changes if change.kind == "skipped")
    assert {step for step, _ in told} == {0, 1, 2, 3}
    assert told[-1] == (3, 1.0)
    assert "stages.0.1.conv1" not in made.origins
    assert made.origins["stem.conv"] == "stem.conv"
    assert Fact.FLOAT_WEIGHT not in made.facts["stem.conv"]
    assert Fact.ORIGINAL_SHAPE not in made.facts["stem.conv"]
    rebuilt = copy.deepcopy(model).eval()
    apply_edits_(rebuilt, made.edits)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {
        n: p.shape for n, p in made.module.named_parameters()
    }


def test_prefix_resumes_to_the_same_bytes(model, task):
    first = compress(model, FULL.prefix(2), task)
    kept = tensors(first.module)
    whole, resumed = compress(model, FULL, task), compress(model, FULL, task, start=first)
    assert same(tensors(whole.module), tensors(resumed.module))
    assert (whole.changes, whole.edits, whole.formats) == (resumed.changes, resumed.edits, resumed.formats)
    assert (whole.facts, whole.origins) == (resumed.facts, resumed.origins)
    assert same(kept, tensors(first.module))


def test_other_seed_other_bytes(model, task):
    one, other = (compress(model, Plan((Step(Finetune(**QUICK)),), seed), task) for seed in (0, 1))
    assert not same(tensors(one.module), tensors(other.module))


def test_empty_plan_is_a_copy(model):
    made = compress(model, Plan())
    assert made.module is not model
    assert same(tensors(made.module), tensors(model))
    assert made.changes == ()


def test_effort_scales_the_last_recovery_only_and_resumes_it(model, task, tmp_path):
    plan = Plan().then(Finetune(epochs=1.0, lr=0.01), Finetune(epochs=2.0, lr=0.01))
    short = compress(model, plan, task, effort=0.5, state_dir=tmp_path)
    assert [change.after.split(" steps")[0] for change in short.changes] == ["6", "6"]
    long = compress(model, plan, task, state_dir=tmp_path)
    assert [change.after.split(" steps")[0] for change in long.changes] == ["6", "12"]
    assert long.changes[1].reason == "went on from step 4"
    assert same(tensors(long.module), tensors(compress(model, plan, task).module))
    assert [path.name for path in tmp_path.iterdir()] == [f"{plan.hash}.safetensors"]


def test_teachers_answers_are_shared_and_change_nothing(model, task):
    plan, cache = Plan().then(Distill(**QUICK, hints=0.0)), {}
    filled = compress(model, plan, task, cache=cache)
    size = len(cache)
    again = compress(model, plan, task, cache=cache)
    assert size == len(cache) == 6
    assert same(tensors(filled.module), tensors(again.module))
    assert same(tensors(filled.module), tensors(compress(model, plan, task).module))


def test_start_must_be_a_prefix_at_full_effort(model, task):
    plan = Plan().then(Finetune(**QUICK), QuantizeStatic())
    start = compress(model, plan.prefix(1), task, effort=0.5)
    with pytest.raises(PlanError, match="prefix of the plan"):
        compress(model, Plan().then(QuantizeStatic()), task, start=start)
    with pytest.raises(PlanError, match=r"at effort 1\. Got 0\.5"):
        compress(model, plan, task, start=start)
    with pytest.raises(PlanError, match=r"at effort 1\. Got 0\.5"):
        compress(model, plan.prefix(1).then(Finetune(**QUICK)), task, start=start, effort=0.5)
    assert compress(model, plan, task, start=start, effort=0.5).effort == 0.5


# Bad input


def test_wrong_order(model, task):
    with pytest.raises(PlanError, match=r"`drop-blocks` .* must stand before `quantize-static`"):
        compress(model, Plan().then(QuantizeStatic(), DropBlocks()), task)


def test_unknown_where_is_told_for_every_step_with_a_suggestion(model, task):
    plan = Plan((Step(QuantizeStatic(), Glob("haed")), Step(Finetune(), Type("Linaer")), Step(Finetune())))
    with pytest.raises(UnknownNameError) as error:
        compress(model, plan, task)
    assert "1. `where` of step 1" in str(error.value)
    assert "2. `where` of step 2" in str(error.value)
    assert error.value.hint == "did you mean `head`?"


def test_everything_that_the_task_lacks_is_told_at_once(model):
    plan = Plan().then(DropBlocks(), Finetune(), QuantizeStatic())
    with pytest.raises(DataError) as error:
        compress(model, plan)
    text = str(error.value)
    assert "1. Step 1 (drop-blocks) needs example inputs" in text
    assert "2. Step 2 (finetune) needs a loss" in text
    assert "3. Step 2 (finetune) needs `train` data" in text
    assert "4. Step 3 (quantize-static) needs `calibrate` data" in text


def test_empty_training_data(model, task):
    with pytest.raises(DataError, match=r"needs `train` data. That of the task is empty"):
        compress(
            model, Plan().then(Finetune()), task.with_(train=TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0)))
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, task, value):
    with torch.no_grad():
        model.head.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"`head.weight` has 1 values of 16 that are not finite"):
        compress(model, FULL, task)


def test_statistics_that_are_not_numbers(model):
    model.stem.norm.running_mean[0] = float("nan")
    with pytest.raises(ModelError, match=r"buffer `stem.norm.running_mean` holds NaN"):
        compress(model, Plan())


@pytest.mark.parametrize("effort", [0, 1.5, True, "all"])
def test_effort_out_of_range(model, effort):
    with pytest.raises(InvalidParameterError, match=r"\(0, 1\]"):
        compress(model, Plan(), effort=effort)


# What the context promises to methods


@pytest.mark.parametrize(
    "method",
    [
        PruneWeights(criterion="wanda"),
        PruneWeights(criterion="sparsegpt"),
        FactorizeLinear(),
        PruneChannels(),
        DropBlocks(),
        Finetune(**QUICK),
        Distill(**QUICK),
    ],
)
def test_a_model_that_does_not_run_on_the_data_is_told(model, task, method):
    with pytest.raises((ModelError, TraceError), match="does not run on "):
        compress(model.double(), Plan().then(method), task)


@dataclass(frozen=True, kw_only=True)
class Scripted(Method):
    """A method that runs what a test gives it."""

    traits: ClassVar[Traits] = Traits(
        stage=Stage.FACTORIZE, targets=("Linear",), requires=Fact.DENSE, removes=Fact.DENSE
    )
    script: ClassVar = None

    def apply(self, ctx):
        type(self).script(ctx)


def scripted(function):
    return type("Scripted", (Scripted,), {"script": staticmethod(function)})()


def test_replacement_inherits_the_origin_everywhere(task):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = self.one

        def forward(self, x):
            return self.other(self.one(x))

    def script(ctx):
        (site,) = ctx.modules()
        ctx.replace(site.path, LowRank(nn.Linear(4, 2), nn.Linear(2, 4)), "thinner")
        assert ctx.get("one") is ctx.get("other")

    again = []
    plan = Plan().then(scripted(script), scripted(lambda ctx: again.extend(ctx.modules())))
    made = compress(Twice(), plan)
    assert made.origins == {"": "", **{f"{p}{s}": p for p in ("one", "other") for s in ("", ".0", ".1")}}
    assert [(c.kind, c.origin) for c in made.changes] == [("replaced", "one"), ("skipped", "one")]
    assert "needs what no longer holds here: dense" in made.changes[1].reason
    assert again == []
    assert not made.module.one.training


def test_what_a_method_forgets_is_told(model, task):
    (change,) = compress(model, Plan().then(scripted(lambda ctx: None)), task).changes
    assert (change.kind, change.origin) == ("skipped", "head")
    assert change.reason == "left as it is by scripted"


def test_calibrate_observes_inputs_and_outputs(model, task):
    seen = []
    script = scripted(lambda ctx: seen.append(ctx.calibrate(lambda *args: seen.append(args), ["head"])))
    compress(model, Plan().then(script), task)
    (path, module, inputs, output), samples = seen
    assert (path, samples) == ("head", 8)
    assert torch.allclose(module(inputs[0]), output)


def test_unknown_path(model, task):
    with pytest.raises(UnknownNameError, match=r"no module 'haed'[\s\S]*`head`"):
        compress(model, Plan().then(scripted(lambda ctx: ctx.get("haed"))), task)


class Surrounded(nn.Module):
    """A model around its core, which is called with keywords."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(36, 36)
        self.net = ResNet(widths=(8, 16), depth=2, classes=2)

    def forward(self, x):
        y = self.net(x=self.scale(x.flatten(1)).reshape(x.shape))
        return y * 2 if float(y.detach().sum()) > 0 else y  # cannot be traced


def test_structure_of_the_core_changes_and_the_whole_model_is_trained(task):
    torch.manual_seed(0)
    model = Surrounded()
    core_task = task.with_(core="net", predict=lambda run, inputs: run(inputs))
    made = compress(model, Plan().then(DropBlocks(), PruneChannels(), Finetune(**QUICK)), core_task)
    assert made.module.net.stages[1][0].conv1.out_channels == 8
    assert {change.origin.split(".")[0] for change in made.changes if change.kind == "bypassed"} == {"net"}
    assert not torch.equal(made.module.scale.weight, model.scale.weight)


def test_recovers_under_a_bare_loop_as_well_as_under_ours(model, task):
    structure = Plan().then(DropBlocks(), PruneChannels(round_to=2))
    method = Finetune(epochs=2.0, lr=0.02, cooldown=0.5)
    ours = compress(model, structure.then(method), task)
    bare = compress(model, structure, task).module
    settings = method.settings(bare, task)
    from trimpoint.recover.batches import mix

    seed, stream = mix(0, 2), []
    for epoch in range(2):
        stream += list(task.training_batches(mix(seed, epoch)))
    spared = {id(p) for m in bare.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()} | {
        id(bare.head.bias)
    }
    groups = [
        {"params": [p for p in bare.parameters() if id(p) not in spared], "weight_decay": 5e-4},
        {"params": [p for p in bare.parameters() if id(p) in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    bare.train()
    for step, (x, y) in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * settings.factor(step)
        optimizer.zero_grad()
        F.cross_entropy(bare(x), y).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), settings.clip)
        optimizer.step()
    for name, value in bare.state_dict().items():
        assert torch.allclose(value, ours.module.state_dict()[name], atol=1e-4), name


def test_a_model_that_cannot_be_copied_is_refused(task):
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    layer(torch.randn(2, 4))
    with pytest.raises(ModelError, match=r"cannot be copied[\s\S]*parametrizations.weight_norm"):
        compress(nn.Sequential(layer), Plan())


def test_weights_that_are_not_there_yet(task):
    with torch.inference_mode():
        frozen = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    for module, what, hint in (
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), "has no shape yet", "run the model on one batch"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).to("meta"), "has no values", "load the model's weights"),
        (frozen, "was made under `torch.inference_mode", "clone"),
    ):
        with pytest.raises(ModelError, match=rf"`1\.weight` {what}(.|\n)*hint: .*{hint}"):
            compress(module, Plan().then(PruneChannels()), task)
