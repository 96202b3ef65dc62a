"""Hidden units of recurrent layers: removed ones compute what a loop over cells computes with them held at zero."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from trimpoint.errors import SurgeryError
from trimpoint.graph import coupled_groups, rebuild, remove_units_, save_structure, trace

HIDDEN, GATES = 6, {"LSTM": 4, "GRU": 3, "RNN": 1}


class Reader(nn.Module):
    """A linear layer, a recurrent one, and a head on what `read` takes from its output and final states."""

    def __init__(self, kind, width, read, **options):
        super().__init__()
        self.inlet = nn.Linear(5, 4)
        self.rnn = getattr(nn, kind)(4, HIDDEN, **options)
        self.head = nn.Linear(width, 3)
        self.read = read

    def forward(self, x):
        output, final = self.rnn(self.inlet(x))
        return self.head(self.read(output, final))


def mean(output, _):
    return output.mean(0) if output.shape[0] == 7 else output.mean(1)


def reader(kind="LSTM", read=mean, width=None, **options):
    torch.manual_seed(3)
    directions = 2 if options.get("bidirectional") else 1
    model = Reader(kind, width or HIDDEN * directions, read, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def inputs(model=None):
    generator = torch.Generator().manual_seed(5)
    time_first = model is not None and not model.rnn.batch_first
    return torch.randn((7, 2, 5) if time_first else (2, 7, 5), generator=generator)


def groups_of(model, x=None):
    return coupled_groups(trace(model, inputs(getattr(model, "rnn", None) and model) if x is None else x))


def hidden(groups):
    return [group for group in groups if group.kind == "hidden"]


def reasons(model, x=None):
    return {group.name: group.reason for group in groups_of(model, x)}


def choose(groups, count=2):
    """Return different units for each group."""
    rng = np.random.default_rng(1)
    return {g.name: sorted(rng.choice(g.size, count, replace=False).tolist()) for g in groups if not g.reason}


def loop(rnn, x, gone):
    """Run a recurrent module cell by cell, batch first, with the states of `gone[set]` held at zero.

    Written from the equations in PyTorch's documentation of the layers.
    """
    kind, batch = type(rnn).__name__, x.shape[0]
    weights = {name: value.detach() for name, value in rnn.named_parameters()}
    finals, number = [], 0
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: 2 if rnn.bidirectional else 1]:
            w, u = (weights[f"weight_{part}_l{layer}{suffix}"] for part in ("ih", "hh"))
            zero = torch.zeros(len(w))
            b, d = (weights.get(f"bias_{part}_l{layer}{suffix}", zero) for part in ("ih", "hh"))
            keep = torch.ones(rnn.hidden_size)
            keep[gone[number]] = 0
            h = c = torch.zeros(batch, rnn.hidden_size)
            steps = []
            for step in reversed(range(x.shape[1])) if suffix else range(x.shape[1]):
                a, r = x[:, step] @ w.T + b, h @ u.T + d
                if kind == "LSTM":
                    i, f, g, o = (a + r).chunk(4, 1)
                    c = (f.sigmoid() * c + i.sigmoid() * g.tanh()) * keep
                    h = o.sigmoid() * c.tanh()
                elif kind == "GRU":
                    (ar, az, an), (rr, rz, rn) = a.chunk(3, 1), r.chunk(3, 1)
                    z = (az + rz).sigmoid()
                    h = (1 - z) * (an + (ar + rr).sigmoid() * rn).tanh() + z * h
                else:
                    h = (a + r).relu() if rnn.nonlinearity == "relu" else (a + r).tanh()
                h = h * keep
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if suffix else steps, 1))
            finals.append(h)
            number += 1
        x = torch.cat(outputs, 2)
    return x, finals


def test_units_run_through_gates_recurrence_and_readers():
    groups = groups_of(reader("GRU", num_layers=2, bidirectional=True, batch_first=True))
    members = {
        g.name: {(f"{m.path}.{m.parameter}", m.dim, m.role, m.indices[1]) for m in g.members} for g in hidden(groups)
    }
    truth = {}
    for number, (layer, direction) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        suffix = f"_l{layer}{'_reverse' * direction}"
        rows = (1, HIDDEN + 1, 2 * HIDDEN + 1)
        own = {(f"rnn.{name}{suffix}", 0, "out", rows) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        own.add((f"rnn.weight_hh{suffix}", 1, "in", (1,)))
        column = (1 + HIDDEN * direction,)
        readers = ["rnn.weight_ih_l1", "rnn.weight_ih_l1_reverse"] if layer == 0 else ["head.weight"]
        truth["rnn" if number == 0 else f"rnn#{number + 1}"] = own | {(path, 1, "in", column) for path in readers}
    assert members == truth
    assert all((g.size, g.alike, g.reason) == (HIDDEN, "rnn", "") for g in hidden(groups))
    inlet = next(g for g in groups if g.name == "inlet")
    assert (inlet.size, inlet.kind, inlet.alike) == (4, "channels", "")
    read = {f"{m.path}.{m.parameter}" for m in inlet.members if m.role == "in"}
    assert read == {"rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"}


CASES = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"bias": False, "bidirectional": True, "batch_first": True}),
    ("GRU", {"batch_first": True}),
    ("GRU", {"num_layers": 3, "batch_first": True, "dropout": 0.5}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "bias": False}),
    ("RNN", {"num_layers": 2, "nonlinearity": "relu", "batch_first": True}),
    ("RNN", {"bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: "-".join(value) if value else "plain")
def test_smaller_layers_compute_what_the_loop_computes_with_units_at_zero(kind, options):
    model = reader(kind, **options)
    x = inputs(model)
    groups = groups_of(model)
    removals = choose(hidden(groups))
    original = copy.deepcopy(model)
    edits, failed = remove_units_(model, groups, removals, x)
    assert edits
    assert failed == {}
    assert model.rnn.hidden_size == HIDDEN - 2
    assert model.rnn.weight_hh_l0.shape == (GATES[kind] * (HIDDEN - 2), HIDDEN - 2)
    gone = list(removals.values())
    sequence = original.inlet(x) if model.rnn.batch_first else original.inlet(x).transpose(0, 1)
    with torch.no_grad():
        wanted, finals = loop(original.rnn, sequence, gone)
        output, final = model.rnn(model.inlet(x))
    output = output if model.rnn.batch_first else output.transpose(0, 1)
    final = final[0] if kind == "LSTM" else final
    kept = [sorted(set(range(HIDDEN)) - set(units)) for units in gone]
    last = kept[-2:] if model.rnn.bidirectional else kept[-1:]
    columns = [unit + place * HIDDEN for place, units in enumerate(last) for unit in units]
    assert torch.allclose(output, wanted[:, :, columns], atol=1e-6)
    assert torch.allclose(final, torch.stack([h[:, units] for h, units in zip(finals, kept, strict=True)]), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model(x), original.head(wanted.mean(1)), atol=1e-6)


def test_the_loop_is_the_layer_where_nothing_is_gone():
    for kind, options in CASES:
        model = reader(kind, **options)
        x = inputs()[:, :, :4]
        with torch.no_grad():
            output = model.rnn(x if model.rnn.batch_first else x.transpose(0, 1))[0]
            wanted, _ = loop(model.rnn, x, [[]] * 8)
        assert torch.allclose(output if model.rnn.batch_first else output.transpose(0, 1), wanted, atol=1e-6)


FINAL = {
    "both layers": ("GRU", lambda _, h: h.transpose(0, 1).flatten(1), {"num_layers": 2}),
    "both directions": ("GRU", lambda _, h: torch.cat([h[-2], h[-1]], 1), {"bidirectional": True}),
    "reshaped": ("GRU", lambda _, h: h.view(2, 1, 2, -1)[:, 0].transpose(0, 1).flatten(1), {"num_layers": 2}),
    "cell states": ("LSTM", lambda _, final: torch.cat([final[0][-1], final[1][0]], 1), {"num_layers": 2}),
}


@pytest.mark.parametrize("case", sorted(FINAL))
def test_final_states_are_followed(case):
    kind, read, options = FINAL[case]
    model = reader(kind, read, 2 * HIDDEN, batch_first=True, **options)
    groups = groups_of(model)
    assert [group.reason for group in hidden(groups)] == ["", ""]
    edits, failed = remove_units_(model, groups, choose(groups, 1), inputs())
    assert edits
    assert failed == {}
    assert (model.rnn.hidden_size, model.rnn.input_size, model.head.in_features) == (5, 3, 10)


def test_sum_of_layers_keeps_them():
    """Different units of two layers meet in a sum of final states: which go is up to each layer, so they stay."""
    model = reader("GRU", lambda _, h: h.sum(0), num_layers=2, batch_first=True)
    assert all("takes one value over these channels" in group.reason for group in hidden(groups_of(model)))


def test_uneven_removals_are_refused():
    model = reader("LSTM", num_layers=2, batch_first=True)
    groups = groups_of(model)
    for removals in ({"rnn": [0]}, {"rnn": [0], "rnn#2": [1, 2]}):
        with pytest.raises(SurgeryError, match="which has one size for all, must lose equally many units") as error:
            remove_units_(model, groups, removals, inputs())
        assert "the same number in all" in error.value.hint
    assert model.rnn.weight_hh_l1.shape == (4 * HIDDEN, HIDDEN)


class FixedState(nn.Module):
    """Zeros of a fixed size as the initial state of the second of two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.GRU(5, 4, 2, batch_first=True)
        self.second = nn.GRU(4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        state = torch.zeros(2, x.shape[0], 6)
        return self.head(self.second(self.first(x)[0], state)[0][:, -1])


def test_alike_groups_fail_together():
    model = FixedState().eval()
    groups = groups_of(model, inputs())
    assert {group.name: group.alike for group in hidden(groups)} == {
        **dict.fromkeys(("first", "first#2"), "first"),
        **dict.fromkeys(("second", "second#2"), "second"),
    }
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert sorted(failed) == ["second", "second#2"]
    assert all("does not run" in reason for reason in failed.values())
    assert (model.first.hidden_size, model.second.input_size, model.second.hidden_size) == (2, 2, 6)
    assert model(inputs()).shape == (2, 2)


class Sized(nn.Module):
    """Zeros of the layer's own size, and a learned state, as initial states; both directions added to each other."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.state = nn.Parameter(torch.randn(1, 1, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        zeros = x.new_zeros(2, x.shape[0], self.lstm.hidden_size)
        forward, backward = self.lstm(x, (zeros, zeros))[0].chunk(2, 2)
        return self.head(self.gru(forward + backward, self.state.expand(-1, x.shape[0], -1))[0][:, -1])


def test_initial_states_that_follow():
    model = Sized().eval()
    groups = groups_of(model, inputs())
    assert {group.name: (group.size, group.reason) for group in hidden(groups)} == {"lstm": (6, ""), "gru": (6, "")}
    state = next(m for g in groups if g.name == "gru" for m in g.members if m.parameter == "state")
    assert (state.path, state.dim, state.indices[2]) == ("", 2, (2,))
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert failed == {}
    assert (model.lstm.hidden_size, model.gru.hidden_size, model.state.shape) == (4, 4, (1, 1, 4))


class Translator(nn.Module):
    """A decoder that begins with the final states of an encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(5, 6, 2, batch_first=True)
        self.decoder = nn.LSTM(5, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.decoder(x, self.encoder(x)[1])[0])


def test_a_decoder_follows_its_encoder():
    model = Translator().eval()
    groups = hidden(groups_of(model, inputs()))
    assert [(g.name, g.size, g.alike, g.reason) for g in groups] == [
        ("encoder", 6, "decoder", ""),
        ("encoder#2", 6, "decoder", ""),
    ]
    assert all({m.path for m in group.members} >= {"encoder", "decoder"} for group in groups)
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert failed == {}
    assert model.encoder.hidden_size == model.decoder.hidden_size == 4


class Sum(nn.Module):
    """Two modules whose outputs are added, and to a projection too."""

    def __init__(self, first, second, width):
        super().__init__()
        self.first, self.second = first, second
        self.project, self.head = nn.Linear(5, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head((self.first(x)[0] + self.second(x)[0] + self.project(x)).mean(1))


def test_modules_that_are_added_lose_the_same_units():
    model = Sum(nn.LSTM(5, 6, 2, batch_first=True), nn.LSTM(5, 6, 2, batch_first=True), 6).eval()
    groups = groups_of(model, inputs())
    assert [(g.name, g.kind, g.alike) for g in groups if not g.reason] == [
        ("first", "hidden", "first"),
        ("first#2", "hidden", "first"),
        ("second", "hidden", "first"),
    ]
    shared = next(g for g in groups if g.name == "first#2")
    assert {m.path for m in shared.members} == {"first", "second", "project", "head"}
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert failed == {}
    assert model.first.hidden_size == model.second.hidden_size == model.project.out_features == 4


def test_directions_that_meet_one_layer():
    """One layer of twelve units is added to six in each direction: equally many of both halves must go."""
    pair = nn.GRU(5, 6, batch_first=True, bidirectional=True), nn.GRU(5, 12, batch_first=True)
    model = Sum(*pair, 12).eval()
    groups = [g for g in groups_of(model, inputs()) if not g.reason]
    assert [(g.name, g.size, g.alike) for g in groups] == [("first", 6, "first"), ("first#2", 6, "first")]
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert failed == {}
    assert (model.first.hidden_size, model.second.hidden_size) == (4, 8)


def test_sets_that_are_grouped_differently_stay():
    """The second layer's units fall into two groups, the first layer's into one: no count would do for both."""
    pair = nn.GRU(5, 6, batch_first=True, bidirectional=True), nn.GRU(5, 12, 2, batch_first=True)
    found = hidden(groups_of(Sum(*pair, 12).eval(), inputs()))
    assert len(found) == 3
    assert all("grouped with others in different ways" in group.reason and not group.alike for group in found)


class Called(nn.Module):
    """A module called twice, a final state unused, and a residual around it."""

    def __init__(self):
        super().__init__()
        self.inlet, self.rnn, self.head = nn.Linear(5, 6), nn.GRU(6, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        y = self.inlet(x)
        y = y + self.rnn(y)[0]
        return self.head((y + self.rnn(y)[0])[:, -1])


def test_a_module_called_twice_and_a_residual():
    model = Called().eval()
    groups = [g for g in groups_of(model, inputs()) if not g.reason]
    assert [(g.name, g.size, g.kind, g.alike) for g in groups] == [
        ("inlet", 6, "hidden", "rnn"),
        ("rnn", 6, "hidden", "rnn"),
    ]
    _, failed = remove_units_(model, groups, choose(groups), inputs())
    assert failed == {}
    assert (model.rnn.input_size, model.rnn.hidden_size, model.inlet.out_features) == (4, 4, 4)


class Steps(nn.Module):
    """Cells called step by step, one fed by the other."""

    def __init__(self, bias):
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(5, 6, bias=bias), nn.GRUCell(6, 6, bias=bias)
        self.rnn, self.head = nn.RNNCell(6, 4, bias=bias, nonlinearity="relu"), nn.Linear(4, 2)

    def forward(self, x):
        state, h, last = None, None, None
        for step in range(x.shape[1]):
            state = self.lstm(x[:, step], state)
            h = self.gru(state[0], h)
            last = self.rnn(h + state[1], last)
        return self.head(last)


@pytest.mark.parametrize("bias", [True, False])
def test_cells(bias):
    torch.manual_seed(0)
    model = Steps(bias).eval()
    groups = groups_of(model, inputs())
    assert [(g.name, g.size, g.alike) for g in hidden(groups) if not g.reason] == [("lstm", 6, ""), ("rnn", 4, "")]
    removals = {"lstm": [0, 3], "rnn": [2]}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for cell, units in ((masked.lstm, [0, 3]), (masked.gru, [0, 3]), (masked.rnn, [2])):
            for weight in cell.parameters():
                for gate in range(len(weight) // cell.hidden_size):
                    weight[[unit + gate * cell.hidden_size for unit in units]] = 0
        _, failed = remove_units_(model, groups, removals, inputs())
        assert failed == {}
        assert [(c.input_size, c.hidden_size) for c in (model.lstm, model.gru, model.rnn)] == [(5, 4), (4, 4), (4, 3)]
        assert torch.allclose(model(inputs()), masked(inputs()), atol=1e-6)


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x, state):
        return self.head(self.rnn(x, state.transpose(0, 1))[0])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.head = nn.LSTM(5, 6, 2, batch_first=True), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0]))


