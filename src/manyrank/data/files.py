"""One data file to rows, a row at a time, in a memory that does not grow with the file.

    file                                                place of a row        a broken row
    JSONL: one object a line; also .gz, .zst            its line              a BadRow, the next line goes on
    JSON: one array of objects; also .gz, .zst          its item, from 1      ends the file: a UserError
    .csv, .tsv with a header; also .gz, .zst            its first line        a BadRow, the next line goes on
    .parquet                                            its row, from 1       ends the file: a UserError

JSON and JSONL are told apart by the first character, not by the name. Text is UTF-8, with or without a byte order mark;
a row with other bytes is a BadRow.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..chat_template.types import BadRow
from ..errors import UserError
from .json_array import items

CHUNK = 1 << 20  # bytes read at a time
BATCH = 256  # rows of a Parquet file read at a time
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARCHIVES = frozenset({".gz", ".zst"})
SUFFIXES = frozenset({".json", ".jsonl", ".parquet", ".txt", *DELIMITERS})


@dataclass(frozen=True)
class Row:
    """One row; a broken one is a value too, so that it can be counted and left out.

    Attributes:
        number: its line, item or row in the source, from 1.
        place: the same with the source, for people: "my.jsonl, line 3".
        value: its columns, or why it cannot be read.
        text: of a broken row, what stands there; other bytes than UTF-8 as \\x...
    """

    number: int
    place: str
    value: dict[str, Any] | BadRow
    text: str = ""

    def readable(self) -> dict[str, Any]:
        """Its columns.

        Raises:
            BadRow: it is a broken row.
        """
        if isinstance(self.value, BadRow):
            raise self.value
        return self.value


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix, and that of the archive: (".csv", ".gz")."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in ARCHIVES else (suffix, "")


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        UserError: it cannot be read from some place on.
        OSError: it cannot be opened.
    """
    return _parquet(path) if kind_of(path) == (".parquet", "") else _text_rows(path, kind_of(path)[0])


def _text_rows(path: Path, suffix: str) -> Iterator[Row]:
    with _opened(path) as file:
        start = file.peek(CHUNK)
        if b"\0" in start:
            raise UserError("binary, not text in UTF-8", where=str(path), fix="give JSON, JSONL, CSV or Parquet")
        if suffix in DELIMITERS:
            yield from _table(file, str(path), DELIMITERS[suffix])
        elif start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _array(file, str(path))
        else:
            yield from _lines(file, str(path))


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file; what is wrong with the archive is the user's error."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self.file.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"a broken archive: {error}", where=str(self.path), fix="pack it again") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _opened(path: Path) -> io.BufferedReader:
    archive = kind_of(path)[1]
    if archive == ".gz":
        return io.BufferedReader(_Unpacked(gzip.open(path, "rb"), path), CHUNK)
    if archive == ".zst":
        import pyarrow

        # Unlike the zstandard package, it notices a file that ends too early.
        unpacked = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(_Unpacked(unpacked, path), CHUNK)
    return path.open("rb", buffering=CHUNK)


def _as_text(file: BinaryIO) -> io.TextIOWrapper:
    """Bytes that are not UTF-8 become lone surrogates, so that one row is bad (see `_is_text`) and not the file."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: BinaryIO, name: str) -> Iterator[Row]:
    first = True
    for number, line in enumerate(file, 1):
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not line:
            continue
        value = _line_value(line)
        if first and isinstance(value, BadRow) and (line == b"{" or line.endswith(b"[")):
            fix = "a JSONL file has one whole object a line, a JSON file one array of objects"
            raise UserError("one object over several lines", where=f"{name}, line {number}", fix=fix)
        first = False
        broken = line.decode(errors="backslashreplace") if isinstance(value, BadRow) else ""
        yield Row(number, f"{name}, line {number}", value, broken)


def _line_value(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return _object(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error.reason}", "not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON: {error.msg} (column {error.colno})", "not JSON")
    except ValueError as error:
        return BadRow(f"JSON that cannot be read: {error}", "not JSON")
    except RecursionError:
        return BadRow("nested too deeply", "nested too deeply")


def _object(value: Any) -> dict[str, Any] | BadRow:
    kind = type(value).__name__
    return value if isinstance(value, dict) else BadRow(f"a row is {kind}, not an object", "not an object")


def _array(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, (value, text) in enumerate(items(_as_text(file), name), 1):
        whole = _object(value) if _is_text(text) else BadRow("not UTF-8", "not UTF-8")
        broken = _printable(text) if isinstance(whole, BadRow) else ""
        yield Row(number, f"{name}, item {number}", whole, broken)


def _table(file: BinaryIO, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; its default is too little for a long answer
    lines = _Remembered(_as_text(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        place = f"{name}, line {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is not closed took other lines with it: which of them are rows nobody knows.
            if not header or reader.line_num > number or "unexpected end of data" in str(error):
                raise UserError(f"broken CSV: {error}", where=place, fix="close the quote") from None
            value = BadRow(f"broken CSV: {error}", "not CSV")
        else:
            if not (cells and header):
                header = header or _header(cells, place)
                continue
            value = _record(header, cells)
        broken = _printable(lines.last.rstrip("\r\n")) if isinstance(value, BadRow) else ""
        yield Row(number, place, value, broken)


class _Remembered:
    """The lines of a file, and the last one that was read."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.last = iter(lines), ""

    def __iter__(self) -> _Remembered:
        return self

    def __next__(self) -> str:
        self.last = next(self.lines)
        return self.last


def _printable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _header(cells: list[str], place: str) -> list[str]:
    if len(cells) == 1 and ";" in cells[0]:
        fix = "write commas between the cells, or name the file .tsv and write tabs"
        raise UserError("the cells are parted by semicolons", where=place, fix=fix)
    if twice := [cell for cell in cells if cells.count(cell) > 1]:
        raise UserError(f"two columns are called {twice[0]!r}", where=place, fix="give each column its own name")
    return cells


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells in a table of {len(header)} columns", "wrong number of cells")
    return dict(zip(header, cells)) if all(map(_is_text, cells)) else BadRow("not UTF-8", "not UTF-8")


# Parquet


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            values = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(BATCH))
            yield from numbered(values, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"broken Parquet: {error}", where=str(path), fix="write the file again") from None


def numbered(values: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        yield Row(number, f"{name}, row {number}", {key: _present(inner) for key, inner in value.items()})


def _present(value: Any) -> Any:
    """Without keys whose value is None: Arrow gives every object all the keys that any object of its column has."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
