"""A folder of training rows: JSONL files and the same for `datasets`, complete or absent.

    OUTPUT.partial/  ──filled, then renamed──>  OUTPUT/
                                                ├── train.jsonl, validation.jsonl, ...   one row a line, UTF-8
                                                ├── dataset/             datasets.DatasetDict.save_to_disk
                                                └── quarantine.jsonl     only where rows were put aside

In JSONL a row is exactly as it was made. A table needs one type for a column, so `Kinds` finds the narrowest that
holds all of its values: text, numbers, lists, objects with the same keys everywhere, or else JSON.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...chat_template.types import BadRow

Kind = Any  # None (no value yet), the name of a type, [kind of the entries] or {key: kind}
SUMMARY = "sft_data_summary.json"
QUARANTINE = "quarantine"


def json_line(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON, with all letters as they are.

    Raises:
        BadRow: JSON or UTF-8 cannot hold it.
    """
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise BadRow("it has half a surrogate pair, which is no text", "half a surrogate pair") from None
    except ValueError as error:
        raise BadRow(f"JSON has no such number: {error}", "NaN") from None
    except TypeError as error:
        raise BadRow(f"JSON cannot hold it: {error}", "not JSON") from None
    except RecursionError:
        raise BadRow("nested too deeply", "nested too deeply") from None


class Writer:
    """Writes rows to the JSONL file of their split, and broken rows to the quarantine.

    Attributes:
        rows: rows by split.
        kinds: the type of each column.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: Counter[str] = Counter()
        self.kinds: dict[str, Kind] = {}
        self._files: dict[str, BinaryIO] = {}

    def write(self, split: str, row: dict[str, Any], line: bytes) -> None:
        """Add a row, given also as its `json_line`.

        Raises:
            BadRow: no table can hold it; then it is not written.
        """
        kinds = {key: kind(value) for key, value in row.items()}
        self.kinds |= {key: merged(self.kinds.get(key), own) for key, own in kinds.items()}
        self._file(split).write(line)
        self.rows[split] += 1

    def put_aside(self, entry: dict[str, Any]) -> None:
        """Add to the quarantine; what JSON has no type for is written as text."""
        text = json.dumps(entry, ensure_ascii=False, default=str)
        self._file(QUARANTINE).write(text.encode("utf-8", "backslashreplace") + b"\n")

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.jsonl").open("wb")
        return self._files[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


# Types of columns


def kind(value: Any) -> Kind:
    """The narrowest type of a JSON value.

    Raises:
        BadRow: a whole number of more than 64 bits, which `datasets` would turn into text.
    """
    if value is None:
        return None
    if isinstance(value, list):
        inner: Kind = None
        for entry in value:
            inner = merged(inner, kind(entry))
        return [inner]
    if isinstance(value, dict):
        return {key: kind(inner) for key, inner in value.items()} or "json"
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise BadRow(f"{value} has more than 64 bits", "number too large")
        return "int64"
    return {bool: "bool", float: "float64", str: "string"}[type(value)]


def merged(one: Kind, other: Kind) -> Kind:
    """The narrowest type that holds the values of both."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, list) and isinstance(other, list):
        return [merged(one[0], other[0])]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: merged(one[key], other[key]) for key in one}
    return one if one == other else "json"


def _feature(of: Kind) -> Any:
    from datasets import Json, List, Value

    if isinstance(of, list):
        return List(_feature(of[0]))
    if isinstance(of, dict):
        return {key: _feature(inner) for key, inner in of.items()}
    return Json() if of == "json" else Value(of or "null")


def _rows(path: str) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def save_dataset(folder: Path, splits: list[str], kinds: dict[str, Kind]) -> None:
    """Write FOLDER/dataset from FOLDER/SPLIT.jsonl, row by row."""
    import datasets

    features = datasets.Features({key: _feature(of) for key, of in kinds.items()})
    cache = folder / "cache"  # else a copy of all rows would stay in the user's cache
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        made = {
            split: datasets.Dataset.from_generator(
                _rows, features=features, gen_kwargs={"path": str(folder / f"{split}.jsonl")}, cache_dir=str(cache)
            )
            for split in splits
        }
        datasets.DatasetDict(made).save_to_disk(folder / "dataset")
    finally:
        if shown:
            datasets.enable_progress_bars()
        shutil.rmtree(cache, ignore_errors=True)
