"""Fields of raw rows by dotted paths, "175b_verification.solution", and programs that judge what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chat_template.types import BadRow
from ..errors import UserError
from ..sandbox import Limits, Refused
from ..sandbox import run as run_program


def find(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; a number is an item of a list, and a key may hold dots itself.

    Raises:
        BadRow: there is nothing, or null.
    """
    value: Any = row
    for part in [path] if path in row else path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise BadRow(f"the row has no field {path!r}", reason="missing field")
    return value


def find_text(row: dict[str, Any], path: str) -> str:
    value = find(row, path)
    if not isinstance(value, str):
        raise BadRow(f"the field {path!r} is {type(value).__name__}, not text", reason="wrong type")
    return value


def refusal(
    row: dict[str, Any], content: Sequence[str], *, run: Sequence[str], file: str, limits: Limits
) -> str | None:
    """Why a program refuses the fields of a row, which stand in a file one after the other; None: it ends with 0.

    Args:
        run: the command; {file} stands for the file's name.

    Raises:
        BadRow: a field is missing, or is no text.
        UserError: the command cannot be started under its limits.
    """
    text = "\n".join(find_text(row, path) for path in content)
    try:
        outcome = run_program([part.replace("{file}", file) for part in run], files={file: text}, limits=limits)
    except UnicodeEncodeError:
        raise BadRow("the content has half a surrogate pair, which is no text", "half a surrogate pair") from None
    except Refused as error:
        fix = "mend `run`" if limits.network else "mend `run`, or set network: true to run it with the network"
        raise UserError(str(error), where=f"the filter command, run: {' '.join(run)}", fix=fix) from None
    return None if outcome.code == 0 else outcome.reason
