"""Exactly so many of the least, against sorting; schedules and normalisations against their formulas."""

import numpy as np
import pytest
import torch

from trimpoint.sparsity.ranking import comparable, cubic, least, least_of_all, least_of_each, share_of


@pytest.mark.parametrize("count", [0, 1, 7, 29, 30])
@pytest.mark.parametrize("tied", [False, True])
def test_least_is_what_sorting_gives(count, tied):
    generator = torch.Generator().manual_seed(count)
    keys = [torch.randint(0, 4, (5, 6), generator=generator).float() for _ in range(2)]
    if not tied:
        keys = [torch.randn(5, 6, generator=generator) for _ in range(2)]
    order = np.lexsort((np.arange(30), keys[1].reshape(-1).numpy(), keys[0].reshape(-1).numpy()))
    expected = np.zeros(30, dtype=bool)
    expected[order[:count]] = True
    assert np.array_equal(least(keys, count).reshape(-1).numpy(), expected)


def test_least_of_each_run_is_what_sorting_each_gives():
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(0, 3, (3, 16), generator=generator).float() for _ in range(2)]
    found = least_of_each(keys, 3, 8)
    for row in range(3):
        for start in (0, 8):
            one, two = (key[row, start : start + 8].numpy() for key in keys)
            chosen = set(np.lexsort((np.arange(8), two, one))[:3].tolist())
            assert set(found[row, start : start + 8].nonzero().squeeze(1).tolist()) == chosen


def test_share_of_is_the_nearest_and_leaves_one():
    assert [share_of(0.29, 100), share_of(0.5, 5), share_of(0.999, 10), share_of(0.5, 1)] == [29, 3, 9, 0]


def test_cubic_is_the_formula_of_zhu_and_gupta():
    for step in range(13):
        assert cubic(step, 12, 0.9, 0.1) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - step / 12) ** 3)
    assert cubic(40, 12, 0.9) == 0.9


def test_lamp_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator)
    squares = weight.double().square()
    expected = torch.stack([w / squares[squares >= w].sum() for w in squares.reshape(-1)]).reshape(4, 3)
    torch.testing.assert_close(comparable([weight], "lamp")[0], expected)
    assert float(comparable([weight], "lamp")[0].max()) == pytest.approx(1.0)


@pytest.mark.parametrize(("normalize", "norm"), [("l1", 1), ("l2", 2)])
def test_normalised_magnitudes_do_not_depend_on_the_layers_scale(normalize, norm):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    mean = (weight.abs() ** norm).mean() ** (1 / norm)
    for scale in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(comparable([weight * scale], normalize)[0], weight.abs() / mean)
    assert torch.equal(comparable([weight], "none")[0], weight.abs())
    assert bool(comparable([torch.zeros(2, 2)], normalize)[0].isfinite().all())


def test_the_least_of_all_are_counted_exactly_and_every_tensor_keeps_one():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) * s for n, s in ((50, 1.0), (30, 1e-6), (20, 1e6))]
    assert least_of_all(scores, 0.3) == [1, 29, 0]
    for ratio in (0.1, 0.62, 0.9, 0.97):
        assert sum(least_of_all(scores, ratio)) == round(100 * ratio)
    assert least_of_all(scores, 0.999) == [49, 29, 19]
