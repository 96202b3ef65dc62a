import pytest
import torch
from torch import nn

from trimpoint.errors import UnknownNameError
from trimpoint.task import call
from trimpoint.testing import ZooEntry, zoo
from trimpoint.testing.applied import differences, inputs_of, snapshot, tensor_bytes, world
from trimpoint.testing.zoo import FEATURES
from trimpoint.testing.zoo_models import shuffle_channels

ENTRIES = list(zoo().values())
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


def test_zoo_has_every_awkward_habit() -> None:
    assert len(ENTRIES) >= 21
    assert set().union(*(entry.features for entry in ENTRIES)) == FEATURES


def test_unknown_feature_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="did you mean `residual`"):
        ZooEntry("x", ENTRIES[0].make, frozenset({"residuals"}))


@every_entry
def test_entry_is_the_same_each_time_and_leaves_the_world_alone(entry: ZooEntry) -> None:
    before = world()
    model, task = entry.make()
    again, task_again = entry.make()
    assert not differences(before, world())
    assert len(model.state_dict()) == len(again.state_dict())
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert tensor_bytes(one) == tensor_bytes(other)
    assert task.fingerprint("train") == task_again.fingerprint("train")


@every_entry
def test_entry_has_sound_data_and_a_loss_that_can_be_trained(entry: ZooEntry) -> None:
    model, task = entry.make()
    assert task.check() == []
    loss = task.loss_of(model, next(task.batches("train")))
    assert torch.isfinite(loss)
    assert loss.requires_grad == any(parameter.requires_grad for parameter in model.parameters())


def test_features_are_what_the_models_have() -> None:
    models = {entry.name: entry.make()[0] for entry in ENTRIES}
    for entry in ENTRIES:
        model = models[entry.name]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tied = len({id(parameter) for parameter in parameters.values()}) < len(parameters)
        modules = dict(model.named_modules(remove_duplicate=False))
        shared = len({id(module) for module in modules.values()}) < len(modules)
        assert shared == ("shared" in entry.features), entry
        assert (tied and not shared) == ("tied" in entry.features), entry
        assert (not parameters) == ("no_parameters" in entry.features), entry
        frozen = any(not parameter.requires_grad for parameter in parameters.values())
        assert frozen == ("frozen" in entry.features), entry
        assert (bool(parameters) and not list(model.children())) == ("root" in entry.features), entry


def test_detector_returns_boxes_or_a_loss() -> None:
    model, task = zoo()["detector"].make()
    images, boxes = next(task.batches("train", size=3))
    found = call(model, images)
    assert [tuple(image.shape) for image in found] == [(3, 5)] * 3
    assert model(images, boxes).shape == ()
    predicted = task.predict(task.core_of(model), images)
    assert all(torch.equal(one, other) for one, other in zip(found, predicted, strict=True))


def test_padding_does_not_change_an_answer() -> None:
    model, task = zoo()["transformer"].make()
    data = task.data("select")
    batch, _ = task.collate([data[0], data[5]])
    alone, _ = task.collate([data[0]])
    assert batch["input_ids"].shape[1] > alone["input_ids"].shape[1]
    torch.testing.assert_close(call(model, batch)[:1], call(model, alone))


def test_snapshot_sees_values_flags_hooks_and_attributes() -> None:
    model, task = zoo()["separable"].make()
    before = snapshot(model)
    call(model, inputs_of(task))
    assert differences(before, snapshot(model)) == []
    model.stem_norm.running_mean.add_(1)
    model.head.weight.requires_grad_(False)
    model.head.out_features = 7
    model.stem.register_forward_hook(lambda module, inputs, output: None)
    model.grouped.train()
    assert differences(before, snapshot(model)) == [
        "stem hooks",
        "grouped training",
        "head attribute out_features",
        "head.weight requires_grad",
        "stem_norm.running_mean value",
    ]


def test_channels_are_dealt_out() -> None:
    channels = torch.arange(6.0).view(1, 6, 1)
    assert shuffle_channels(channels, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    shuffle = nn.ChannelShuffle(3)
    image = torch.randn(2, 6, 4, 4)
    assert torch.equal(shuffle_channels(image, 3), shuffle(image))


def test_tied_transformer_reads_no_later_token() -> None:
    model, task = zoo()["tied_transformer"].make()
    assert model.decoder.weight is model.tokens.weight
    tokens = inputs_of(task).clone()
    before = call(model, tokens)
    tokens[:, 4] = (tokens[:, 4] + 1) % 32
    torch.testing.assert_close(call(model, tokens)[:, :4], before[:, :4])
