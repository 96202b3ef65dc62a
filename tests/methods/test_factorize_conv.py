"""Convolutions by thinner ones: the same answers where nothing is cut, the sizes and the border right."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.graph import LowRank, rebuild, save_structure
from trimpoint.low_rank import spatial, tucker2, vbmf_rank
from trimpoint.low_rank.convolution import unfolded
from trimpoint.measure.static import count_macs
from trimpoint.methods import factorize_conv
from trimpoint.methods.factorize_conv import FactorizeConv
from trimpoint.plan import Plan
from trimpoint.task import Task

LAYERS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1), bias=False),
    nn.Conv2d(12, 8, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect", stride=2),
]


def images(channels=8, dims=2, count=24, seed=0):
    return torch.randn(count, channels, *(9,) * dims, generator=torch.Generator().manual_seed(seed)) + 0.5


def planted(layer, ranks):
    """Give a convolution a kernel of low rank, so that its factors are exact."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(layer.weight.shape, generator=generator)
    made = spatial(kernel, ranks) if isinstance(ranks, int) else tucker2(kernel, *ranks)
    with torch.no_grad():
        layer.weight.copy_(made.kernel())
    return layer.eval()


def task_of(x):
    return Task(calibrate=TensorDataset(x, torch.zeros(len(x))), batch_size=7)


def apply(method, model, x):
    return compress(model, Plan().then(method), task_of(x))


def reasons(compressed):
    return {change.origin: change.reason for change in compressed.changes if change.kind == "skipped"}


def relative(one, other, x):
    with torch.no_grad():
        return float((one(x) - other(x)).norm() / one(x).norm())


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("weighting", ["none", "activation"])
@pytest.mark.parametrize(("form", "ranks"), [("tucker2", (3, 4)), ("spatial", 5)])
def test_a_kernel_of_low_rank_gives_the_same_answers_at_the_border_too(layer, weighting, form, ranks):
    x = images(layer.in_channels)
    planted(layer, ranks)
    method = FactorizeConv(form=form, rank="energy", energy=1 - 1e-9, weighting=weighting)
    compressed = apply(method, nn.Sequential(layer), x)
    made = compressed.module[0]
    assert isinstance(made, LowRank)
    assert relative(layer, made, x) < 1e-4
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in layer.parameters())
    if form == "tucker2":
        assert [part.out_channels for part in made] == [3, 4, layer.out_channels]
    else:
        assert [part.kernel_size for part in made] == [(layer.kernel_size[0], 1), (1, layer.kernel_size[1])]


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 12, 5, stride=2, padding=1), nn.Conv3d(8, 8, (1, 2, 3), padding=1)])
def test_other_dimensions(layer):
    dims = len(layer.kernel_size)
    planted(layer, (3, 4))
    x = images(8, dims, count=8)
    made = apply(FactorizeConv(rank="energy", energy=1 - 1e-9), nn.Sequential(layer), x).module[0]
    assert relative(layer, made, x) < 1e-4
    spatially = reasons(apply(FactorizeConv(form="spatial"), nn.Sequential(layer), x))
    assert "two" in spatially["0"]


def test_a_pointwise_convolution_becomes_two():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 1, stride=2, padding=1).eval()
    with torch.no_grad():
        layer.weight.copy_((torch.randn(16, 4) @ torch.randn(4, 8))[..., None, None])
    x = images()
    for form in ("tucker2", "spatial"):
        made = apply(FactorizeConv(rank_ratio=0.8, form=form), nn.Sequential(layer), x).module[0]
        assert [(part.out_channels, part.stride) for part in made] == [(4, (2, 2)), (16, (1, 1))]
        assert relative(layer, made, x) < 1e-4


def test_a_change_of_channels_that_would_keep_all_is_left_out():
    torch.manual_seed(0)
    x = images(3)
    made = apply(FactorizeConv(), nn.Sequential(nn.Conv2d(3, 32, 3, padding=1)), x).module[0]
    assert len(made) == 2
    assert made[0].in_channels == 3


@pytest.mark.parametrize("form", ["tucker2", "spatial"])
def test_what_is_weighted_by_the_inputs_is_better_on_other_inputs_too(form):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1)
    mix = torch.randn(8, 8) * torch.logspace(0, -1.5, 8)[:, None]
    x, other = (torch.einsum("bchw,cd->bdhw", images(seed=seed, count=64), mix) for seed in (0, 1))
    errors = [
        relative(layer, apply(FactorizeConv(form=form, weighting=w), nn.Sequential(layer), x).module[0], other)
        for w in ("none", "auto")
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_bias_takes_over_the_mean(monkeypatch):
    monkeypatch.setattr(factorize_conv, "POSITIONS", 10**6)
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 16, 3), images()
    made = apply(FactorizeConv(rank_ratio=0.2), nn.Sequential(layer), x).module[0]
    with torch.no_grad():
        assert torch.allclose(made(x).mean((0, 2, 3)), layer(x).mean((0, 2, 3)), atol=1e-4)


