"""Wanda against its formula, SparseGPT against the optimal brain surgeon done literally."""

import pytest
import torch

from trimpoint.sparsity.one_shot import sparsegpt, wanda


def problem(rows=6, columns=16, samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator).double()
    x = torch.randn(samples, columns, generator=generator).double() @ mixing
    return torch.randn(rows, columns, generator=generator), x


def output_error(weight, new, x):
    return float(((weight.double() - new.double()) @ x.T).norm())


def brain_surgeon(weight, products, ratio, pattern, damping, block):
    """Go through the columns one by one, with the whole inverse of what is left updated after each.

    Choice and update for a weight w of column j with the inverse H of the columns from j on: the loss of removing it is
    w² / H₀₀, and the weights behind it change by −w / H₀₀ · H₀.
    """
    rows, columns = weight.shape
    new, gone = weight.double().clone(), torch.zeros(rows, columns, dtype=torch.bool)
    inverse = torch.linalg.inv(products + damping * products.diagonal().mean() * torch.eye(columns).double())
    inverses = []
    for _ in range(columns):
        inverses.append(inverse)
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
    for j in range(columns):
        size = pattern[1] if pattern else block
        if j % size == 0:
            losses = torch.stack([new[:, k] ** 2 / inverses[k][0, 0] for k in range(j, min(j + size, columns))], 1)
            if pattern:
                for row in range(rows):
                    for k in losses[row].argsort()[: pattern[1] - pattern[0]]:
                        gone[row, j + k] = True
            else:
                total = round(ratio * rows * min(j + size, columns)) - round(ratio * rows * j)
                for k in losses.reshape(-1).argsort()[:total]:
                    gone[k // losses.shape[1], j + k % losses.shape[1]] = True
        for row in range(rows):
            if gone[row, j]:
                new[row, j:] -= new[row, j] / inverses[j][0, 0] * inverses[j][0]
                new[row, j] = 0.0
    return new, gone


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern, block):
    weight, x = problem()
    expected, gone = brain_surgeon(weight, x.T @ x, 0.5, pattern, 0.01, block)
    new, removed = sparsegpt(weight, x.T @ x, 48, pattern, block=block)
    assert torch.equal(removed, gone)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-8)
    assert bool((new[removed] == 0).all())


@pytest.mark.parametrize("count", [0, 1, 48, 86, 96])
def test_sparsegpt_removes_exactly_so_many(count):
    weight, x = problem()
    for block in (3, 5, 16, 128):
        assert int(sparsegpt(weight, x.T @ x, count, block=block)[1].sum()) == count


def test_sparsegpt_loses_less_output_than_magnitude_and_wanda():
    for seed in range(5):
        weight, x = problem(rows=24, columns=64, seed=seed)
        x = x @ torch.diag(torch.arange(1, 65).double() ** -1.0) @ torch.linalg.qr(x[:64])[0]
        products = x.T @ x
        new, _ = sparsegpt(weight, products, 24 * 32)
        by_wanda = weight.masked_fill(wanda(weight, products.diagonal(), 0.5), 0.0)
        limit = weight.abs().reshape(-1).median()
        by_magnitude = weight.masked_fill(weight.abs() <= limit, 0.0)
        assert output_error(weight, new, x) < 0.7 * output_error(weight, by_wanda, x)
        assert output_error(weight, new, x) < 0.6 * output_error(weight, by_magnitude, x)


def test_held_weights_stay_zero_and_come_on_top_where_they_must():
    weight, x = problem()
    held = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    weight = weight.masked_fill(held, 0.0)
    new, removed = sparsegpt(weight, x.T @ x, 48, held=held, block=4)
    assert bool((removed | ~held).all())
    assert bool((new[held] == 0).all())
    assert int(removed.sum()) == 48


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x = problem()
    x[:, :5] = 0.0
    new, removed = sparsegpt(weight, x.T @ x, 48)
    assert bool(new.isfinite().all())
    assert bool(removed[:, :5].all())
    new, removed = sparsegpt(weight, torch.zeros(16, 16), 48)
    assert torch.equal(new, weight.double().masked_fill(removed, 0.0))


@pytest.mark.parametrize("where", [slice(0, 140), slice(100, 240), slice(116, 256)])
def test_weights_of_inputs_that_are_always_zero_go_first(where):
    weight, x = problem(rows=8, columns=256, samples=600)
    x[:, where] = 0
    count = round(0.6 * weight.numel())
    new, gone = sparsegpt(weight, x.T @ x, count)
    assert int(gone.sum()) == count
    assert bool(gone[:, where].all())
    rest = torch.ones(256, dtype=torch.bool)
    rest[where] = False
    alone, _ = sparsegpt(weight[:, rest], (x.T @ x)[rest][:, rest], count - 8 * 140)
    assert output_error(weight, new, x) < 1.3 * output_error(weight[:, rest], alone, x[:, rest])
    some, few = sparsegpt(weight, x.T @ x, 100)
    assert int(few.sum()) == 100
    assert not bool(few[:, rest].any())
    assert output_error(weight, some, x) == 0


def test_wanda_is_its_formula():
    weight, x = problem()
    scores = weight.abs() * x.norm(dim=0).float()
    removed = wanda(weight, x.square().sum(0), 0.5)
    assert removed.sum(1).tolist() == [8] * 6
    for row in range(6):
        assert float(scores[row][removed[row]].max()) < float(scores[row][~removed[row]].min())
    pairs = wanda(weight, x.square().sum(0), 0.0, (2, 4)).reshape(6, 4, 4)
    assert bool((pairs.sum(-1) == 2).all())
    grouped = scores.reshape(6, 4, 4)
    assert bool((grouped.masked_fill(~pairs, 0).amax(-1) < grouped.masked_fill(pairs, torch.inf).amin(-1)).all())
