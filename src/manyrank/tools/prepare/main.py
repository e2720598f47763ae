"""`manyrank data prepare`: raw results to a training set, as a YAML file says.

    sources ──> rows ──> filters ──> training rows ──> splits ──> OUTPUT/, see `export`

Rows stream; what stays in memory is hashes (of `dedup`) and counts, and in the end a split, see `export`. The split of a row follows from the hash of
its question alone: rows with the same question are never on both sides, and no row moves when others are added.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ... import __version__
from ...chat_template.types import IGNORE, BadRow
from ...config.args import Options, arg, options_of, read_with_keys, word
from ...config.recipe_file import refuse_data
from ...config.value_types import Columns, Float, Format, Int
from ...data import sources
from ...data.dedup import digest
from ...data.formats import Conversation, PlainText, Sample, detect, to_sample
from ...data.sources import Source, read_rows
from ...errors import UserError
from ...project_files import asset
from ...runs.mapping_files import read_yaml
from ...runs.run_folder import atomic_directory
from .export import QUARANTINE, Writer, json_line, save_dataset
from .filters import FilterStage, Item, build_stages, validated


class RawSource(BaseModel):
    """One source of raw rows. The format and its columns are those of the training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    split: str | None = None
    name: str | None = None
    format_type: Format = "auto"
    columns: Columns | None = None
    max_rows: Int | None = Field(None, gt=0)


def _sources(value: Any) -> Any:
    entries = value if isinstance(value, list) else [value]
    named = [{"path": one} if isinstance(one, str) else one for one in entries]
    return [validated(RawSource, one, where=f"data_path, source {number}") for number, one in enumerate(named, 1)]


