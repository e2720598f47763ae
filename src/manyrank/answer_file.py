"""A file of answers that grows batch by batch and survives being killed.

OUTPUT.partial    {"settings": {...}}        first line: what must be the same to go on
                  {"row": 7, ...}            rows in the order in which they were answered
                  {"row": 3, ...             half a line of a killed run: dropped
     └── all rows are there ──> OUTPUT       the rows in the order of the input, without the first line
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UserError
from .run_folder import sync


class AnswerFile:
    """The answers so far.

    Args:
        settings: JSON values that decide what the answers are.
        overwrite: replace what is there; what was begun with these settings goes on all the same.

    Attributes:
        done: the rows that are answered.

    Raises:
        UserError: OUTPUT is there, or what was begun had other settings.
        OSError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output, self.partial = output, partial_of(output)
        check_output(output, overwrite=overwrite)
        try:
            self.done = self._read(settings)
        except UserError:
            if not overwrite:
                raise
            self.partial.unlink()
            self.done = set()
        self._file = self.partial.open("ab")
        if not self._file.tell():
            self._write([{"settings": settings}])

    def _read(self, settings: dict[str, Any]) -> set[int]:
        """The rows of an earlier run; what follows the last whole line is cut off."""
        if not self.partial.exists():
            return set()
        end, rows = 0, set()
        with self.partial.open("r+b") as file:
            for line in file:
                entry = _whole(line)
                if entry is None:
                    break
                if end == 0:
                    self._compare(entry.get("settings"), settings)
                else:
                    rows.add(entry["row"])
                end += len(line)
            file.truncate(end)
        return rows

    def _compare(self, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        if before is None:
            what = f"{self.partial} is not a file that this command began"
            raise UserError(what, where="OUTPUT", fix="choose another name")
        now = json.loads(json.dumps(now))
        changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in before | now if before.get(key) != now.get(key)]  # fmt: skip
        if changed:
            what = f"{self.partial} was begun with other settings: {'; '.join(changed)}"
            raise UserError(what, where="OUTPUT", fix="give the same settings, another name, or --overwrite")

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write rows that are not there yet, to the disk."""
        new = [entry for entry in entries if entry["row"] not in self.done]
        self._write(new)
        self.done |= {entry["row"] for entry in new}

    def _write(self, entries: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the rows their order and the file its name."""
        self._file.close()
        with self.partial.open("rb") as file:
            next(file)
            lines = sorted(file, key=lambda line: json.loads(line)["row"])
        whole = self.output.with_name(self.output.name + ".whole")
        try:
            with whole.open("wb") as file:
                file.writelines(lines)
            sync(whole)
            whole.replace(self.output)
        finally:
            whole.unlink(missing_ok=True)
        self.partial.unlink()

    def close(self) -> None:
        self._file.close()


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse what cannot be written, before the work.

    Raises:
        UserError: see there.
    """
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"{output} cannot be written", where="OUTPUT", fix="name a file in a folder that is there")
    if output.suffix != ".jsonl":
        raise UserError(f"{output} is not named as JSONL", where="OUTPUT", fix="end it with .jsonl")
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already", where="OUTPUT", fix="choose another name, or add --overwrite")


def _whole(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # what a crash of the machine may leave
        return None
    return entry if isinstance(entry, dict) and ("row" in entry or "settings" in entry) else None
