"""Chunks give what whole sequences give, in PyTorch and in the runtimes; what cannot be streamed is told."""

import numpy as np
import pytest
import torch
from torch import nn

import trimpoint as tpt
from trimpoint.artifact import Model
from trimpoint.compress import compress
from trimpoint.errors import DataError, ModelError
from trimpoint.graph.streaming import Streaming
from trimpoint.measure.inputs import core_inputs
from trimpoint.measure.quality import evaluate
from trimpoint.methods.factorize_recurrent import FactorizeRecurrent
from trimpoint.methods.prune_recurrent import PruneRecurrent
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.stream import Stream
from trimpoint.runtimes.verify import require_parity
from trimpoint.signature import flatten
from trimpoint.target import Target
from trimpoint.task import Task
from trimpoint.values import Profile


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, hidden=16, layers=2, **settings):
        super().__init__()
        self.rnn = kind(8, hidden, layers, batch_first=True, **settings)
        self.head = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def built(kind=nn.LSTM, **settings):
    torch.manual_seed(0)
    return Tagger(kind, **settings).eval()


def lowered(core, x, directory, runtime="onnxruntime", formats=None):
    names = {"input_0": {0: "batch", 1: "length"}, **{name: {0: "batch"} for name in core.initial_state()}}
    exported = export(core, (x[:, :1], core.initial_state(len(x))), names)
    assert not exported.notes
    made = get_runtime(runtime).lower(exported, directory, formats=formats)
    return get_runtime(runtime).open(directory, made)


