"""Which rows go, what the others cost, and that the model takes the ids it always took."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError, ModelError
from trimpoint.graph import rebuild, save_structure
from trimpoint.graph.layers import PrunedVocabulary
from trimpoint.measure.inputs import core_inputs
from trimpoint.methods.prune_vocabulary import PruneVocabulary
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.target import Target
from trimpoint.task import Task, cross_entropy

WORDS = 400


class Classifier(nn.Module):
    """Tokens `[batch, 6]` to logits `[batch, 3]`; positions have an embedding of their own."""

    def __init__(self, padding_idx=None, tied=False):
        super().__init__()
        self.words = nn.Embedding(WORDS, 16, padding_idx=padding_idx)
        self.places = nn.Embedding(300, 16)
        self.head = nn.Linear(16, 3)
        self.again = nn.Linear(16, WORDS, bias=False)
        if tied:
            self.again.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(x.mean(1)) + self.again(x).mean((1, 2), keepdim=True)[:, 0]


def ids(low, high, count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 6), generator=generator)


def dataset(x):
    return TensorDataset(x, x.sum(1) % 3)


@pytest.fixture
def task():
    return Task(
        train=dataset(ids(10, 40)),
        calibrate=dataset(ids(30, 50, seed=1)),
        select=dataset(torch.cat([ids(10, 50, seed=2), ids(200, 210, seed=3)])),
        loss=cross_entropy,
        batch_size=8,
    )


def seen(task):
    return sorted({int(i) for role in ("train", "calibrate") for x, _ in task.data(role) for i in x})


def made(model, task, **params):
    with torch.random.fork_rng(devices=[]):
        return compress(model, Plan().then(PruneVocabulary(**params)), task)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().eval()


def test_what_was_seen_gives_the_same_answers(model, task):
    result = made(model, task)
    assert isinstance(result.module.words, PrunedVocabulary)
    assert result.module.words.rows == len(seen(task))
    assert torch.equal(result.module(ids(30, 40)), model(ids(30, 40)))
    assert torch.equal(result.module.words.table.weight, model.words.weight[seen(task)])
    assert torch.equal(result.module.places.weight, model.places.weight)


def test_what_was_not_seen_reads_the_most_similar_row(model, task):
    known = seen(task)
    with torch.no_grad():
        model.words.weight[200] = 2 * model.words.weight[known[5]]
    result = made(model, task)
    assert result.module.words.rows == len(known)
    assert torch.equal(result.module.words(torch.tensor([200]))[0], model.words.weight[known[5]])
    centred = model.words.weight - model.words.weight.mean(0)
    similar = nn.functional.cosine_similarity(centred[:, None], centred[None, known], dim=2).argmax(1)
    read = result.module.words(torch.arange(WORDS))
    expected = model.words.weight[torch.tensor(known)[similar]]
    gone = [i for i in range(WORDS) if i not in known]
    assert torch.equal(read[gone], expected[gone])


def test_padding_is_similar_to_nothing(task):
    torch.manual_seed(0)
    result = made(Classifier(padding_idx=0).eval(), task)
    words = result.module.words
    assert int((words.remap == words.padding_row).sum()) == 1


def test_what_was_not_seen_is_the_mean_of_what_went(model, task):
    result = made(model, task, others="mean")
    gone = [i for i in range(WORDS) if i not in seen(task)]
    expected = model.words.weight[gone].mean(0)
    for unknown in (gone[0], gone[-1]):
        assert torch.allclose(result.module.words(torch.tensor([unknown]))[0], expected, atol=1e-6)


def test_the_cost_is_told(model, task):
    (change,) = [c for c in made(model, task).changes if c.origin == "words"]
    known = set(seen(task))
    x = torch.stack([x for x, _ in task.data("select")])
    share = np.mean([int(i) not in known for i in x.flatten()])
    assert share >= 0.5
    assert f"{share:.2%} of the ids in `select` are unknown now" in change.reason
    assert f"{WORDS - len(known)} of {WORDS} rows go" in change.reason


def test_rare_words_go_as_well(model, task):
    counts = torch.bincount(torch.cat([x for role in ("train", "calibrate") for x, _ in task.data(role)]))
    result = made(model, task, min_count=6)
    assert result.module.words.rows == int((counts >= 6).sum())


def test_an_id_of_ones_own_stands_for_the_unknown(model, task):
    result = made(model, task, unknown=3)
    assert result.module.words.rows == len(seen(task)) + 1
    assert torch.equal(result.module.words(torch.tensor([399]))[0], model.words.weight[3])


def test_padding_stays_without_gradient(task):
    torch.manual_seed(0)
    result = made(Classifier(padding_idx=0).eval(), task)
    row = result.module.words.table.padding_idx
    assert torch.equal(result.module.words(torch.tensor([0]))[0], torch.zeros(16))
    result.module(torch.zeros(2, 6, dtype=torch.long)).sum().backward()
    assert torch.equal(result.module.words.table.weight.grad[row], torch.zeros(16))


@pytest.mark.parametrize(
    ("origin", "reason"), [("places", "is no input of the model"), ("words", "is tied to another layer's")]
)
def test_what_stays_has_a_reason(task, origin, reason):
    (change,) = [c for c in made(Classifier(tied=True).eval(), task).changes if c.origin == origin]
    assert change.kind == "skipped"
    assert reason in change.reason


def test_a_table_that_would_be_larger_is_not_made(model, task):
    wide = task.with_(train=dataset(torch.arange(396).reshape(66, 6)))
    (change,) = [c for c in made(model, wide).changes if c.origin == "words"]
    assert change.kind == "skipped"
    assert "would be larger" in change.reason


def test_it_is_rebuilt_and_runs_in_the_runtime(model, task, tmp_path):
    result = made(model, task)
    save_structure(tmp_path / "rebuilt", result.module, result.edits)
    x = ids(0, WORDS)
    assert torch.equal(rebuild(tmp_path / "rebuilt", Classifier).eval()(x), result.module(x))
    inputs, runtime = core_inputs(model, task, Target()), get_runtime("onnxruntime")
    sizes = {}
    for name, module in (("before", model), ("after", result.module)):
        exported = export(module, inputs.example, inputs.dims)
        (tmp_path / name).mkdir()
        lowered = runtime.lower(exported, tmp_path / name)
        session = runtime.open(tmp_path / name, lowered, threads=1)
        with torch.no_grad():
            assert np.allclose(session(x[:1].numpy()), module(x[:1]).numpy(), atol=1e-5)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    assert sizes["after"] < sizes["before"] - 15_000


def test_bad_input(model, task):
    with pytest.raises(DataError, match="needs `train` data"):
        made(model, task.with_(train=None))
    with pytest.raises(InvalidParameterError, match="min_count"):
        PruneVocabulary(min_count=-1)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.words(ids.clamp(max=60)).mean(1))


def test_ids_that_are_an_input_in_the_first_samples_only_stay(task):
    rare = task.with_(calibrate=dataset(torch.cat([ids(30, 50), ids(70, 80, count=2)])))
    (change,) = [c for c in made(Clamped().eval(), rare).changes if c.origin == "words"]
    assert change.kind == "skipped"
    assert "is no input of the model as it is" in change.reason


def test_an_unknown_id_that_an_embedding_has_not_leaves_it_alone(model, task):
    (change,) = [c for c in made(model, task, unknown=900).changes if c.origin == "words"]
    assert "it has no id 900" in change.reason


@pytest.mark.parametrize("bad", [-1, WORDS])
def test_ids_that_were_refused_are_refused(model, task, bad):
    with pytest.raises(IndexError):
        made(model, task).module(torch.full((1, 6), bad))


def test_a_row_far_from_all_others_still_reads_no_padding(task):
    torch.manual_seed(0)
    model = Classifier(padding_idx=0).eval()
    with torch.no_grad():
        model.words.weight[200] = -model.words.weight[seen(task)].mean(0)
        model.words.weight[10:50] = model.words.weight[10] + 1e-3 * torch.randn(40, 16)
    words = made(model, task).module.words
    assert int((words.remap == words.padding_row).sum()) == 1


class Masked(nn.Module):
    def __init__(self, padding_idx=None):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 16, padding_idx=padding_idx), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.words(input_ids).mean(1))


@pytest.mark.parametrize("told_by", ["mask", "padding_idx"])
def test_padding_does_not_dilute_the_share_of_unknown_ids(told_by):
    """Two words and 18 paddings in each sample; one of the two words was never seen in training."""

    def padded(second):
        x = torch.zeros(16, 20, dtype=torch.long)
        x[:, 0], x[:, 1] = 5, second
        if told_by == "padding_idx":
            return dataset(x)
        return [({"input_ids": row, "attention_mask": (row != 0).long()}, torch.tensor(0)) for row in x]

    torch.manual_seed(0)
    data = Task(train=padded(6), calibrate=padded(6), select=padded(200), loss=cross_entropy, batch_size=8)
    result = made(Masked(padding_idx=0 if told_by == "padding_idx" else None).eval(), data)
    (change,) = [c for c in result.changes if c.origin == "words"]
    assert "50.00% of the ids in `select` are unknown now" in change.reason
    assert result.module.words.rows == 3  # the row of padding is read, masked or not


@pytest.mark.parametrize("params", [{}, {"others": "mean"}, {"unknown": 3}])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_a_count_that_no_id_reaches_leaves_the_embedding_alone(task, params, padding_idx):
    (change,) = [
        c for c in made(Classifier(padding_idx).eval(), task, min_count=10**6, **params).changes if c.origin == "words"
    ]
    assert change.kind == "skipped"
    assert "no id but padding occurs 1,000,000 times" in change.reason


@pytest.mark.parametrize("bad", [-100, WORDS])
def test_ids_that_no_embedding_has_are_told(model, task, bad):
    x = ids(10, 40)
    x[4, 2] = bad
    with pytest.raises(DataError, match=rf"An id of the `train` data must be in \[0, {WORDS}\).* Got {bad}"):
        made(model, task.with_(train=TensorDataset(x, torch.zeros(24, dtype=torch.long))))


@pytest.mark.parametrize("role", ["calibrate", "select"])
def test_ids_that_no_embedding_has_in_other_data_are_told(model, task, role):
    x = ids(10, 40)
    x[4, 2] = WORDS
    with pytest.raises(ModelError, match=r"does not run on a batch of \[.*\] int64: IndexError: index out of range"):
        made(model, task.with_(**{role: TensorDataset(x, torch.zeros(24, dtype=torch.long))}))
