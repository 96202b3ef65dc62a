"""Which tensors get which format, and that the module stays as it is."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.graph import baked, grids_of
from trimpoint.method import Fact
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.sparsity import inputs as inputs_of_layers
from trimpoint.task import Task
from trimpoint.values import Format


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.second(self.first(self.norm(self.conv(x)))))


@pytest.fixture
def task():
    return Task(calibrate=TensorDataset(torch.randn(4, 1, 4), torch.zeros(4)))


def quantise(task, where="*", **params):
    model = Shared().eval()
    return model, compress(model, Plan((Step(QuantizeStatic(**params), Glob(where)),)), task)


def test_formats_by_default(task):
    model, compressed = quantise(task)
    assert sorted(compressed.formats) == ["conv", "first", "head", "second"]
    assert compressed.formats["conv"] == {
        "weight": Format(dtype="int8", granularity="channel", symmetric=True, reduce_range=True),
        "input": Format(dtype="uint8", granularity="tensor", symmetric=False),
    }
    assert [(c.origin, c.kind) for c in compressed.changes] == [(p, "assigned") for p in ("conv", "first", "head")]
    assert compressed.changes[0].after == "weight int8 per channel, input uint8 per tensor"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


def test_formats_by_parameters(task):
    _, compressed = quantise(task, granularity="tensor", symmetric_activations=True, reduce_range=False)
    assert compressed.formats["head"] == {
        "weight": Format(dtype="int8", granularity="tensor"),
        "input": Format(dtype="int8", granularity="tensor", symmetric=True),
    }


def test_where_and_facts(task):
    _, compressed = quantise(task, where="head")
    assert list(compressed.formats) == ["head"]
    assert Fact.FLOAT_WEIGHT not in compressed.facts["head"]
    assert Fact.FLOAT_WEIGHT in compressed.facts["conv"]


def test_a_second_time_is_skipped_with_the_reason(task):
    model = Shared().eval()
    plan = Plan((Step(QuantizeStatic(), Glob("head")), Step(QuantizeStatic(granularity="tensor"))))
    compressed = compress(model, plan, task)
    assert compressed.formats["head"]["weight"].granularity == "channel"
    assert compressed.formats["conv"]["weight"].granularity == "tensor"
    (change,) = [c for c in compressed.changes if c.kind == "skipped"]
    assert change.origin == "head"
    assert "float_weight" in change.reason


def test_needs_calibration_data():
    with pytest.raises(DataError, match="needs `calibrate` data"):
        quantise(Task())


def test_parameters_out_of_range():
    with pytest.raises(InvalidParameterError, match="granularity"):
        QuantizeStatic(granularity="group")
    with pytest.raises(InvalidParameterError, match="reduce_range"):
        QuantizeStatic(reduce_range="yes")


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.up(self.norm(self.conv(x)).relu()).mean((2, 3)))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Task(calibrate=TensorDataset(torch.randn(32, 1, 8, 8, generator=generator).cumsum(-1), torch.zeros(32)))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_weights_are_put_on_grids(images, rounding):
    torch.manual_seed(0)
    model = Convolutional().eval()
    compressed = compress(model, Plan().then(QuantizeStatic(bits=4, rounding=rounding)), images)
    for name in ("conv", "up", "head"):
        codes = grids_of(compressed.module)[name].codes
        assert codes.min() >= -7
        assert codes.max() <= 7
        assert len(set(codes.ravel().tolist())) > 2
        assert compressed.formats[name]["weight"].dtype == "int4"
    told = {change.origin: change for change in compressed.changes}
    assert told["conv"].after == "weight on 15 levels, weight int4 per channel, input uint8 per tensor"
    assert told["conv"].reason == f"scale by output-error, {rounding}, on 1,152 positions"
    assert told["up"].reason == "scale by weight-error, nearest"
    again = compress(model, compressed.plan, images)
    assert all(
        torch.equal(one, other)
        for one, other in zip(again.module.parameters(), compressed.module.parameters(), strict=True)
    )


def test_what_looks_at_the_inputs_is_nearer_to_the_model(images):
    torch.manual_seed(0)
    model = Convolutional().eval()
    inputs = torch.stack([images.calibrate[i][0] for i in range(32)])
    errors = {}
    for rounding in ("nearest", "gptq", "adaround"):
        made = compress(model, Plan().then(QuantizeStatic(bits=3, rounding=rounding)), images).module
        with torch.no_grad():
            errors[rounding] = float((made.conv(inputs) - model.conv(inputs)).square().sum())
    assert errors["gptq"] < errors["nearest"]
    assert errors["adaround"] < errors["nearest"]


def test_scales_of_weights(images):
    torch.manual_seed(0)
    model = Convolutional().eval()
    inputs = torch.stack([images.calibrate[i][0] for i in range(32)])
    grids, errors = {}, {}
    for weights in ("largest", "weight-error", "output-error"):
        made = compress(model, Plan().then(QuantizeStatic(bits=3, weights=weights)), images).module
        grids[weights] = grids_of(made)["conv"].scale
        with torch.no_grad():
            errors[weights] = (
                float((made.conv.weight - model.conv.weight).square().sum()),
                float((made.conv(inputs) - model.conv(inputs)).square().sum()),
            )
    largest = model.conv.weight.detach().abs().flatten(1).amax(1) / 3
    torch.testing.assert_close(torch.from_numpy(grids["largest"]).float(), largest)
    assert errors["weight-error"][0] == min(error[0] for error in errors.values())
    assert errors["output-error"][1] == min(error[1] for error in errors.values())


def test_training_goes_on_upon_the_grid():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 2)
    task = Task.classification(data, data)
    plan = Plan().then(QuantizeStatic(bits=4), Finetune(epochs=2, lr=0.1))
    compressed = compress(Convolutional().eval(), plan, task)
    before = compress(Convolutional().eval(), plan.prefix(1), task)
    assert sorted(grids_of(compressed.module)) == sorted(grids_of(before.module)) == ["conv", "head", "up"]
    weight = baked(compressed.module).conv.weight
    grid = grids_of(compressed.module)["conv"]
    torch.testing.assert_close(
        weight, torch.from_numpy((grid.codes * grid.scale[:, None, None, None]).astype("float32"))
    )


def test_shared_weights_are_left_to_the_runtime(task):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(x)))

    compressed = compress(Tied().eval(), Plan().then(QuantizeStatic(bits=4)), task)
    assert list(compressed.formats) == ["head"]
    assert compressed.formats["head"]["weight"].reduce_range  # for a runtime that has to round anew
    eight = compress(Tied().eval(), Plan().then(QuantizeStatic(rounding="gptq")), task)
    assert sorted(eight.formats) == ["first", "head", "second"]
    assert list(grids_of(eight.module)) == ["head"]
    assert {c.origin: c.reason for c in compressed.changes if c.kind == "skipped"} == dict.fromkeys(
        ("first", "second"), "it shares a weight with another module"
    )


@pytest.mark.parametrize("params", [{"bits": 4}, {"rounding": "gptq"}, {"weights": "weight-error"}])
def test_chosen_integers_need_a_scale_per_channel(params):
    with pytest.raises(InvalidParameterError, match="must be 'channel'"):
        QuantizeStatic(granularity="tensor", **params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"rounding": "gptq"}, {"bits": 4}, {"bits": 4, "rounding": "adaround"}])
def test_calibration_data_that_is_not_finite_is_refused_by_the_name_of_the_layer(params, bad):
    inputs = torch.randn(8, 4)
    inputs[3, 2] = bad
    task = Task(calibrate=TensorDataset(inputs, torch.zeros(8)))
    with pytest.raises(DataError, match="not finite at the input of `0`"):
        compress(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), Plan().then(QuantizeStatic(**params)), task)


def test_what_has_no_integers_of_its_own_is_skipped_with_the_reason_or_left_to_the_runtime():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Conv2d(6, 2, 1),
    ).eval()
    task = Task(calibrate=TensorDataset(torch.randn(8, 4, 5, 5), torch.zeros(8)))
    four = compress(model, Plan().then(QuantizeStatic(bits=4)), task)
    reasons = {change.origin: change.reason for change in four.changes if change.kind == "skipped"}
    assert "parametrisation of its own" in reasons["0"]
    assert "in groups" in reasons["1"]
    assert list(grids_of(four.module)) == list(four.formats) == ["2"]
    eight = compress(model, Plan().then(QuantizeStatic(rounding="gptq")), task)
    assert sorted(eight.formats) == ["0", "1", "2"]
    assert list(grids_of(eight.module)) == ["2"]


def test_layers_are_seen_in_parts_where_their_products_do_not_fit(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval()
    task = Task(calibrate=TensorDataset(torch.randn(32, 8), torch.zeros(32)))
    plan = Plan().then(QuantizeStatic(bits=4, rounding="gptq"))
    together = compress(model, plan, task)
    monkeypatch.setattr(inputs_of_layers, "_MOST_PRODUCTS", 2 * 8 * 8)
    apart = compress(model, plan, task)
    grids = [grids_of(each.module) for each in (together, apart)]
    assert list(grids[0]) == list(grids[1]) == ["0", "1", "2", "3"]
    assert all((grids[0][path].codes == grids[1][path].codes).all() for path in ("0", "1"))
    assert not (grids[0]["3"].codes == grids[1]["3"].codes).all()  # seen through rounded layers


class Normed(nn.Module):
    """A layer with a batch norm behind it, one with a bias, and one that has neither."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.head(self.grouped(self.norm(self.conv(x)).relu()).mean((2, 3)))


