"""The trainer: schedule, determinism, resuming, frozen parts, breakdowns; a bare PyTorch loop as the oracle."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from trimpoint.errors import DataError, StorageError, TrainingError
from trimpoint.recover import Settings, train
from trimpoint.recover.trainer import first_not_finite, make_optimizer


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


def make_net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return Net(dropout)


def make_batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(5):
        x = torch.randn(8, 1, 6, 6, generator=generator)
        yield x, (x.mean((1, 2, 3)) * 10).clamp(-1, 1).round().long() + 1


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def state_bytes(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_schedule_rises_holds_and_falls_linearly_to_zero():
    settings = Settings(steps=20, lr=1.0, warmup=4, cooldown=0.5)
    factors = [settings.factor(step) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:10] == [1.0] * 5
    assert factors[10:] == pytest.approx([(20 - step) / 11 for step in range(10, 20)])
    assert settings.stable == 10


def test_longer_run_repeats_shorter_one_before_its_cooldown():
    short, long = Settings(steps=10, lr=1.0, warmup=3), Settings(steps=30, lr=1.0, warmup=3)
    assert [short.factor(s) for s in range(short.stable)] == [long.factor(s) for s in range(short.stable)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_as_a_bare_loop(optimizer):
    settings = Settings(steps=12, lr=0.05, optimizer=optimizer, weight_decay=0.1, warmup=3, cooldown=0.25)
    ours, bare = make_net(), make_net()
    train(ours, loss_of, make_batches, settings)
    decayed, spared = [bare.conv.weight, bare.head.weight], [bare.conv.bias, *bare.norm.parameters(), bare.head.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    if optimizer == "sgd":
        stepper = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    else:
        stepper = torch.optim.AdamW(groups, lr=0.05)
    bare.train()
    stream = (batch for epoch in range(3) for batch in make_batches(epoch))
    for step in range(12):
        for group in stepper.param_groups:
            group["lr"] = 0.05 * settings.factor(step)
        stepper.zero_grad()
        loss_of(bare, next(stream)).backward()
        stepper.step()
    for name, value in bare.state_dict().items():
        assert torch.allclose(value, ours.state_dict()[name], atol=2e-5), name


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    results = []
    for seed in (0, 0, 1):
        model = make_net(dropout=0.5)
        train(model, loss_of, make_batches, Settings(steps=8, lr=0.1, seed=seed))
        results.append(state_bytes(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_global_random_state_is_not_touched():
    model = make_net(dropout=0.5)
    before = torch.get_rng_state()
    train(model, loss_of, make_batches, Settings(steps=2, lr=0.1, seed=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_longer_run_resumes_exactly(tmp_path, optimizer):
    state = tmp_path / "deep" / "state.safetensors"
    shared = {"lr": 0.05, "optimizer": optimizer, "warmup": 2, "cooldown": 0.4}
    first = make_net(dropout=0.3)
    done = train(first, loss_of, make_batches, Settings(steps=12, **shared), state=state)
    assert done.resumed == 0
    resumed, fresh = make_net(dropout=0.3), make_net(dropout=0.3)
    done = train(resumed, loss_of, make_batches, Settings(steps=30, **shared), state=state)
    train(fresh, loss_of, make_batches, Settings(steps=30, **shared))
    assert done.resumed == 7
    assert same(state_bytes(resumed), state_bytes(fresh))
    assert [path.name for path in state.parent.iterdir()] == ["state.safetensors"]


def test_same_run_again_repeats_only_its_cooldown(tmp_path):
    settings, state, results = Settings(steps=10, lr=0.05), tmp_path / "s", []
    for expected in (0, 7):
        model = make_net()
        assert train(model, loss_of, make_batches, settings, state=state).resumed == expected
        results.append(state_bytes(model))
    assert same(*results)


@pytest.mark.parametrize("other", ["weights", "lr", "shorter", "garbage"])
def test_state_that_does_not_fit_is_not_used(tmp_path, other):
    state = tmp_path / "state"
    train(make_net(), loss_of, make_batches, Settings(steps=20, lr=0.05), state=state)
    if other == "garbage":
        state.write_bytes(b"\x00" * 100)
    settings = Settings(steps=5 if other == "shorter" else 30, lr=0.1 if other == "lr" else 0.05)
    model, fresh = (make_net(seed=1 if other == "weights" else 0) for _ in range(2))
    assert train(model, loss_of, make_batches, settings, state=state).resumed == 0
    train(fresh, loss_of, make_batches, settings)
    assert same(state_bytes(model), state_bytes(fresh))


def test_state_is_plain_tensors_and_json(tmp_path):
    train(make_net(), loss_of, make_batches, Settings(steps=4, lr=0.05), state=tmp_path / "state")
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert "model/conv.weight" in file.keys()  # noqa: SIM118
        assert "optimizer/conv.weight/momentum_buffer" in file.keys()  # noqa: SIM118


def test_state_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        train(make_net(), loss_of, make_batches, Settings(steps=4, lr=0.05), state=tmp_path / "file" / "state")


def test_frozen_parameters_and_statistics_stay():
    model = make_net()
    model.conv.requires_grad_(False)
    model.norm.requires_grad_(False)
    before = state_bytes(model)
    train(model, loss_of, make_batches, Settings(steps=5, lr=0.1))
    after = state_bytes(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_modes_layout_and_gradients_are_put_back():
    model = make_net().train()
    model.norm.eval()
    strides = [p.stride() for p in model.parameters()]
    train(model, loss_of, make_batches, Settings(steps=2, lr=0.1))
    assert model.training
    assert model.conv.training
    assert not model.norm.training
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_convolutions_see_channels_last_inputs():
    model, seen = make_net(), []
    model.conv.register_forward_pre_hook(
        lambda m, args: seen.append((args[0].shape, m.weight.is_contiguous(memory_format=torch.channels_last)))
    )
    train(model, loss_of, make_batches, Settings(steps=1, lr=0.1))
    assert seen == [((8, 1, 6, 6), True)]


class Downsampling(nn.Module):
    """A convolution, and a path beside it that takes every second pixel."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.main = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.path = nn.Conv2d(channels, 4, 1, stride=2)

    def forward(self, x):
        x = self.first(x)
        return (self.main(x) + self.path(x)).mean((2, 3))


