"""The matrices that layers multiply, against the layers themselves; padding."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.context import _Context
from trimpoint.errors import DataError
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.methods.share_weights import ShareWeights
from trimpoint.plan import Plan, Step
from trimpoint.sparsity.inputs import InputStatistics, as_matrix, from_matrix, gather, own_forward, unfolded
from trimpoint.task import Task

LAYERS = [
    (nn.Linear(6, 5), (3, 4, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (3, 4, 8, 7)),
    (nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1), padding_mode="circular"), (2, 4, 8, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="reflect"), (2, 4, 8, 8)),
    (nn.Conv2d(4, 8, 3, groups=4), (4, 8, 8)),
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (3, 4, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:40])
def test_a_layer_is_the_product_of_its_matrices(layer, shape):
    layer = layer.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    columns = torch.cat(list(unfolded(layer, x)), 1)
    parts = as_matrix(layer.weight).chunk(getattr(layer, "groups", 1))
    product = torch.cat([part @ columns[group].T for group, part in enumerate(parts)])
    expected = layer(x) - layer.bias.reshape(
        -1, *([1] * (0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)))
    )
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 5).T
    else:
        expected = expected[None] if x.ndim == len(layer.kernel_size) + 1 else expected
        expected = expected.transpose(0, 1).reshape(len(product), -1)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_a_weight_goes_to_a_matrix_and_back(shape):
    weight = torch.randn(shape)
    matrix = as_matrix(weight)
    assert torch.equal(matrix[:, :4], weight.reshape(5, 4, -1)[:, :, 0])
    assert torch.equal(from_matrix(matrix, weight.shape), weight)


def test_statistics_are_sums_over_calls_and_pieces(monkeypatch):
    layer, x = nn.Conv2d(4, 2, 3, groups=2), torch.randn(6, 4, 8, 8)
    whole = torch.cat(list(unfolded(layer, x)), 1)
    monkeypatch.setattr("trimpoint.sparsity.inputs._PIECE", 1)
    for products, expected in ((True, whole.transpose(1, 2) @ whole), (False, whole.square().sum(1))):
        found = InputStatistics(products=products)
        found.add(layer, x[:4])
        found.add(layer, x[4:])
        assert found.positions == whole.shape[1]
        torch.testing.assert_close(found.total, expected)


class Tokens(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, 3, generator=generator), "attention_mask": (torch.arange(4) <= index % 4).long()}, 0


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, attention_mask):
        return self.layer(x)


def test_padding_does_not_count():
    model, task = Masked(), Task(calibrate=Tokens(), batch_size=2)
    context = _Context(Build(module=model, given=model, task=task), Step(PruneWeights()), 0, 0)
    ((_, found),) = gather(context, {"layer": model.layer}, products=True)
    real = torch.cat([x["x"][x["attention_mask"].bool()] for x, _ in (Tokens()[i] for i in range(5))]).double()
    assert found.positions == len(real)
    torch.testing.assert_close(found.total[0], real.T @ real)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_layers_with_a_forward_of_their_own_are_known():
    for plain in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.MultiheadAttention(4, 2).out_proj):
        assert own_forward(plain) == ""
    assert own_forward(Scaled(2, 2)) == "its class Scaled has a forward pass of its own"
    assert "Bilinear has a forward pass of its own" in own_forward(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(
    "method",
    [
        PruneWeights(criterion="wanda"),
        QuantizeStatic(rounding="gptq"),
        QuantizeWeights(rounding="awq"),
        ShareWeights(importance="inputs"),
    ],
    ids=lambda method: method.name,
)
def test_inputs_that_are_not_finite_are_refused(method):
    inputs = torch.randn(16, 6)
    inputs[3, 2] = float("nan")
    task = Task(calibrate=[(row, 0) for row in inputs])
    with pytest.raises(DataError, match="not finite at the input of `0`"):
        compress(nn.Sequential(nn.Linear(6, 4)).eval(), Plan().then(method), task)