def test_corrected_biases_take_the_mean_error_back():
    torch.manual_seed(0)
    model = Normed().eval()
    inputs = torch.randn(64, 3, 8, 8) + 2.0
    with torch.no_grad():
        model.norm.running_mean.copy_(model.conv(inputs).mean((0, 2, 3)))
    task = Task(calibrate=TensorDataset(inputs, torch.zeros(64)), batch_size=16)
    plain = QuantizeStatic(bits=3, weights="weight-error")
    errors = {}
    for corrected in (False, True):
        plan = Plan().then(dataclasses.replace(plain, correct_bias=corrected))
        made = compress(model, plan, task)
        with torch.no_grad():
            first, second = (m.norm(m.conv(inputs)).mean((0, 2, 3)) for m in (model, made.module))
            given = model.norm(model.conv(inputs)).relu()  # each layer is corrected for what it saw
            third, fourth = (m.grouped(given).mean((0, 2, 3)) for m in (model, made.module))
        errors[corrected] = float((first - second).abs().max()), float((third - fourth).abs().max())
        shifted = {c.origin for c in made.changes if "shifted" in c.after}
        assert shifted == ({"norm", "grouped"} if corrected else set())
    assert min(errors[False]) > 0.02
    assert max(errors[True]) < 1e-4


def test_layers_that_hurt_most_are_kept_in_float_with_the_reason():
    """A layer whose input has outliers costs most; its neighbour, whose channels all count the same, does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 300.0
        model[2].weight[:, 3] /= 300.0
    task = Task(calibrate=TensorDataset(torch.randn(64, 8), torch.zeros(64)), batch_size=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressed = compress(model, Plan().then(QuantizeStatic(keep_float=1)), task)
    assert sorted(compressed.formats) == ["0", "4"]
    (skipped,) = (change for change in compressed.changes if change.kind == "skipped")
    assert skipped.origin == "2"
    assert "kept in float32" in skipped.reason
    assert all(torch.equal(tensor, before[name]) for name, tensor in compressed.module.state_dict().items())
    everything = compress(model, Plan().then(QuantizeStatic(keep_float=9)), task)
    assert everything.formats == {}


@pytest.mark.parametrize("norm", [False, True])
def test_with_one_scale_per_tensor_layers_are_measured_with_it(norm):
    """One large weight on a small input leaves the others of its tensor no levels; a scale per channel does not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    model.eval()
    with torch.no_grad():
        # Folded in, the norm makes the largest weight of an even matrix, or takes it out of an uneven one.
        model[0].weight[3, 1:] = 0.0
        model[1].weight[3] = 300.0 if norm else 1.0 / 300.0
        model[0].weight[3, 0] = 0.2 if norm else 60.0
    data = torch.randn(64, 16)
    data[:, 0] /= 40.0
    task = Task(calibrate=TensorDataset(data, torch.zeros(64)), batch_size=16)
    kept, cost = {}, {}
    for granularity in ("channel", "tensor"):
        made = compress(model, Plan().then(QuantizeStatic(granularity=granularity, keep_float=1)), task)
        (skipped,) = (change for change in made.changes if change.kind == "skipped")
        kept[granularity] = skipped.origin
        cost[granularity] = float(skipped.reason.split(" by ")[1].split()[0])
    assert cost["channel"] < 0.1
    assert (cost["tensor"] > 0.3) == norm
    assert kept["tensor"] == ("0" if norm else "5")
