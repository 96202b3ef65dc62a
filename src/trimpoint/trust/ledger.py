"""A record of every time that certification data was looked at: each further look weakens what the data can prove."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimpoint.errors import InvalidParameterError, StorageError

_LOCK_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Look:
    """One artifact whose quality was looked at on one data set.

    Args:
        data: SHA-256 of the data.
        artifact: digest of the artifact.
        score: name of the score; another score of the same artifact is another look.
        finalists: how many artifacts were declared to be looked at together.
        batch: what the finalists of one declaration share.
        looks: what this look was counted as, those declared with it included.
        opened: when, in UTC.
    """

    data: str
    artifact: str
    score: str
    finalists: int
    batch: str
    looks: int
    opened: str


class Ledger:
    """An append-only file of JSON lines, shared by every study of a user, safe against concurrent writers.

    A line that was torn by a crash is passed over: it is written, and forced to disk, before the data is opened.

    Args:
        path: of the file; by default `ledger.jsonl` in `state_directory()`. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else state_directory() / "ledger.jsonl"

    def entries(self, data: str | None = None) -> list[Look]:
        """Return the looks in the order in which they were recorded.

        Args:
            data: only those at the data of this hash.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(self.path, error) from error
        return [look for look in _parse(content) if data is None or look.data == data]

    def record(self, data: str, artifact: str, score: str, *, finalists: int = 1, batch: str = "") -> int:
        """Record a look, and return how many looks its correction has to count.

        That is the sum over the declarations so far, this one included, of the finalists that each declared (or of
        those that were looked at, if more). The same artifact and score on the same data count as they did before.

        Args:
            data: SHA-256 of the data.
            artifact: digest of the artifact.
            score: name of the score.
            finalists: how many artifacts are looked at together, declared before the first of them.
            batch: what the finalists of one declaration share; by default each artifact is a declaration of its own.

        Raises:
            InvalidParameterError: if `finalists` is below 1, or the data or the artifact has no hash.
            StorageError: if the ledger cannot be written; then nothing may be looked at.
        """
        if isinstance(finalists, bool) or not isinstance(finalists, int) or finalists < 1:
            raise InvalidParameterError(f"'finalists' must be a whole number ≥ 1. Got {finalists!r}.")
        if not data or not artifact:
            raise InvalidParameterError(f"A look needs the hashes of data and artifact. Got {data!r}, {artifact!r}.")
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
                before = self.entries(data)
                for look in before:
                    if (look.artifact, look.score) == (artifact, score):
                        return max(look.looks, finalists)
                look = Look(
                    data=data,
                    artifact=artifact,
                    score=score,
                    finalists=finalists,
                    batch=batch or f"{artifact}/{score}",
                    looks=0,
                    opened=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                counted = _count([*before, look])
                self._append({**vars(look), "looks": counted})
                return counted
        except Timeout as error:
            raise _unusable(self.path, error) from error
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            torn = False
            if size:
                file.seek(size - 1)
                torn = file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def state_directory() -> Path:
    """Return the directory of what outlives a study.

    `TRIMPOINT_STATE` where set; else `trimpoint` in the platform's own place: `XDG_STATE_HOME` or `~/.local/state`,
    on macOS `~/Library/Application Support`, on Windows `%LOCALAPPDATA%`.
    """
    if own := os.environ.get("TRIMPOINT_STATE"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trimpoint"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "trimpoint"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "trimpoint"


def _parse(content: bytes) -> Iterator[Look]:
    types = {name: int if name in ("finalists", "looks") else str for name in Look.__dataclass_fields__}
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in types.items()):
            yield Look(**{name: entry[name] for name in types})


def _count(looks: list[Look]) -> int:
    batches: dict[str, list[Look]] = {}
    for look in looks:
        batches.setdefault(look.batch, []).append(look)
    return sum(max(len(batch), *(look.finalists for look in batch)) for batch in batches.values())


def _unusable(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"The ledger {path} cannot be used: {error}.",
        "no certificate is given without it; set TRIMPOINT_STATE to a directory that can be written",
    )
