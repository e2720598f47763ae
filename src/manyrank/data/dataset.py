"""Sources to examples: tables of tokens, less what is bad, double or not wanted.

    sources -> tables (tokenize) -> bad rows, duplicates, caps -> Examples -> training | validation part

Only the small columns are in memory; tokens are read from the cache when a batch needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..chat_template.render import TEMPLATE_REASONS, render_options
from ..config.data_source import DataSource
from ..config.resolve import TrainConfig
from ..errors import UserError
from .formats import needs_template
from .messages import bad_rows_error, usual_fix
from .sources import Source, known_format, source_of
from .tokenize import TABLE, USED, RowStatus, Stream, Subsample, TokenizeOptions, count_rows, tokenize

DESCRIPTIONS = {
    RowStatus.CUT: "cut at max_length",
    RowStatus.PIECE: "pieces of longer rows",
    RowStatus.EMPTY_PIECE: "pieces without an answer left out",
    RowStatus.TOO_LONG: "too long, left out",
}


@dataclass(frozen=True)
class Report:
    """Counts of how the rows were used.

    Attributes:
        formats, rows: by source, the format its rows were read in, and how many were.
        out_of: by source, the rows that it has; more than were read with max_rows or a small max_steps.
        needed: the part of the rows that max_steps chose to read; 1 where it did not choose, or of a stream.
        streamed: whether only the first rows of sources were read.
        counts: rows by what became of them, where it is not simply kept.
        problems: the table whose column "problem" tells of the quarantined rows, a line of JSON each.
    """

    formats: tuple[str, ...]
    rows: tuple[int, ...]
    out_of: tuple[int, ...]
    needed: float
    streamed: bool
    counts: dict[str, int]
    problems: Dataset

    def bad(self) -> Iterator[dict]:
        """Read the quarantined rows: reason, detail, place, row. From the cache, not held in memory."""
        return (json.loads(row["problem"]) for row in self.problems)


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples, in the order of the sources and their rows.

    Attributes:
        dataset: the tables of all sources, also with rows that are no example.
        index: (examples,), where each example is in `dataset`.
        lengths: (examples,), tokens of each.
        supervised: (examples,), supervised tokens of each; at least one.
        content: (examples,), hash of what is said; equal for texts that differ in blanks alone.
        tokens: (examples,), hash of the ids and labels.
        source: (examples,), number of its source.
        paths, weights: by source, its path and how often an example is seen in an epoch.
    """

    dataset: Dataset
    index: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    content: np.ndarray
    tokens: np.ndarray
    source: np.ndarray
    paths: tuple[str, ...]
    weights: tuple[float, ...]
    report: Report

    @property
    def fingerprint(self) -> str:
        """A hash of what is learned in which order, to the token, wherever the files lie."""
        digest = hashlib.sha256(repr(self.weights).encode())
        for column in (self.tokens, self.source):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, example: int) -> dict:
        """input_ids and labels, both (tokens,), and where the row is: source and row."""
        return {**self.dataset[int(self.index[example])], "source": self.paths[self.source[example]]}

    def keys(self) -> list[tuple[str, int]]:
        """List the path of each example's source and the number of its row there."""
        rows = self.dataset.select_columns("row").with_format("numpy")[:]["row"][self.index]
        return [(self.paths[at], int(row)) for at, row in zip(self.source, rows)]

    @property
    def in_epoch(self) -> tuple[int, ...]:
        """By source, how many examples of it an epoch has."""
        sizes = np.bincount(self.source, minlength=len(self.weights))
        return tuple(round(weight * int(size)) for weight, size in zip(self.weights, sizes))

    def tempered(self, config: TrainConfig) -> Examples:
        """The same with the weights that sampling_temperature gives, as multilingual T5 does (arXiv:2010.11934).

        A source that max_repeats caps gives nothing to the others: the epoch is shorter.
        """
        if config.sampling_temperature == 1:
            return self
        sizes = np.bincount(self.source, minlength=len(self.weights))
        shares = sizes ** (1 / config.sampling_temperature)
        weights = shares / shares.sum() * sizes.sum() / np.maximum(1, sizes)
        weights = np.minimum(weights, config.max_repeats or np.inf).round(6)
        return replace(self, weights=tuple(weights.tolist()))

    def describe(self) -> str:
        formats = ", ".join(sorted(set(self.report.formats)))
        share = self.supervised.sum() / self.lengths.sum()
        others = "".join(f"; {count:,} {what}" for what, count in self.report.counts.items())
        read, there = sum(self.report.rows), sum(self.report.out_of)
        why = "max_rows" if self.report.needed == 1 else "as many as max_steps needs"
        some = "" if len(self) == read else f" out of {read:,}"
        part = f"{some} of {there:,} rows ({why})" if read < there else f"{some}, streamed" * self.report.streamed
        mixed = [f"{n:,} of {path} (x {w:.3g})" for path, n, w in zip(self.paths, self.in_epoch, self.weights)]
        mix = f"; an epoch has {', '.join(mixed)}" if any(weight != 1 for weight in self.weights) else ""
        return f"{len(self):,} examples{part} ({formats}), {self.lengths.sum():,} tokens, {share:.0%} supervised{others}{mix}"

    def take(self, chosen: np.ndarray) -> Examples:
        """The examples of a mask or of positions."""
        return replace(
            self,
            index=self.index[chosen],
            lengths=self.lengths[chosen],
            supervised=self.supervised[chosen],
            content=self.content[chosen],
            tokens=self.tokens[chosen],
            source=self.source[chosen],
        )

    def split(self, part: float) -> tuple[Examples, Examples]:
        """All but about `part` of the examples, and that part.

        The hash of the content decides, so that a row stays on its side when others are added (of a share; of a number
        nearly), and the same conversation is never on both.

        Args:
            part: a share below 1, or a number of examples; where the last one is there twice, both are held.
        """
        order = self.content.view(np.uint64)
        if part < 1:
            held = (order % np.uint64(1_000_000)) < np.uint64(round(part * 1_000_000))
        else:
            held = order <= np.sort(order)[min(int(part), len(order)) - 1]
        if not held.any() or held.all():
            raise UserError(
                f"{int(held.sum())} of {len(self)} examples are in the validation part",
                where="eval_split",
                fix=f"choose another part, as --eval_split {max(1, len(self) // 10)}, or give eval_data_path",
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
    known = [known_format(source_of(source, config)) for source in sources]
    chats = [source.path for source in known if needs_template(source.format_type)]
    if chats and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template", where=chats[0], fix="give one: --chat_template chatml, or a file"
        )
    examples = (_first if config.streaming else _part)(known, tokenizer, config, needed)
    if not len(examples):
        raise _nothing_left(examples)
    return examples


