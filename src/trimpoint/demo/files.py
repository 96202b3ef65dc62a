"""Where the files of Fashion-MNIST are found, and their content as NumPy arrays.

The content is compared, not the archives: Debian packs the same streams without the name and date that the official
archives carry. (With those put back, Debian's files have the MD5 sums that the data set's README gives.)
"""

import gzip
import hashlib
import http.client
import os
import struct
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, StorageError

Part = Literal["train", "test"]

ORIGIN = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
VARIABLE = "TRIMPOINT_DATA"
FILES: dict[Part, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Archive → SHA-256 of what is in it."""
BY_HAND = (
    f"install the Debian package `dataset-fashion-mnist`, or put the four files from {ORIGIN} "
    f"into a directory and set {VARIABLE} to it"
)


def find() -> Path:
    """Return the directory with the four archives, downloading them once where there is none.

    Looked at in this order: `$TRIMPOINT_DATA` and its subdirectory `fashion-mnist`, the Debian package
    `dataset-fashion-mnist`, the user's cache directory. What is missing is downloaded into the last one.

    Raises:
        DataError: if the files are nowhere and cannot be downloaded.
        StorageError: if they cannot be written.
    """
    for directory in _places():
        if all((directory / name).is_file() for name in SHA256):
            return directory
    return download(cache_directory())


def _places() -> Iterator[Path]:
    if given := os.environ.get(VARIABLE):
        yield Path(given)
        yield Path(given) / "fashion-mnist"
    yield DEBIAN
    yield cache_directory()


def cache_directory() -> Path:
    """Return where downloaded files are kept, as the platform has it; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trimpoint" / "fashion-mnist"


def read(part: Part) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images `[n, 28, 28]` and the labels `[n]` of a part, both uint8: 60,000 to train, 10,000 to test.

    Raises:
        DataError: if a file cannot be had, is damaged or is another one.
    """
    directory = find()
    images, labels = (parse_idx(_content(directory / name), name) for name in FILES[part])
    return images, labels


def _content(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.", f"remove it; or {BY_HAND}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[path.name]:
        raise DataError(
            f"{path} is not the official file: the SHA-256 of its content must be {SHA256[path.name]}. Got {found}.",
            f"remove it; or {BY_HAND}",
        )
    return content


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """Return the array in a file of the IDX format that MNIST introduced: unsigned bytes, big-endian sizes.

    Args:
        content: of the file, not compressed.
        name: for the message.

    Raises:
        DataError: if it is no IDX file of unsigned bytes, or too short or too long for its sizes.

    References:
        LeCun, Cortes, Burges, "The MNIST database of handwritten digits", section "File formats".

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]), "labels")
        array([5, 7], dtype=uint8)
    """
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise DataError(f"{name} must be an IDX file of unsigned bytes (00 00 08). It begins with {content[:4].hex()}.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{name} ends within its header of {start} bytes. Got {len(content)}.")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    size = int(np.prod(shape, dtype=np.int64))
    if len(content) != start + size:
        raise DataError(f"{name} must hold {size:,} bytes of shape {list(shape)}. Got {len(content) - start:,}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def download(directory: Path, origin: str = ORIGIN) -> Path:
    """Download what is missing in `directory`, check it, and put each file in place whole.

    Progress goes to the standard error stream.

    Raises:
        DataError: if the origin does not answer, or sends something else.
        StorageError: if a file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in SHA256:
            if not (directory / name).is_file():
                _download_one(f"{origin}/{name}", directory / name)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be written: {error}.", "free some space, or check permissions"
        ) from error
    return directory


def _download_one(url: str, path: Path) -> None:
    archive = _fetch(url)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as scratch:
        part = Path(scratch) / path.name
        part.write_bytes(archive)
        _content(part)
        part.replace(path)


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return b"".join(_with_progress(answer, url))
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} could not be downloaded: {error}.", BY_HAND) from error


def _with_progress(answer: Any, url: str) -> Iterator[bytes]:
    total, done, live = int(answer.headers.get("Content-Length") or 0), 0, sys.stderr.isatty()
    print(f"downloading {url} ({total / 1e6:.1f} MB)", file=sys.stderr)
    while chunk := answer.read(1 << 18):
        done += len(chunk)
        yield chunk
        if live:
            print(f"\r  {done / max(total, done):4.0%}", end="", file=sys.stderr, flush=True)
    if done < total:
        raise http.client.IncompleteRead(b"", total - done)
    if live:
        print(file=sys.stderr)
