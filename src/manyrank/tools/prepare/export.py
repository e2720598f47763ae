"""A folder of training rows: JSONL files and the same for `datasets`, complete or absent.

    OUTPUT.partial/  ──filled, then renamed──>  OUTPUT/
                                                ├── train.jsonl, validation.jsonl, ...   one row a line, UTF-8
                                                ├── dataset/             datasets.DatasetDict.save_to_disk
                                                └── quarantine.jsonl     only where rows were quarantined

In JSONL a row is exactly as it was made. In the table a column has one type, which `datasets` finds: text, numbers,
lists, objects with the same keys everywhere, or else JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ...chat_template.types import BadRow
from ...errors import UserError

QUARANTINE = "quarantine"


def json_line(row: dict[str, Any]) -> bytes:
    """Write a row as one line of JSON, with all letters as they are.

    Raises:
        BadRow: JSON, UTF-8 or a table cannot hold it.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise BadRow("it has half a surrogate pair, which is no text", "half a surrogate pair") from None
    except ValueError as error:
        raise BadRow(f"JSON has no such number: {error}", "NaN") from None
    except TypeError as error:
        raise BadRow(f"JSON cannot hold it: {error}", "not JSON") from None
    except RecursionError:
        raise BadRow("nested too deeply", "nested too deeply") from None
    json.loads(line, parse_int=_whole_number)
    return line


def _whole_number(digits: str) -> int:
    if not -(2**63) <= int(digits) < 2**63:
        raise BadRow(f"{digits} has more than 64 bits", "number too large")
    return int(digits)


class Writer:
    """Writes rows to the JSONL file of their split, and broken rows to the quarantine.

    Attributes:
        rows: rows by split.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: Counter[str] = Counter()
        self._files: dict[str, BinaryIO] = {}

    def write(self, split: str, line: bytes) -> None:
        """Add a row, given as its `json_line`."""
        self._file(split).write(line)
        self.rows[split] += 1

    def quarantine(self, entry: dict[str, Any]) -> None:
        """Add a broken row; what JSON has no type for is written as text."""
        text = json.dumps(entry, ensure_ascii=False, default=str)
        self._file(QUARANTINE).write(text.encode("utf-8", "backslashreplace") + b"\n")

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.jsonl").open("wb")
        return self._files[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def save_dataset(folder: Path, splits: list[str]) -> None:
    """Write FOLDER/dataset from FOLDER/SPLIT.jsonl; one split at a time is in memory, so that its types are known."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        tables = datasets.DatasetDict({split: _table(folder / f"{split}.jsonl") for split in splits})
        tables.save_to_disk(folder / "dataset")
    finally:
        if shown:
            datasets.enable_progress_bars()


def _table(file: Path):
    """Read a split into a table.

    Raises:
        UserError: a column has floats beside whole numbers that no float can hold.
    """
    import pyarrow
    from datasets import Dataset

    with file.open(encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns}, on_mixed_types="use_json")
    except pyarrow.ArrowException as error:
        fix = "leave out such a column, or bring its values to one type"
        raise UserError(f"no table can hold the rows: {error}", where=file.name, fix=fix) from None
