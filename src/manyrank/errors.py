"""What a user can do wrong, and the exit codes of every command."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75  # a complete checkpoint is written: queue the job again


class UserError(Exception):
    """The user's input is wrong. Printed as three lines, exit code 2, no traceback.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, row, option or folder it was found in.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self):  # processes that tokenise send it to the one that prints it
        return _user_error, (self.what, self.where, self.fix)

    def __str__(self) -> str:
        return f"error: {self.what}\nwhere: {self.where}\nfix:   {self.fix}"


def _user_error(what: str, where: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix)


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a finite number; raised before the optimizer has stepped."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


class Preempted(SystemExit):
    """A signal asked the run to stop; its checkpoint is complete."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)