class PrepareConfig(BaseModel):
    """Keys of a config: everything that `manyrank data prepare` needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_path: Annotated[list[RawSource], BeforeValidator(_sources)] = arg(
        ...,
        "raw rows: a file, folder or hub name; in the config also a list of these and of {path, split, name, max_rows}",
        also=["data"],
        min_length=1,
    )
    output_dir: str = Field(min_length=1, description="the folder to write")
    fields: dict[str, str] | None = Field(
        None, min_length=1, description="{output field: path in the raw row}; rows are kept as they are without it"
    )
    filters: list[Any] = Field([], description="the filters, in order")
    splits: dict[str, Float] = Field(
        {"train": 0.85, "validation": 0.15}, min_length=1, description="{name: part}; the parts sum to 1"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a broken row: stop, or quarantine it")
    max_rows: Int | None = arg(None, "read only the first rows", also=["limit"], gt=0)
    overwrite: bool = Field(False, description="replace an output_dir that this command has written")
    workers: Int = Field(default_factory=lambda: os.cpu_count() or 1, gt=0, description="commands at a time")

    @field_validator("splits")
    @classmethod
    def _whole(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, part in splits.items():
            if not name.isidentifier() or name == QUARANTINE:
                raise ValueError(f"{name!r} cannot name a split")
            if not 0 < part <= 1:
                raise ValueError(f"the part of {name} is not between 0 and 1")
        if abs(sum(splits.values()) - 1) > 1e-6:
            raise ValueError(f"the parts sum to {sum(splits.values()):g}, not to 1")
        return splits


def examples() -> list[str]:
    return sorted(path.stem for path in asset("data", "prepare").glob("*.yaml"))


class PrepareOptions(Options):
    """Filter raw rows and split them into a training set."""

    config: str = word(..., f"a YAML file, or an example: {', '.join(examples())}", also=["config"])


ON_COMMAND_LINE = ("data_path", "output_dir", "on_bad_row", "max_rows", "overwrite", "workers")


def main(argv: Sequence[str]) -> int:
    """Prepare, and print what every filter did.

    Raises:
        UserError: see `prepare`.
    """
    config, where = read_config(argv)
    print(table(prepare(config, where=where)))
    print(f"written to {config.output_dir}")
    return 0


# Config


def read_config(argv: Sequence[str]) -> tuple[PrepareConfig, str]:
    """Read the config of a command line, and say where it came from.

    Raises:
        UserError: no such file, no valid YAML, an unknown key or option, or a wrong value.
    """
    keys = options_of(PrepareConfig, ON_COMMAND_LINE)
    options, overrides = read_with_keys(argv, PrepareOptions, keys, prog="manyrank data prepare")
    path = _find(options.config)
    where = f"{path} and the command line" if overrides else str(path)
    config = validated(PrepareConfig, _read(path) | overrides, where=where)
    return config, where


def _find(name: str) -> Path:
    path, example = Path(name), asset("data", "prepare", f"{name}.yaml")
    refuse_data(
        name, fix=f"manyrank data prepare CONFIG --data_path {name}, where CONFIG is a YAML file, or {examples()}"
    )
    if path.is_file() or (name in examples() and example.is_file()):
        return path if path.is_file() else example
    raise UserError(f"there is no config {name}", where="command line", fix=f"give a YAML file, or {examples()}")


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError("expected a YAML mapping", where=str(path), fix="see data/prepare/README.md")
    return content


# Rows


def prepare(config: PrepareConfig, *, where: str) -> dict[str, Any]:
    """Read, filter, split and write.

    Args:
        where: the config, for errors.

    Returns:
        What sft_data_summary.json holds.

    Raises:
        UserError: a source or filter that cannot be, a broken row, no row left, or an output_dir that is taken.
            Nothing is written then.
    """
    output = Path(config.output_dir).resolve()
    for source in config.data_path:
        if Path(source.path).resolve().is_relative_to(output):
            raise UserError(f"{source.path} would be replaced", where="output_dir", fix="choose another --output_dir")
        if Path(source.path).is_dir() and output.is_relative_to(Path(source.path).resolve()):
            what = f"it lies in the source folder {source.path}, which would have its rows too the next time"
            raise UserError(what, where="output_dir", fix="choose another --output_dir")
    stages = build_stages(config.filters, workers=config.workers, where=where)
    with atomic_directory(output, overwrite=config.overwrite, mark=sources.PREPARED) as folder:
        with closing(Writer(folder)) as writer:
            run = Preparation(config, writer)
            items: Generator[Item, None, None] = run.items()
            for stage in stages:
                items = stage.run(items, run.refuse)
            with closing(items):  # also on an error: no command is started any more
                for item in items:
                    run.take(item)
        if not writer.rows:
            most = max(stages, key=lambda stage: stage.seen - stage.kept, default=None)
            fix = f"look at the filter {most.name}, which dropped most" if most else "look at the rows"
            raise UserError(f"no row is left of {run.read}", where=where, fix=fix)
        save_dataset(folder, [name for name in config.splits if writer.rows[name]])
        summary = run.summary(stages)
        (folder / sources.PREPARED).write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return summary


class Preparation:
    """Takes rows from the sources to the writer, and counts."""

    def __init__(self, config: PrepareConfig, writer: Writer) -> None:
        self.config, self.writer = config, writer
        self.read = 0
        self.sources: list[dict[str, Any]] = []
        self.formats: dict[int, tuple[str, Columns | None]] = {}  # by source
        self.quarantined: Counter[str] = Counter()

    def items(self) -> Generator[Item, None, None]:
        """Read the raw rows of all sources, up to max_rows."""
        for number, raw_source in enumerate(self.config.data_path):
            path, own = Path(raw_source.path), asset(raw_source.path)
            path = own if not path.exists() and own.is_file() else path
            name = str(path) if path.exists() else raw_source.path
            state = {"path": raw_source.path, "split": raw_source.split, "rows": 0} | fingerprint(path)
            self.sources.append(state)
            for row in read_rows(
                Source(name, raw_source.split, raw_source.format_type, raw_source.columns, name=raw_source.name)
            ):
                if self.read == self.config.max_rows:
                    return
                if state["rows"] == raw_source.max_rows:
                    break
                self.read += 1
                state["rows"] += 1
                if isinstance(row.value, BadRow):
                    self.refuse(Item(row.place, {}), "reading", row.value, text=row.text)
                else:
                    yield Item(row.place, row.value, self.config.fields, number)

    def refuse(self, item: Item, stage: str, error: BadRow, *, text: str = "") -> None:
        """Quarantine a broken row, or stop.

        Raises:
            UserError: on_bad_row is "error".
        """
        if self.config.on_bad_row == "error":
            fix = "fix the row, or quarantine such rows with on_bad_row: skip"
            raise UserError(str(error), where=f"{item.place}, {stage}", fix=fix)
        entry = {
            "place": item.place,
            "stage": stage,
            "reason": error.reason,
            "detail": str(error),
            "row": text or item.row,
        }
        self.writer.quarantine(entry)
        self.quarantined[error.reason] += 1

    def take(self, item: Item) -> None:
        """Write a row that passed the filters."""
        try:
            row = item.training
            sample = to_sample(row, *self._format(item))
            self.writer.write(split_of(question(sample), self.config.splits), json_line(row))
        except BadRow as error:
            self.refuse(item, "training row", error)

    def _format(self, item: Item) -> tuple[str, Columns | None]:
        """Find the format of a source with its columns: those given, or what its first good row fits."""
        if item.source in self.formats:
            return self.formats[item.source]
        source = self.config.data_path[item.source]
        try:
            auto = source.format_type == "auto"
            named = (source.format_type, source.columns)
            format_type, columns = detect(item.training, where=item.place, columns=source.columns) if auto else named
        except UserError as error:
            if self.config.on_bad_row == "error":
                raise
            raise BadRow(error.what, "unknown format") from None
        if others := [shape for shape in self.formats.values() if shape != (format_type, columns)]:
            what = f"{source.path} has the format {format_type}, another source {others[0][0]}, or other columns"
            raise UserError(what, where="data_path", fix="bring them to one with `fields`, or prepare them apart")
        self.formats[item.source] = format_type, columns
        return format_type, columns

    def summary(self, stages: list[FilterStage]) -> dict[str, Any]:
        filters = [stage.summary() for stage in stages]
        return {
            "version": __version__,
            "config": self.config.model_dump(mode="json"),
            "sources": self.sources,
            "format": next(iter(self.formats.values()))[0],
            "rows_read": self.read,
            "filters": filters,
            "accuracy": next((one["accuracy"] for one in filters if "accuracy" in one), None),
            "quarantined": dict(self.quarantined.most_common()),
            "rows_written": self.writer.rows.total(),
            "splits": {name: self.writer.rows[name] for name in self.config.splits},
        }


def fingerprint(path: Path) -> dict[str, Any]:
    """Compute size and SHA-256 of a file or folder; nothing for a name on the hub."""
    if not path.exists():
        return {"bytes": None, "sha256": None}
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"bytes": sum(file.stat().st_size for file in inside), "sha256": sources.digest(path)}


# Samples


def question(sample: Sample) -> Any:
    """Take what decides the split: the user's turns before the first answer; where there is none, the most that there is."""
    if isinstance(sample, PlainText):
        return sample.text
    if isinstance(sample, Conversation):
        before = list(takewhile(lambda message: message["role"] != "assistant", sample.messages))
        questions = [message for message in before if message["role"] == "user"]
        return [message["content"] for message in questions or before or sample.messages]
    prompt = [token for token, _ in takewhile(lambda pair: pair[1] == IGNORE, zip(sample.input_ids, sample.labels))]
    return prompt if len(prompt) > 1 else sample.input_ids  # one token alone is the start token that all rows share


