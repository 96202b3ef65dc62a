"""How long-running work tells what it is doing: a small protocol, and the silence that is its default."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Something that shows how far work has come."""

    def phase(self, name: str) -> None:
        """Begin a new phase of the work, such as `"baseline"` or `"search"`."""

    def update(
        self, text: str = "", fraction: float | None = None, best: str = "", seconds_left: float | None = None
    ) -> None:
        """Say where the current phase stands.

        Args:
            text: what is being done.
            fraction: how much of the phase is done, in [0, 1]; `None` where nobody can tell.
            best: the best result so far, in a few words.
            seconds_left: an honest estimate, in seconds; `None` where there is none.
        """

    def message(self, text: str) -> None:
        """Say something that stays on the screen."""


class Silence:
    """A `Progress` that shows nothing."""

    def phase(self, name: str) -> None:
        """Do nothing."""

    def update(
        self, text: str = "", fraction: float | None = None, best: str = "", seconds_left: float | None = None
    ) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


SILENT: Progress = Silence()
