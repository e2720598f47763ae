"""The rows of a recipe's sources as they are read, before any tokenizer: formats, counts, bad rows, an example. No torch.

    sources -> rows -> samples | bad rows, by reason -> Survey

A name on the hub is streamed, so only its first rows are read; of files and folders all are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..chat_template.types import BadRow, Message, is_learned
from ..config.data_source import DataSource
from ..config.schema import TrainConfig
from ..errors import UserError
from .formats import Conversation, PlainText, Sample, TokenIds, to_sample
from .messages import SHOWN, bad_rows_error, usual_fix
from .sources import LOOKED_AT, Source, known_format, read_rows, source_of

BYTES_A_TOKEN = 3  # of text; English has about 4


@dataclass(frozen=True)
class BadFacts:
    """A row that cannot be used: "my.jsonl, line 3", the short reason, and what is wrong."""

    place: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source.

    Attributes:
        whole: whether all its rows were read.
        longest: tokens of the longest sample, about.
        example, place: the first sample, and where it stands; None: every row is bad.
    """

    path: str
    format_type: str
    weight: float
    rows: int
    usable: int
    whole: bool
    longest: int
    example: Sample | None
    place: str


@dataclass(frozen=True)
class Survey:
    """Sources that are read together.

    Attributes:
        name: the recipe's key.
        reasons: bad rows by reason, the most frequent first.
        bad: the first bad rows.
    """

    name: str
    sources: tuple[SourceRows, ...]
    reasons: dict[str, int]
    bad: tuple[BadFacts, ...]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def usable(self) -> int:
        return sum(source.usable for source in self.sources)


def survey(config: TrainConfig) -> list[Survey]:
    """Read the rows of the training data, and of the validation data where there is some.

    Raises:
        UserError: a source cannot be read, or no row of it can be used.
    """
    sources = {"data_path": config.data_path, "eval_data_path": config.eval_data_path or []}
    return [_survey(name, of_key, config) for name, of_key in sources.items() if of_key]


def _survey(name: str, sources: Sequence[DataSource], config: TrainConfig) -> Survey:
    reasons: Counter[str] = Counter()
    bad: list[BadFacts] = []
    rows = tuple(_source_rows(known_format(source_of(source, config)), reasons, bad) for source in sources)
    survey = Survey(name, rows, dict(reasons.most_common()), tuple(bad))
    if not survey.usable:
        first, fix = ((row.place, row.detail) for row in bad), usual_fix(reasons)
        error = bad_rows_error(first, reasons, out_of=f"{survey.rows:,} rows", fix=fix, skippable=False)
        raise UserError(f"no row is left to train on: {error.what}", where=error.where, fix=error.fix)
    return survey


def _source_rows(source: Source, reasons: Counter[str], bad: list[BadFacts]) -> SourceRows:
    """Read a source; its bad rows are added to `reasons`, and to `bad` as long as it has fewer than SHOWN."""
    whole = Path(source.path).exists() and not source.streamed
    count, longest, first = 0, 0, None
    rejected = reasons.total()
    for row in islice(read_rows(source), None if whole else LOOKED_AT):
        count += 1
        try:
            sample = to_sample(row.readable(), source.format_type, source.columns)
        except BadRow as problem:
            reasons[problem.reason] += 1
            if len(bad) < SHOWN:
                bad.append(BadFacts(row.place, problem.reason, str(problem)))
            continue
        first = first or (sample, row.place)
        longest = max(longest, _tokens(sample))
    example, place = first or (None, "")
    usable = count - (reasons.total() - rejected)
    return SourceRows(source.path, source.shape, source.weight, count, usable, whole, longest, example, place)


def _tokens(sample: Sample) -> int:
    if isinstance(sample, TokenIds):
        return len(sample.input_ids)
    return sum(len(text.encode()) for _, text in texts(sample)) // BYTES_A_TOKEN


def texts(sample: Sample) -> list[tuple[str, str]]:
    """List the texts of a sample, each with its role; of token ids, the numbers."""
    if isinstance(sample, PlainText):
        return [("text", sample.text)]
    if isinstance(sample, Conversation):
        return [(_role(message), _said(message)) for message in sample.messages]
    return [("tokens", " ".join(map(str, sample.input_ids)))]


def _role(message: Message) -> str:
    return message["role"] if is_learned(message) else f"{message['role']} (not learned)"


def _said(message: dict) -> str:
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", [])]
    parts = [message.get("reasoning_content", ""), message.get("content", ""), *calls]
    return "\n".join(part for part in parts if part)
