"""Which heads go, that only they go, and that modules are replaced only where heads go."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from tests.graph.attentions import HEADS, LENGTH, WIDTH, Plain, Talking, make, strengthen
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.context import _Context
from trimpoint.errors import DataError, InvalidParameterError, ModelError
from trimpoint.filters import Glob, Type
from trimpoint.graph import PrunedAttention, rebuild, save_structure
from trimpoint.losses import squared_error
from trimpoint.methods.prune_heads import PruneHeads, contribution
from trimpoint.plan import Plan, Step
from trimpoint.task import Task


def rows_task(module):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, LENGTH, WIDTH, generator=generator)
    with torch.no_grad():
        shape = module(inputs).shape
    data = TensorDataset(inputs, torch.randn(shape, generator=generator))
    return Task(train=data, calibrate=data, loss=squared_error, batch_size=4)


@pytest.fixture
def encoder():
    return make("encoder")[0]


@pytest.fixture
def task(encoder):
    return rows_task(encoder)


def prune(model, task, where="*", **params):
    return compress(model, Plan((Step(PruneHeads(**params), Glob(where)),)), task)


def silence(model, path, heads):
    """Put zeros where the output projection of an `nn.MultiheadAttention` reads the heads, in place."""
    attention = model.get_submodule(path)
    size = attention.head_dim
    for head in heads:
        attention.out_proj.weight.data[:, head * size : (head + 1) * size] = 0


def strongest(model, path, order):
    """Make head `order[-1]` the most important one of an attention and `order[0]` the least, in place."""
    attention = model.get_submodule(path)
    size = attention.head_dim
    for rank, head in enumerate(order):
        rows = slice(head * size, (head + 1) * size)
        attention.out_proj.weight.data[:, rows] *= 0.2 * (1 + rank)
        for part in range(3):
            start = part * attention.embed_dim
            attention.in_proj_weight.data[start + rows.start : start + rows.stop] *= 0.2 * (1 + rank)


def kinds(compressed):
    return {change.origin: change.kind for change in compressed.changes}


def test_half_of_the_heads_of_an_encoder(encoder, task):
    strongest(encoder, "layers.0.self_attn", [2, 0, 3, 1])
    strongest(encoder, "layers.1.self_attn", [1, 3, 0, 2])
    before = copy.deepcopy(encoder.state_dict())
    result = prune(encoder, task, ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    small = result.module
    for layer in small.layers:
        assert isinstance(layer.self_attn, PrunedAttention)
        assert (layer.self_attn.num_heads, layer.self_attn.head_dim) == (HEADS // 2, WIDTH // HEADS)
        assert layer.self_attn.q_proj.weight.shape == (WIDTH // 2, WIDTH)
    expected = copy.deepcopy(encoder)
    silence(expected, "layers.0.self_attn", [2, 0])
    silence(expected, "layers.1.self_attn", [1, 3])
    x = torch.randn(3, LENGTH, WIDTH)
    torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.train()(x).shape, x.shape)
    assert kinds(result)["layers.0.self_attn"] == "replaced"


def test_modules_without_a_loss_stay_what_they_are(encoder, task):
    strongest(encoder, "layers.0.self_attn", [0, 1, 2, 3])
    result = prune(encoder, task, where="layers.0.*", ratio=0.25)
    assert isinstance(result.module.layers[0].self_attn, PrunedAttention)
    assert result.module.layers[0].self_attn.num_heads == 3
    assert type(result.module.layers[1].self_attn) is nn.MultiheadAttention
    result = prune(encoder, task, ratio=0.2)
    assert type(result.module.layers[0].self_attn) is nn.MultiheadAttention
    assert kinds(result)["layers.0.self_attn"] == "skipped"


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "contribution"])
def test_global_ranking_takes_the_weak_heads_and_leaves_one(importance):
    model = strengthen(nn.Sequential(Plain(), nn.Linear(3, WIDTH), Plain()))
    for path, scales in (("0.attention", (1, 1, 1, 1)), ("2.attention", (1e-3, 1e-3, 1e-3, 1e-3))):
        for head, scale in enumerate(scales):
            silence_by(model.get_submodule(path), head, scale * (1 + 0.01 * head))
    strong = model.get_submodule("0.attention")
    silence_by(strong, 2, 1e-3)
    result = prune(model, rows_task(model), ratio=0.25, scope="global", importance=importance)
    left = [part.num_heads for part in result.module.modules() if isinstance(part, PrunedAttention)]
    kept = [part.num_heads for part in result.module.modules() if isinstance(part, nn.MultiheadAttention)]
    assert sum(left) + sum(kept) == 2 * HEADS - 2
    assert min(left) >= 1


def silence_by(attention, head, scale):
    size = attention.head_dim
    attention.out_proj.weight.data[:, head * size : (head + 1) * size] *= scale
    for part in range(3):
        start = part * attention.embed_dim + head * size
        attention.in_proj_weight.data[start : start + size] *= scale


def test_one_head_of_each_stays(encoder, task):
    result = prune(encoder, task, ratio=0.99, scope="global")
    assert [layer.self_attn.num_heads for layer in result.module.layers] == [1, 1]
    result = prune(encoder, task, ratio=0.99)
    assert [layer.self_attn.num_heads for layer in result.module.layers] == [1, 1]


class Contributing(nn.Module):
    """Attention over one position: each head adds its values, times the output projection."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4, bias=False) for _ in range(4))
        with torch.no_grad():
            self.v.weight.copy_(torch.eye(4))
            self.out.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 2.0, 3.0])))

    def forward(self, x):
        q, k, v = (part(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)).flatten(1).sum(1, keepdim=True)