def streamed(session, x, steps):
    stream = Stream(session, session.signature, batch=len(x))
    return np.concatenate([stream(x[:, i : i + steps].numpy()) for i in range(0, x.shape[1], steps)], 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_chunks_of_any_length_give_the_answers_for_the_whole(kind, runtime, tmp_path):
    model, x = built(kind), torch.randn(2, 12, 8)
    session = lowered(tpt.streaming(model, x), x, tmp_path, runtime)
    expected = model(x).detach().numpy()
    for steps in (1, 5, 12):
        np.testing.assert_allclose(streamed(session, x, steps), expected, atol=1e-5)
    names = {nn.LSTM: ["input_0", "rnn.h", "rnn.c"], nn.GRU: ["input_0", "rnn.h"]}
    assert [spec.name for spec in session.signature.inputs] == names[kind]


def test_the_model_stays_as_it_is_and_so_do_the_paths_of_its_modules():
    model, x = built(), torch.randn(2, 6, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    core = tpt.streaming(model, x)
    assert type(model) is Tagger
    assert isinstance(core, (Tagger, Streaming))
    assert core.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in core.modules())
    torch.testing.assert_close(core(x), model(x))


def test_smaller_in_three_ways_and_still_streamed(tmp_path):
    model, x = built(hidden=32), torch.randn(4, 12, 8)
    task = Task(example=torch.randn(12, 8), calibrate=[(sample, 0) for sample in x])
    plan = Plan().then(PruneRecurrent(ratio=0.5), QuantizeDynamic())
    made = compress(model, plan, task)
    core = tpt.streaming(made.module, x)
    assert core.initial_state()["rnn.h"].shape == (1, 2, 16)
    (tmp_path / "int8").mkdir()
    session = lowered(core, x, tmp_path / "int8", formats=made.formats)
    expected = made.module(x).detach().numpy()
    for steps in (1, 5):
        assert abs(streamed(session, x, steps) - expected).max() < 0.03 * abs(expected).max()
    thin = compress(model, Plan().then(FactorizeRecurrent()), task).module
    core = tpt.streaming(thin, x)
    assert list(core.initial_state()) == ["rnn.recurrent.h", "rnn.recurrent.c"]
    torch.testing.assert_close(core.in_chunks(5)(lambda inputs: core(*inputs), x), thin(x))


def test_quality_of_whole_sequences_that_are_run_in_chunks(tmp_path):
    model, x = built(), torch.randn(20, 11, 8)
    core = tpt.streaming(model, x[:1])
    data = [(sample, int(model(sample[None]).mean(1).argmax())) for sample in x]
    chunks = core.in_chunks(4)
    task = Task(select=data, predict=lambda run, inputs: chunks(run, inputs).mean(1), batch_size=7)
    session = lowered(core, x, tmp_path)
    for run in (core, session):
        assert evaluate(run, task, "select").value == 1.0
    named = core_inputs(core, task.with_(dims={"input_0": {1: "length"}}), Target())
    assert named.dims["input_0"] == {0: "batch", 1: "length"}
    assert [leaf.shape for leaf in flatten(named.shapes[""])] == [(1, 4, 8), (1, 2, 16), (1, 2, 16)]


def test_a_stream_of_an_artifact_goes_on_is_reset_and_set(tmp_path):
    model, x = built(nn.GRU), torch.randn(1, 6, 8)
    session = lowered(tpt.streaming(model, x), x, tmp_path)
    stream = Model(session=session, manifest={}, profile=Profile()).stream()
    first = stream(x[:, :3].numpy())
    kept = stream.state
    second = stream(x[:, 3:].numpy())
    assert abs(second - model(x[:, 3:]).detach().numpy()).max() > 1e-3
    stream.state = kept
    np.testing.assert_array_equal(stream(x[:, 3:].numpy()), second)
    stream.reset()
    np.testing.assert_array_equal(stream(x[:, :3].numpy()), first)


class ByHand(nn.Module):
    """Carries its own state, as many models do."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 3)

    def forward(self, x, state):
        h, c = self.cell(x, state)
        return self.head(h), (h, c)


def test_a_model_with_a_state_of_its_own_is_streamed_as_it_is(tmp_path):
    torch.manual_seed(0)
    model, state = ByHand().eval(), (torch.zeros(2, 16), torch.zeros(2, 16))
    task = Task(example=(torch.randn(8), (torch.zeros(16), torch.zeros(16))))
    inputs, dims = (torch.randn(2, 8), state), {name: {0: "batch"} for name in ("input_0", "input_1_0", "input_1_1")}
    exported = export(model, task.example_batch(2), task.dynamic_dims())
    assert exported.signature == export(model, inputs, dims).signature
    made = get_runtime("onnxruntime").lower(
        exported, tmp_path, formats=compress(model, Plan().then(QuantizeDynamic()), task).formats
    )
    assert not made.unmapped
    session = get_runtime("onnxruntime").open(tmp_path, made)
    stream = Stream(session, session.signature, batch=2)
    for _ in range(5):
        x = torch.randn(2, 8)
        with torch.no_grad():
            expected, state = model(x, state)
        assert abs(stream(x.numpy()) - expected.numpy()).max() < 0.02
    pruned = compress(model, Plan().then(PruneRecurrent(ratio=0.5)), task)
    assert all(change.kind == "skipped" for change in pruned.changes)
    assert any("initial state" in change.reason or "output" in change.reason for change in pruned.changes)


class Mean(Tagger):
    def forward(self, x):
        return super().forward(x).mean(1, keepdim=True)


class Initial(Tagger):
    def forward(self, x):
        return self.head(self.rnn(x, x.new_zeros(2, len(x), 16))[0])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 3)), "no `nn.LSTM`"),
        (nn.LSTM(8, 4, batch_first=True), "itself a recurrent layer"),
        (Tagger(bidirectional=True), "'rnn' is bidirectional"),
        (Mean(), "must be those for the whole sequence"),
        (Initial(nn.GRU), "'rnn' gets its initial state from the model"),
    ],
)
def test_what_cannot_be_streamed(model, reason):
    with pytest.raises(ModelError, match=reason):
        tpt.streaming(model, torch.randn(2, 6, 8))


class Projected(nn.Module):
    """Takes and returns steps first, from layers with projections."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 16, 2, proj_size=5)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_and_steps_that_come_first():
    torch.manual_seed(0)
    model, x = Projected().eval(), torch.randn(7, 3, 8)
    core = tpt.streaming(model, x, dim=0)
    state = core.initial_state(3)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"rnn.h": (3, 2, 5), "rnn.c": (3, 2, 16)}
    parts = []
    for part in x.split(2):
        outputs, state = core(part, state)
        parts.append(outputs)
    torch.testing.assert_close(torch.cat(parts), model(x))
    torch.testing.assert_close(core.in_chunks(3, dim=0)(lambda inputs: core(*inputs), x), model(x))


