import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coding.cases import every_kind, weights
from trimpoint.coding.layout import _kind
from trimpoint.coding.tensors import FLOATS, INTEGERS, KINDS, LZMA, MOST_BYTES, RAW, TABLE, decode, encode
from trimpoint.errors import ArtifactError

KIND_OF = {
    **{"f4": _kind("float", 32, 23), "f2": _kind("float", 16, 10), "f8": _kind("float", 64, 52)},
    **{
        f"{letter}{size}": _kind(name, 8 * size)
        for letter, name in (("i", "int"), ("u", "uint"))
        for size in (1, 2, 4, 8)
    },
    "b1": _kind("uint", 8),
}


def entropy(array: np.ndarray) -> float:
    """Return the bytes that the array's values take if each is coded on its own, by how often it occurs."""
    shares = np.unique(array, return_counts=True)[1] / array.size
    return float(-(shares * np.log2(shares)).sum() * array.size / 8)


@pytest.mark.parametrize("name", every_kind())
def test_every_tensor_comes_back_bit_for_bit(name: str) -> None:
    array = every_kind()[name]
    data, kind = array.tobytes(), KIND_OF[array.dtype.str[1:]]
    scheme, coded = encode(data, kind, array.shape)
    assert decode(scheme, coded, kind, len(data)) == data
    assert len(coded) <= len(data)


@settings(deadline=None, max_examples=80)
@given(data=st.binary(max_size=700), kind=st.sampled_from(KINDS), dims=st.lists(st.integers(0, 20), max_size=4))
def test_any_bytes_come_back_whatever_they_are_said_to_be(data: bytes, kind, dims) -> None:
    scheme, coded = encode(data, kind, dims)
    assert decode(scheme, coded, kind, len(data)) == data
    assert len(coded) <= len(data)


@pytest.mark.parametrize("signed", [True, False])
def test_nibbles_come_back_and_take_four_bits_at_most(signed: bool) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8).tobytes()
    kind = _kind("int" if signed else "uint", 4)
    skewed = bytes(byte & 0x33 for byte in data)
    scheme, coded = encode(skewed, kind, (60, 100))
    assert scheme == INTEGERS
    assert len(coded) < 0.55 * len(data)
    assert decode(scheme, coded, kind, len(data)) == skewed


def test_zeros_that_gather_in_rows_and_columns_take_less_than_their_entropy() -> None:
    array = weights(np.random.default_rng(0), 200, 300, zeros=0.93, values=16)
    scheme, coded = encode(array.tobytes(), KIND_OF["f4"], array.shape)
    assert scheme == TABLE
    assert len(coded) < 0.93 * entropy(array)


def test_neighbours_at_a_distance_are_found() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((14, 14)) < 0.5
    picture = np.kron(image, np.ones((2, 2)))[None] * (rng.random((300, 1, 1)) < 0.5)
    flags = (np.roll(picture, 3, 2) + picture).reshape(300, 784) * (rng.random((300, 784)) < 0.4)
    array = np.where(flags > 0, np.float32(0.5), np.float32(0)).astype(np.float32)
    _, coded = encode(array.tobytes(), KIND_OF["f4"], array.shape)
    assert len(coded) < 0.8 * entropy(array)


def test_independent_integers_take_hardly_more_than_their_entropy() -> None:
    array = np.clip(np.rint(np.random.default_rng(0).normal(0, 25, (128, 1152))), -127, 127).astype(np.int8)
    scheme, coded = encode(array.tobytes(), KIND_OF["i1"], array.shape)
    assert scheme == INTEGERS
    assert len(coded) < 1.01 * entropy(array)


def test_floats_lose_what_their_exponents_have_too_much() -> None:
    array = np.random.default_rng(0).normal(0, 0.05, (256, 512)).astype(np.float32)
    scheme, coded = encode(array.tobytes(), KIND_OF["f4"], array.shape)
    assert scheme == FLOATS
    assert len(coded) < 0.85 * array.nbytes
    assert decode(scheme, coded, KIND_OF["f4"], array.nbytes) == array.tobytes()


def test_floats_that_were_half_precision_take_no_more_than_half() -> None:
    array = np.random.default_rng(0).normal(0, 0.05, (256, 512)).astype(np.float16).astype(np.float32)
    scheme, coded = encode(array.tobytes(), KIND_OF["f4"], array.shape)
    assert len(coded) < 0.5 * array.nbytes
    assert decode(scheme, coded, KIND_OF["f4"], array.nbytes) == array.tobytes()


@pytest.mark.parametrize("filled", [0, 40])
def test_a_large_tensor_of_hardly_anything_is_small_and_still_read_in_large_steps(filled: int) -> None:
    array = np.zeros((1024, 1024), np.float32)
    array.ravel()[:: array.size // max(filled, 1)][:filled] = 1.5
    scheme, coded = encode(array.tobytes(), KIND_OF["f4"], array.shape)
    assert scheme == TABLE
    assert len(coded) < 600
    assert decode(scheme, coded, KIND_OF["f4"], array.nbytes) == array.tobytes()


@pytest.mark.parametrize("scheme", [RAW, LZMA, INTEGERS, TABLE, FLOATS, 5, 255])
@pytest.mark.parametrize("coded", [b"", b"\0", b"\xff" * 40, bytes(range(200))])
def test_bytes_that_nobody_coded_are_refused(scheme: int, coded: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode(scheme, coded, KIND_OF["f4"], 4000)


def test_a_size_beyond_the_bound_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ArtifactError, match="at most"):
        decode(TABLE, b"", KIND_OF["f4"], MOST_BYTES + 1)
