"""Convolutions by thinner ones: the same answers where nothing is cut, the sizes and the border right."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.graph import LowRank, rebuild, save_structure
from trimpoint.low_rank import spatial, tucker2
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


@pytest.mark.parametrize("wrong", [{"form": "cp"}, {"round_to": 0}, {"weighting": "fisher"}, {"rank_ratio": 1.5}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        FactorizeConv(**wrong)
