"""Files to rows, a row at a time, in a memory that does not grow with the file.

    source                                              place of a row        a broken row
    JSONL: one object a line; also .gz, .zst            its line              a BadRow, the next line goes on
    JSON: one array of objects; also .gz, .zst          its item, from 1      ends the file: a UserError
    .csv, .tsv with a header; also .gz, .zst            its first line        a BadRow, the next line goes on
    .parquet                                            its row, from 1       ends the file: a UserError
    a folder that datasets saved (save_to_disk)         its row, from 1
    a folder with data files, or a name on the hub      its row, from 1       ends the source: a UserError

JSON and JSONL are told apart by the first character, not by the name. Text is UTF-8, with or without a byte order mark;
a row with other bytes is a BadRow.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .json_array import items
from .schema import DataSource, TrainConfig
from .turns import BadRow

CHUNK = 1 << 20  # bytes read at a time
BATCH = 256  # rows of a Parquet file read at a time
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARCHIVES = frozenset({".gz", ".zst"})
FILE_SUFFIXES = frozenset({".json", ".jsonl", ".parquet", ".txt", *DELIMITERS})  # no names on the hub
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WHERE = "data_path or eval_data_path"


@dataclass(frozen=True)
class Source:
    """Rows from one place.

    Attributes:
        path: a file, a folder or a name on the hub.
        split: of a folder or a name on the hub; "train" unless given.
        format_type: how its rows are read, see `formats`; "auto" looks at the first one.
        columns: the column of each field of the format that is not called as the field.
        weight: how often a row is seen in an epoch. For who mixes the sources: `read_rows` reads each row once.
        max_rows: at most so many rows are used. For the same.
        name: the configuration of a name on the hub that has several, such as "main" of openai/gsm8k.
    """

    path: str
    split: str | None = None
    format_type: str = "auto"
    columns: dict[str, str] | None = None
    weight: float = 1.0
    max_rows: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("the path is empty", where=WHERE, fix="give a file, a folder or a name on the hub")


def source_of(given: DataSource, config: TrainConfig) -> Source:
    """The source as the recipe gives it; what is not given is the recipe's."""
    return Source(
        given.path,
        split=given.split,
        name=given.name,
        format_type=given.format_type or config.format_type,
        columns=config.columns if given.columns is None else given.columns,
        weight=given.weight,
        max_rows=given.max_rows,
    )


@dataclass(frozen=True)
class Row:
    """One row; a broken one is a value too, so that it can be counted and left out.

    Attributes:
        number: its line, item or row in the source, from 1.
        place: the same with the source, for people: "my.jsonl, line 3".
        value: its columns, or why it cannot be read.
    """

    number: int
    place: str
    value: dict[str, Any] | BadRow


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        UserError: the source is not there, has no rows, or cannot be read from some place on.
    """
    path, found = Path(source.path), False
    try:
        rows = _file_rows(source, path) if path.is_file() else _dataset_rows(source, path)
        for row in rows:
            found = True
            yield row
    except OSError as error:
        raise _unreadable(source, error) from None
    if not found:
        raise UserError("there are no rows in it", where=source.path, fix="give a file with rows")


def fingerprint(source: Source) -> str:
    """What tells this source's content from another's, as 64 hex digits; for the key of a cache.

    The bytes of a file or of all files in a folder with their names, the kind of file, and the split. For a name on the
    hub: the name, the split and the newest commit, or without the commit where the hub cannot be reached.

    Raises:
        UserError: the source is not there or cannot be read.
    """
    path = Path(source.path)
    try:
        if path.is_file():
            content = [_kind(path), _digest(path)]
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            content = [[file.relative_to(path).as_posix(), _digest(file)] for file in inside]
        else:
            content = [_hub_name(source.path), _commit(source.path)]
    except OSError as error:
        raise _unreadable(source, error) from None
    return hashlib.sha256(json.dumps([source.split, source.name, content]).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # offline, or a name that `read_rows` refuses with its reason
        return None


def _unreadable(source: Source, error: OSError) -> UserError:
    return UserError(f"cannot be read: {error}", where=source.path, fix="check the file and its permissions")


def _kind(path: Path) -> tuple[str, str]:
    """The suffix, and that of the archive: (".csv", ".gz")."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in ARCHIVES else (suffix, "")


