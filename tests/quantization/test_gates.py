"""Bits for each gate of a recurrent layer: against brute force, in training, in what is saved and in the file."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import GridEdit, OnGates, OnGrid, baked, grids_of, put_on_grid_, rebuild, save_structure
from trimpoint.graph.edits import edits_from_data, edits_to_data
from trimpoint.graph.grids import grid_to_data
from trimpoint.methods.quantize_mixed import QuantizeMixed
from trimpoint.plan import Plan
from trimpoint.quantization.rounding import best_scale, nearest
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.task import Task


class Recurrent(nn.Module):
    """The mean over time of a recurrent layer."""

    def __init__(self, kind=nn.LSTM, **settings):
        super().__init__()
        self.rnn = kind(6, 5, batch_first=True, **settings)

    def forward(self, x):
        return self.rnn(x)[0].mean(1)


def given(kind=nn.LSTM, **settings):
    torch.manual_seed(0)
    inputs = torch.randn(48, 7, 6)
    model = Recurrent(kind, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, Task(calibrate=TensorDataset(inputs, torch.zeros(48))), inputs


def mixed(model, task, **params):
    return compress(model, Plan().then(QuantizeMixed(**params)), task)


def bits_of(module):
    """Return the bits of every gate, in the order of the layers."""
    parts = [part for part in module.modules() if isinstance(part, OnGates)]
    return [bits for first, second in zip(parts[::2], parts[1::2], strict=True) for bits in both(first, second)]


def both(first, second):
    assert first.gates == second.gates
    return first.gates


CASES = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2}),
    (nn.RNN, {"num_layers": 2}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_bits_of_all_gates_together_are_the_best(kind, settings):
    model, task, inputs = given(kind, **settings)
    bits = (2, 3) if settings.get("bidirectional") else (2, 3, 4)
    with torch.no_grad():
        before = model(inputs).double()
        spread = (before - before.mean(0)).square().sum()
        names = [name for name, _ in model.rnn.named_parameters() if "weight_ih" in name]
        count = len(model.rnn.weight_hh_l0) // 5
        costs, sizes = [], []
        for name, gate in itertools.product(names, range(count)):
            rows = slice(5 * gate, 5 * gate + 5)
            found = []
            for each in bits:
                changed = copy.deepcopy(model)
                for weight in (getattr(changed.rnn, name), getattr(changed.rnn, name.replace("ih", "hh"))):
                    top = 2 ** (each - 1) - 1
                    weight[rows] = nearest(weight[rows], best_scale(weight[rows], top), top).float()
                found.append(float((changed(inputs) - before).square().sum() / spread))
            costs.append(found)
            sizes.append(5 * (getattr(model.rnn, name).shape[1] + 5))
    limit = 2.6
    every = np.array(list(itertools.product(range(len(bits)), repeat=len(sizes))))
    total = sum(np.array(costs[unit])[every[:, unit]] for unit in range(len(sizes)))
    mean = np.array(bits)[every] @ np.array(sizes) / sum(sizes)
    made = mixed(model, task, mean_bits=limit, fewest_bits=2, most_bits=bits[-1])
    chosen = [bits.index(each) for each in bits_of(made.module)]
    assert len(chosen) == len(sizes)
    assert np.array(bits)[chosen] @ np.array(sizes) / sum(sizes) <= limit + 1e-9
    cost = sum(costs[unit][place] for unit, place in enumerate(chosen))
    assert cost == pytest.approx(total[mean <= limit + 1e-9].min(), rel=1e-4)


def test_bits_by_gate_beat_one_number_for_all():
    model, task, inputs = given(num_layers=2)
    errors = []
    for params in ({}, {"fewest_bits": 3, "most_bits": 3}):
        made = mixed(model, task, mean_bits=3.0, **params)
        with torch.no_grad():
            errors.append(float((made.module(inputs) - model(inputs)).square().mean()))
    assert errors[0] < 0.7 * errors[1]
    assert len(set(bits_of(mixed(model, task, mean_bits=3.0).module))) > 1
    assert max(bits_of(mixed(model, task, mean_bits=8.0).module)) == 7


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_the_kernel_gets_just_these_integers(tmp_path, settings):
    model, task, inputs = given(**settings)
    made = mixed(model, task, mean_bits=3.0)
    exported = export(made.module, inputs[:2], task.dynamic_dims())
    calibration = [inputs[:16].numpy()]
    lowered = get_runtime("onnxruntime").lower(exported, tmp_path, formats=made.formats, calibration=calibration)
    assert lowered.unmapped == ()
    graph = onnx.load(tmp_path / lowered.files["main"][0]).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DynamicQuantizeLSTM"]
    plain = baked(made.module).rnn
    assert len(nodes) == settings.get("num_layers", 1)
    for layer, node in enumerate(nodes):
        for place, scale, kind in ((1, 8, "ih"), (2, 10, "hh")):
            codes, sizes = stored[node.input[place]], stored[node.input[scale]]
            for way, (rows, steps) in enumerate(zip(codes, sizes, strict=True)):
                name = f"weight_{kind}_l{layer}{'_reverse' if way else ''}"
                weight = getattr(plain, name).detach().numpy()
                ours = weight.reshape(4, 5, -1)[[0, 3, 1, 2]].reshape(weight.shape)
                np.testing.assert_allclose(rows.T * steps[:, None], ours, rtol=1e-5, atol=1e-7)
                bits = made.module.rnn.parametrizations[name][0].gates
                for gate, part in zip((0, 3, 1, 2), np.split(rows.T, 4), strict=True):
                    assert abs(part).max() <= 2 ** (bits[gate] - 1) - 1
    answers = get_runtime("onnxruntime").open(tmp_path, lowered)(inputs.numpy())
    with torch.no_grad():
        assert float((torch.as_tensor(answers) - made.module(inputs)).abs().max()) < 0.05


def test_what_has_no_kernel_is_told(tmp_path):
    model, task, inputs = given(nn.GRU)
    made = mixed(model, task, mean_bits=3.0)
    exported = export(made.module, inputs[:2], task.dynamic_dims())
    lowered = get_runtime("onnxruntime").lower(exported, tmp_path, formats=made.formats)
    assert lowered.unmapped == ("rnn: ONNX Runtime has no dynamic int8 kernel for GRU",)
    answers = get_runtime("onnxruntime").open(tmp_path, lowered)(inputs.numpy())
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(answers), made.module(inputs), rtol=0, atol=1e-5)


def test_a_projected_state_is_left_alone():
    model, task, _ = given(proj_size=3)
    changes = mixed(model, task).changes
    assert [change.reason for change in changes if change.origin == "rnn"] == ["it projects its hidden state"]


def held():
    model = Recurrent(nn.GRU)
    scale, edits = torch.linspace(0.05, 0.2, 15), []
    for name in ("weight_ih_l0", "weight_hh_l0"):
        put_on_grid_(model.rnn, name, OnGates(scale.clone(), (2, 4, 3)))
        edits.append(GridEdit("rnn", name, grid_to_data(model.rnn.parametrizations[name][0])))
    return model, edits


def test_each_gate_is_on_a_grid_of_its_own():
    model, _ = held()
    weight = model.rnn.parametrizations.weight_ih_l0.original
    for gate, bits in enumerate((2, 4, 3)):
        rows = slice(5 * gate, 5 * gate + 5)
        alone = OnGrid(torch.linspace(0.05, 0.2, 15)[rows], bits)(weight[rows])
        torch.testing.assert_close(model.rnn.weight_ih_l0[rows], alone)
    assert set(grids_of(model)) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_a_recurrent_layer_trains_on_its_grid_and_can_be_copied_at_any_time():
    model, _ = held()
    names, inputs = list(Recurrent(nn.GRU).state_dict()), torch.randn(8, 7, 6)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for _ in range(40):
        loss = (model(inputs) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        copy.deepcopy(model)
    assert losses[-1] < 0.5 * losses[0]
    plain = baked(model)
    assert type(plain.rnn) is nn.GRU
    assert list(plain.state_dict()) == names
    assert not plain.rnn._forward_hooks
    assert all(isinstance(weight, nn.Parameter) for weight in plain.rnn._flat_weights)
    with torch.no_grad():
        torch.testing.assert_close(plain(inputs), model(inputs))


def test_saved_and_made_again(tmp_path):
    model, edits = held()
    assert edits_from_data(edits_to_data(edits)) == edits
    save_structure(tmp_path, model, edits)
    again, inputs = rebuild(tmp_path, lambda: Recurrent(nn.GRU)), torch.randn(2, 7, 6)
    torch.testing.assert_close(again(inputs), model(inputs))


@pytest.mark.parametrize("gates", [[], [2, 9], [True, 3], [3] * 9, 4, None, [2.0, 3]])
def test_an_edit_that_makes_no_gates_is_refused(gates):
    data = {"edit": "grid", "path": "", "parameter": "weight", "grid": {"gates": gates, "scales": 15}}
    with pytest.raises(ArtifactError, match="makes no grid"):
        edits_from_data([data])


@pytest.mark.parametrize(("scales", "gates"), [(15, (2, 3)), (14, (2, 3)), (1, (2,))])
def test_gates_that_do_not_fit_are_refused(scales, gates):
    with pytest.raises(SurgeryError):
        put_on_grid_(nn.GRU(6, 5), "weight_ih_l0", OnGates(torch.ones(scales), gates))
