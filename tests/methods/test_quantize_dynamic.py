"""Which tensors get which format, beside a static step, and that nothing needs data."""

import pytest
import torch
from torch import nn

from trimpoint.compress import compress
from trimpoint.errors import InvalidParameterError, PlanError
from trimpoint.filters import Glob, Type
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.task import Task
from trimpoint.values import Format

INPUT = Format(dtype="uint8", symmetric=False, dynamic=True)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, words):
        x = self.conv(self.words(words).mT).mT
        return self.head(self.lstm(self.attention(x, x, x)[0])[0])


def test_formats_without_any_data():
    model = Tagger().eval()
    made = compress(model, Plan().then(QuantizeDynamic()))
    weight = Format(dtype="int8", granularity="channel", reduce_range=True)
    assert made.formats == {
        "words": {"weight": Format(dtype="int8", granularity="channel")},
        **{name: {"weight": weight, "input": INPUT} for name in ("attention", "attention.out_proj", "lstm", "head")},
    }
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.module.parameters(), strict=True))


def test_formats_by_parameters():
    made = compress(Tagger(), Plan().then(QuantizeDynamic(granularity="tensor", reduce_range=False)))
    assert made.formats["lstm"] == {"weight": Format(dtype="int8"), "input": INPUT}
    assert made.formats["words"]["weight"].granularity == "channel"


def test_each_of_two_steps_has_its_own_layers():
    task = Task(calibrate=[(torch.randint(0, 30, (6,)), torch.zeros(6)) for _ in range(4)])
    plan = Plan((Step(QuantizeStatic(), Type("Conv1d")), Step(QuantizeDynamic(), Glob("*"))))
    made = compress(Tagger(), plan, task)
    assert not made.formats["conv"]["input"].dynamic
    assert made.formats["lstm"]["input"].dynamic
    both = Plan((Step(QuantizeStatic(), Glob("head")), Step(QuantizeDynamic(), Glob("head"))))
    (change,) = [c for c in compress(Tagger(), both, task).changes if c.kind == "skipped"]
    assert (change.origin, "float_weight" in change.reason) == ("head", True)


def test_what_it_refuses():
    with pytest.raises(InvalidParameterError, match="granularity"):
        QuantizeDynamic(granularity="group")
    with pytest.raises(PlanError, match="must stand before"):
        compress(Tagger(), Plan().then(QuantizeDynamic(), DropBlocks()), Task(example=torch.zeros(6, dtype=torch.long)))
