import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.coding.cases import every_kind, model_bytes, weights
from trimpoint.coding import is_coded, read_about, read_coded, write_coded
from trimpoint.coding.container import MOST_TEXT
from trimpoint.coding.entropy import DAMAGED
from trimpoint.coding.integers import packed
from trimpoint.coding.layout import spans
from trimpoint.errors import ArtifactError

GOLDEN = Path(__file__).parents[1] / "golden" / "coded_1.tpz"
FRONT = 9
"""Bytes before the part that the checksum is over."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Files of all kinds, by name."""
    directory = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    made = {
        "model.onnx": model_bytes(every_kind()),
        "notes/README.md": b"# A model\n" * 40,
        "empty": b"",
        "noise.bin": rng.bytes(70_000),
        "broken.onnx": model_bytes(every_kind())[:-1000],
        "labels.json": json.dumps([f"label {i}" for i in range(9000)]).encode(),
    }
    for name, content in made.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    save_file({name: value for name, value in every_kind(2).items() if value.size}, directory / "more.safetensors")
    return {name: directory / name for name in (*made, "more.safetensors")}


@pytest.fixture(scope="module")
def coded(files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("coded") / "all.tpz"
    write_coded(path, b'{"a":1}', files)
    return path


def checked(content: bytes) -> bytes:
    """Return a coded file with the checksum that fits it."""
    return content[:5] + zlib.crc32(content[FRONT:]).to_bytes(4, "little") + content[FRONT:]


def test_files_come_back_bit_for_bit(files, coded: Path, tmp_path: Path) -> None:
    found = read_coded(coded, tmp_path)
    assert found.about == b'{"a":1}'
    assert {name: (tmp_path / name).read_bytes() for name in found.files} == {
        name: path.read_bytes() for name, path in files.items()
    }
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(files)
    assert found == read_about(coded)
    assert is_coded(coded)
    assert not any(is_coded(path) for path in (*files.values(), tmp_path, tmp_path / "none"))
    assert coded.stat().st_size < 0.75 * found.bytes


def test_the_same_files_give_the_same_bytes(files, coded: Path, tmp_path: Path) -> None:
    write_coded(tmp_path / "again.tpz", b'{"a":1}', files)
    assert (tmp_path / "again.tpz").read_bytes() == coded.read_bytes()


def test_a_file_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    """A change of what probabilities are computed is a new format, on whatever processor: this file was kept."""
    found = read_coded(GOLDEN, tmp_path)
    assert found.digest == "69d14baae53931b03503b992137ebffb1fc06a80e25bf6ebdc94febf7fc185b7"
    assert found.files == {"model.onnx": (tmp_path / "model.onnx").stat().st_size}


def test_tensors_are_found_where_they_lie(files) -> None:
    for name in ("model.onnx", "more.safetensors"):
        data = files[name].read_bytes()
        found = {data[span.offset : span.offset + span.size]: span for span in spans(files[name], data)}
        for key, array in every_kind(0 if name == "model.onnx" else 2).items():
            if array.size:
                assert found[array.tobytes()].dims == array.shape, key
    data = files["model.onnx"].read_bytes()
    assert np.arange(300, dtype=np.int64).tobytes() in {
        data[s.offset : s.offset + s.size] for s in spans(files["model.onnx"], data)
    }
    assert spans(files["broken.onnx"], files["broken.onnx"].read_bytes()) == []


def test_constants_of_openvino_are_found(tmp_path: Path) -> None:
    array = weights(np.random.default_rng(0), 40, 50, zeros=0.9, values=8)
    (tmp_path / "model.bin").write_bytes(bytes(64) + array.tobytes())
    (tmp_path / "model.xml").write_text(
        '<net><layer type="Const"><data element_type="f32" shape="40, 50" offset="64" size="8000"/></layer>'
        '<layer type="Const"><data element_type="f32" shape="1" offset="9999999" size="4"/></layer></net>'
    )
    found = spans(tmp_path / "model.bin", (tmp_path / "model.bin").read_bytes())
    assert [(span.offset, span.size, span.dims) for span in found] == [(64, 8000, (40, 50))]
    contents = write_coded(tmp_path / "m.tpz", b"", {name: tmp_path / name for name in ("model.xml", "model.bin")})
    assert (tmp_path / "m.tpz").stat().st_size < contents.bytes / 6


def test_a_large_tensor_is_coded_in_pieces_and_read_in_bounded_memory(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-3, 4, (2200, 1000)).astype(np.int8)
    (tmp_path / "model.onnx").write_bytes(model_bytes({"w": array}))
    out = tmp_path / "out"
    out.mkdir()
    write_coded(tmp_path / "m.tpz", b"", {"model.onnx": tmp_path / "model.onnx"})
    tracemalloc.start()
    read_coded(tmp_path / "m.tpz", out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (out / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert peak < 64e6


def test_reading_imports_neither_torch_nor_onnx(coded: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from trimpoint.coding import read_coded\n"
        f"read_coded(pathlib.Path({str(coded)!r}), pathlib.Path({str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'onnx', 'optuna', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# What is no coded file, or a hostile one


def test_what_is_wrong_is_said(coded: Path, tmp_path: Path) -> None:
    content, other = coded.read_bytes(), tmp_path / "other.tpz"
    for changed, message in (
        (b"", "no coded file"),
        (b"PK" + content, "no coded file"),
        (content[:6], "cut off"),
        (content[:-1], "cut off or was changed"),
        (content + b"\0", "cut off or was changed"),
        (content[:4] + b"\2" + content[5:], "must have the format 1. Got 2"),
        (checked(content + b"\0"), "something follows"),
        (checked(content[:FRONT] + bytes(32) + content[FRONT + 32 :]), "SHA-256"),
    ):
        other.write_bytes(changed)
        with pytest.raises(ArtifactError, match=message) as caught:
            read_coded(other, None)
        assert caught.value.hint


def test_more_than_was_allowed_is_refused_before_anything_is_written(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at most 1000 bytes together"):
        read_coded(coded, tmp_path, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def forged(table: bytes, *, size: int | None = None) -> bytes:
    """Return a coded file with this head, stored by DEFLATE, and nothing after it."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = machine.compress(table) + machine.flush()
    front = bytes(32) + packed(1, len(table) if size is None else size, len(coded)) + coded
    return checked(b"\x89TPZ\x01" + bytes(4) + front)


def name_of(name: str, rest: bytes) -> bytes:
    return packed(0, 0, 1, len(name)) + name.encode() + rest  # names of ASCII letters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged(b"", size=MOST_TEXT + 1), "at most"),
        (forged(bytes(MOST_TEXT), size=100), "100 bytes must follow"),
        (forged(packed(2**60)), "at most"),
        (forged(packed(0, 2**40)), "at most"),
        (forged(packed(0, 0, 2**40)), "at most"),
        (forged(packed(0, 1, 2**40, 1, 2, 5)), "at most"),
        (forged(packed(0, 1, 8, 99, 0, 8)), "at most"),
        (forged(name_of("../escape", packed(0, 0))), "plain paths"),
        (forged(name_of("/etc/passwd", packed(0, 0))), "plain paths"),
        (forged(name_of("a\\b", packed(0, 0))), "plain paths"),
        (forged(name_of("a" * 256, packed(0, 0))), "plain paths"),
        (forged(name_of("nul.txt", packed(0, 0))), "plain paths"),
        (forged(name_of("a\nb", packed(0, 0))), "plain paths"),
        (forged(name_of("x/Nul.txt", packed(0, 0))), "plain paths"),
        (forged(name_of("a.", packed(0, 0))), "plain paths"),
        (forged(name_of("x/" + "b" * 256, packed(0, 0))), "plain paths"),
        (forged(packed(0, 0, 2, 1) + b"a" + packed(0, 0, 1) + b"a" + packed(0, 0)), "others on every system"),
        (forged(packed(0, 0, 2, 1) + b"a" + packed(0, 0, 3) + b"A/b" + packed(0, 0)), "others on every system"),
        (forged(packed(0, 15) + packed(2**24, 0, 1, 9) * 15), "pools must have at most"),
        (forged(name_of("a", packed(2**62, 1, 5, 0)) + b"12345"), "pieces of a are not"),
        (forged(name_of("a", packed(5, 1, 5, 0)) + b"1234"), "do not fit"),
        (forged(name_of("a", packed(5, 1, 0, 5, 3, 0, 0, 5))), "at most 0"),
        (forged(name_of("a", packed(2**24, 1, 0, 2**24, 0, 1, 3, 0))), "1 to 2097152 elements"),
        (forged(b"\xff" * 30), "has no end"),
    ],
)
def test_a_forged_head_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "forged.tpz"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=message):
        read_coded(path, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert not (tmp_path.parent / "escape").exists()


# Fuzzing

MUTATIONS = 10_000


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A coded file in which every scheme occurs, small enough to be read thousands of times; and what it restores."""
    directory = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(5)
    floats = rng.normal(0, 1, (3, 45)).astype(np.float32)
    tensors = {
        "table": weights(rng, 12, 20, zeros=0.8, values=5),
        "floats": floats,
        "integers": np.rint(rng.normal(0, 2, (9, 30))).astype(np.int8),
        "counted": np.arange(130, dtype=np.int64),
        "noise": rng.integers(0, 2**62, 40),
        "bias": floats[0, :10].copy(),
    }
    (directory / "model.onnx").write_bytes(model_bytes(tensors))
    write_coded(directory / "small.tpz", b"{}", {"model.onnx": directory / "model.onnx"})
    return directory / "small.tpz", (directory / "model.onnx").read_bytes()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a coded file with some bits flipped, a part cut out, doubled, moved or overwritten, or its end cut off."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        first = int(rng.integers(FRONT, len(data))) if len(data) > FRONT else 0
        # Lengths and tables lie in the first part: half of all changes go there.
        if rng.random() < 0.5:
            first = min(first, FRONT + 32 + int(rng.integers(0, 120)))
        length = int(rng.integers(1, 40))
        kind = int(rng.integers(0, 7))
        if kind == 0 and first < len(data):
            data[first] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[first : first + length] = rng.bytes(length)
        elif kind == 2:
            del data[first : first + length]
        elif kind == 3:
            data[first:first] = data[first : first + length]
        elif kind == 4:
            other = int(rng.integers(FRONT, max(FRONT + 1, len(data))))
            data[first:first] = content[other : other + length]
        elif kind == 5:
            del data[first:]
        elif first < len(data):
            data[first] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(data)


@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_mutations_restore_the_same_bytes_or_a_clear_error(small, part: int, tmp_path: Path) -> None:
    """The checksum is made to fit in nine of ten, so that what is behind it is what is tried."""
    path, restored = small
    content = path.read_bytes()
    rng = np.random.default_rng(part)
    other, out = tmp_path / "mutated.tpz", tmp_path / "out"
    accepted = 0
    for _ in range(MUTATIONS // 4):
        changed = mutated(content, rng)
        other.write_bytes(checked(changed) if rng.random() < 0.9 else changed)
        out.mkdir(exist_ok=True)
        try:
            read_coded(other, out, max_bytes=1 << 20)
        except ArtifactError as error:
            assert error.message  # noqa: PT017 - either outcome is right
        else:
            accepted += 1
            assert (out / "model.onnx").read_bytes() == restored
        for found in [*out.rglob("*")][::-1]:
            assert found.is_file()
            assert found.stat().st_size <= 1 << 20
            found.unlink()
    assert accepted < MUTATIONS // 40


def test_a_flipped_bit_is_found_by_the_checksum(small) -> None:
    path, _ = small
    content = path.read_bytes()
    refused = 0
    positions = range(FRONT, len(content), 5)
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 0x10
        path.with_name("flipped.tpz").write_bytes(bytes(changed))
        with pytest.raises(ArtifactError, match=r"checksum") as caught:
            read_coded(path.with_name("flipped.tpz"), None)
        refused += caught.value.hint == DAMAGED
    assert refused == len(positions)