def split_of(value: Any, splits: dict[str, float]) -> str:
    """Choose the split of a value, by its hash as a number from 0 to 1."""
    point, end = int.from_bytes(digest(value)[:8]) / 2**64, 0.0
    for name, part in splits.items():
        end += part
        if point < end:
            return name
    return name


def table(summary: dict[str, Any]) -> str:
    """Lay out the filters with their counts, then the splits, for people."""
    lines = [f"{'filter':<22} {'in':>9} {'out':>9} {'dropped':>9}  reasons"]
    for number, one in enumerate(summary["filters"], 1):
        reasons = chain(one["dropped"].items(), [("broken", one["broken"])] if one["broken"] else [])
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
        name = f"{number} {one['filter']}"
        lines.append(f"{name:<22} {one['in']:>9} {one['out']:>9} {one['in'] - one['out']:>9}  {counts}".rstrip())
    lines += [f"{summary['rows_read']} rows read, {summary['rows_written']} written"]
    if summary["quarantined"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary["quarantined"].items())
        lines.append(f"{sum(summary['quarantined'].values())} quarantined in {QUARANTINE}.jsonl: {reasons}")
    for name, rows in summary["splits"].items():
        lines.append(f"  {name:<20} {rows:>9}" + ("" if rows else "  (no file)"))
    return "\n".join(lines)
