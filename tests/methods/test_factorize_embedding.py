"""Embeddings by a narrower table and a projection: the error, frequent rows, the padding row, what is left alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.graph import rebuild, save_structure
from trimpoint.methods.factorize_embedding import FactorizeEmbedding
from trimpoint.plan import Plan
from trimpoint.task import Task


class Reader(nn.Module):
    """Tokens `[batch, 5]` to numbers `[batch, 16]`."""

    def __init__(self, **more):
        super().__init__()
        self.words = nn.Embedding(60, 16, **more)

    def forward(self, ids):
        return self.words(ids).mean(1)


def make(**more):
    torch.manual_seed(0)
    return Reader(**more).eval()


@pytest.fixture
def task():
    ids = torch.randint(0, 10, (30, 5), generator=torch.Generator().manual_seed(0))
    return Task(calibrate=TensorDataset(ids, torch.zeros(30)), batch_size=8)


def apply(method, model, task):
    return compress(model, Plan().then(method), task)


def table(compressed):
    return compressed.module.words(torch.arange(60)).detach()


def reasons(compressed):
    return {change.origin: change.reason for change in compressed.changes if change.kind == "skipped"}


def test_plain_truncation_leaves_the_tail_that_numpy_finds(task):
    model = make()
    compressed = apply(FactorizeEmbedding(weighting="none"), model, task)
    weight, rank = model.words.weight.detach().numpy(), compressed.module.words[0].embedding_dim
    assert rank == int(0.5 * 60 * 16 / 76)
    tail = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[rank:])
    assert np.linalg.norm(weight - table(compressed).numpy()) == pytest.approx(tail, rel=1e-4)
    assert compressed.module.words[1].bias is None


def test_rows_that_are_read_are_kept_best(task):
    model = make()
    errors = {
        weighting: (table(apply(FactorizeEmbedding(weighting=weighting), model, task)) - model.words.weight)
        .detach()
        .norm(dim=1)
        for weighting in ("none", "frequency")
    }
    assert errors["frequency"][:10].mean() < 0.7 * errors["none"][:10].mean()
    assert errors["frequency"][10:].max() < 1.5 * model.words.weight.norm(dim=1).max()


def test_rows_that_are_never_read_weigh_little(task):
    """Where the rows that are read fill other directions than the many that never are, the rank is for the former."""
    model = make()
    with torch.no_grad():
        model.words.weight[:10, 8:] = 0
        model.words.weight[10:, :8] = 0
    errors = (table(apply(FactorizeEmbedding(), model, task)) - model.words.weight).detach().square().sum(1)
    tail = np.linalg.svd(model.words.weight.detach().numpy()[:10], compute_uv=False)[6:]
    assert float(errors[:10].sum()) < 1.5 * float((tail**2).sum())


def test_the_note_says_what_weighted(task):
    class Deaf(Reader):
        def forward(self, ids):
            return self.words(ids * 0 + 5).mean(1)

    def note(model, task=task):
        return apply(FactorizeEmbedding(), model, task).changes[0].reason

    assert "weighted by frequency, 10 of 60 rows are read" in note(make())
    assert "weighted by frequency, 1 of 60 rows are read" in note(Deaf().eval())
    assert "plain: the task has no `calibrate` data" in note(
        make(), task=Task(example=torch.zeros(5, dtype=torch.long))
    )


def test_variational_bayes_that_finds_nothing_leaves_the_table_alone(task):
    assert "stands out of the noise" in reasons(apply(FactorizeEmbedding(rank="bayes"), make(), task))["words"]


class Masked(Reader):
    """Tokens and where they are, both `[batch, length]`, to numbers `[batch, 16]`."""

    def forward(self, input_ids, attention_mask):
        return (self.words(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def masked_task(width):
    """Return sentences of 3 to 5 tokens, padded by zeros to `width`; or, for 5, the same tokens without padding."""
    ids = torch.randint(1, 10, (30, 5), generator=torch.Generator().manual_seed(0))
    rows = [ids[index, : 3 + index % 3] for index in range(30)]
    rows = list(torch.cat(rows).split(5)) if width == 5 else [F.pad(row, (0, width - len(row))) for row in rows]
    return Task(
        calibrate=[({"input_ids": row, "attention_mask": (row != 0).long()}, 0.0) for row in rows], batch_size=8
    )


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = Masked().eval()
    padded, plain = (apply(FactorizeEmbedding(), model, masked_task(width)) for width in (12, 5))
    assert torch.equal(table(padded), table(plain))
    (change,) = padded.changes
    assert "9 of 60 rows are read" in change.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["none", "frequency"])
def test_the_row_of_the_padding_stays_zero(task, dtype, weighting):
    model = make(padding_idx=3).to(dtype)
    compressed = apply(FactorizeEmbedding(weighting=weighting), model, task)
    assert not table(compressed)[3].any()
    assert table(compressed)[4].any()
    assert compressed.module.words.padding_idx == 3
    assert table(compressed).dtype == dtype


def test_negative_padding_index(task):
    assert not table(apply(FactorizeEmbedding(), make(padding_idx=-1), task))[59].any()


@pytest.mark.parametrize(
    ("more", "words"), [({"max_norm": 1.0}, "limits the norm"), ({"sparse": True}, "sparse"), ({}, "")]
)
def test_embeddings_that_do_more(task, more, words):
    assert words in reasons(apply(FactorizeEmbedding(), make(**more), task)).get("words", "")


def test_tied_embeddings_are_left_alone(task):
    model = make()
    model.out = nn.Linear(16, 60, bias=False)
    model.out.weight = model.words.weight
    compressed = apply(FactorizeEmbedding(), model, task)
    assert "shares its weight" in reasons(compressed)["words"]
    assert compressed.module.out.weight is compressed.module.words.weight


def test_what_would_not_become_smaller_is_left_alone(task):
    assert "below round_to=16" in reasons(apply(FactorizeEmbedding(round_to=16), make(), task))["words"]
    assert "no fewer" in reasons(apply(FactorizeEmbedding(rank="energy", energy=1.0), make(), task))["words"]
    assert "rank_ratio=1" in reasons(apply(FactorizeEmbedding(rank_ratio=1.0), make(), task))["words"]


def test_without_calibration_data(task):
    lacking = Task(example=torch.zeros(5, dtype=torch.long))
    plain = apply(FactorizeEmbedding(weighting="none"), make(), task)
    assert torch.equal(table(apply(FactorizeEmbedding(), make(), lacking)), table(plain))
    with pytest.raises(DataError, match=r"needs `calibrate` data[\s\S]*hint"):
        apply(FactorizeEmbedding(weighting="frequency"), make(), lacking)


def test_the_result_is_saved_and_made_again(task, tmp_path):
    compressed = apply(FactorizeEmbedding(), make(), task)
    save_structure(tmp_path, compressed.module, compressed.edits)
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(rebuild(tmp_path, make)(ids), compressed.module(ids))


@pytest.mark.parametrize("wrong", [{"rank_ratio": 0}, {"weighting": "activation"}, {"round_to": 0}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        FactorizeEmbedding(**wrong)
