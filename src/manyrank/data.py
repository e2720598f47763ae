"""Sources to examples: tables of tokens, less what is bad, double or not wanted.

    sources -> tables (tokenise) -> bad rows, duplicates, caps -> Examples -> training | validation part

Only the small columns are in memory; tokens are read from the cache when a batch needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .config import TrainConfig
from .errors import UserError
from .formats import PLAIN_FORMATS
from .render import TEMPLATE_REASONS, RenderOptions
from .schema import DataSource
from .sources import Source, read_rows, source_of
from .tokenise import TABLE, USED, Choice, Fate, TokeniseOptions, known_format, near_doubles, tokenise

FATES = {
    Fate.CUT: "cut at max_length",
    Fate.PIECE: "pieces of longer rows",
    Fate.EMPTY_PIECE: "pieces without an answer left out",
    Fate.TOO_LONG: "too long, left out",
}
SHOWN = 10  # bad rows in an error


@dataclass(frozen=True)
class Report:
    """What happened to the rows.

    Attributes:
        formats, rows: by source, the format its rows were read in, and how many were.
        out_of: rows of the sources, where only a part of them was read.
        counts: rows by what became of them, where it is not simply kept.
        bad: the rows put aside: reason, detail, place, row.
    """

    formats: tuple[str, ...]
    rows: tuple[int, ...]
    out_of: int | None
    counts: dict[str, int]
    bad: list[dict] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the rows, how many were read."""
        return sum(self.rows) / self.out_of if self.out_of else 1.0


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples, in the order of the sources and their rows.

    Attributes:
        dataset: the tables of all sources, also with rows that are no example.
        index: (examples,), where each example is in `dataset`.
        lengths: (examples,), tokens of each.
        supervised: (examples,), supervised tokens of each; at least one.
        content: (examples,), hash of what is said.
        source: (examples,), number of its source.
        paths, weights: by source, its path and how often an example is seen in an epoch.
    """

    dataset: Dataset
    index: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    content: np.ndarray
    source: np.ndarray
    paths: tuple[str, ...]
    weights: tuple[float, ...]
    report: Report

    @property
    def fingerprint(self) -> str:
        """What is learned in which order, wherever the files lie."""
        digest = hashlib.sha256(repr(self.weights).encode())
        for column in (self.content, self.lengths, self.supervised, self.source):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, example: int) -> dict:
        """input_ids and labels, both (tokens,), and where the row is: source and row."""
        return {**self.dataset[int(self.index[example])], "source": self.paths[self.source[example]]}

    def describe(self) -> str:
        formats = ", ".join(sorted(set(self.report.formats)))
        share = self.supervised.sum() / self.lengths.sum()
        others = "".join(f"; {count:,} {what}" for what, count in self.report.counts.items())
        looked = f"{sum(self.report.rows):,} of {self.report.out_of or 0:,} rows, as many as max_steps needs"
        part = f" out of {looked}" if self.report.out_of else ""
        return (
            f"{len(self):,} examples{part} ({formats}), {self.lengths.sum():,} tokens, {share:.0%} supervised{others}"
        )

    def take(self, chosen: np.ndarray) -> Examples:
        """The examples of a mask or of positions."""
        return replace(
            self, index=self.index[chosen], lengths=self.lengths[chosen], supervised=self.supervised[chosen],
            content=self.content[chosen], source=self.source[chosen],
        )  # fmt: skip

    def split(self, part: float) -> tuple[Examples, Examples]:
        """All but about `part` of the examples, and that part.

        The hash of the content decides, so that a row stays on its side when others are added, and the same
        conversation is never on both.
        """
        held = (self.content.view(np.uint64) % np.uint64(1_000_000)) < np.uint64(round(part * 1_000_000))
        if not held.any() or held.all():
            raise UserError(
                f"{int(held.sum())} of {len(self)} examples are in the validation part",
                where="eval_split",
                fix="choose another part, or give eval_data_path",
            )
        return self.take(~held), self.take(held)


def prepare(
    sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, config: TrainConfig, *, needed: int | None = None
) -> Examples:
    """Tokenise the sources, or load what was tokenised before.

    Args:
        needed: examples that the run will use; when there are far more, a part chosen by the seed is tokenised.

    Raises:
        UserError: a source cannot be read, a row is bad and `on_bad_row` is error, or no example is left.
    """
    found = [known_format(source_of(source, config)) for source in sources]
    chats = [source.path for source in found if source.format_type not in PLAIN_FORMATS]
    if chats and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template", where=chats[0], fix="give one: --chat_template chatml, or a file"
        )
    rows = [sum(1 for _ in read_rows(source)) if needed or source.max_rows else None for source in found]
    share, choices, examples = 1.1, None, None  # some more than needed, for those that will be left out
    while examples is None or (needed and len(examples) < needed):
        wanted = share * needed / sum(rows) if needed else None
        before, choices = choices, [_choice(source, count, wanted, config.seed) for source, count in zip(found, rows)]
        if choices == before:
            break
        examples, share = _examples(found, choices, tokenizer, config), 2 * share
    return examples


def _choice(source: Source, rows: int | None, wanted: float | None, seed: int) -> Choice | None:
    """The rows of a source to read; `wanted` is the part of all rows that the run needs."""
    if rows is None:
        return None
    most = min(rows, source.max_rows or rows)
    if wanted is not None:
        most = min(most, int(wanted * rows) + 16)
    return Choice(rows, most, seed) if most < rows else None


def _examples(sources: list[Source], choices: list[Choice | None], tokenizer, config: TrainConfig) -> Examples:
    options = TokeniseOptions(config.max_length, config.overlong, render_options(config))
    tables = [
        tokenise(source, tokenizer, options, choice=choice, processes=config.dataset_num_proc)
        for source, choice in zip(sources, choices)
    ]
    whole = concatenate_datasets(tables)
    columns = {name: whole.data[name].to_numpy() for name in TABLE}
    columns["source"] = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    # Several processes write the rows in turns; this is the order of the sources.
    order = np.lexsort((np.arange(len(whole)), columns["row"], columns["source"]))
    columns = {name: column[order] for name, column in columns.items()}
    fate, rows = columns["fate"], _row_numbers(columns)
    bad = [json.loads(text) for text in whole.select(order[fate == Fate.BAD])["problem"]]
    if bad and config.on_bad_row == "error":
        raise bad_rows_error(bad, int(rows[-1]) + 1)
    used = np.isin(fate, USED)
    double = _is_double(columns["content"], rows, used)
    if config.duplicates == "drop_near":
        double |= used & _is_near(near_doubles(sources, choices), columns)
    keep = np.flatnonzero(used & ~double if config.duplicates != "keep" else used)
    if not len(keep):
        left = bad_rows_error(bad, int(rows[-1]) + 1) if bad else None
        what = f"no row is left to train on: {left.what}" if left else "no row is left to train on"
        raise UserError(
            what, where=left.where if left else sources[0].path, fix=left.fix if left else "raise max_length"
        )
    return Examples(
        dataset=whole.select_columns(["input_ids", "labels", "row"]).with_format("numpy"),
        index=order[keep],
        lengths=columns["length"][keep].astype(np.int64),
        supervised=columns["supervised"][keep].astype(np.int64),
        content=columns["content"][keep],
        source=columns["source"][keep],
        paths=tuple(source.path for source in sources),
        weights=tuple(source.weight for source in sources),
        report=Report(
            formats=tuple(source.format_type for source in sources),
            rows=tuple(len(np.unique(rows[columns["source"] == number])) for number in range(len(sources))),
            out_of=sum(choice.rows for choice in choices) if all(choices) else None,
            counts=_counts(columns, double, config.duplicates),
            bad=bad,
        ),
    )


def _row_numbers(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(records,), from 0: the pieces of a row have one number."""
    new = (np.diff(columns["row"], prepend=-1) != 0) | (np.diff(columns["source"], prepend=-1) != 0)
    return np.cumsum(new) - 1


