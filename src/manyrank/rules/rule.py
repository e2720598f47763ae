"""Rules and violations."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..errors import UserError
from .context import RunContext


@dataclass(frozen=True)
class Rule:
    """A combination that is known to be bad, or doubtful.

    Attributes:
        name: short words with dashes; a warning is switched off by it.
        keys: what the user set or may set, as `RunContext.where` takes it.
        broken: says what is wrong here, or None.
        reason: why it is wrong, whatever the values are.
        fix: what to do about it.
        upstream: the issue or page of the library that it comes from.
        of_many: whether only those of the keys count that `broken` names.
    """

    name: str
    keys: tuple[str, ...]
    broken: Callable[[RunContext], str | None]
    reason: str
    fix: str
    severity: Literal["error", "warning"]
    upstream: str | None = None
    of_many: bool = False

    def keys_in(self, what: str) -> list[str]:
        """The keys that count where this is wrong."""
        return [key for key in self.keys if not self.of_many or re.search(rf"\b{key}\b", what)]


error, warning = partial(Rule, severity="error"), partial(Rule, severity="warning")


@dataclass(frozen=True)
class Violation:
    """A broken rule: what is wrong here, and where."""

    rule: Rule
    what: str
    where: str

    @property
    def why(self) -> str:
        return self.rule.reason + (f" ({self.rule.upstream})" if self.rule.upstream else "")

    def error(self) -> UserError:
        return UserError(self.what, where=self.where, fix=self.rule.fix, why=self.why)

    def warning(self) -> str:
        """Format the violation as it is printed."""
        off = f"or, if it is meant so, ignore_warnings: [{self.rule.name}]"
        return f"warning: {self.what}\nwhere: {self.where}\nwhy:   {self.why}\nfix:   {self.rule.fix}; {off}"


def unless(wrong: Callable[[RunContext], bool], what: str) -> Callable[[RunContext], str | None]:
    """A rule's `broken` in one line: `what` is formatted with the context `s` and its recipe `c`."""
    return lambda s: what.format(s=s, c=s.config) if wrong(s) else None
