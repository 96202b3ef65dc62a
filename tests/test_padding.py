"""What tells padding, and what layers are seen to read where it is not."""

import pytest
import torch
from torch import nn

from trimpoint.compress import compress
from trimpoint.errors import DataError
from trimpoint.method import Method, Stage, Traits
from trimpoint.padding import calibrate_kept, kept_positions, rows_of
from trimpoint.plan import Plan
from trimpoint.task import Task


def test_masks_tell_what_is_padding():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = torch.zeros(2, 3)
    assert torch.equal(kept_positions({"ids": ids, "attention_mask": mask}), mask.bool())
    assert torch.equal(kept_positions({"src_key_padding_mask": mask.bool()}), ~mask.bool())
    for inputs in (ids, {"ids": ids}, {"attention_mask": mask[:, None]}, {"attention_mask": -1e9 * mask}):
        assert kept_positions(inputs) is None


def test_rows_leave_padding_out_where_the_mask_fits():
    kept, x = torch.tensor([[True, False, True]]), torch.arange(6.0).reshape(1, 3, 2)
    assert rows_of(x, kept).tolist() == [[0, 1], [4, 5]]
    assert rows_of(x.transpose(0, 1), kept).tolist() == [[0, 1], [4, 5]]
    assert rows_of(x, None).shape == (3, 2)
    assert rows_of(x[:, 0], kept).tolist() == [[0, 1]]
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    assert rows_of(packed, kept).shape == (4, 2)


class Look(Method):
    """Records what a linear layer reads."""

    traits = Traits(stage=Stage.STRUCTURE, targets=("Linear",))

    def apply(self, ctx):
        self.seen.clear()
        paths = [site.path for site in ctx.modules()]
        calibrate_kept(ctx, lambda path, module, value, kept: self.seen.append((path, module, value, kept)), paths)


Look.seen = []


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x, attention_mask):
        return self.layer(self.layer(x).narrow(2, 0, 2)).mean(1)


def test_each_call_of_a_layer_comes_with_the_mask_of_its_batch():
    x = torch.arange(30.0).reshape(5, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    data = [({"x": one, "attention_mask": row}, 0) for one, row in zip(x, mask, strict=True)]
    model = Masked().eval()
    compress(model, Plan().then(Look()), Task(calibrate=data, batch_size=2))
    assert [path for path, *_ in Look.seen] == ["layer"] * 6
    assert torch.equal(torch.cat([value for _, _, value, _ in Look.seen[::2]]), x)
    for calls in (Look.seen[::2], Look.seen[1::2]):
        assert torch.equal(torch.cat([kept for *_, kept in calls]), mask.bool())


def test_calibration_data_is_asked_for():
    with pytest.raises(DataError):
        compress(
            Masked().eval(),
            Plan().then(Look()),
            Task(example={"x": torch.zeros(3, 2), "attention_mask": torch.ones(3)}),
        )
