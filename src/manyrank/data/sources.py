"""Sources to rows: a file (see `files`), a folder, or a name on the hub.

source                                              place of a row
a file, or a folder of `data prepare`               its line, item or row
a folder that datasets saved (save_to_disk)         its row, from 1
a folder with data files, or a name on the hub      its row, from 1; a broken one ends the source: a UserError
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..chat_template.types import BadRow
from ..config.data_source import DataSource
from ..config.schema import TrainConfig
from ..errors import UserError
from ..runs import hub
from .files import SUFFIXES, Row, file_rows, kind_of, numbered
from .formats import detect

PREPARED = "sft_data_summary.json"  # in a folder that `manyrank data prepare` has written, beside a file for each split
WHERE = "data_path or eval_data_path"
LOOKED_AT = 1000  # rows in which a known format is looked for


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
        shard_seed: of a source that is not read to its end: the order of the files of a folder or a name on the hub.
    """

    path: str
    split: str | None = None
    format_type: str = "auto"
    columns: dict[str, str] | None = None
    weight: float = 1.0
    max_rows: int | None = None
    name: str | None = None
    shard_seed: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether it is not read to its end, so that nothing may depend on all of it."""
        return self.shard_seed is not None

    @property
    def shape(self) -> str:
        """The format, with the columns of other names that every row has."""
        columns = [column for column in (self.columns or {}).values() if not column.endswith("?")]
        return f"{self.format_type} of {', '.join(columns)}" if columns else self.format_type

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("the path is empty", where=WHERE, fix="give a file, a folder or a name on the hub")


def source_of(source: DataSource, config: TrainConfig) -> Source:
    """The source as the recipe gives it; what is not given is the recipe's."""
    return Source(
        source.path,
        split=source.split,
        name=source.name,
        format_type=source.format_type or config.format_type,
        columns=config.columns if source.columns is None else source.columns,
        weight=source.weight,
        max_rows=source.max_rows or config.max_rows,
        shard_seed=config.order_seed if config.streaming else None,
    )


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        UserError: the source is not there, has no rows, or cannot be read from some place on.
    """
    path, any_row = Path(source.path), False
    try:
        if (path / PREPARED).is_file():
            rows = file_rows(_prepared(source, path))
        else:
            rows = _one_file(source, path) if path.is_file() else _dataset_rows(source, path)
        for row in rows:
            any_row = True
            yield row
    except OSError as error:
        raise _unreadable(source, error) from None
    if not any_row:
        raise UserError("there are no rows in it", where=source.path, fix="give a file with rows")


def known_format(source: Source) -> Source:
    """The source with its format, found out from its first rows: the first format that a row fits.

    Where no row can be read it stays "auto": each of them is told of when the rows are used.

    Raises:
        UserError: the source cannot be read, or no format fits.
    """
    if source.format_type != "auto":
        return source
    problem, looked_at = None, 0
    for row in read_rows(source):
        if isinstance(row.value, BadRow):
            continue
        try:
            name, columns = detect(row.value, where=row.place, columns=source.columns)
            return replace(source, format_type=name, columns=columns and dict(columns))
        except UserError as error:
            problem, looked_at = problem or error, looked_at + 1
        if looked_at == LOOKED_AT:
            break
    if problem:
        raise problem
    return source


def fingerprint(source: Source) -> str:
    """Compute what tells this source's content from another's, as 64 hex digits; for the key of a cache.

    The bytes of a file or of all files in a folder with their names, the kind of file, and the split. Of what is streamed
    not the bytes, but the sizes and times of change. For a name on the hub: the name, the split and the newest commit, or
    without the commit where the hub cannot be reached.

    Raises:
        UserError: the source is not there or cannot be read.
    """
    path = Path(source.path)
    try:
        if path.exists():
            content = [kind_of(path), _state(path) if source.streamed else digest(path)]
        else:
            content = [_hub_name(source.path), _commit(source.path)]
    except OSError as error:
        raise _unreadable(source, error) from None
    return hashlib.sha256(json.dumps([source.split, source.name, content]).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names, as 64 hex digits."""
    if path.is_file():
        state = path.stat()
        return _file_digest(path, state.st_size, state.st_mtime_ns)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    names = "".join(f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in inside)
    return hashlib.sha256(names.encode()).hexdigest()


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of a file, or of a folder's files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, state.st_size, state.st_mtime_ns) for file in files for state in [file.stat()]]


