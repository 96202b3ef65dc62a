"""Recurrent layers that read fewer numbers: the same states where nothing is cut, all forms of call, saved and run."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.data import as_numpy
from trimpoint.errors import InvalidParameterError
from trimpoint.graph import rebuild, save_structure
from trimpoint.graph.layers import LowRankRecurrent
from trimpoint.methods.factorize_recurrent import FactorizeRecurrent
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.task import Task, cross_entropy

KINDS = [
    (nn.LSTM, {}),
    (nn.GRU, {"num_layers": 2, "dropout": 0.1}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"bias": False, "bidirectional": True}),
]


class Reader(nn.Module):
    """Sequences `[batch, 6, 20]` to logits `[batch, 3]`."""

    def __init__(self, kind=nn.LSTM, **more):
        super().__init__()
        self.body = kind(20, 12, batch_first=True, **more)
        self.head = nn.Linear(12 * (2 if self.body.bidirectional else 1), 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


def sequences(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(20, 20, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, 20)[:, None]
    return torch.randn(count, 6, 20, generator=generator) @ mix + 0.5


@pytest.fixture
def task():
    return Task(calibrate=TensorDataset(sequences(), torch.arange(40) % 3), loss=cross_entropy, batch_size=16)


def make(kind=nn.LSTM, **more):
    torch.manual_seed(0)
    return Reader(kind, **more).eval()


def plant(model, rank):
    """Give the input weights of all directions one common low rank."""
    weights = [p for name, p in model.body.named_parameters() if name.startswith("weight_ih_l0")]
    with torch.no_grad():
        right = torch.randn(rank, 20)
        for weight in weights:
            weight.copy_(torch.randn(len(weight), rank) @ right / 5)
    return model


def apply(method, model, task):
    return compress(model, Plan().then(method), task)


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize("weighting", ["none", "activation", "fisher"])
def test_weights_of_low_rank_give_the_same_states(task, kind, more, weighting):
    model = plant(make(kind, **more), 4)
    made = apply(FactorizeRecurrent(weighting=weighting, rank_ratio=0.6), model, task).module.body
    assert isinstance(made, LowRankRecurrent)
    x = sequences(3, seed=1)
    with torch.no_grad():
        before, after = model.body(x), made(x)
        assert torch.allclose(before[0], after[0], atol=1e-4)
        state = before[1]
        assert torch.allclose(model.body(x, state)[0], made(x, state)[0], atol=1e-4)
        packed = nn.utils.rnn.pack_padded_sequence(x, [6, 4, 1], batch_first=True)
        assert torch.allclose(model.body(packed)[0].data, made(packed)[0].data, atol=1e-4)
    made.flatten_parameters()


def test_the_error_of_what_the_gates_read_is_the_closed_form(task):
    model = make(nn.GRU, bidirectional=True)
    made = apply(FactorizeRecurrent(), model, task).module.body
    x = sequences().reshape(-1, 20)
    old = torch.cat([model.body.weight_ih_l0, model.body.weight_ih_l0_reverse]).detach()
    new = torch.cat([made.recurrent.weight_ih_l0, made.recurrent.weight_ih_l0_reverse]).detach()
    shift = torch.cat(
        [getattr(made.recurrent, name) - getattr(model.body, name) for name in ("bias_ih_l0", "bias_ih_l0_reverse")]
    ).detach()
    lost = x @ old.T - (x @ made.reduce.weight.detach().T @ new.T + shift)
    tail = np.linalg.svd((x - x.mean(0)).numpy() @ old.numpy().T, compute_uv=False)[made.rank :]
    assert float(lost.norm()) == pytest.approx(np.linalg.norm(tail), rel=1e-3)


def test_what_is_weighted_by_the_inputs_is_better_on_other_inputs_too(task):
    model, x = make(), sequences(30, seed=2)
    with torch.no_grad():
        errors = [
            float((apply(FactorizeRecurrent(weighting=w), model, task).module.body(x)[0] - model.body(x)[0]).norm())
            for w in ("none", "auto")
        ]
    assert errors[1] < 0.6 * errors[0]


def test_all_else_of_the_layer_is_what_it_was(task):
    model = make(nn.LSTM, num_layers=2)
    made = apply(FactorizeRecurrent(), model, task).module.body
    for name in ("weight_hh_l0", "bias_hh_l0", "weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
        assert torch.equal(getattr(made.recurrent, name), getattr(model.body, name))
    assert (made.input_size, made.hidden_size, made.batch_first, made.num_layers) == (20, 12, True, 2)
    assert made.rank == int(0.5 * 48 * 20 / 68)


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_the_result_is_saved_made_again_and_runs_in_the_runtime(task, tmp_path, kind, more):
    compressed = apply(FactorizeRecurrent(), make(kind, **more), task)
    save_structure(tmp_path / "saved", compressed.module, compressed.edits)
    x = sequences(4, seed=3)
    expected = compressed.module(x).detach()
    assert torch.equal(rebuild(tmp_path / "saved", lambda: make(kind, **more))(x), expected)
    runtime = get_runtime("onnxruntime")
    (tmp_path / "lowered").mkdir()
    lowered = runtime.lower(export(compressed.module, x, task.dynamic_dims()), tmp_path / "lowered")
    answer = runtime.open(tmp_path / "lowered", lowered, threads=1)(as_numpy(x))
    assert np.allclose(answer, expected.numpy(), atol=1e-4)
    import onnx

    graphs = [onnx.load(path) for path in (tmp_path / "lowered").glob("*.onnx")]
    operators = [node.op_type for graph in graphs for node in graph.graph.node]
    assert operators.count(kind.__name__) == compressed.module.body.num_layers


def test_what_is_left_alone(task):
    def reason(method, model):
        (change,) = [c for c in apply(method, model, task).changes if c.origin == "body"]
        assert change.kind == "skipped"
        return change.reason

    projecting = make()
    projecting.body = nn.LSTM(20, 24, batch_first=True, proj_size=12)
    assert "projects its state" in reason(FactorizeRecurrent(), projecting.eval())
    assert "no fewer parameters" in reason(FactorizeRecurrent(rank="energy", energy=1.0), make())
    assert "below round_to=16" in reason(FactorizeRecurrent(round_to=16), make())
    assert "rank_ratio=1" in reason(FactorizeRecurrent(rank_ratio=1.0), make())


def test_what_says_nothing_is_no_weighting(task):
    still = task.with_(calibrate=TensorDataset(torch.ones(8, 6, 20), torch.zeros(8)))
    model = make()
    compressed = apply(FactorizeRecurrent(), model, still)
    assert "plain: its inputs do not vary" in compressed.changes[0].reason
    x = torch.ones(2, 6, 20)
    assert torch.allclose(compressed.module.body(x)[0], model.body(x)[0], atol=1e-5)
    nn.init.normal_(model.body.weight_ih_l0)
    assert "stands out of the noise" in apply(FactorizeRecurrent(rank="bayes"), model, task).changes[0].reason


def test_factors_are_not_factorised_again(task):
    twice = compress(make(), Plan().then(FactorizeRecurrent(), FactorizeRecurrent()), task)
    assert isinstance(twice.module.body.recurrent, nn.LSTM)


def test_bfloat16_and_frozen_parameters(task):
    model = make().bfloat16()
    model.body.weight_hh_l0.requires_grad_(False)
    data = TensorDataset(sequences().bfloat16(), torch.zeros(40))
    made = apply(FactorizeRecurrent(), model, task.with_(calibrate=data)).module.body
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert not made.recurrent.weight_hh_l0.requires_grad
    assert made.reduce.weight.requires_grad


@pytest.mark.parametrize("wrong", [{"rank_ratio": 0}, {"weighting": "x"}, {"rank": "x"}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        FactorizeRecurrent(**wrong)