@pytest.mark.parametrize(("channels", "suited"), [(4, False), (15, False), (16, True)])
def test_strided_pointwise_convolutions_of_few_channels_are_trained_in_the_usual_layout(channels, suited):
    torch.manual_seed(0)
    model = Downsampling(channels)
    images, expected, seen = torch.randn(8, 3, 8, 8), copy.deepcopy(model), []
    model.path.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )

    def loss_of(net, batch):
        return net(batch).square().mean()

    train(model, loss_of, lambda epoch: [images], Settings(steps=1, lr=0.1, cooldown=0.0))
    assert seen == [suited]
    optimizer = make_optimizer(expected, Settings(steps=1, lr=0.1, cooldown=0.0))
    loss_of(expected, images).backward()
    optimizer.step()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_weight_decay_spares_norms_biases_and_counts_tied_weights_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 5)
            self.head.weight = self.embed.weight
            self.lstm = nn.LSTM(4, 2)

    model = Tied()
    decayed, spared = make_optimizer(model, Settings(steps=1, lr=1.0, weight_decay=0.3)).param_groups
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (model.embed.weight, model.lstm.weight_ih_l0, model.lstm.weight_hh_l0)
    }
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_no_trainable_parameter():
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(make_net().requires_grad_(False), loss_of, make_batches, Settings(steps=1, lr=0.1))


def test_loss_that_is_not_finite_names_the_module_and_restores_good_weights():
    model = make_net()
    before = state_bytes(model)

    def poisoned(epoch):
        for index, (x, y) in enumerate(make_batches(epoch)):
            if index == 3:
                model.norm.register_forward_hook(lambda m, i, o: o * math.inf)
            yield x, y

    with pytest.raises(TrainingError, match=r"step 4 of 5: the loss was nan; .*output was not finite is `norm`"):
        train(model, loss_of, poisoned, Settings(steps=5, lr=0.1))
    assert same(before, state_bytes(model))


def test_diverging_learning_rate_breaks_down_with_finite_weights():
    model = make_net()
    with pytest.raises(TrainingError, match="not finite"):
        train(model, lambda m, b: loss_of(m, b) ** 4, make_batches, Settings(steps=50, lr=1e20))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_batch_that_is_not_finite_is_named():
    batch = (torch.full((2, 1, 6, 6), math.nan), torch.zeros(2, dtype=torch.long))
    assert "batch itself" in first_not_finite(make_net(), loss_of, batch)


def test_finite_outputs_point_at_the_loss():
    batch = next(make_batches(0))
    assert "loss function" in first_not_finite(make_net(), loss_of, batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), "must be a scalar tensor. Got shape"),
        (lambda m, b: 1.0, "must be a scalar tensor. Got float"),
        (lambda m, b: m(b[0]).detach().sum(), "does not depend on any trainable"),
    ],
)
def test_what_is_no_loss(loss, message):
    with pytest.raises(TrainingError, match=message):
        train(make_net(), loss, make_batches, Settings(steps=1, lr=0.1))


def test_empty_loader():
    with pytest.raises(DataError, match="has no batch"):
        train(make_net(), loss_of, lambda epoch: iter(()), Settings(steps=1, lr=0.1))


def test_clip_bounds_the_update():
    model, start = make_net(), make_net()
    settings = Settings(steps=1, lr=1.0, momentum=0.0, weight_decay=0.0, cooldown=0.0, clip=1e-3)
    train(model, loss_of, make_batches, settings)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_float32_parameters_and_still_learns():
    model = make_net()
    done = train(model, loss_of, make_batches, Settings(steps=60, lr=0.05, precision="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert done.last_loss < done.first_loss


def test_zero_steps_change_nothing():
    model = make_net()
    before = state_bytes(model)
    assert math.isnan(train(model, loss_of, make_batches, Settings(steps=0, lr=0.1)).first_loss)
    assert same(before, state_bytes(model))


def test_progress_ends_at_one():
    told = []
    train(make_net(), loss_of, make_batches, Settings(steps=7, lr=0.1), progress=lambda share, text: told.append(share))
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_model_without_convolutions_and_dict_batches():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.EmbeddingBag(10, 4), nn.Linear(4, 2)

        def forward(self, ids):
            return {"logits": self.head(self.embed(ids))}

    torch.manual_seed(0)
    model = Words()
    original = copy.deepcopy(model)
    ids = torch.randint(0, 10, (4, 5))
    train(
        model,
        lambda m, b: F.cross_entropy(m(**b[0])["logits"], b[1]),
        lambda epoch: iter([({"ids": ids}, torch.tensor([0, 1, 0, 1]))]),
        Settings(steps=3, lr=0.1),
    )
    assert not torch.equal(model.head.weight, original.head.weight)
