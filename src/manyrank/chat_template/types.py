"""Types of rows, messages and masks."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]  # role, content, and optionally tool_calls, reasoning_content, weight, name, tool_call_id
IGNORE = -100  # the label of a token that is not learned


class BadRow(ValueError):
    """A row that cannot become a sample.

    Args:
        detail: what is wrong, with the field or turn; the text of the error.
        reason: the kind of problem in a few words, the same for all such rows, to count them.
    """

    def __init__(self, detail: str, reason: str) -> None:
        super().__init__(detail, reason)  # both, so that it can be pickled
        self.detail, self.reason = detail, reason

    def __str__(self) -> str:
        return self.detail
