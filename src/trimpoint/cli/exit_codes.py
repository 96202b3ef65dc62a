"""What the program's exit codes mean."""

from trimpoint.errors import TrimpointError

DONE = 0
ERROR = 1
USAGE = 2
NOTHING_MET_THE_GOAL = 3
NOT_VERIFIED = 4
INTERRUPTED = 130


class VerbError(TrimpointError):
    """An end of a verb that has an exit code of its own.

    Args:
        message: what is wrong.
        hint: what to do about it.
        code: the exit code.
    """

    def __init__(self, message: str, hint: str | None = None, *, code: int = ERROR) -> None:
        super().__init__(message, hint)
        self.code = code
