"""One source of rows to one table of tokens, made once and cached by datasets.

    row 12 -> conversation -> ids and labels -> kept | cut | pieces | too long | bad, with the reason

Every row of the source leaves a record, also when it cannot be used: nothing is dropped without a count. A row that is
split leaves one for each piece. Rows are streamed, so the source may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import chain, compress, islice
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ..chat_template.render import Note, Notice, RenderOptions, render
from ..chat_template.types import IGNORE, BadRow, bare
from ..errors import UserError
from ..signals import mortal_children
from .dedup import digest
from .files import Row
from .formats import Conversation, PlainText, Sample, TokenIds, load_function, to_sample
from .sources import Source, fingerprint, read_rows

CACHE_VERSION = 11  # raise it when the same input gives other tokens
PARALLEL_BYTES = 32 * 2**20  # a smaller source is tokenised sooner by one process


class RowStatus(IntEnum):
    """Use of a row."""

    KEPT = 0
    CUT = 1
    PIECE = 2
    EMPTY_PIECE = 3
    TOO_LONG = 4
    BAD = 5


USED = (RowStatus.KEPT, RowStatus.CUT, RowStatus.PIECE)
FEATURES = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "labels": Sequence(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "row": Value("int64"),  # its number in the source
        "content": Value("int64"),  # hash of what is said, before any template
        "tokens": Value("int64"),  # hash of input_ids and labels
        "fate": Value("int8"),
        **{notice: Value("bool") for notice in Notice},
        "problem": Value("string"),  # JSON of a bad row: reason, detail, place, row
    }
)
TABLE = [name for name in FEATURES if name not in ("input_ids", "labels", "problem")]


@dataclass(frozen=True)
class TokenizeOptions:
    """The options that decide how a row becomes tokens, besides the tokenizer."""

    max_length: int
    overlong: str
    render: RenderOptions


@dataclass(frozen=True)
class Subsample:
    """The rows to read: the first `count` of a shuffle of all `rows`."""

    rows: int
    count: int
    seed: int

    def mask(self) -> np.ndarray:
        """(rows,), whether each is read."""
        return np.random.default_rng([self.seed, self.rows]).permutation(self.rows) < self.count


@dataclass(frozen=True)
class Stream:
    """The rows to read of a source that is not read to its end: the first `count`; `seed` has put its files in order."""

    count: int
    seed: int


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    *,
    subsample: Subsample | Stream | None = None,
    processes: int | None = None,
) -> Dataset:
    """The table of a source (FEATURES), from the cache if it was made before.

    Every rank calls this. On each machine the first one works and the others wait for its file lock, without a
    time-out, and read the result.

    Args:
        source: with its format (`sources.known_format`).
        processes: that tokenise; None: one, or up to eight for a large source.

    Raises:
        UserError: the source cannot be read.
    """
    processes = processes or _processes(source)
    what = {"source": source, "tokenizer": tokenizer, "options": options, "subsample": subsample}
    key = _fingerprint(source, tokenizer, options, subsample)
    try:
        shards = [(part, processes) for part in range(processes)]
        return _cached(_records, FEATURES, key, processes if processes > 1 else None, **what, shards=shards)
    except DatasetGenerationError:
        if processes == 1:
            raise
        # What a process raised is a text by now: one process raises it as it is.
        return _cached(_records, FEATURES, key, **what, shards=[(0, 1)])


def count_rows(source: Source) -> int:
    """The rows of a source, counted once.

    Raises:
        UserError: the source cannot be read.
    """
    key = hashlib.sha256(f"rows of {fingerprint(source)}".encode()).hexdigest()[:32]
    return _cached(_row_count, Features({"rows": Value("int64")}), key, source=source)[0]["rows"]


def _row_count(source: Source) -> Iterator[dict]:
    yield {"rows": sum(1 for _ in read_rows(source))}


def _cached(
    make: Callable[..., Iterator[dict]], features: Features, key: str, processes: int | None = None, **what: object
) -> Dataset:
    """Make a table of `make(**what)`, or load what it yielded before under the same key."""
    disable_progress_bars()
    try:
        with mortal_children():
            return Dataset.from_generator(make, features=features, gen_kwargs=what, num_proc=processes, fingerprint=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _processes(source: Source) -> int:
    path = Path(source.path)
    size = path.stat().st_size if path.is_file() else 0
    return 1 if size < PARALLEL_BYTES else min(8, len(os.sched_getaffinity(0)))


def _fingerprint(source: Source, tokenizer, options: TokenizeOptions, subsample: Subsample | Stream | None) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    what = [
        fingerprint(source),
        source.path,
        source.format_type,
        source.columns,
        _code(source.format_type),
        asdict(options),
        asdict(subsample) if subsample else None,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        CACHE_VERSION,
    ]
    digest.update(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _code(format_type: str) -> str:
    """The text of the module whose function reads the rows."""
    if ":" not in format_type:
        return ""
    file = Path(getattr(sys.modules[load_function(format_type).__module__], "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _records(
    source: Source, tokenizer, options: TokenizeOptions, subsample: Subsample | Stream | None, shards: list
) -> Iterator[dict]:
    for part, parts in shards:
        for order, row in enumerate(_chosen(source, subsample)):
            if order % parts == part:
                yield from _row_records(row, source, tokenizer, options)


def _chosen(source: Source, subsample: Subsample | Stream | None) -> Iterator[Row]:
    if isinstance(subsample, Stream):
        return islice(read_rows(source), subsample.count)
    return compress(read_rows(source), subsample.mask()) if subsample else read_rows(source)


def _row_records(row: Row, source: Source, tokenizer, options: TokenizeOptions) -> Iterator[dict]:
    blank = {"input_ids": [], "labels": [], "length": 0, "supervised": 0, "row": row.number, "content": 0, "tokens": 0}
    blank |= {"fate": 0, "problem": ""} | dict.fromkeys(Notice, False)
    try:
        sample = _sample(row, source)
        blank["content"] = content_hash(sample)
        ids, labels, notes = _ids_and_labels(sample, tokenizer, options.render)
        blank |= {note.kind: True for note in notes}
        pieces = list(_fitted(ids, labels, options))
    except BadRow as problem:
        problem_row = {"reason": problem.reason, "detail": str(problem), "place": row.place, "row": _writable(row)}
        yield {**blank, "fate": RowStatus.BAD, "problem": json.dumps(problem_row)}
        return
    for ids, labels, fate in pieces:
        learned = sum(label != IGNORE for label in labels)
        columns = {"input_ids": ids, "labels": labels, "tokens": _tokens_hash(ids, labels), "fate": fate}
        yield {**blank, **columns, "length": len(ids), "supervised": learned}


def _sample(row: Row, source: Source) -> Sample:
    return to_sample(row.readable(), source.format_type, source.columns)


def _writable(row: Row) -> str:
    """The row as text for the quarantine file; half surrogate pairs and the like are escaped."""
    return row.text if isinstance(row.value, BadRow) else json.dumps(row.value, default=str)


def _ids_and_labels(sample: Sample, tokenizer, options: RenderOptions) -> tuple[list[int], list[int], tuple[Note, ...]]:
    if isinstance(sample, TokenIds):
        labels = (label for label in sample.labels if label != IGNORE)
        size = len(tokenizer)  # which takes 5 microseconds
        strange = next((token for token in chain(sample.input_ids, labels) if not 0 <= token < size), None)
        if strange is not None:
            raise BadRow(f"{strange} is not in the vocabulary of {size} tokens", reason="unknown token")
        return list(sample.input_ids), list(sample.labels), ()
    if isinstance(sample, PlainText):
        ids = tokenizer(sample.text)["input_ids"]
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return ids, list(ids), ()
    rendered = render(tokenizer, sample.messages, tools=sample.tools, documents=sample.documents, options=options)
    return rendered.input_ids, rendered.labels, rendered.notes


def _fitted(
    ids: list[int], labels: list[int], options: TokenizeOptions
) -> Iterator[tuple[list[int], list[int], RowStatus]]:
    """The row in at most max_length tokens, as `overlong` says."""
    limit = options.max_length
    if len(ids) <= limit:
        pieces, fate = [(ids, labels)], RowStatus.KEPT
    elif options.overlong == "error":
        raise BadRow(f"{len(ids)} tokens, more than max_length {limit}", reason="too long")
    elif options.overlong == "drop":
        yield [], [], RowStatus.TOO_LONG
        return
    else:
        pieces = [(ids[at : at + limit], labels[at : at + limit]) for at in range(0, len(ids), limit)]
        pieces, fate = (pieces[:1], RowStatus.CUT) if options.overlong == "truncate" else (pieces, RowStatus.PIECE)
    # The first token has nothing in front that could predict it.
    pieces = [(ids, [IGNORE, *labels[1:]]) for ids, labels in pieces]
    learned = [any(label != IGNORE for label in labels) for _, labels in pieces]
    if not any(learned):
        cut = (
            f"the first {limit} of {len(ids)} tokens are all prompt"
            if fate is RowStatus.CUT
            else "no token is to be learned"
        )
        raise BadRow(cut, reason="nothing to learn")
    for (ids, labels), good in zip(pieces, learned):
        yield (ids, labels, fate) if good else ([], [], RowStatus.EMPTY_PIECE)


def content_hash(sample: Sample) -> int:
    """64 bits of what is said: the same for the same conversation, in any file and format."""
    if isinstance(sample, TokenIds):
        return _tokens_hash(sample.input_ids)
    return int.from_bytes(digest(said(sample))[:8], "little", signed=True)


def _tokens_hash(*lists: list[int]) -> int:
    numbers = np.array(lists, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little", signed=True)


def said(sample: Sample) -> object:
    """Collect all text of a sample that somebody wrote."""
    if not isinstance(sample, Conversation):
        return asdict(sample)
    return [list(map(bare, sample.messages)), sample.tools, sample.documents]
