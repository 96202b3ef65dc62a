"""What a step did to the model, module by module, told by where it was in the unmodified model."""

from dataclasses import replace

from trimpoint.build import Build, describe
from trimpoint.graph.masks import owner_of
from trimpoint.method import ALL_FACTS, Fact
from trimpoint.values import Change, ChangeKind


class Record:
    """The changes of one step.

    Args:
        build: the model in the making.
        method: name of the step's method.
        removes: facts that no longer hold for what it changes.

    Attributes:
        changes: by the origin of a module, and the part of what stands there now.
    """

    def __init__(self, build: Build, method: str, removes: Fact) -> None:
        self.changes: dict[tuple[str, str], Change] = {}
        self._build, self._method, self._removes = build, method, removes
        self._implied: set[tuple[str, str]] = set()  # parts that are skipped for the reason of another part

    def add(self, kind: ChangeKind, path: str, before: str, after: str, reason: str) -> None:
        """Record a change of the module at `path`."""
        origin, part = self._key(path)
        old = self.changes.get((origin, ""))
        if kind == "resized" and old is not None and old.kind == "replaced":  # a part of what this step put there
            parts = [other for other, _ in self._build.module.named_modules() if self._build.origin(other) == origin]
            after = describe(self._build.module.get_submodule(min(parts, key=len)))
            kind, before, part = "replaced", old.before, ""
            reason = old.reason if reason in old.reason else f"{old.reason}; {reason}"
        elif part:
            before = f"its `{part}`, {before}"
            if old is not None and old.kind == "skipped":
                del self.changes[origin, ""]
        self.changes[origin, part] = Change(
            method=self._method, origin=origin, kind=kind, before=before, after=after, reason=reason
        )
        self.lose(path)

    def add_to(self, kind: ChangeKind, path: str, before: str, after: str, reason: str = "") -> None:
        """Record one more change of the same kind of a module."""
        old = self.changes.get(self._key(path))
        if old is None or old.kind != kind:
            return self.add(kind, path, before, after, reason)
        reasons = [text for text in (old.reason, reason) if text]
        more = replace(old, after=f"{old.after}, {after}", reason="; ".join(dict.fromkeys(reasons)))
        self.changes[self._key(path)] = more

    def skip(self, path: str, reason: str) -> None:
        """Record why a module stays as it is; the first reason counts."""
        origin, part = self._key(path)
        told = {other: change for (at, other), change in self.changes.items() if at == origin}
        if told.keys() & {"", part} or (told and not part) or (origin, part) in self._implied:
            return
        if any(change.reason == reason for change in told.values()):
            self._implied.add((origin, part))
        else:
            self.changes[origin, part] = Change(method=self._method, origin=origin, kind="skipped", reason=reason)

    def lose(self, path: str) -> None:
        """Take from a module the facts that no longer hold for it."""
        origin = self._build.origin(path)
        self._build.facts[origin] = self._build.facts.get(origin, ALL_FACTS) & ~self._removes

    def _key(self, path: str) -> tuple[str, str]:
        """Return the origin of a module, and its path below what stands in the place of that now."""
        path = owner_of(path)
        origin, names = self._build.origin(path), path.split(".") if path else []
        heads = (".".join(names[:count]) for count in range(len(names) + 1))
        whole = next(head for head in heads if self._build.origin(head) == origin)
        return origin, path[len(whole) :].lstrip(".")