def test_share_of_parameters_and_multiples():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1)), images(32, count=4)
    for ratio in (0.2, 0.5, 0.8):
        made = apply(FactorizeConv(rank_ratio=ratio, round_to=8), model, x).module[0]
        assert [part.out_channels % 8 for part in made] == [0] * len(made)
        assert sum(p.numel() for part in made for p in [part.weight]) <= ratio * model[0].weight.numel()


def test_variational_bayes_finds_the_ranks():
    torch.manual_seed(0)
    layer = planted(nn.Conv2d(32, 48, 3, padding=1), (4, 6))
    with torch.no_grad():
        layer.weight += 0.05 * layer.weight.std() * torch.randn_like(layer.weight)
    made = apply(FactorizeConv(rank="bayes"), nn.Sequential(layer), images(32, count=4)).module[0]
    assert [part.out_channels for part in made] == [4, 6, 48]


@pytest.mark.parametrize(
    ("layer", "method", "words"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), FactorizeConv(), "depthwise"),
        (nn.Conv2d(8, 8, 3, groups=2), FactorizeConv(), "2 groups"),
        (nn.Conv2d(8, 8, (3, 1)), FactorizeConv(form="spatial"), "3×1 has not two sides"),
        (nn.Conv2d(8, 1, 1), FactorizeConv(), "no fewer parameters"),
        (nn.Conv2d(8, 8, 3), FactorizeConv(rank="energy", energy=1.0), "no fewer parameters"),
        (nn.Conv2d(8, 8, 3), FactorizeConv(rank_ratio=1.0), "rank_ratio=1"),
    ],
)
def test_what_is_left_alone(layer, method, words):
    compressed = apply(method, nn.Sequential(layer), images())
    assert words in reasons(compressed)["0"]
    assert torch.equal(compressed.module[0].weight, layer.weight)


def test_kernels_that_read_too_much_are_fitted_plainly(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), images()
    plain = apply(FactorizeConv(weighting="none"), model, x)
    monkeypatch.setattr(factorize_conv, "MOST_FEATURES", 71)
    again = apply(FactorizeConv(), model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), again.module.parameters(), strict=True))
    assert "plain" in again.changes[0].reason


def test_what_the_weighting_needs_is_asked_for():
    task = Task(example=torch.zeros(8, 9, 9))
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(DataError, match=r"needs `calibrate` data[\s\S]*hint"):
        compress(model, Plan().then(FactorizeConv(weighting="activation")), task)
    assert isinstance(compress(model, Plan().then(FactorizeConv()), task).module[0], LowRank)


def test_bfloat16_and_the_same_bytes_again(tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).bfloat16().eval()  # noqa: E731
    model, x = make(), images(count=64).bfloat16()
    one, other = (apply(FactorizeConv(), model, x) for _ in range(2))
    assert {p.dtype for p in one.module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))
    save_structure(tmp_path, one.module, one.edits)
    assert torch.equal(rebuild(tmp_path, make)(x), one.module(x))


@pytest.mark.parametrize("form", ["tucker2", "spatial"])
@pytest.mark.parametrize("rank", ["ratio", "energy"])
@pytest.mark.parametrize("x", [torch.ones(8, 8, 6, 6), torch.randn(1, 8, 3, 3), torch.full((4, 8, 6, 6), 0.1)])
def test_inputs_that_do_not_vary_are_no_weighting(form, rank, x):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3)
    method = FactorizeConv(form=form, rank=rank, energy=0.7)
    compressed = apply(method, nn.Sequential(layer), x)
    assert "plain: its inputs do not vary" in compressed.changes[0].reason
    assert relative(layer, compressed.module[0], x) < 1e-5
    plain = apply(FactorizeConv(form=form, rank=rank, energy=0.7, weighting="none"), nn.Sequential(layer), x)
    assert torch.equal(compressed.module[0].weight, plain.module[0].weight)


def test_without_a_bias_inputs_of_zero_are_no_weighting():
    compressed = apply(FactorizeConv(), nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)), torch.zeros(4, 8, 6, 6))
    assert "plain: its inputs are all zero" in compressed.changes[0].reason


@pytest.mark.parametrize("form", ["tucker2", "spatial"])
@pytest.mark.parametrize(("count", "share"), [(1, 1.05), (4, 1.0), (16, 0.9)])
def test_few_images_are_never_much_worse_than_none(form, count, share):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1)
    mix = torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None]
    x, other = (torch.einsum("bchw,cd->bdhw", smooth(seed), mix) for seed in (0, 1))
    plain, observed = (
        relative(layer, apply(FactorizeConv(form=form, weighting=w), nn.Sequential(layer), x[:count]).module[0], other)
        for w in ("none", "auto")
    )
    assert observed < share * plain


