"""One line of the doctor's report. No torch.

ok        as it should be
warning   the training may suffer, or it cannot be known
failed    the training would not work
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """Checks: what was examined, what was seen, and how to fix it.

    Attributes:
        fix: empty when it is ok.
        figures: what was measured, as numbers and short texts.
    """

    name: str
    state: State
    seen: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Check:
        """Make one again from the JSON of its `asdict`."""
        return cls(**{**values, "state": State(values["state"])})

    def __str__(self) -> str:
        shown = f"{self.state:<8} {self.name:<16} {self.seen}"
        return f"{shown}\n{'':<8} fix: {self.fix}" if self.fix else shown


def ok(name: str, seen: str, **figures) -> Check:
    return Check(name, State.OK, _one_line(seen), figures=figures)


def warning(name: str, seen: str, fix: str, **figures) -> Check:
    return Check(name, State.WARNING, _one_line(seen), _one_line(fix), figures)


def failed(name: str, seen: str, fix: str, **figures) -> Check:
    return Check(name, State.FAILED, _one_line(seen), _one_line(fix), figures)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def counted(number: int, what: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def gib(count: float) -> str:
    """Bytes in GiB, or in MiB where that would be next to nothing."""
    return f"{count / 2**30:,.1f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:,.1f} MiB"


def speed(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:,.3g} GB/s"
