"""The manifest of an artifact: SHA-256 and size of every file, and a checksum of itself."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trimpoint.errors import ArtifactError, TrimpointError
from trimpoint.runtimes.base import Lowered
from trimpoint.storage import contradiction, is_plain_path
from trimpoint.values import from_data

FORMAT = 1
MANIFEST = "manifest.json"
_HINT = "it was changed after it was written: get the artifact again from where it came from"


def write_manifest(directory: Path, about: Mapping[str, Any], write: Callable[[Path, bytes], None]) -> str:
    """Write the manifest of all files below `directory`.

    Args:
        directory: of the artifact.
        about: what else it says, as JSON data.
        write: writes bytes to a path.

    Returns:
        The digest: SHA-256 of the manifest file.
    """
    files = {
        path.relative_to(directory).as_posix(): {"sha256": hash_file(path), "size": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    body = {"format": FORMAT, **about, "files": files}
    content = _content(body)
    write(directory / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check a manifest: its format, its own checksum, that it is written as we write it, and its names.

    Raises:
        ArtifactError: saying what is wrong with it.
    """
    content = _read(directory)
    try:
        manifest = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{MANIFEST} is not valid JSON: {error}.", _HINT) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "checksum" not in manifest:
        raise ArtifactError(f"{MANIFEST} is not that of an artifact.", "give the directory of an artifact")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{MANIFEST} must have the format {FORMAT}. Got {manifest.get('format')!r}.",
            "a newer trimpoint wrote it: update with `pip install -U trimpoint`",
        )
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if _content(body) != content:
        raise ArtifactError(f"{MANIFEST} does not have its own checksum.", _HINT)
    check_names(manifest["files"])
    return manifest


def check_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check that exactly the files of the manifest are there, each with its size and hash.

    Raises:
        ArtifactError: naming every file that is missing, too much, a link, or changed.
    """
    present = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    expected = set(manifest["files"]) | {MANIFEST}
    problems = [f"{name} is missing." for name in sorted(expected - set(present))]
    problems += [f"{name} does not belong to the artifact." for name in sorted(set(present) - expected)]
    for name in sorted(expected & set(present)):
        if present[name].is_symlink() or not present[name].is_file():
            problems.append(f"{name} must be a plain file.")
        elif name != MANIFEST and (difference := _difference(present[name], manifest["files"][name])):
            problems.append(f"{name} {difference}.")
    if problems:
        text = problems[0] if len(problems) == 1 else "\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1))
        raise ArtifactError(text, _HINT)


def model_of(manifest: Mapping[str, Any]) -> Lowered:
    """Return what a manifest says of the model.

    Raises:
        ArtifactError: if it says something else.
    """
    try:
        return from_data(Lowered, manifest["model"])
    except (KeyError, TrimpointError) as error:
        raise ArtifactError(f"{MANIFEST} does not describe a model of format {FORMAT}: {error}.") from error


def digest_of(directory: Path) -> str:
    """Return the SHA-256 of the manifest file.

    Raises:
        ArtifactError: if there is none.
    """
    return hashlib.sha256(_read(directory)).hexdigest()


def is_artifact(directory: Path) -> bool:
    """Return whether a directory holds an artifact, sound or not."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "model", "files", "checksum"} <= set(manifest)


def check_names(names: Collection[str]) -> None:
    """Check that files can lie within the artifact under these names, on every system.

    Raises:
        ArtifactError: if they cannot.
    """
    for name in names:
        if not is_plain_path(name) or name == MANIFEST:
            raise ArtifactError(
                f"The files of a {MANIFEST} must have plain paths within the artifact. Got {name!r}.",
                "use letters, digits, dots, dashes and forward slashes",
            )
    if (twice := contradiction([MANIFEST, *names])) is not None:
        raise ArtifactError(
            f"The files of a {MANIFEST} must be others on every system, and no directories as well. Got {twice!r}, "
            "which another one is but for case, or lies above or below.",
            "give it another name",
        )


def own_version() -> str:
    """Return the version of the package that writes a manifest."""
    try:
        return metadata.version("trimpoint")
    except metadata.PackageNotFoundError:
        return "unknown"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{directory.name!r} must be the directory of an artifact. Got no readable {MANIFEST}: {error.strerror}.",
            "give the directory that `save` or a search wrote",
        ) from error


def _content(body: Mapping[str, Any]) -> bytes:
    """Return the one way to write a manifest, its checksum over everything else included."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**body, "checksum": checksum}, indent=2, allow_nan=False) + "\n").encode()


def _difference(path: Path, entry: Any) -> str:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
        return "has no size and hash in the manifest"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"must have {entry['size']} bytes, has {size}"
    return "" if hash_file(path) == entry["sha256"] else "does not have the SHA-256 of the manifest"
