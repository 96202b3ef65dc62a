"""Linear layers by their factors: which, how well, and what is left alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import parse
from trimpoint.graph import LowRank, rebuild, save_structure
from trimpoint.low_rank import observed
from trimpoint.method import Fact
from trimpoint.methods.factorize_linear import FactorizeLinear
from trimpoint.plan import Plan
from trimpoint.task import Task, squared_error


class Network(nn.Module):
    """Two layers that are read along directions of very different strength: `[batch, 24]` to `[batch, 8]`."""

    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(24, 32, bias=bias)
        self.down = nn.Linear(32, 8, bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def inputs(count=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1.5, 24)[:, None]
    return torch.randn(count, 24, generator=generator) @ mix + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def task():
    data = TensorDataset(inputs(), torch.randn(256, 8, generator=torch.Generator().manual_seed(1)))
    return Task(calibrate=data, loss=squared_error, batch_size=50)


def apply(method, model, task, where="*"):
    return compress(model, Plan().then(*[method]) if where == "*" else _at(method, where), task)


def _at(method, where):
    from trimpoint.plan import Step

    return Plan((Step(method, parse(where)),))


def reasons(compressed):
    return {change.origin: change.reason for change in compressed.changes if change.kind == "skipped"}


def layer_error(old, new, x):
    with torch.no_grad():
        return float((old(x) - new(x)).double().norm())


@pytest.mark.parametrize("rank_ratio", [0.3, 0.5, 0.8])
def test_plain_truncation_leaves_the_tail_that_numpy_finds(model, task, rank_ratio):
    compressed = apply(FactorizeLinear(rank_ratio=rank_ratio, weighting="none"), model, task)
    for name in ("up", "down"):
        weight, made = model.get_submodule(name).weight.detach().numpy(), compressed.module.get_submodule(name)
        rank = made[0].out_features
        assert rank == int(rank_ratio * weight.size / sum(weight.shape))
        tail = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[rank:])
        assert np.linalg.norm(weight - made.weight.detach().numpy()) == pytest.approx(tail, rel=1e-4)
        assert torch.equal(made.bias, model.get_submodule(name).bias)
        assert Fact.ORIGINAL_SHAPE not in compressed.facts[name]


def test_without_a_bias_the_error_on_the_calibration_data_is_the_closed_form(task):
    torch.manual_seed(0)
    model = Network(bias=False).eval()
    made = apply(FactorizeLinear(weighting="activation"), model, task).module.up
    x = inputs()
    tail = np.linalg.svd(model.up.weight.detach().numpy() @ x.numpy().T, compute_uv=False)[made[0].out_features :]
    assert layer_error(model.up, made, x) == pytest.approx(np.linalg.norm(tail), rel=1e-3)


def test_a_bias_takes_over_the_mean(model, task):
    made = apply(FactorizeLinear(weighting="activation"), model, task).module.up
    x = inputs()
    centred = (x - x.mean(0)).numpy()
    tail = np.linalg.svd(model.up.weight.detach().numpy() @ centred.T, compute_uv=False)[made[0].out_features :]
    assert layer_error(model.up, made, x) == pytest.approx(np.linalg.norm(tail), rel=1e-3)
    with torch.no_grad():
        assert torch.allclose(made(x).mean(0), model.up(x).mean(0), atol=1e-4)


def test_what_is_weighted_by_the_inputs_is_better_on_other_inputs_too(model, task):
    x = inputs(seed=5)
    plain, auto = (apply(FactorizeLinear(weighting=w), model, task).module for w in ("none", "auto"))
    assert layer_error(model.up, auto.up, x) < 0.6 * layer_error(model.up, plain.up, x)
    assert layer_error(model, auto, x) < 0.6 * layer_error(model, plain, x)


def test_without_calibration_data_auto_is_plain_and_says_so(model, task):
    plain = apply(FactorizeLinear(weighting="none"), model, task)
    auto = apply(FactorizeLinear(), model, task.with_(calibrate=None, example=torch.zeros(24)))
    assert torch.equal(plain.module.up.weight, auto.module.up.weight)
    assert "no `calibrate` data" in next(change.reason for change in auto.changes if change.origin == "up")


@pytest.mark.parametrize(
    ("weighting", "lack"), [("activation", "calibrate"), ("fisher", "calibrate"), ("fisher", "loss")]
)
def test_what_a_weighting_needs_is_asked_for(model, task, weighting, lack):
    lacking = task.with_(**{lack: None}, example=torch.zeros(24))
    with pytest.raises(DataError, match=rf'weighting="{weighting}" needs .*{lack}[\s\S]*hint'):
        apply(FactorizeLinear(weighting=weighting), model, lacking)


def test_fisher_weights_keep_the_inputs_that_the_loss_depends_on(task):
    torch.manual_seed(0)
    model = Network().eval()
    x = inputs().clone()
    x[:, 12:] = 0
    data = TensorDataset(x, torch.randn(len(x), 8))
    made = apply(FactorizeLinear(weighting="fisher", rank_ratio=0.9), model, task.with_(calibrate=data), "up").module.up
    lost = (made.weight - model.up.weight).detach().norm(dim=0)
    assert float(lost[:12].max()) < 1e-2 * float(lost[12:].min())


def test_padding_does_not_count():
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(24, 32)

        def forward(self, x, attention_mask):
            return self.up(x).mean(1)

    model = Masked().eval()
    x, mask = inputs(60).reshape(20, 3, 24), torch.ones(20, 5, dtype=torch.long)
    mask[:, 3:] = 0
    padded = torch.cat([x, torch.full((20, 2, 24), 1e3)], 1)

    def make(rows, masks):
        samples = [({"x": row, "attention_mask": one}, torch.zeros(32)) for row, one in zip(rows, masks, strict=True)]
        return apply(FactorizeLinear(), model, Task(calibrate=samples, batch_size=7)).module.up

    one, other = make(padded, mask), make(x, mask[:, :3])
    assert torch.allclose(one.weight, other.weight, atol=1e-5)
    assert torch.allclose(one.bias, other.bias, atol=1e-4)


@pytest.mark.parametrize("limit", [8 * 24 * 24, 1 << 30])
def test_in_one_pass_or_several_the_result_is_the_same(model, task, monkeypatch, limit):
    expected = apply(FactorizeLinear(), model, task).module.down.weight
    monkeypatch.setattr(observed, "MOST_BYTES", limit)
    assert torch.equal(apply(FactorizeLinear(), model, task).module.down.weight, expected)


def test_energy_is_an_error_budget(model, task):
    for energy in (0.9, 0.99):
        compressed = apply(FactorizeLinear(rank="energy", energy=energy), model, task, "up")
        x = inputs()
        with torch.no_grad():
            spread = float((model.up(x) - model.up(x).mean(0)).norm())
        assert layer_error(model.up, compressed.module.up, x) ** 2 <= (1 - energy) * spread**2 * 1.001


def test_variational_bayes_finds_the_rank_of_a_layer(task):
    torch.manual_seed(0)
    model = Network().eval()
    with torch.no_grad():
        noise = 0.01 * torch.randn(32, 24)
        model.up.weight.copy_(torch.randn(32, 5) @ torch.randn(5, 24) + noise)
    assert apply(FactorizeLinear(rank="bayes"), model, task, "up").module.up[0].out_features == 5


@pytest.mark.parametrize(("round_to", "rank"), [(1, 6), (4, 4), (8, 8)])
def test_ranks_are_multiples(model, task, round_to, rank):
    method = FactorizeLinear(round_to=round_to, rank_ratio=0.47)
    assert apply(method, model, task, "up").module.up[0].out_features == rank


def test_what_would_not_become_smaller_is_left_alone(model, task):
    compressed = apply(FactorizeLinear(round_to=16), model, task)
    assert "below round_to=16" in reasons(compressed)["up"]
    compressed = apply(FactorizeLinear(rank="energy", energy=1.0), model, task)
    assert all("no fewer parameters" in reason for reason in reasons(compressed).values())
    assert not any(isinstance(module, LowRank) for module in compressed.module.modules())


def test_ratio_one_is_exactly_nothing(model, task):
    compressed = apply(FactorizeLinear(rank_ratio=1.0), model, task)
    assert {change.kind for change in compressed.changes} == {"skipped"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "down", Scaled(32, 8)), "a forward pass of its own"),
        (lambda m: setattr(m.down, "weight", nn.Parameter(m.up.weight.detach()[:8, :1].repeat(1, 32))), ""),
        (lambda m: nn.utils.parametrizations.orthogonal(m.down), "computed from others"),
        (lambda m: m.down.register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_layers_that_are_more_than_their_weight(model, task, change, words):
    change(model)
    compressed = apply(FactorizeLinear(), model, task)
    assert words in reasons(compressed).get("down", "")
    assert isinstance(compressed.module.down, LowRank) == (not words)


def test_tied_layers_are_left_alone(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8)).eval()
    model[1].weight = model[0].weight
    compressed = apply(FactorizeLinear(), model, task)
    assert all("shares its weight" in reasons(compressed)[name] for name in ("0", "1"))


@pytest.mark.parametrize(
    ("weighting", "words"),
    [
        ("activation", "the calibration data never calls it"),
        ("fisher", "does not call the layer"),
        ("none", "does not call the layer"),
    ],
)
def test_a_layer_that_is_never_called(model, task, weighting, words):
    model.spare = nn.Linear(24, 24)
    assert words in reasons(apply(FactorizeLinear(weighting=weighting), model, task))["spare"]


@pytest.mark.parametrize("weighting", ["activation", "none"])
def test_what_attention_reads_is_named(weighting):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True).eval()
    task = Task(calibrate=TensorDataset(inputs(60).reshape(20, 3, 24), torch.zeros(20)), batch_size=7)
    compressed = apply(FactorizeLinear(weighting=weighting), model, task)
    words = "its weight is read by nn.MultiheadAttention, which does not call it"
    assert reasons(compressed)["self_attn.out_proj"] == words
    assert set(FactorizeLinear().forecast(model, (), ())) == {"linear1", "linear2"}


def test_the_note_says_what_weighted(model, task):
    def note(method, task):
        return next(c.reason for c in apply(method, model, task, "up").changes if c.origin == "up")

    still = task.with_(calibrate=TensorDataset(torch.full((20, 24), 0.1), torch.zeros(20, 8)))
    assert "weighted by the inputs" in note(FactorizeLinear(), task)
    assert "plain: its inputs do not vary" in note(FactorizeLinear(), still)
    assert "weighted by the Fisher information" in note(FactorizeLinear(weighting="fisher"), task)
    with torch.no_grad():
        model.down.weight.zero_()
    assert "plain: the loss does not depend on it" in note(FactorizeLinear(weighting="fisher"), task)


def test_variational_bayes_that_finds_nothing_leaves_the_layer_alone(model, task):
    torch.nn.init.normal_(model.up.weight)
    words = "no component stands out of the noise (rank by bayes)"
    assert reasons(apply(FactorizeLinear(rank="bayes"), model, task, "up"))["up"] == words


@pytest.mark.parametrize("weighting", ["none", "activation", "fisher"])
@pytest.mark.parametrize("rank", ["ratio", "energy", "bayes"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_no_width(weighting, rank):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 0), nn.Linear(0, 8)

        def forward(self, x):
            return self.b(self.a(x))

    task = Task(calibrate=TensorDataset(inputs(8), torch.zeros(8, 8)), loss=squared_error)
    compressed = apply(FactorizeLinear(weighting=weighting, rank=rank), Empty().eval(), task)
    assert reasons(compressed) == {"a": "its weight is empty", "b": "its weight is empty"}


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    ],
)
def test_no_hook_is_lost(model, task, hook):
    hook(model.up)
    assert "hooks" in reasons(apply(FactorizeLinear(weighting="none"), model, task))["up"]


def test_factors_are_not_factorised_again(model, task):
    compressed = compress(model, Plan().then(FactorizeLinear(), FactorizeLinear(rank_ratio=0.2)), task)
    assert isinstance(compressed.module.up[0], nn.Linear)
    assert any("a factor of a layer already" in change.reason for change in compressed.changes)


def test_the_conv1d_of_transformers(task):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(32, 24), nn.ReLU(), Conv1D(8, 32)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.normal_()
    compressed = apply(FactorizeLinear(rank_ratio=0.9), model, task)
    assert isinstance(compressed.module[0], LowRank)
    assert layer_error(model, compressed.module, inputs()) < 0.3 * float(model(inputs()).detach().norm())
    fisher = apply(FactorizeLinear(weighting="fisher"), model, task)
    assert isinstance(fisher.module[2], LowRank)


def test_bfloat16_models_stay_so(model, task):
    data = TensorDataset(inputs().bfloat16(), torch.zeros(256, 8))
    expected = layer_error(model.up, apply(FactorizeLinear(), model, task).module.up, inputs())
    compressed = apply(FactorizeLinear(), model.bfloat16(), task.with_(calibrate=data))
    assert {p.dtype for p in compressed.module.parameters()} == {torch.bfloat16}
    assert layer_error(model.up, compressed.module.up, inputs().bfloat16()) < 1.1 * expected


def test_frozen_layers_stay_frozen_and_nothing_is_drawn(model, task):
    model.up.requires_grad_(False)
    state = torch.get_rng_state()
    compressed = apply(FactorizeLinear(), model, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in compressed.module.up.parameters()] == [False] * 3
    assert all(p.requires_grad for p in compressed.module.down.parameters())


def test_a_bias_is_frozen_or_not_as_it_was(model, task):
    model.up.weight.requires_grad_(False)
    made = apply(FactorizeLinear(), model, task).module.up
    assert [(name, p.requires_grad) for name, p in made.named_parameters()] == [
        ("0.weight", False),
        ("1.weight", False),
        ("1.bias", True),
    ]


def test_the_result_is_saved_and_made_again(model, task, tmp_path):
    compressed = apply(FactorizeLinear(), model, task)
    save_structure(tmp_path, compressed.module, compressed.edits)
    x = inputs()
    assert torch.equal(rebuild(tmp_path, lambda: Network().eval())(x), compressed.module(x))


def test_the_forecast_is_the_share_of_parameters():
    model = nn.ModuleDict({"a": nn.Linear(8, 24), "c": nn.Conv1d(8, 8, 1), "m": nn.MultiheadAttention(8, 2)})
    model["tied"] = nn.Linear(8, 24)
    model["also"] = nn.Linear(8, 24)
    model["also"].weight = model["tied"].weight
    # Of 192 weights at most 0.3 may stay, which is rank 1 of 32 numbers; the bias of 24 stays as well.
    assert FactorizeLinear(rank_ratio=0.3).forecast(model, (), ()) == {"a": pytest.approx((32 + 24) / (192 + 24))}
    assert FactorizeLinear(rank_ratio=0.3, round_to=16).forecast(model, (), ()) == {}
    assert FactorizeLinear(rank_ratio=1.0).forecast(model, (), ()) == {}
    assert FactorizeLinear(rank="energy").forecast(model, (), ()) == {}
    assert [method.rank_ratio for method in FactorizeLinear.variants((), ())] == [0.75, 0.5, 0.35]


@pytest.mark.parametrize(
    "wrong",
    [{"rank_ratio": 0.0}, {"rank": "best"}, {"energy": 1.5}, {"round_to": 0}, {"weighting": "x"}],
)
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        FactorizeLinear(**wrong)
