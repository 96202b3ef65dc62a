"""Which weights go and how many; that they stay zero through recovery, storage, export and quantisation."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.data import as_numpy
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.graph import ScheduledMask, baked, masks_of
from trimpoint.measure.static import count_macs, count_params
from trimpoint.method import Fact
from trimpoint.methods.distill import Distill
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import require_parity
from trimpoint.search.stages import load_stage, save_stage
from trimpoint.sparsity.inputs import as_matrix
from trimpoint.task import Task, cross_entropy

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A convolution, a grouped and a depthwise one with norms, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.depthwise(F.relu(self.grouped(x)))).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


LAYERS = ("first", "grouped", "depthwise", "hidden", "head")
COUNTS = {"first": 216, "grouped": 288, "depthwise": 72, "hidden": 128, "head": 64}


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def make_task(count=48):
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.randn(count, 3, 3, 3, generator=generator), SHAPE[1:], mode="bilinear")
    y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    data = TensorDataset(x, y)
    return Task(train=data, calibrate=data, select=data, loss=cross_entropy, batch_size=16)


def pruned(*more, model=None, task=None, where="*", **params):
    plan = Plan((Step(PruneWeights(**params), Glob(where)), *map(Step, more)))
    return compress(model or net(), plan, task or make_task())


def zeros(module):
    return {path: int((part.weight == 0).sum()) for path, part in module.named_modules() if path in LAYERS}


CRITERIA = ("magnitude", "movement", "wanda", "sparsegpt")


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "sparsegpt"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_the_same_share_of_each_layer_to_the_weight(criterion, ratio):
    expected = {name: int(ratio * count + 0.5) for name, count in COUNTS.items()}
    made = pruned(criterion=criterion, ratio=ratio)
    assert zeros(made.module) == expected
    assert {change.origin: change.after for change in made.changes} == {
        name: f"{100 * expected[name] / count:.4g} % of {count} weights zero" for name, count in COUNTS.items()
    }
    assert {change.kind for change in made.changes} == {"masked"}


def test_magnitude_keeps_the_largest():
    model = net()
    made = pruned(model=model, ratio=0.6)
    for name in LAYERS:
        before, after = (m.get_submodule(name).weight.detach() for m in (model, made.module))
        assert float(before.abs()[after == 0].max()) < float(before.abs()[after != 0].min())
        assert torch.equal(after[after != 0], before[after != 0])


@pytest.mark.parametrize("normalize", ["none", "l1", "l2", "lamp"])
def test_the_same_share_of_all_layers_to_the_weight(normalize):
    made = pruned(scope="global", normalize=normalize, ratio=0.7)
    found = zeros(made.module)
    assert sum(found.values()) == round(0.7 * sum(COUNTS.values()))
    assert len({round(found[name] / COUNTS[name], 2) for name in LAYERS}) > 2
    assert all(found[name] < COUNTS[name] for name in LAYERS)


def test_a_layer_of_small_weights_is_not_emptied():
    model = net()
    with torch.no_grad():
        model.hidden.weight *= 1e-6
    assert zeros(pruned(model=model, scope="global", ratio=0.5).module)["hidden"] == COUNTS["hidden"] - 1


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "2:8"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_holds_in_every_group_along_the_inputs(criterion, pattern):
    kept, of = map(int, pattern.split(":"))
    made = pruned(criterion=criterion, pattern=pattern)
    told = {change.origin: change for change in made.changes}
    for name in LAYERS:
        weight = made.module.get_submodule(name).weight
        if weight.shape[1] % of:
            assert told[name].reason == f"its {weight.shape[1]} inputs are no multiple of {of}"
        else:
            runs = (weight.movedim(1, -1) != 0).reshape(-1, of)
            assert bool((runs.sum(-1) == kept).all())
            assert told[name].kind == "masked"


def test_wanda_is_magnitude_times_the_norm_of_the_input():
    model, task = net(), make_task()
    made = pruned(model=model, task=task, criterion="wanda", where="first")
    x = torch.stack([task.calibrate[i][0] for i in range(48)])
    columns = F.unfold(x, 3, padding=1).reshape(48, 3, 9, -1).permute(0, 3, 2, 1).reshape(-1, 27)
    scores = as_matrix(model.first.weight.detach()).abs() * columns.norm(dim=0)
    removed = as_matrix(made.module.first.weight == 0)
    assert removed.sum(1).tolist() == [14] * 8
    for row in range(8):
        assert float(scores[row][removed[row]].max()) <= float(scores[row][~removed[row]].min())


def test_sparsegpt_changes_the_outputs_of_each_layer_less_than_magnitude():
    model, x = net(), torch.stack([make_task().calibrate[i][0] for i in range(48)])

    def error(made, name):
        layer, other, seen = model.get_submodule(name), made.module.get_submodule(name), []
        handle = layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
        model(x)
        handle.remove()
        return float((layer(seen[0]) - other(seen[0])).detach().norm())

    for name in ("first", "grouped", "hidden", "head"):
        errors = [error(pruned(model=model, criterion=c, where=name), name) for c in ("sparsegpt", "magnitude")]
        assert errors[0] < 0.9 * errors[1], name


@pytest.mark.parametrize("params", [{"criterion": c} for c in CRITERIA] + [{"schedule": "cubic"}, {"pattern": "2:4"}])
def test_ratio_0_changes_nothing(params):
    model = net()
    made = pruned(model=model, ratio=0.0, **params)
    assert [(c.kind, c.reason) for c in made.changes] == [("skipped", "the ratio is 0")] * 5
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in made.module.state_dict().items())
    assert Fact.DENSE in made.facts["head"]
    assert made.edits == ()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_stays_and_the_same_seed_gives_the_same_bytes(criterion):
    model = net()
    before = copy.deepcopy(model.state_dict())
    one, other = (pruned(model=model, criterion=criterion) for _ in range(2))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(v, other.module.state_dict()[n]) for n, v in one.module.state_dict().items())
    assert Fact.DENSE not in one.facts["head"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_bfloat16_model_stays_one(criterion):
    model = net().bfloat16()
    data = TensorDataset(torch.randn(16, *SHAPE).bfloat16(), torch.zeros(16, dtype=torch.long))
    made = pruned(model=model, task=Task(calibrate=data, batch_size=8), criterion=criterion)
    assert made.module.head.weight.dtype == torch.bfloat16
    assert zeros(made.module)["head"] == 32
    assert bool(made.module(data[0][0][None]).isfinite().all())


# What is left alone


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.own = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.one = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.normed(self.own(self.embed(x)))) + self.one(x[..., None].float())


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_what_is_left_alone_has_its_reason(criterion):
    task = Task(calibrate=TensorDataset(torch.randint(0, 8, (8, 3)), torch.zeros(8)))
    made = pruned(model=Tied().eval(), task=task, criterion=criterion)
    told = {change.origin: change for change in made.changes}
    assert told["head"].reason == "its weight is tied to another module's"
    assert told["normed"].reason == "it has a parametrisation of its own"
    assert told["one"].reason == "0.5 of 1 weights rounds to none"
    assert told["own"].kind == "masked"
    assert made.module.head.weight is made.module.embed.weight
    unused = "the calibration data does not run through it" if criterion == "sparsegpt" else criterion + ", local"
    assert told["unused"].reason == unused


def test_a_module_that_is_used_twice_is_masked_once():
    shared = nn.Linear(8, 8)
    made = pruned(model=nn.Sequential(shared, nn.ReLU(), shared).eval(), task=None)
    assert made.module[0] is made.module[2]
    assert int((made.module[2].weight == 0).sum()) == 32
    assert len(made.edits) == 1


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_calibration_data_is_needed(criterion):
    with pytest.raises(DataError, match="calibrate"):
        compress(net(), Plan().then(PruneWeights(criterion=criterion)), Task())
    with pytest.raises(DataError, match="needs a task"):
        compress(net(), Plan().then(PruneWeights(criterion=criterion)))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"ratio": 1.0}, "'ratio'"),
        ({"pattern": "3:4"}, "'pattern'"),
        ({"steps": 0}, "'steps'"),
        ({"scope": "global", "criterion": "wanda"}, "'scope'.*'wanda'"),
        ({"scope": "global", "criterion": "movement"}, "'scope'.*'movement'"),
        ({"scope": "global", "pattern": "2:4"}, "'scope'.*'2:4'"),
        ({"schedule": "cubic", "criterion": "sparsegpt"}, "'schedule'.*'sparsegpt'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(params, words):
    with pytest.raises(InvalidParameterError, match=words) as error:
        PruneWeights(**params)
    assert error.value.hint


# Training


@pytest.mark.parametrize("recovery", [Finetune(epochs=2.0, optimizer="adamw"), Distill(epochs=2.0, optimizer="sgd")])
@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_zeros_stay_zero_through_recovery(criterion, recovery):
    before = pruned(criterion=criterion)
    after = compress(net(), Plan().then(PruneWeights(criterion=criterion), recovery), make_task(), start=before)
    for name in LAYERS:
        one, other = (made.module.get_submodule(name).weight for made in (before, after))
        assert torch.equal(one == 0, other == 0)
        assert not torch.equal(one, other)


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
@pytest.mark.parametrize("steps", [4, 1000])
def test_a_schedule_ends_at_its_ratio_whether_training_lasts_or_not(criterion, steps):
    made = pruned(Finetune(epochs=2.0), criterion=criterion, schedule="cubic", steps=steps, ratio=0.75)
    mask = masks_of(made.module.hidden)["weight"]
    assert isinstance(mask, ScheduledMask)
    assert int(mask.step) == min(6, steps)
    assert zeros(made.module) == {name: int(0.75 * count) for name, count in COUNTS.items()}
    assert zeros(baked(made.module)) == zeros(made.module)


def test_a_longer_recovery_goes_on_from_the_state_of_a_shorter_one(tmp_path):
    plan = Plan().then(
        PruneWeights(criterion="movement", schedule="cubic", steps=5), Finetune(epochs=4.0, cooldown=0.5)
    )
    compress(net(), plan, make_task(), effort=0.5, state_dir=tmp_path)
    resumed = compress(net(), plan, make_task(), state_dir=tmp_path)
    whole = compress(net(), plan, make_task())
    assert "went on from step 3" in resumed.changes[-1].reason
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_only_what_is_in_scope_is_trained():
    plan = Plan((Step(PruneWeights()), Step(Finetune(), Glob("hidden"))))
    start = compress(net(), plan.prefix(1), make_task())
    made = compress(net(), plan, make_task(), start=start)
    changed = {n for n, v in made.module.state_dict().items() if not torch.equal(v, start.module.state_dict()[n])}
    trained = {name.split(".")[0] for name in changed if not name.startswith("norm.running")}
    assert trained - {"norm"} == {"hidden"}
    by_type = compress(net(), Plan((Step(PruneWeights()), Step(Finetune(), ~Glob("x")))), make_task(), start=start)
    assert not torch.equal(by_type.module.head.weight, start.module.head.weight)


def test_pruning_again_goes_further_and_never_back():
    plan = Plan().then(PruneWeights(ratio=0.5), Finetune(epochs=1.0), PruneWeights(ratio=0.75), Finetune(epochs=1.0))
    first, last = (compress(net(), plan.prefix(n), make_task()) for n in (2, 4))
    for name in LAYERS:
        one, other = (made.module.get_submodule(name).weight for made in (first, last))
        assert bool((other == 0)[one == 0].all())
    assert zeros(last.module) == {name: int(0.75 * count) for name, count in COUNTS.items()}
    back = compress(net(), Plan().then(PruneWeights(ratio=0.5), PruneWeights(ratio=0.25)), make_task())
    assert back.changes[-1].reason == "32 of its 64 weights are zero already"


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_what_was_zero_stays_zero_when_pruned_by_inputs(criterion):
    plan = Plan().then(PruneWeights(ratio=0.25), PruneWeights(ratio=0.5, criterion=criterion))
    first, last = (compress(net(), plan.prefix(n), make_task()) for n in (1, 2))
    for name in LAYERS:
        one, other = (made.module.get_submodule(name).weight for made in (first, last))
        assert bool((other == 0)[one == 0].all())


# Storage and files

STORED = [{"ratio": 0.6}, {"criterion": "sparsegpt"}, {"criterion": "movement", "schedule": "cubic", "steps": 8}]


@pytest.mark.parametrize("params", STORED, ids=str)
def test_a_stage_read_back_trains_on_as_if_it_had_not_been_stored(params, tmp_path):
    plan = Plan().then(PruneWeights(**params), Finetune(epochs=1.0), Finetune(epochs=1.0, lr=0.01))
    made = compress(net(), plan.prefix(2), make_task())
    save_stage(made, tmp_path, 0.0)
    back = load_stage(tmp_path, net(), plan.prefix(2))
    assert back.edits == made.edits
    assert back.facts == made.facts
    one, other = (compress(net(), plan, make_task(), start=start) for start in (made, back))
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name
    assert zeros(one.module) == zeros(made.module)


def test_what_is_counted_is_what_is_exported():
    made = pruned(ratio=0.6)
    plain, model, x = baked(made.module), net(), torch.randn(1, *SHAPE)
    assert count_params(made.module).total == count_params(plain).total == count_params(model).total
    assert count_macs(plain, x).total == count_macs(model, x).total
    assert count_macs(plain, x).not_counted == count_macs(model, x).not_counted


def lowered(made, task, directory):
    runtime = get_runtime("onnxruntime")
    exported = export(made.module, task.example_batch(2), task.dynamic_dims())
    calibration = [as_numpy(inputs) for inputs, _ in task.batches("calibrate")] if made.formats else ()
    files = runtime.lower(exported, directory, formats=made.formats or None, calibration=calibration)
    graph = onnx.load(directory / "model.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return runtime.open(directory, files, threads=1), graph, tensors


def test_the_file_has_plain_weights_with_the_zeros_among_them(tmp_path):
    task = make_task()
    made = pruned(Finetune(epochs=1.0), task=task, where="[!f]*", ratio=0.6, schedule="cubic", steps=1000)
    session, graph, tensors = lowered(made, task, tmp_path)
    assert not {node.op_type for node in graph.node} & {"Mul", "Where", "And", "Not"}
    require_parity(made.module, session, [as_numpy(task.example_batch(3))])
    by_size = {tensor.size: tensor for tensor in tensors.values() if tensor.ndim >= 2}
    for name in ("hidden", "head"):  # a norm is folded into what is before it
        assert np.array_equal(by_size[COUNTS[name]], made.module.get_submodule(name).weight.detach().numpy())
    for name in ("grouped", "depthwise", "hidden", "head"):
        found = by_size[COUNTS[name]]
        assert int((found == 0).sum()) == int(0.6 * COUNTS[name] + 0.5)
        assert not np.signbit(found[found == 0]).any()
    assert masks_of(made.module.hidden)


def test_zeros_stay_zero_in_eight_bits(tmp_path):
    task = make_task()
    made = pruned(QuantizeStatic(), task=task, ratio=0.6)
    assert {path for path, formats in made.formats.items() if formats} == set(LAYERS)
    _, graph, tensors = lowered(made, task, tmp_path)
    points = {
        node.input[position - 2]: node.input[position]
        for node in graph.node
        for operator, position in (("QLinearConv", 5), ("QGemm", 5))
        if node.op_type == operator
    }
    assert sorted(tensors[weight].size for weight in points) == sorted(COUNTS.values())
    for weight, point in points.items():
        tensor = tensors[weight]
        assert tensor.dtype == np.int8
        assert int(0.6 * tensor.size + 0.5) <= int((tensor == 0).sum()) < 0.8 * tensor.size
        assert (tensors[point] == 0).all()


@pytest.mark.slow
def test_zeros_stay_zero_in_openvinos_file(tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    task = make_task()
    made = pruned(QuantizeStatic(), task=task, ratio=0.6)
    runtime = get_runtime("openvino")
    exported = export(made.module, task.example_batch(2), task.dynamic_dims())
    calibration = [as_numpy(inputs) for inputs, _ in task.batches("calibrate")]
    files = runtime.lower(exported, tmp_path, formats=made.formats, calibration=calibration)
    (name,) = (n for names in files.files.values() for n in names if n.endswith(".xml"))
    constants = [node.data for node in openvino.Core().read_model(tmp_path / name).get_ops() if "Const" in str(node)]
    eight = [data for data in constants if data.dtype == np.int8 and data.ndim >= 2 and data.size > 16]
    assert len(eight) == 5
    for data in eight:
        assert int((data == 0).sum()) >= int(0.6 * data.size)


class Standardised(nn.Conv2d):
    """A convolution that multiplies with a weight of mean 0 and deviation 1."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_zeros_of_a_layer_that_computes_its_weight_are_not_claimed():
    model = net()
    model.first = Standardised(3, 8, 3, padding=1)
    for criterion in CRITERIA:
        (change,) = [c for c in pruned(model=model, criterion=criterion).changes if c.origin == "first"]
        assert (change.kind, change.reason) == ("skipped", "its class Standardised has a forward pass of its own")