def _part(known: list[Source], tokenizer, config: TrainConfig, needed: int | None) -> Examples:
    """The examples of all rows, or of a part that the seed chooses."""
    rows = [count_rows(source) if needed or source.max_rows else None for source in known]
    most = [count and min(count, source.max_rows or count) for source, count in zip(known, rows)]
    share, subsamples, examples = 1.1, None, None  # some more than needed, for those that will be left out
    while examples is None or (needed and len(examples) < needed):
        wanted = min(1.0, share * needed / sum(most)) if needed else 1.0
        before, subsamples = subsamples, [_subsample(*pair, wanted, config.order_seed) for pair in zip(rows, most)]
        if subsamples == before:
            break
        examples, share = _examples(known, subsamples, tokenizer, config), 2 * share
    read = sum(examples.report.rows)
    return replace(examples, report=replace(examples.report, needed=read / sum(most) if needed else 1.0))


def _first(known: list[Source], tokenizer, config: TrainConfig, needed: int | None) -> Examples:
    """The examples of each source's first rows; of a source without max_rows as many as are needed."""
    share, read, examples = 1.1, (), None
    while examples is None or (needed and len(examples) < needed and examples.report.rows != read):
        read = examples.report.rows if examples else ()
        most = [source.max_rows or (needed and int(share * needed) + 16) for source in known]
        streams = [count and Stream(count, config.order_seed) for count in most]
        examples, share = _examples(known, streams, tokenizer, config), 2 * share
    return examples


def _subsample(rows: int | None, most: int | None, wanted: float, seed: int) -> Subsample | None:
    """The rows of a source to read, at most `most`; `wanted` is the part of all rows that the run needs."""
    if rows is None:
        return None
    count = min(most, int(wanted * most) + 16)
    return Subsample(rows, count, seed) if count < rows else None