def test_bad_steps_and_states(tmp_path):
    core, x = tpt.streaming(built(), torch.randn(2, 6, 8)), torch.randn(1, 6, 8)
    with pytest.raises(ModelError, match="at least 2 steps"):
        tpt.streaming(built(), x[:, :1])
    with pytest.raises(ModelError, match="must be finite"):
        tpt.streaming(built(), torch.full((2, 6, 8), torch.nan))
    with pytest.raises(ModelError, match="at least 1 step"):
        core.in_chunks(0)
    first = core.initial_state()
    for state, reason in (
        ({"rnn.h": first["rnn.h"]}, r"'rnn.c' must be a tensor of shape \[batch, 2, 16\] .*Got NoneType"),
        (first | {"rnn.h": first["rnn.h"].double()}, r"Got \[1, 2, 16\] torch.float64"),
        (first | {"rnn.h": first["rnn.h"].numpy()}, "Got ndarray"),
        (first | {"rnn.h": first["rnn.h"][0]}, r"Got \[2, 16\]"),
        (core.initial_state(2), "'rnn.h' must be of the batch of the inputs, 1. Got 2"),
        (first | {"rnn.c": core.initial_state(2)["rnn.c"]}, "'rnn.c' must be of the batch"),
        (None, "does not take these inputs"),
        ((first["rnn.h"], first["rnn.c"]), "does not take these inputs"),
    ):
        with pytest.raises(ModelError, match=reason):
            core(x, state)
    with pytest.raises(ModelError, match="must read batches"):
        core(x[0], first)
    for dim, steps, reason in ((1, 2.5, "whole number"), (-2, 2, "counted from the first")):
        with pytest.raises(ModelError, match=reason):
            core.in_chunks(steps, dim=dim)
    for inputs in (x[:, :0], x[0, 0]):
        with pytest.raises(DataError, match="at least 1 step"):
            core.in_chunks(2)(lambda given: core(*given), inputs)
    session = get_runtime("onnxruntime").open(
        tmp_path, get_runtime("onnxruntime").lower(export(built(), x, {"input": {0: "batch"}}), tmp_path)
    )
    with pytest.raises(DataError, match="must be its state"):
        Stream(session, session.signature)


class Twice(Tagger):
    """Has its layer under two names, and takes its input in a mapping."""

    def __init__(self):
        super().__init__()
        self.again = self.rnn

    def forward(self, inputs):
        return self.head(self.again(inputs["x"])[0])


def test_a_layer_with_two_names_and_inputs_in_a_mapping(tmp_path):
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 6, 8)
    core = tpt.streaming(model, ({"x": x},))
    assert list(core.initial_state()) == ["rnn.h", "rnn.c"]
    names = {"x": {0: "batch", 1: "length"}, **{name: {0: "batch"} for name in core.initial_state()}}
    exported = export(core, ({"x": x[:, :1]}, core.initial_state(2)), names)
    runtime = get_runtime("onnxruntime")
    session = runtime.open(tmp_path, runtime.lower(exported, tmp_path))
    state = {name: tensor.numpy() for name, tensor in core.initial_state(2).items()}
    outputs, _ = session(({"x": x.numpy()}, state))
    np.testing.assert_allclose(outputs, model({"x": x}).detach().numpy(), atol=1e-5)


def test_models_in_float64_and_those_that_stream_already():
    model, x = built().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    core = tpt.streaming(tpt.streaming(model, x), x)
    torch.testing.assert_close(core.in_chunks(4)(lambda inputs: core(*inputs), x), model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_are_exported_for_any_length(kind, tmp_path):
    model = built(kind, bidirectional=True)
    exported = export(model, torch.randn(2, 1, 8), {"input": {0: "batch", 1: "length"}})
    assert (exported.signature.inputs[0].shape, exported.notes) == (("batch", "length", 8), ())
    runtime = get_runtime("onnxruntime")
    session = runtime.open(tmp_path, runtime.lower(exported, tmp_path))
    require_parity(model, session, [torch.randn(batch, steps, 8).numpy() for batch, steps in ((1, 1), (3, 2), (2, 31))])
