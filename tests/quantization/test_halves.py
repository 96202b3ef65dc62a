import numpy as np
import pytest
import torch

from trimpoint.quantization.halves import rounded, why_not


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_rounding_is_that_of_torch(kind):
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(5000) * 10.0 ** generator.integers(-6, 5, 5000)).astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, kind)).float().numpy()
    np.testing.assert_array_equal(rounded(values, kind), expected)


def test_ties_go_to_even_and_the_largest_overflows():
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert rounded(ties, "bfloat16").view(np.uint32).tolist() == [0x3F800000, 0x3F820000, 0x7F800000]
    assert "beyond the range of bfloat16" in why_not(ties, "bfloat16")
    assert why_not(np.array([65504, -65504], np.float32), "float16") == ""


def test_few_small_weights_do_no_harm_but_many_do():
    values = np.ones(100, np.float32)
    values[0] = 1e-9
    assert why_not(values, "float16") == ""
    assert "too small" in why_not(values * np.float32(1e-7), "float16")
    assert why_not(np.zeros(3, np.float32), "float16") == ""
    assert why_not(np.zeros((0, 2), np.float32), "float16") == ""
