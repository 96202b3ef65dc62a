"""The zoo: small models that each have one awkward habit, with synthetic data to go with them.

Example:
    >>> model, task = zoo()["resnet"].make()
    >>> sorted(zoo()["resnet"].features)
    ['conv', 'linear', 'norm', 'residual']
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimpoint.demo.resnet import ResNet
from trimpoint.errors import UnknownNameError, suggest
from trimpoint.score import Records, Score
from trimpoint.task import Task, cross_entropy, squared_error
from trimpoint.testing import zoo_models as models

FEATURES = frozenset(
    (
        "attention",
        "bfloat16",
        "concat",
        "conv",
        "core",
        "depthwise",
        "dict_inputs",
        "dict_outputs",
        "embedding",
        "frozen",
        "grouped",
        "hollow",
        "huge_scale",
        "inner_loss",
        "linear",
        "mixed_modes",
        "no_parameters",
        "norm",
        "recurrent",
        "residual",
        "root",
        "shared",
        "single_channel",
        "tied",
        "tiny_scale",
        "transposed",
        "tuple_inputs",
        "variable_length",
    )
)
"""What a model of the zoo can have; the checks choose their models by it."""

TRAIN, CALIBRATE, SELECT = 32, 16, 16
Make = Callable[[], tuple[nn.Module, Task]]
Draw = Callable[[int, torch.Generator], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class ZooEntry:
    """One model of the zoo with its task.

    Args:
        name: unique, a valid test id.
        make: returns a new model and task, the same ones each time; leaves global random state alone.
        features: what the model has, from `FEATURES`.
    """

    name: str
    make: Make
    features: frozenset[str]

    def __post_init__(self) -> None:
        if unknown := sorted(self.features - FEATURES):
            raise UnknownNameError(f"The zoo knows no feature {unknown[0]!r}.", suggest(unknown[0], sorted(FEATURES)))

    def __str__(self) -> str:
        return self.name


class Drawn:
    """A data set of a fixed number of random samples, drawn once.

    Args:
        count: number of samples.
        draw: `(index, generator) -> (inputs, target)`.
        seed: of the generator.
    """

    def __init__(self, count: int, draw: Draw, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = [draw(index, generator) for index in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.samples[index]


@dataclass(frozen=True, kw_only=True)
class CentreHit(Score):
    """Share of images whose most confident box has its centre within 0.5 of the target's."""

    name: ClassVar[str] = "centre_hit"
    proportion: ClassVar[bool] = True

    def records(self, outputs: Any, targets: Any) -> Records:
        """Return `[samples, 1]`: 1 for a hit. `outputs` is a list of boxes `[k, 5]`, `targets` `[batch, 4]`."""
        top = np.stack([np.asarray(boxes)[0, 1:3] for boxes in outputs])
        near = np.abs(top - np.asarray(targets)[:, :2]).max(1) < 0.5
        hits: Records = near.astype(np.float64).reshape(-1, 1)
        return hits

    def aggregate(self, records: Records, weights: NDArray[np.float64] | None = None) -> float:
        """Return the weighted mean."""
        return float(np.average(records[:, 0], weights=weights))


def make_task(draw: Draw, **fields: Any) -> Task:
    """Return a task with synthetic data in the roles `train`, `calibrate` and `select`.

    Args:
        draw: makes one sample, `(index, generator) -> (inputs, target)`.
        fields: of `Task`; cross-entropy is the loss where none is given.
    """
    roles = {"train": (TRAIN, 1), "calibrate": (CALIBRATE, 2), "select": (SELECT, 3)}
    data = {role: Drawn(count, draw, seed) for role, (count, seed) in roles.items()}
    losses = {} if "loss" in fields or "step" in fields else {"loss": cross_entropy}
    return Task(**({"batch_size": 16} | data | losses | fields))


