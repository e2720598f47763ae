"""A file of answers that grows batch by batch and survives being killed.

OUTPUT.partial    {"settings": {...}}        first line: what must be the same to go on
                  {"row": 7, ...}            rows in the order in which they were answered
                  {"row": 3, ...             half a line of a killed run: dropped
     └── all rows are there ──> OUTPUT       the rows in the order of the input, without the first line

Whoever writes OUTPUT.partial holds a lock on it, which ends with the process, whatever ends that.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from ...runs.folder import sync


class AnswerFile:
    """The answers so far.

    Args:
        settings: JSON values that decide what the answers are.
        overwrite: replace what is there; what was begun with these settings goes on all the same.

    Attributes:
        done: the rows that are answered.

    Raises:
        UserError: OUTPUT is there, what was begun had other settings, or another process writes it.
        OSError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output, self.partial = output, partial_of(output)
        self._file = self._mine(overwrite=overwrite)
        try:
            self.done = self._read(settings, overwrite=overwrite)
            if not self.partial.stat().st_size:
                self._write([{"settings": settings}])
        except BaseException:
            self.close()
            raise

    def _mine(self, *, overwrite: bool) -> BinaryIO:
        """The file, to read and to append, for this process alone."""
        while True:
            check_output(self.output, overwrite=overwrite)
            file = self.partial.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                what = f"another process is writing {self.partial}"
                raise UserError(what, where="OUTPUT", fix="wait for it, end it, or choose another name") from None
            except OSError:  # a file system without locks
                return file
            if self.partial.exists() and os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                return file
            file.close()  # another process has finished meanwhile

    def _read(self, settings: dict[str, Any], *, overwrite: bool) -> set[int]:
        """The rows of an earlier run; what follows the last whole line is cut off."""
        end, rows = 0, set()
        self._file.seek(0)
        for line in self._file:
            entry = _whole(line)
            if entry is None:
                break
            if end == 0:
                try:
                    self._compare(entry.get("settings"), settings)
                except UserError:
                    if not overwrite:
                        raise
                    break
            else:
                rows.add(entry["row"])
            end += len(line)
        self._file.truncate(end)
        return rows

    def _compare(self, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        if before is None:
            what = f"{self.partial} is not a file that this command began"
            raise UserError(what, where="OUTPUT", fix="choose another name")
        now = json.loads(json.dumps(now))
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}" for key in before | now if before.get(key) != now.get(key)
        ]
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
        self.close()

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
