"""How far answers move: over what counts, however the data is put into batches."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trimpoint.quantization.sensitivity import divergence
from trimpoint.task import Task
from trimpoint.testing.zoo import pad


class Tagger(nn.Module):
    """Label each token from itself, and loudly where there is none: `[batch, length, 3]`, or `[batch, length]`."""

    def __init__(self, outputs):
        super().__init__()
        self.table, self.outputs = nn.Embedding(50, 3), outputs

    def forward(self, input_ids, attention_mask):
        found = self.table(input_ids) + 100 * (1 - attention_mask[..., None])
        return found if self.outputs == 3 else found[..., 0]


@pytest.mark.parametrize("outputs", [1, 3])
def test_neither_padding_nor_the_batches_count(outputs):
    model = Tagger(outputs).eval()
    generator = torch.Generator().manual_seed(1)
    texts = [({"input_ids": torch.randint(2, 50, (4 + i % 6,), generator=generator)}, 0) for i in range(24)]

    @contextmanager
    def changed():
        before = model.table.weight.data.clone()
        model.table.weight.data.mul_(0.9)
        yield
        model.table.weight.data.copy_(before)

    def measured(size):
        task = Task(calibrate=texts, collate=pad, batch_size=size)
        ctx = SimpleNamespace(task=task, module=model, report=lambda *_: None)
        return divergence(ctx, {"smaller": changed}, 24)["smaller"]

    rows = torch.cat([model.table(inputs["input_ids"]).detach() for inputs, _ in texts])[:, :outputs].double()
    expected = ((0.1 * rows).square().sum() / (rows - rows.mean(0)).square().sum()).item()
    assert measured(1) == pytest.approx(expected, rel=1e-5)
    assert measured(8) == pytest.approx(expected, rel=1e-5)


def test_outputs_as_wide_as_a_batch_is_long_are_compared_number_by_number():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 1)

        def forward(self, input_ids):
            return self.table(input_ids)[..., 0]

    model = Lengths().eval()
    texts = [(torch.arange(2, 6 + 2 * i), 0) for i in range(4)]
    ctx = SimpleNamespace(task=Task(calibrate=texts, batch_size=1), module=model, report=lambda *_: None)

    @contextmanager
    def same():
        yield

    assert divergence(ctx, {"same": same}, 4) == {"same": 0.0}
