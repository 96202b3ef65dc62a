"""Where Fashion-MNIST comes from: order of places, download, damage. No test leaves this machine."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from trimpoint.demo import files
from trimpoint.errors import DataError, StorageError

OFFICIAL_MD5 = {  # from the data set's README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
PACKED = {"train": 1_504_176_606, "t10k": 1_504_176_627}  # the official archives' dates: 31 August 2017


def idx(shape: tuple[int, ...], seed: int = 0) -> bytes:
    body = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body.tobytes()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory of four tiny archives that pass for the official ones; every real place is out of sight."""
    directory = tmp_path / "small"
    directory.mkdir()
    digests = {}
    for position, name in enumerate(files.SHA256):
        content = idx((5, 28, 28) if "images" in name else (5,), position)
        digests[name] = hashlib.sha256(content).hexdigest()
        (directory / name).write_bytes(gzip.compress(content))
    monkeypatch.setattr(files, "SHA256", digests)
    monkeypatch.setattr(files, "DEBIAN", tmp_path / "no-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.VARIABLE, raising=False)
    return directory


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def origin(small: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(small))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_files_here_hold_what_the_official_archives_hold() -> None:
    directory = files.find()
    for name, expected in OFFICIAL_MD5.items():
        raw = (directory / name).read_bytes()
        if raw[3] == 0:  # packed without name and date, as Debian does: put them back
            stamp = struct.pack("<I", PACKED[name.split("-")[0]])
            raw = raw[:3] + b"\x08" + stamp + raw[8:10] + name.removesuffix(".gz").encode() + b"\0" + raw[10:]
        assert hashlib.md5(raw, usedforsecurity=False).hexdigest() == expected, name


def test_read_gives_the_official_sizes() -> None:
    images, labels = files.read("test")
    assert (images.shape, labels.shape) == ((10_000, 28, 28), (10_000,))
    assert np.bincount(labels).tolist() == [1_000] * 10


def test_the_variable_goes_before_the_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DEBIAN", small)
    assert files.find() == small
    given = small.parent / "given"
    (given / "fashion-mnist").mkdir(parents=True)
    for archive in small.iterdir():
        (given / "fashion-mnist" / archive.name).write_bytes(archive.read_bytes())
    monkeypatch.setenv(files.VARIABLE, str(given))
    assert files.find() == given / "fashion-mnist"
    monkeypatch.setenv(files.VARIABLE, str(given / "fashion-mnist"))
    assert files.find() == given / "fashion-mnist"


def test_a_directory_that_lacks_a_file_is_passed_over(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small.parent / "given"
    given.mkdir()
    (given / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    monkeypatch.setenv(files.VARIABLE, str(given))
    monkeypatch.setattr(files, "DEBIAN", small)
    assert files.find() == small


def test_download_once_into_the_cache(
    small: Path, origin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.download, "__defaults__", (origin,))
    directory = files.find()
    assert directory == files.cache_directory()
    assert sorted(path.name for path in directory.iterdir()) == sorted(files.SHA256)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("downloading http://") == 4
    assert files.find() == directory
    assert capsys.readouterr().err == ""
    assert files.read("train")[0].shape == (5, 28, 28)


def test_download_of_something_else_leaves_nothing(small: Path, origin: str) -> None:
    name = next(iter(files.SHA256))
    (small / name).write_bytes(gzip.compress(idx((5, 28, 28), 99)))
    with pytest.raises(DataError, match=r"SHA-256 of its content must be .* Got ") as caught:
        files.download(small.parent / "cache", origin)
    assert "dataset-fashion-mnist" in (caught.value.hint or "")
    assert list((small.parent / "cache").iterdir()) == []


def test_offline_says_what_to_do(small: Path) -> None:
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        files.download(small.parent / "cache", "http://127.0.0.1:9")
    assert "TRIMPOINT_DATA" in (caught.value.hint or "")
    assert list((small.parent / "cache").iterdir()) == []


def test_a_short_answer_is_no_file(small: Path, origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def send_head(self: QuietHandler) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    monkeypatch.setattr(QuietHandler, "send_head", send_head)
    with pytest.raises(DataError, match="could not be downloaded"):
        files.download(small.parent / "cache", origin)


def test_a_cache_that_cannot_be_written_is_an_error_of_storage(small: Path, origin: str) -> None:
    blocked = small.parent / "file"
    blocked.write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        files.download(blocked / "cache", origin)


@pytest.mark.parametrize("damage", [b"", b"no archive", gzip.compress(idx((5,)))[:-12]], ids=["empty", "text", "cut"])
def test_a_damaged_archive_is_named(small: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    (small / "train-labels-idx1-ubyte.gz").write_bytes(damage)
    monkeypatch.setenv(files.VARIABLE, str(small))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz (cannot be read|is not the official file)"):
        files.read("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an IDX file"),
        (b"\x00\x00\x08", "must be an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "must be an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header of 16 bytes"),
        (idx((3, 2))[:-1], r"must hold 6 bytes of shape \[3, 2\]. Got 5"),
        (idx((3, 2)) + b"\x00", r"must hold 6 bytes of shape \[3, 2\]. Got 7"),
    ],
)
def test_bad_idx_content(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        files.parse_idx(content, "labels")


def test_idx_round_trip() -> None:
    array = files.parse_idx(idx((3, 2)), "x")
    assert np.array_equal(array, np.random.default_rng(0).integers(0, 256, (3, 2), np.uint8))
