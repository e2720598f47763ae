"""Fields of raw rows by dotted paths, "175b_verification.solution", and programs that judge what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..chat_template.types import BadRow
from ..config.value_types import Float, Int
from ..errors import UserError
from ..sandbox import Limits, Refused, run_limited


def find(row: dict[str, Any], path: str) -> Any:
    """Follow a dotted path to its value; a number is an item of a list, and a key may hold dots itself.

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


class Program(BaseModel):
    """The options of a program that judges fields of a row. `run` has "{file}" for the name of the file with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: list[str] = Field(min_length=1)
    file: str = Field(pattern=r"^[\w-][\w.-]*$")
    timeout: Float = Field(10.0, gt=0)  # seconds
    memory_mb: Int = Field(512, gt=0)  # of each process
    network: bool = False

    def refusal(self, row: dict[str, Any], content: Sequence[str]) -> str | None:
        """Tell why the program refuses the fields of a row, one after the other in the file; None: it ends with 0.

        Raises:
            BadRow: a field is missing, or is no text.
            UserError: the command cannot be started under its limits.
        """
        text = "\n".join(find_text(row, path) for path in content)
        limits = Limits(seconds=self.timeout, memory_mb=self.memory_mb, network=self.network)
        command = [part.replace("{file}", self.file) for part in self.run]
        try:
            outcome = run_limited(command, files={self.file: text}, limits=limits)
        except UnicodeEncodeError:
            raise BadRow("the content has half a surrogate pair, which is no text", "half a surrogate pair") from None
        except Refused as error:
            fix = "fix `run`" if self.network else "fix `run`, or set network: true to run it with the network"
            raise UserError(str(error), where=f"the filter command, run: {' '.join(self.run)}", fix=fix) from None
        return None if outcome.code == 0 else outcome.reason
