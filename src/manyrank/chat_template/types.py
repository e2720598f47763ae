"""Types of rows, messages and masks."""

from __future__ import annotations

from typing import Any

# role, content, and optionally tool_calls, reasoning_content, weight, prompt, name, tool_call_id
Message = dict[str, Any]
IGNORE = -100  # the label of a token that is not learned

# Reasons why a message or an end of turn that an option names cannot be learned.
ROLE_NOT_NAMED, ROLE_WITHOUT_END = "role not named", "role without end of turn"
END_AT_THE_START = "end of turn at the start"


def bare(message: Message) -> Message:
    """The message as a template sees it, without what says whether it is learned."""
    return {key: value for key, value in message.items() if key not in ("weight", "prompt")}


def is_learned(message: Message) -> bool:
    """Tell whether an assistant message is learned: it is not in a prompt, and its weight is not 0."""
    return bool(message.get("weight", 1)) and not message.get("prompt")


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