def tensors(*shape: int, classes: int = 4, dtype: torch.dtype = torch.float32) -> Draw:
    """Return a draw of normal tensors of `shape` whose class shifts their mean."""

    def draw(index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        target = index % classes
        noise = torch.randn(shape, generator=generator)
        return (noise + target / classes).to(dtype), target

    return draw


def _tokens(_: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 32, (7,), generator=generator)
    return tokens[:-1], tokens[1:]


def _sentence(index: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    length = 4 + index % 6
    return {"input_ids": torch.randint(2, 50, (length,), generator=generator)}, index % 4


def pad(samples: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Collate token sequences: pad to the longest with zero, and give the mask that says where the tokens are."""
    rows = [inputs["input_ids"] for inputs, _ in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([target for _, target in samples])


def _picture(_: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    image = torch.randn(3, 8, 8, generator=generator)
    return image, image.mean(0, keepdim=True)


def _row(index: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    numbers = torch.randn(8, generator=generator)
    return (numbers, torch.tensor(index % 10)), numbers.sum().reshape(1) + index % 10


def _box(_: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, 16, generator=generator), torch.rand(4, generator=generator)


def _detector_step(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
    loss: Tensor = model(*batch)
    return loss


def _detector_predict(run: Callable[[Any], Any], inputs: Any) -> list[Tensor]:
    return models.decode_boxes(torch.as_tensor(run(inputs)))


def _entry(name: str, features: str, build: Callable[[], nn.Module], task: Callable[[], Task]) -> ZooEntry:
    def make() -> tuple[nn.Module, Task]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(), task()

    return ZooEntry(name, make, frozenset(features.split()))


def _images(side: int = 8, channels: int = 3) -> Callable[[], Task]:
    return lambda: make_task(tensors(channels, side, side))


def _rows(*shape: int) -> Callable[[], Task]:
    return lambda: make_task(tensors(*shape))


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    """Multiply every weight and bias by `factor`, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def _frozen(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Freeze the parameters at `paths`, in place."""
    for path in paths:
        model.get_submodule(path).requires_grad_(False)
    return model


def _settled(model: nn.Module) -> nn.Module:
    """Give batch norms the statistics of images and weights that differ by channel, in place."""
    inputs, generator = torch.randn(16, 3, 8, 8) + 0.4, torch.Generator().manual_seed(7)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
            norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
        model.train()
        for _ in range(20):
            model(inputs)
    return model.eval()


def _mixed_modes() -> nn.Module:
    model = _settled(models.Separable()).train()
    model.get_submodule("stem_norm").eval()
    return _frozen(model, ["stem", "stem_norm", "depthwise"])


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=4, return_dict=True, **sizes)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def _sentences() -> Task:
    return make_task(_sentence, collate=pad)


def _detection() -> Task:
    return make_task(_box, step=_detector_step, predict=_detector_predict, core="core", score=CentreHit())


def _entries() -> list[ZooEntry]:
    def regress(draw: Draw) -> Callable[[], Task]:
        return lambda: make_task(draw, loss=squared_error)

    def half() -> Task:
        return make_task(tensors(3, 8, 8, dtype=torch.bfloat16))

    def resnet() -> nn.Module:
        return _settled(ResNet(widths=(16, 32), depth=2, channels=3, classes=4))

    return [
        _entry("cnn", "conv linear", lambda: models.plain_cnn().eval(), _images()),
        _entry("resnet", "conv linear norm residual", resnet, _images()),
        _entry("separable", "conv linear norm depthwise grouped", lambda: _settled(models.Separable()), _images()),
        _entry("shared", "linear shared", lambda: models.Shared().eval(), _rows(16)),
        _entry("tied", "linear embedding tied", lambda: models.TiedLanguageModel().eval(), lambda: make_task(_tokens)),
        _entry("dict_outputs", "conv linear dict_outputs", lambda: models.DictOutputs().eval(), _images()),
        _entry(
            "transformer",
            "linear norm embedding attention residual dict_inputs variable_length",
            lambda: models.MaskedTransformer().eval(),
            _sentences,
        ),
        _entry(
            "tied_transformer",
            "linear norm embedding attention residual tied",
            lambda: models.TiedTransformer().eval(),
            lambda: make_task(_tokens),
        ),
        _entry("detector", "conv inner_loss core", lambda: models.Detector().eval(), _detection),
        _entry("attention", "linear attention", lambda: models.AttentionClassifier().eval(), _rows(5, 16)),
        _entry("lstm", "linear recurrent", lambda: models.LstmClassifier().eval(), _rows(6, 8)),
        _entry("gru_stack", "linear recurrent", lambda: models.GruStack().eval(), _rows(6, 8)),
        _entry("bidirectional", "linear recurrent", lambda: models.BidirectionalLstm().eval(), _rows(6, 8)),
        _entry("tiny_scale", "conv linear tiny_scale", lambda: _scaled(models.plain_cnn(), 1e-6), _images()),
        _entry("huge_scale", "conv linear huge_scale", lambda: _scaled(models.plain_cnn(), 1e6), _images()),
        _entry("frozen", "conv linear norm depthwise grouped frozen mixed_modes", _mixed_modes, _images()),
        _entry("no_parameters", "no_parameters", lambda: models.NoParameters().eval(), _images(channels=4)),
        _entry("root_linear", "linear root", lambda: nn.Linear(16, 4).eval(), _rows(16)),
        _entry("root_conv", "conv root", lambda: nn.Conv2d(3, 1, 3, padding=1).eval(), regress(_picture)),
        _entry("dense", "conv linear norm concat", lambda: _settled(models.DenseNet()), _images()),
        _entry(
            "shuffle",
            "conv linear norm residual depthwise grouped concat",
            lambda: _settled(models.ShuffleNet()),
            _images(),
        ),
        _entry("unet", "conv concat transposed", lambda: models.UNet().eval(), regress(_picture)),
        _entry(
            "single_channel",
            "conv linear single_channel",
            lambda: models.SingleChannel().eval(),
            lambda: make_task(tensors(1, 8, 8, classes=2)),
        ),
        _entry("hollow", "linear hollow", lambda: models.Hollow().eval(), _rows(8)),
        _entry("two_inputs", "linear embedding tuple_inputs", lambda: models.TwoInputs().eval(), regress(_row)),
        _entry("bfloat16", "conv linear bfloat16", lambda: models.plain_cnn().eval().bfloat16(), half),
    ]


@cache
def zoo() -> dict[str, ZooEntry]:
    """Return the models of the zoo by name; those that need a package that is not installed are left out."""
    entries = _entries()
    if find_spec("transformers") is not None:
        features = "linear norm embedding attention residual dict_inputs dict_outputs variable_length"
        entries.append(_entry("bert", features, _bert, _sentences))
    return {entry.name: entry for entry in entries}