def smooth(seed):
    """Return images whose neighbouring positions are alike, `[48, 32, 4, 4]`."""
    noise = torch.randn(48, 32, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.relu(nn.functional.avg_pool2d(noise, 3, 1) * 3 + 0.2)


def test_variational_bayes_that_finds_nothing_leaves_the_layer_alone():
    torch.manual_seed(0)
    for layer, form in (
        (nn.Conv2d(24, 32, 3), "tucker2"),
        (nn.Conv2d(24, 32, 3), "spatial"),
        (nn.Conv2d(8, 16, 1), "tucker2"),
    ):
        nn.init.normal_(layer.weight)
        compressed = apply(FactorizeConv(rank="bayes", form=form), nn.Sequential(layer), images(layer.in_channels))
        assert "no component stands out of the noise" in reasons(compressed)["0"]


def test_what_variational_bayes_finds_on_one_side_is_limited_by_the_other():
    torch.manual_seed(0)
    layer = planted(nn.Conv2d(32, 32, 3), (12, 32))
    with torch.no_grad():
        one = torch.randn(32, 1) @ torch.randn(1, 32 * 9)
        layer.weight.copy_(one.reshape(32, 32, 3, 3))
        assert vbmf_rank(unfolded(layer.weight, 1)) == 9
        layer.weight += 0.02 * torch.randn_like(layer.weight)
    made = apply(FactorizeConv(rank="bayes"), nn.Sequential(layer), images(32)).module[0]
    assert made[-2].out_channels == 1
    assert made[0].out_channels <= 9


@pytest.mark.parametrize("form", ["tucker2", "spatial"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("energy", [0.8, 0.95])
def test_energy_is_an_error_budget(monkeypatch, form, bias, energy):
    monkeypatch.setattr(factorize_conv, "POSITIONS", 10**6)
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, bias=bias)
    mix = torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None]
    x = torch.einsum("bchw,cd->bdhw", smooth(0), mix)
    compressed = apply(FactorizeConv(form=form, rank="energy", energy=energy), nn.Sequential(layer), x)
    with torch.no_grad():
        before, after = layer(x), compressed.module[0](x)
        spread = before - before.mean((0, 2, 3), keepdim=True) if bias else before
        kept = 1 - float((before - after).square().sum() / spread.square().sum())
    assert energy - 1e-4 <= kept < 1 - 0.6 * (1 - energy)


STRIDED = nn.Conv2d(16, 16, 8, stride=8)


def test_what_costs_more_before_a_stride_is_left_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 24, 24)
    for rank in ("ratio", "energy"):
        method = FactorizeConv(form="spatial", rank=rank, energy=0.5)
        assert "no fewer multiplications" in reasons(apply(method, nn.Sequential(STRIDED), x))["0"]
    assert FactorizeConv(form="spatial").forecast(nn.Sequential(STRIDED), (), ()) == {}


@pytest.mark.parametrize("form", ["tucker2", "spatial"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (4, 4), (5, (1, 3))])
def test_multiplications_always_fall(form, ratio, size, stride):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 24, size, stride=stride)), torch.randn(1, 16, 24, 24)
    method = FactorizeConv(form=form, rank_ratio=ratio, weighting="none")
    compressed = apply(method, model, x)
    before, after = (count_macs(module, x).total for module in (model, compressed.module))
    forecast = method.forecast(model, (), ())
    assert bool(forecast) == (compressed.changes[0].kind == "replaced")
    if forecast:
        assert after < before
        assert forecast["0"] == pytest.approx(max(after / before, method.rank_ratio), abs=0.3)


class Asking(nn.Module):
    """Runs its convolution by what it finds out about it."""

    def __init__(self, **more):
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, **more)

    def forward(self, x):
        c = self.conv
        if c.padding_mode != "zeros":
            return c(x)
        made = nn.functional.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        return c(x) + made


@pytest.mark.parametrize("more", [{"padding": 1}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
@pytest.mark.parametrize("form", ["tucker2", "spatial"])
def test_models_that_ask_for_attributes_find_them(more, form):
    torch.manual_seed(0)
    model, x = Asking(**more).eval(), images()
    made = apply(FactorizeConv(form=form), model, x).module
    assert isinstance(made.conv, LowRank)
    assert (made.conv.groups, made.conv.padding_mode) == (1, more.get("padding_mode", "zeros"))
    assert made.conv.padding == model.conv.padding
    factor = 1 if "padding_mode" in more else 2
    assert torch.allclose(made(x), factor * made.conv(x), atol=1e-4)


def test_each_parameter_is_frozen_or_not_as_it_was():
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    model[0].weight.requires_grad_(False)
    made = apply(FactorizeConv(), model, images()).module[0]
    assert made[-1].bias.requires_grad
    assert not any(part.weight.requires_grad for part in made)


def test_layers_that_the_calibration_data_never_calls():
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Spare(nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3))
    assert reasons(apply(FactorizeConv(), model, images())) == {"1": "the calibration data never calls it"}
    assert "does not call the layer" in reasons(apply(FactorizeConv(weighting="none"), model, images()))["1"]


@pytest.mark.parametrize("wrong", [{"form": "cp"}, {"round_to": 0}, {"weighting": "fisher"}, {"rank_ratio": 1.5}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        FactorizeConv(**wrong)