@lru_cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Read once in a process, unless the file changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache
def _commit(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # offline, or a name that `read_rows` refuses with its reason
        return None


def _unreadable(source: Source, error: OSError) -> UserError:
    return UserError(f"cannot be read: {error}", where=source.path, fix="check the file and its permissions")


def _one_file(source: Source, path: Path) -> Iterator[Row]:
    if source.split is not None or source.name is not None:
        what = f"no split {source.split!r}" if source.split is not None else f"no configuration {source.name!r}"
        raise UserError(f"a file has {what}", where=source.path, fix="leave it out")
    return file_rows(path)


# Folders and the hub


def _prepared(source: Source, folder: Path) -> Path:
    splits = {file.stem: file for file in sorted(folder.glob("*.jsonl")) if file.stem != "quarantine"}
    wanted = source.split or "train"
    if wanted not in splits:
        raise UserError(f"there is no split {wanted!r}", where=source.path, fix=f"its splits: {', '.join(splits)}")
    return splits[wanted]


def _dataset_rows(source: Source, path: Path) -> Iterator[Row]:
    name = source.path if path.is_dir() else _hub_name(source.path)
    place = f"{name} ({source.split})" if source.split else name
    try:
        yield from numbered(_saved(source) if _is_saved(path) else _shards_mixed(_loaded(source), source), place)
    except UserError:
        raise
    except Exception as error:  # datasets passes on what its readers, the hub's client and the network raise
        problem = " ".join(str(error).split()) or type(error).__name__
        away = (
            "there is no such file or folder here; for a name on the hub check the name, the split and the connection"
        )
        fix = "check the files and the split" if path.is_dir() else away
        raise UserError(f"datasets cannot read it: {problem}", where=place, fix=fix) from None


def _shards_mixed(rows: Iterable[dict[str, Any]], source: Source) -> Iterable[dict[str, Any]]:
    return rows if source.shard_seed is None else rows.shuffle(seed=source.shard_seed, buffer_size=1)


def _hub_name(path: str) -> str:
    if hub.NAME.fullmatch(path) and kind_of(Path(path))[0] not in SUFFIXES:
        return path
    raise UserError(f"there is no file {path}", where=WHERE, fix="check the path")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved(source: Source) -> Iterable[dict[str, Any]]:
    from datasets import Dataset, load_from_disk

    stored = load_from_disk(source.path)
    lone = isinstance(stored, Dataset)
    splits = [str(stored.split)] if lone else list(stored)
    wanted = source.split or (splits[0] if lone else "train")
    if wanted not in splits:
        raise UserError(f"there is no split {wanted!r}", where=source.path, fix=f"its splits: {', '.join(splits)}")
    return (stored if lone else stored[wanted]).with_format(None)


def _loaded(source: Source) -> Iterable[dict[str, Any]]:
    from datasets import config as dataset_settings
    from datasets import load_dataset, load_dataset_builder

    folder, wanted = Path(source.path), source.split or "train"
    if not folder.is_dir():
        stored = Path(dataset_settings.HF_DATASETS_CACHE, source.path.replace("/", "___"))
        if not dataset_settings.HF_HUB_OFFLINE and not stored.exists():  # else datasets looks into its cache
            hub.check_data(source.path)
        return load_dataset(source.path, source.name, split=wanted, streaming=True, revision=_commit(source.path))
    builder = load_dataset_builder(source.path, source.name)
    read = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    others = sorted(file for file in folder.rglob("*") if _has_rows(file, folder) and file.resolve() not in read)
    by_card = set(builder.builder_configs) != {"default"}  # a card that names the files of each configuration
    if others and read and not by_card:
        what = f"{len(others)} data files in it would not be read, {others[0].name} the first: datasets goes by names"
        fix = "give each file as a source of its own, or put a part of them into another folder"
        raise UserError(what, where=source.path, fix=fix)
    return builder.as_streaming_dataset(split=wanted)


def _has_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and kind_of(path)[0] in SUFFIXES and path.name != "dataset_infos.json"