def test_contribution_is_the_norm_of_what_a_head_adds():
    model = Contributing().eval()
    inputs = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 0.0, 0.0, 1.0]]).view(2, 1, 4)
    task = Task(calibrate=[(x, torch.zeros(1)) for x in inputs], loss=squared_error, batch_size=1)
    ctx = _Context(Build(module=model, given=model, task=task), Step(PruneHeads()), 0, 0)
    groups = [group for group in ctx.groups() if group.kind == "heads"]
    (found,) = contribution(ctx, groups).values()
    expected = [((1 + 4 + 9) / 2) ** 0.5, ((4 + 36 + 9) / 2) ** 0.5]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    result = prune(model, task, importance="contribution")
    assert result.module.v.weight.tolist() == torch.eye(4)[2:].tolist()


def test_contribution_of_multihead_attention_is_seen(encoder, task):
    silence(encoder, "layers.0.self_attn", [1])
    silence(encoder, "layers.1.self_attn", [3])
    result = prune(encoder, task, ratio=0.25, importance="contribution")
    x = torch.randn(2, LENGTH, WIDTH)
    assert [layer.self_attn.num_heads for layer in result.module.layers] == [3, 3]
    torch.testing.assert_close(result.module(x), encoder(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("importance", ["contribution", "taylor"])
def test_data_is_asked_for(encoder, task, importance):
    bare = Task(train=task.train, loss=squared_error)
    with pytest.raises(DataError, match="calibrate"):
        prune(encoder, bare, importance=importance)


def test_what_stays_has_a_reason(encoder, task):
    result = prune(encoder, task, ratio=0.0)
    assert {change.reason for change in result.changes if change.origin.endswith("self_attn")} == {"the ratio is 0"}
    result = prune(encoder, task, ratio=0.5)
    reasons = {change.origin: change.reason for change in result.changes}
    assert reasons["layers.0.linear1"] == "its units are channels, no attention heads"
    model = strengthen(Plain(add_zero_attn=True))
    result = prune(model, rows_task(model))
    assert type(result.module.attention) is nn.MultiheadAttention
    model = strengthen(nn.Sequential(Plain(), nn.Linear(3, WIDTH), Plain()))
    model[2].attention.out_proj.weight = model[0].attention.out_proj.weight
    result = prune(model, rows_task(model))
    assert all(type(result.module[i].attention) is nn.MultiheadAttention for i in (0, 2))


class Around(nn.Module):
    """A model whose core is exported, and one attention under two names."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, x, target=None):
        y = self.core(x)
        return y if target is None else (y - target).square().mean()


def test_paths_are_those_of_the_whole_model():
    model = strengthen(Around(make("fused")[0]))
    data = [(torch.randn(LENGTH, WIDTH), torch.randn(LENGTH, WIDTH)) for _ in range(4)]
    around = {"step": lambda model, batch: model(*batch), "predict": lambda run, inputs: run(inputs)}
    task = Task(calibrate=data, core="core", batch_size=2, **around)
    result = prune(model, task, importance="taylor")
    assert (result.module.core.num_heads, result.module.core.qkv.out_features) == (2, 3 * WIDTH // 2)
    assert kinds(result)["core.qkv"] == "resized"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.again = self.first

    def forward(self, x):
        x = x + self.first(x, x, x, need_weights=False)[0]
        return x + self.again(x, x, x, need_weights=False)[0]


def test_a_shared_attention_stays_shared():
    model = strengthen(Twice())
    result = prune(model, rows_task(model), ratio=0.5, importance="contribution")
    small = result.module
    assert small.first is small.again
    assert small.first.num_heads == 2


def test_twice_in_a_row_takes_more(encoder, task):
    plan = Plan((Step(PruneHeads(ratio=0.25)), Step(PruneHeads(ratio=0.5))))
    small = compress(encoder, plan, task).module
    assert [layer.self_attn.num_heads for layer in small.layers] == [2, 2]


def test_returned_weights_are_a_reason():
    model = strengthen(Talking())
    data = [(torch.randn(LENGTH, WIDTH), torch.zeros(1)) for _ in range(4)]
    task = Task(calibrate=data, loss=lambda outputs, targets: outputs[0].mean() + 0 * targets.sum(), batch_size=2)
    result = prune(model, task)
    assert type(result.module.attention) is nn.MultiheadAttention
    assert "mean" in next(change.reason for change in result.changes if change.origin == "attention")


def test_of_transformers_and_back_from_a_file(tmp_path):
    model, inputs = make("bert")
    data = [({name: value[i] for name, value in inputs.items()}, i) for i in (0, 1)]
    task = Task(calibrate=data, batch_size=2, loss=lambda outputs, targets: outputs["logits"].sum() + 0 * targets.sum())
    result = prune(model, task, ratio=0.5, importance="taylor")
    attention = result.module.bert.encoder.layer[0].attention
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (2, 12)
    assert attention.output.dense.weight.shape == (WIDTH, 12)
    assert model.config.num_attention_heads == result.module.config.num_attention_heads == HEADS
    save_structure(tmp_path, result.module, result.edits)
    again = rebuild(tmp_path, lambda: make("bert")[0]).eval()
    assert torch.equal(again(**inputs)["logits"], result.module(**inputs)["logits"])


@pytest.mark.filterwarnings("ignore")
def test_the_exported_file_computes_the_same(encoder, task, tmp_path):
    small = prune(encoder, task).module
    x = torch.randn(2, LENGTH, WIDTH)
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, small(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_bfloat16_heads_go_too(encoder, task):
    model = encoder.bfloat16()
    data = [(x.bfloat16(), y) for x, y in (task.calibrate[i] for i in range(4))]
    result = prune(model, Task(calibrate=data, loss=squared_error, batch_size=2))
    assert result.module.layers[0].self_attn.num_heads == 2
    assert {p.dtype for p in result.module.parameters()} == {torch.bfloat16}


def test_forecast_names_the_projections(encoder, task):
    groups = Build(module=encoder, given=encoder, task=task).groups()
    shares = PruneHeads(ratio=0.5).forecast(encoder, (), groups)
    assert shares["layers.0.self_attn"] == 0.5  # and of its output projection as well
    assert "layers.0.linear1" not in shares
    assert PruneHeads(ratio=0.1).forecast(encoder, (), groups) == {}


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"ratio": -0.1}, {"scope": "both"}, {"importance": "confidence"}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError):
        PruneHeads(**wrong)


class Local(nn.Module):
    """Attention with a temperature, or a window, that happens to equal the number or the width of the heads."""

    def __init__(self, window, infinite):
        super().__init__()
        self.num_heads, self.embed_dim, self.window_size, self.infinite = 4, 32, window, infinite
        self.enter = nn.Linear(8, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.enter(x)
        b, n, _ = x.shape
        heads = 4 if self.window_size is None else self.num_heads
        q, k, v = (p(x).view(b, n, -1 if self.window_size is None else heads, 8).transpose(1, 2) for p in self.qkv())
        scores = q @ k.mT / self.num_heads if self.window_size is None else q @ k.mT
        if self.window_size is not None:
            place = torch.arange(n)
            near = (place[:, None] - place[None]).abs() < self.window_size
            scores = scores.masked_fill(~near, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)
        mixed = mixed.flatten(2) if self.window_size is None else mixed.reshape(b, n, self.embed_dim)
        y = self.head(x + self.o(mixed))
        return y.masked_fill(torch.tensor([False, False, True]), float("-inf")) if self.infinite else y

    def qkv(self):
        return self.q, self.k, self.v


@pytest.mark.parametrize("infinite", [False, True])
def test_a_temperature_that_equals_the_number_of_heads_stays(infinite):
    torch.manual_seed(0)
    data = [(torch.randn(8, 8), torch.tensor(i % 3)) for i in range(8)]
    model = Local(None, infinite).eval()
    made = compress(model, Plan().then(PruneHeads()), Task.classification(data, data)).module
    assert made.q.out_features == 16
    assert made.num_heads == 4


def test_a_window_that_equals_the_width_of_the_heads_stays():
    torch.manual_seed(0)
    data = [(torch.randn(8, 8), torch.tensor(i % 3)) for i in range(8)]
    made = compress(Local(32, False).eval(), Plan().then(PruneHeads()), Task.classification(data, data)).module
    assert (made.num_heads, made.embed_dim, made.window_size) == (2, 16, 32)


def test_heads_of_modules_that_a_filter_names_by_class_go():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()
    data = [(torch.randn(6, 8), torch.zeros(6, 3)) for _ in range(8)]
    task = Task(train=data, calibrate=data, loss=squared_error)
    made = compress(model, Plan((Step(PruneHeads(), Type("MultiheadAttention")),)), task).module
    assert [part.num_heads for part in made.modules() if isinstance(part, PrunedAttention)] == [2, 2]


def test_contributions_that_are_not_finite_rank_nothing(encoder, task):
    x = torch.full((8, LENGTH, WIDTH), torch.nan)
    bad = task.with_(calibrate=TensorDataset(x, torch.zeros(8)))
    with pytest.raises(ModelError, match=r"importance 'contribution' of the group .* that are not finite"):
        compress(encoder, Plan().then(PruneHeads(importance="contribution")), bad)