def computed():
    model = reader("GRU", batch_first=True)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


KEPT = {
    "output": (lambda: nn.LSTM(5, 6, 2, batch_first=True), inputs, "reaches the model's output"),
    "given": (Given, lambda: (inputs(), torch.randn(2, 2, 6)), "given by the caller"),
    "projected": (lambda: reader(proj_size=3, width=3, batch_first=True), inputs, "proj_size"),
    "normed": (Normed, inputs, "layer_norm"),
    "computed": (computed, inputs, "computed, not parameters"),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", sorted(KEPT))
def test_reasons(case):
    make, example, words = KEPT[case]
    found = reasons(make().eval(), example())
    names = [name for name in found if name.split("#")[0] in ("rnn", "")]
    assert names
    assert all(words in found[name] for name in names)


def test_one_layer_that_stays_keeps_the_others():
    found = reasons(Normed().eval(), inputs())
    assert found["rnn"] == f"one size with units that must stay: {found['rnn#2']}"


def test_packed_sequences_are_not_followed():
    """The modules of PyTorch cannot be exported with packed sequences today; a graph can hold them."""
    graph = torch.fx.Graph()
    data, sizes, h, c, w, u = (graph.placeholder(name) for name in ("data", "sizes", "h", "c", "w", "u"))
    lstm = graph.call_function(torch.ops.aten.lstm.data, (data, sizes, [h, c], [w, u], False, 1, 0.0, False, False), {})
    graph.output((lstm,))
    shapes = dict.fromkeys((h, c), (1, 3, 6)) | {data: (5, 5), sizes: (2,), w: (24, 5), u: (24, 6)}
    for node, shape in shapes.items():
        node.meta["val"] = torch.empty(shape)
    lstm.meta["val"] = torch.empty(5, 6), torch.empty(1, 3, 6), torch.empty(1, 3, 6)
    owners = {"w": (("rnn", "weight_ih_l0"),), "u": (("rnn", "weight_hh_l0"),)}
    program = SimpleNamespace(graph=graph)
    made = SimpleNamespace(program=program, owners=owners, modules={"lstm": "rnn", "lstm_data": "rnn"}, module=None)
    assert all("packed sequences" in group.reason for group in coupled_groups(made))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_identity_flat_weights_rebuild_and_copy(kind, tmp_path):
    model = reader(kind, num_layers=2, bidirectional=True, batch_first=True)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    groups = groups_of(model)
    edits, _ = remove_units_(model, groups, choose(groups), inputs())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    named = [getattr(model.rnn, name) for names in model.rnn._all_weights for name in names]
    assert all(flat is parameter for flat, parameter in zip(model.rnn._flat_weights, named, strict=True))
    save_structure(tmp_path, model, edits)
    again = rebuild(tmp_path, lambda: reader(kind, num_layers=2, bidirectional=True, batch_first=True)).eval()
    assert repr(again) == repr(model)
    with torch.no_grad():
        assert torch.equal(again(inputs()), model(inputs()))
        assert torch.equal(copy.deepcopy(model)(inputs()), model(inputs()))
