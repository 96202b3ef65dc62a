"""Equalised ranges: against the closed form of two layers, and what int8 per tensor gains where channels differ."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError
from trimpoint.filters import Glob
from trimpoint.graph import trace
from trimpoint.graph.scalings import find_scalings, rescale_
from trimpoint.methods.equalize_layers import EqualizeLayers
from trimpoint.methods.smooth_activations import SmoothActivations
from trimpoint.plan import Plan, Step
from trimpoint.quantization.distilled import distilled_inputs
from trimpoint.task import Task


class Separable(nn.Module):
    """Depthwise-separable convolutions with batch norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm1(self.deep(self.norm0(self.stem(x)).relu())).relu()
        return self.head(self.norm2(self.point(x)).relu().mean((2, 3)))


def images(count=64):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unequal():
    """A network that computes the same as an ordinary one, but whose channels differ by factors up to 256."""
    torch.manual_seed(0)
    module = Separable().train()
    with torch.no_grad():
        for _ in range(20):
            module(images())
    module.eval()
    groups = [group for group in find_scalings(trace(module, images(2))).groups if not group.reason]
    generator = torch.Generator().manual_seed(1)
    factors = {g: torch.exp2(torch.empty(g.size).uniform_(-4, 4, generator=generator)) for g in groups}
    ordinary = copy.deepcopy(module)
    rescale_(module, factors, images(2))
    return ordinary, module


def task(inputs=None):
    inputs = images() if inputs is None else inputs
    return Task(calibrate=TensorDataset(inputs, torch.zeros(len(inputs))))


def rounded(module, bits=8):
    """Return a copy with all weights, batch norms folded in, rounded with one scale per tensor."""
    module, norms = copy.deepcopy(module), find_scalings(trace(module, images(2))).norms
    with torch.no_grad():
        for path, part in module.named_modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                fold = torch.ones(len(part.weight))
                if path in norms:
                    norm = module.get_submodule(norms[path])
                    fold = norm.weight / (norm.running_var + norm.eps).sqrt()
                folded = part.weight * fold.view(-1, *[1] * (part.weight.ndim - 1))
                step = folded.abs().max() / (2 ** (bits - 1) - 1)
                part.weight.copy_((folded / step).round() * step / fold.view(-1, *[1] * (part.weight.ndim - 1)))
    return module


def noise(module, reference):
    with torch.no_grad():
        wrong = module(images()) - reference(images())
        return float(wrong.square().mean() / reference(images()).var())


def test_two_layers_are_equalised_as_the_closed_form_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    given = Task(calibrate=TensorDataset(torch.randn(4, 6), torch.zeros(4)))
    made = compress(model, Plan().then(EqualizeLayers()), given).module
    first, second = model[0].weight.detach().abs().amax(1), model[2].weight.detach().abs().amax(0)
    # Nagel et al., equation 9, up to the one factor that all channels share.
    expected = (second / first).sqrt()
    ratio = (made[0].weight.detach().abs().amax(1) / first) / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(5), rtol=2e-3, atol=0)
    after = made[0].weight.detach().abs().amax(1), made[2].weight.detach().abs().amax(0)
    shares = [sizes / sizes.max() for sizes in after]
    torch.testing.assert_close(shares[0], shares[1], rtol=5e-3, atol=0)
    x = torch.randn(16, 6)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


def test_weights_with_one_scale_per_tensor_are_as_good_as_if_channels_had_never_differed(unequal):
    ordinary, module = unequal
    equal = compress(module, Plan().then(EqualizeLayers()), task())
    assert noise(equal.module, module) < 1e-8
    assert noise(rounded(module), module) > 20 * noise(rounded(ordinary), ordinary)
    assert noise(rounded(equal.module), module) < 2 * noise(rounded(ordinary), ordinary)
    changed = {change.origin for change in equal.changes if change.kind == "assigned"}
    assert {"norm0", "deep", "norm1", "point", "norm2", "head"} == changed


def test_what_is_out_of_scope_stays_with_the_reason(unequal):
    _, module = unequal
    step = Step(EqualizeLayers(), Glob("norm0") | Glob("stem") | Glob("deep"))
    made = compress(module, Plan((step,)), task())
    assert torch.equal(made.module.head.weight, module.head.weight)
    assert not torch.equal(made.module.norm0.weight, module.norm0.weight)
    assert any("out of scope" in change.reason for change in made.changes)


def test_channels_of_zeros_stay():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    given = Task(calibrate=TensorDataset(torch.randn(4, 4), torch.zeros(4)))
    made = compress(model, Plan().then(EqualizeLayers()), given).module
    assert torch.isfinite(made(torch.randn(8, 4))).all()
    assert torch.equal(made[0].weight[1], model[0].weight[1])


class Outliers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.norm.weight[3] = 60.0

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_outliers_go_to_the_weights_as_the_formula_says(strength):
    torch.manual_seed(0)
    model, inputs = Outliers().eval(), torch.randn(64, 16)
    given = Task(calibrate=TensorDataset(inputs, torch.zeros(64)), batch_size=16)
    made = compress(model, Plan().then(SmoothActivations(strength=strength)), given)
    seen, now = (m.norm(inputs).detach().abs().amax(0) for m in (model, made.module))
    weights = model.up.weight.detach().abs().amax(0)
    torch.testing.assert_close(now, seen / (seen**strength / weights ** (1 - strength)), rtol=1e-4, atol=0)
    torch.testing.assert_close(made.module(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    reasons = {change.origin: change.reason for change in made.changes if change.kind == "skipped"}
    assert "cannot be scaled" in reasons["down"]


def test_distilled_inputs_show_batch_norms_what_they_remember():
    torch.manual_seed(0)
    module = Separable().train()
    with torch.no_grad():
        for _ in range(50):
            module(images() * 2 + 1)
    module.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    made = distilled_inputs(module, images(1), 64, steps=150)
    assert made.shape == (64, 3, 8, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        first = module.stem(made)
    torch.testing.assert_close(first.mean((0, 2, 3)), module.norm0.running_mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(first.var((0, 2, 3)), module.norm0.running_var, rtol=0.2, atol=0.1)
    assert torch.equal(made, distilled_inputs(module, images(1), 64, steps=150))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (nn.Linear(4, 2), torch.zeros(1, 4), "No batch norm"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), torch.zeros(1, 4), "No batch norm"),
        (nn.Linear(4, 2), torch.zeros(1, 4, dtype=torch.int64), "one tensor of floats"),
    ],
)
def test_without_statistics_or_floats_nothing_can_be_distilled(model, example, words):
    with pytest.raises(DataError, match=words):
        distilled_inputs(model, example)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_smoothing_refuses_calibration_data_that_is_not_finite(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).eval()
    inputs = torch.randn(16, 6)
    inputs[3, 2] = value
    with pytest.raises(DataError, match="not finite at the input of `1`"):
        compress(model, Plan().then(SmoothActivations()), task(inputs))