def _is_double(content: np.ndarray, rows: np.ndarray, used: np.ndarray) -> np.ndarray:
    """(records,), whether an earlier row says the same."""
    double = np.zeros(len(content), dtype=bool)
    _, first, inverse = np.unique(content[used], return_index=True, return_inverse=True)
    double[used] = rows[used] != rows[used][first][inverse]
    return double


def _is_near(found: Dataset, columns: dict[str, np.ndarray]) -> np.ndarray:
    """(records,), whether the record's row is one of those found."""
    near = found.filter(lambda near: near, input_columns="near", keep_in_memory=True)
    pairs = set(zip(near["source"], near["row"]))
    return np.array([pair in pairs for pair in zip(columns["source"].tolist(), columns["row"].tolist())], dtype=bool)


def _counts(columns: dict[str, np.ndarray], double: np.ndarray, duplicates: str) -> dict[str, int]:
    fate = columns["fate"]
    counts = {what: int((fate == name).sum()) for name, what in FATES.items()}
    counts["bad, put aside"] = int((fate == Fate.BAD).sum())
    counts["duplicates" + ("" if duplicates == "keep" else ", left out")] = int(double.sum())
    counts["whose end of turn is no token of the tokenizer (another chat_template?)"] = int(columns["loose_end"].sum())
    counts["with special-token text, read as plain text"] = int(columns["special_text"].sum())
    counts["with earlier thinking that the template drops"] = int(columns["dropped_thinking"].sum())
    return {what: count for what, count in counts.items() if count}


def bad_rows_error(bad: list[dict], rows: int) -> UserError:
    """The first bad rows with their places, and the counts by reason."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(row["reason"] for row in bad).most_common())
    shown = [f"{row['place']}: {row['detail']}" for row in bad[:SHOWN]]
    by_template = sum(row["reason"] in TEMPLATE_REASONS for row in bad) > len(bad) / 2
    fix = (
        "choose a chat template that knows such rows (--chat_template), or mend it"
        if by_template
        else "mend these rows"
    )
    more = [f"and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
    return UserError(
        f"{len(bad):,} of {rows:,} rows cannot be used ({reasons})",
        where="\n       ".join([*shown, *more]),
        fix=f"{fix}; or set on_bad_row: skip, which puts such rows aside and counts them",
    )


def write_quarantine(examples: Examples, path: Path) -> None:
    """The rows that were put aside, a line each: reason, detail, place, row."""
    if examples.report.bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples.report.bad), encoding="utf-8"
        )


def render_options(config: TrainConfig) -> RenderOptions:
    """What the recipe says of rendering; its template is the tokenizer's already."""
    return RenderOptions(
        last_turn_only=config.train_on_last_turn,
        train_on_prompt=config.train_on_prompt,
        train_on_opening=config.train_on_opening,
        thinking=config.thinking,
        template_kwargs=config.chat_template_kwargs,
        stop_tokens=tuple(config.stop_tokens),
    )
