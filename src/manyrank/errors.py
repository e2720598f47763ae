"""Errors of users, and the exit codes of every command."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_MEMORY = 76  # out of memory
EXIT_PREEMPTED = 75  # a complete checkpoint is written: queue the job again


class UserError(Exception):
    """The user's input is wrong. Printed as three lines, or four with the reason; exit code 2, no traceback.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, row, option or folder it was found in.
        fix: what to do about it.
        why: the reason, where `what` does not say it.
    """

    def __init__(self, what: str, *, where: str, fix: str, why: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix, self.why = what, where, fix, why

    def __reduce__(self) -> tuple:  # processes that tokenise send it to the one that prints it
        return _user_error, (self.what, self.where, self.fix, self.why)

    def __str__(self) -> str:
        why = f"why:   {self.why}\n" if self.why else ""
        return f"error: {self.what}\nwhere: {self.where}\n{why}fix:   {self.fix}"


def name_too_long(error: OSError) -> UserError:
    """Turn an OSError of a name that the file system does not take into one of the user; raise any other."""
    if error.errno != errno.ENAMETOOLONG:
        raise error
    what = f"a name is too long for a file: {str(error.filename)[:40]}..."
    return UserError(what, where="command line", fix="give a shorter name")


class OutOfMemory(UserError):
    """The run needs more memory than there is. Three lines, too, and its own exit code."""


# In the words of torch (its allocators, CUDA and the driver under expandable segments), cuBLAS, cuDNN, cuSOLVER, NCCL,
# Triton and bitsandbytes. torch 2.13 fails an assertion about NVML where it would say it of a GPU that NVML cannot read.
_OUT_OF_MEMORY = re.compile(
    r"(CUDA|HIP) out of memory\. Tried to allocate (?!more than 1EB)"
    r"|(CUDA|HIP)( driver)? error: out of memory"
    r"|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    r"|Cuda failure (\d+ )?'out of memory'|Failed to CUDA \w*alloc"
    r"|Triton Error \[(CUDA|HIP)\]: out of memory"
    r"|Error out of memory at line \d+ in file"
    r"|DefaultCPUAllocator: can't allocate memory"
    r"|NVML_SUCCESS == r INTERNAL ASSERT FAILED at \S*CUDACachingAllocator"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch or of a library below it says that memory is short, of a GPU or of the machine."""
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _user_error(what: str, where: str, fix: str, why: str) -> UserError:
    return UserError(what, where=where, fix=fix, why=why)


class UserErrors(UserError):
    """Several things are wrong at once; each is printed as it would be alone."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        super().__init__(first.what, where=first.where, fix=first.fix, why=first.why)
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple:
        return UserErrors, (self.problems,)

    def __str__(self) -> str:
        return "\n\n".join([f"{len(self.problems)} things are wrong", *map(str, self.problems)])


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a finite number; raised before the optimizer has stepped."""


class NonFiniteGradientError(NonFiniteError):
    """The norm of a step's gradient is not a finite number; the optimizer has not used it."""


class GradientOverflow(Exception):
    """A step's gradients were too large for fp16 with the loss scale it had; nothing has used them, and the scale is lower."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


class Preempted(SystemExit):
    """A signal asked the run to stop; its checkpoint is complete.

    Args:
        final: False where the signal may be that of torch's agent, which starts the workers anew.
    """

    def __init__(self, *, final: bool = True) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.final = final


def in_one_line(error: BaseException) -> str:
    """The error without a traceback: its type and the first line of what it says."""
    if isinstance(error, UserError):
        return error.what
    return f"{type(error).__name__}: {error}".split("\n")[0].strip().removesuffix(":")