# Files


def _file_rows(source: Source, path: Path) -> Iterator[Row]:
    if source.split is not None or source.name is not None:
        what = f"no split {source.split!r}" if source.split is not None else f"no configuration {source.name!r}"
        raise UserError(f"a file has {what}", where=source.path, fix="leave it out")
    if _kind(path) == (".parquet", ""):
        return _parquet(path)
    return _text_rows(path, _kind(path)[0])


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
    archive = _kind(path)[1]
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
        if first and isinstance(value, BadRow) and line.endswith((b"{", b"[")):
            fix = "a JSONL file has one whole object a line, a JSON file one array of objects"
            raise UserError("one object over several lines", where=f"{name}, line {number}", fix=fix)
        first = False
        yield Row(number, f"{name}, line {number}", value)


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
        yield Row(number, f"{name}, item {number}", whole)


def _table(file: BinaryIO, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; its default is too little for a long answer
    reader = csv.reader(_as_text(file), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        place = f"{name}, line {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header or "unexpected end of data" in str(error):  # a quote that is not closed took all the rest
                raise UserError(f"broken CSV: {error}", where=place, fix="close the quote") from None
            yield Row(number, place, BadRow(f"broken CSV: {error}", "not CSV"))
            continue
        if cells and header:
            yield Row(number, place, _record(header, cells))
        header = header or _header(cells, place)


def _header(cells: list[str], place: str) -> list[str]:
    if twice := [cell for cell in cells if cells.count(cell) > 1]:
        raise UserError(f"two columns are called {twice[0]!r}", where=place, fix="give each column its own name")
    return cells


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells in a table of {len(header)} columns", "wrong number of cells")
    return dict(zip(header, cells)) if all(map(_is_text, cells)) else BadRow("not UTF-8", "not UTF-8")


# Arrow


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            values = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(BATCH))
            yield from _numbered(values, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"broken Parquet: {error}", where=str(path), fix="write the file again") from None


def _numbered(values: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        yield Row(number, f"{name}, row {number}", {key: _present(inner) for key, inner in value.items()})


def _present(value: Any) -> Any:
    """Without keys whose value is None: Arrow gives every object all the keys that any object of its column has."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _dataset_rows(source: Source, path: Path) -> Iterator[Row]:
    name = source.path if path.is_dir() else _hub_name(source.path)
    place = f"{name} ({source.split})" if source.split else name
    try:
        yield from _numbered(_saved(source) if _is_saved(path) else _loaded(source), place)
    except UserError:
        raise
    except Exception as error:  # datasets passes on what its readers, the hub's client and the network raise
        problem = " ".join(str(error).split()) or type(error).__name__
        away = (
            "there is no such file or folder here; for a name on the hub check the name, the split and the connection"
        )
        fix = "check the files and the split" if path.is_dir() else away
        raise UserError(f"datasets cannot read it: {problem}", where=place, fix=fix) from None


def _hub_name(path: str) -> str:
    if HUB_NAME.fullmatch(path) and _kind(Path(path))[0] not in FILE_SUFFIXES:
        return path
    raise UserError(f"there is no file {path}", where=WHERE, fix="check the path")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved(source: Source) -> Iterable[dict[str, Any]]:
    from datasets import Dataset, load_from_disk

    found = load_from_disk(source.path)
    lone = isinstance(found, Dataset)
    splits = [str(found.split)] if lone else list(found)
    wanted = source.split or (splits[0] if lone else "train")
    if wanted not in splits:
        raise UserError(f"there is no split {wanted!r}", where=source.path, fix=f"its splits: {', '.join(splits)}")
    return (found if lone else found[wanted]).with_format(None)


def _loaded(source: Source) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    return load_dataset(source.path, source.name, split=source.split or "train", streaming=True)
