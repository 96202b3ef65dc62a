"""A progress display that notes how time passes, so that what a killed process had used is known to its successor."""

import time
from collections.abc import Callable

from trimpoint.progress import Progress

EVERY_SECONDS = 5.0


class Heartbeat:
    """A `Progress` that hands everything on, and calls `beat` at most every five seconds.

    Args:
        progress: that shows how far the work is.
        beat: what is called.
    """

    def __init__(self, progress: Progress, beat: Callable[[], None]) -> None:
        self._progress, self._beat = progress, beat
        self._last = time.monotonic()

    def phase(self, name: str) -> None:
        """Begin a new phase."""
        self._progress.phase(name)

    def update(
        self, text: str = "", fraction: float | None = None, best: str = "", seconds_left: float | None = None
    ) -> None:
        """Say where the current phase stands, and beat if it is time to."""
        self._progress.update(text, fraction, best, seconds_left)
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._beat()
            self._last = time.monotonic()

    def message(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._progress.message(text)