def _examples(
    sources: list[Source], subsamples: Sequence[Subsample | Stream | None], tokenizer, config: TrainConfig
) -> Examples:
    options = TokenizeOptions(config.max_length, config.overlong, render_options(config))
    tables = [
        tokenize(source, tokenizer, options, subsample=subsample, processes=config.dataset_num_proc)
        for source, subsample in zip(sources, subsamples)
    ]
    whole = concatenate_datasets(tables)
    columns = {name: whole.data[name].to_numpy() for name in TABLE}
    columns["source"] = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    # Several processes write the rows in turns; this is the order of the sources.
    order = np.lexsort((np.arange(len(whole)), columns["row"], columns["source"]))
    columns = {name: column[order] for name, column in columns.items()}
    fate, numbers = columns["fate"], _row_numbers(columns)
    rows = tuple(len(np.unique(numbers[columns["source"] == source])) for source in range(len(sources)))
    used = np.isin(fate, USED)
    double = _is_double(columns["content"] ^ columns["tokens"], numbers, used)
    keep = np.flatnonzero(used & ~double if config.duplicates != "keep" else used)
    report = Report(
        formats=tuple(source.shape for source in sources),
        rows=rows,
        out_of=tuple(x.rows if isinstance(x, Subsample) else read for x, read in zip(subsamples, rows)),
        needed=1.0,
        streamed=any(isinstance(subsample, Stream) for subsample in subsamples),
        counts=_counts(columns, double, config.duplicates),
        problems=whole.select(order[fate == RowStatus.BAD]).select_columns("problem"),
    )
    if config.on_bad_row == "error" and len(report.problems):
        raise _bad_rows(report)
    return Examples(
        dataset=whole.select_columns(["input_ids", "labels", "row"]).with_format("numpy"),
        index=order[keep],
        lengths=columns["length"][keep].astype(np.int64),
        supervised=columns["supervised"][keep].astype(np.int64),
        content=columns["content"][keep],
        tokens=columns["tokens"][keep],
        source=columns["source"][keep],
        paths=tuple(source.path for source in sources),
        weights=tuple(source.weight for source in sources),
        report=report,
    )


def _nothing_left(examples: Examples) -> UserError:
    if len(examples.report.problems):
        bad = _bad_rows(examples.report, skippable=False)
        return UserError(f"no row is left to train on: {bad.what}", where=bad.where, fix=bad.fix)
    return UserError("no row is left to train on", where=examples.paths[0], fix="raise max_length")


def _row_numbers(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(records,), from 0: the pieces of a row have one number."""
    new = (np.diff(columns["row"], prepend=-1) != 0) | (np.diff(columns["source"], prepend=-1) != 0)
    return np.cumsum(new) - 1


def _is_double(what: np.ndarray, rows: np.ndarray, used: np.ndarray) -> np.ndarray:
    """(records,), whether an earlier row is the same; `what` is a hash of each."""
    double = np.zeros(len(what), dtype=bool)
    _, first, inverse = np.unique(what[used], return_index=True, return_inverse=True)
    double[used] = rows[used] != rows[used][first][inverse]
    return double


def _counts(columns: dict[str, np.ndarray], double: np.ndarray, duplicates: str) -> dict[str, int]:
    fate = columns["fate"]
    counts = {what: int((fate == name).sum()) for name, what in DESCRIPTIONS.items()}
    counts["bad, quarantined"] = int((fate == RowStatus.BAD).sum())
    counts["duplicates" + ("" if duplicates == "keep" else ", left out")] = int(double.sum())
    counts["whose end of turn is no token of the tokenizer (another chat_template?)"] = int(columns["loose_end"].sum())
    counts["with special-token text, read as plain text"] = int(columns["special_text"].sum())
    counts["with earlier thinking that the template drops"] = int(columns["dropped_thinking"].sum())
    return {what: count for what, count in counts.items() if count}


def _bad_rows(report: Report, *, skippable: bool = True) -> UserError:
    reasons = bad_reasons(report)
    if sum(reasons[reason] for reason in TEMPLATE_REASONS) > reasons.total() / 2:
        fix = "choose a chat template that knows such rows (--chat_template; deepseek_r1 keeps the thinking), or fix it"
    else:
        fix = usual_fix(reasons)
    first = ((row["place"], row["detail"]) for row in report.bad())
    return bad_rows_error(first, reasons, out_of=f"{sum(report.rows):,} rows", fix=fix, skippable=skippable)


def bad_reasons(report: Report) -> Counter[str]:
    """Count the quarantined rows by reason."""
    return Counter(row["reason"] for row in report.bad())


def write_quarantine(examples: Examples, path: Path) -> None:
    """Write the quarantined rows, a line each: reason, detail, place, row."""
    if len(examples.report.problems):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in examples.report.bad())
