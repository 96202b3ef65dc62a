"""Artifacts as one coded file: packed for the wire or for flash, and opened from it.

A packed artifact restores the whole directory, its manifest included. Packed with `model_only`, it restores what the
runtime loads and nothing else: that is the smallest file that runs.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimpoint.coding import Contents, code_model, coded_model, is_coded, read_coded, write_coded
from trimpoint.coding.container import Step
from trimpoint.coding.reading import DEFAULT_MOST_BYTES
from trimpoint.errors import ArtifactError, StorageError, TrimpointError
from trimpoint.manifest import MANIFEST, check_files, is_artifact, model_of, read_manifest
from trimpoint.runtimes.base import Lowered
from trimpoint.storage import put_in_place, scratch_beside, sync, sync_directory


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was packed or unpacked.

    Args:
        file: the coded file.
        directory: its files, as they are run.
        coded_bytes: size of the coded file.
        bytes: of all files in it.
        files: how many.
        model_only: whether they are only what the runtime loads.
        digest: SHA-256 of what is restored.
    """

    file: str
    directory: str
    coded_bytes: int
    bytes: int
    files: int
    model_only: bool
    digest: str


@dataclass(frozen=True)
class Unpacked:
    """An artifact as a directory.

    Args:
        directory: of the artifact; a temporary one if it was a coded file.
        model: what the coded file says of its model, where it holds nothing else; else the manifest says it.
        contents: of the coded file, where it was one.
    """

    directory: Path
    model: Lowered | None = None
    contents: Contents | None = None


def pack_artifact(
    directory: Path | str,
    file: Path | str,
    *,
    model_only: bool = False,
    on_step: Step = lambda _done, _total: None,
) -> PackReport:
    """Write an artifact into one coded file and read it again to see that it comes back bit for bit.

    Args:
        directory: of the artifact.
        file: where it is to lie; an older coded file there is replaced.
        model_only: leave out everything but the runtime's files and the signature: no record of what was measured and
            certified, and no recorded answers to verify.
        on_step: told how many bytes of how many are done.

    Raises:
        ArtifactError: if the directory is no sound artifact, or something else lies at `file`.
        StorageError: if it cannot be written; an older file stays.
    """
    directory, file = Path(directory), Path(file).absolute()
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    if file.is_dir() or (file.exists() and not is_coded(file)):
        raise ArtifactError(
            f"{file.name!r} must be new or a coded file. It is something else and was left alone.",
            "choose another name, such as model.tpz",
        )
    if file.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(
            f"The coded file must lie outside of the artifact, whose files are only its own. Got {file.name!r} within.",
            "choose another directory",
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(file) as scratch:
            work = scratch / file.name
            if model_only:
                contents = code_model(work, directory, model_of(manifest), on_step)
            else:
                names = [MANIFEST, *manifest["files"]]
                contents = write_coded(work, b"", {name: directory / name for name in names}, on_step)
            sync(work)
            work.replace(file)
            sync_directory(file.parent)
    except OSError as error:
        raise _not_written(file.name, error) from error
    return _report(file, directory, contents)


def unpack_artifact(
    file: Path | str,
    directory: Path | str,
    *,
    max_bytes: int = DEFAULT_MOST_BYTES,
    on_step: Step = lambda _done, _total: None,
) -> PackReport:
    """Restore the files of a coded file beside their destination, check them, and move them into place.

    Args:
        file: the coded file.
        directory: where they are to lie: new, empty, or an artifact, which is replaced.
        max_bytes: that they may have together.
        on_step: told how many bytes of how many are done.

    Raises:
        ArtifactError: if it is no sound coded file or too large, or something else lies at the destination.
        StorageError: if they cannot be written; nothing half-written is left.
    """
    file, directory = Path(file), Path(directory).absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(directory) as scratch:
            work = scratch / directory.name
            work.mkdir()
            contents = _restored(file, work, max_bytes, on_step).contents
            for name in contents.files:
                sync(work / name)
            put_in_place(work, directory, replaceable=is_artifact)
    except OSError as error:
        raise _not_written(directory.name, error) from error
    return _report(file, directory, contents)


@contextmanager
def unpacked(path: Path | str) -> Iterator[Unpacked]:
    """Give an artifact as a directory: a coded file is restored into a temporary one.

    Raises:
        ArtifactError: if it is a file but no sound coded one.
        StorageError: if there is no room to restore it.
    """
    path = Path(path)
    if not path.is_file():
        yield Unpacked(path)
        return
    with tempfile.TemporaryDirectory(prefix="trimpoint-", ignore_cleanup_errors=True) as temporary:
        try:
            restored = _restored(path, Path(temporary), DEFAULT_MOST_BYTES, lambda _done, _total: None)
        except OSError as error:
            if isinstance(error, TrimpointError):
                raise
            raise StorageError(
                f"{path.name!r} could not be restored in {tempfile.gettempdir()}: {error.strerror or error}.",
                "free some space, or name another directory by the environment variable TMPDIR",
            ) from error
        yield Unpacked(Path(temporary), restored.model, restored.contents)


@dataclass(frozen=True)
class _Restored:
    contents: Contents
    model: Lowered | None


def _restored(file: Path, directory: Path, max_bytes: int, on_step: Step) -> _Restored:
    if not is_coded(file):
        raise ArtifactError(
            f"{file.name!r} must be a coded file. {'It is another one' if file.exists() else 'There is none'}.",
            "give a file that `trimpoint pack` wrote",
        )
    contents = read_coded(file, directory, max_bytes=max_bytes, on_step=on_step)
    model = coded_model(contents)
    if model is None:
        check_files(directory, read_manifest(directory))
    return _Restored(contents, model)


def _report(file: Path, directory: Path, contents: Contents) -> PackReport:
    return PackReport(
        file=str(file),
        directory=str(directory),
        coded_bytes=file.stat().st_size,
        bytes=contents.bytes,
        files=len(contents.files),
        model_only=bool(contents.about),
        digest=contents.digest,
    )


def _not_written(name: str, error: OSError) -> TrimpointError:
    if isinstance(error, TrimpointError):
        return error
    return StorageError(
        f"{name!r} could not be written: {error.strerror or error}. Nothing half-written is left.",
        "free some space, or choose another place that you may write to",
    )
