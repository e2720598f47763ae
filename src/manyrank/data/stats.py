"""The facts of a recipe's data, gathered before anything is trained: plain values for `manyrank data inspect`.

    recipe -> readings    what was read: sources, what became of their rows, bad rows
           -> parts       what is learned from: training and validation examples, lengths, packing, samples

With eval_split one reading gives both parts; with eval_data_path each part has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..chat_template.types import IGNORE
from ..config.data_source import DataSource
from ..config.resolve import FIELDS, TrainConfig
from ..errors import UserError
from .dataset import Examples, bad_reasons, prepare
from .histogram import Bar, bars
from .loader import StepLoader, epoch_order
from .messages import SHOWN
from .packing import dataset_layout
from .sources import LOOKED_AT
from .survey import BadFacts

RANKS = (1, 2, 4, 8)
STEPS = 20  # that the balance of ranks is measured over


@dataclass(frozen=True)
class SourceFacts:
    """One source. Examples, tokens and supervised tokens are those that are used; `in_epoch` are the examples of an epoch."""

    path: str
    format_type: str
    weight: float
    rows: int
    examples: int
    in_epoch: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class SourceReport:
    """Sources that were read together.

    Attributes:
        name: the recipe's key.
        rows: rows that were read.
        counts: rows by what became of them, where it is not simply kept.
        reasons: bad rows by reason, the most frequent first.
        bad: the first bad rows.
    """

    name: str
    sources: tuple[SourceFacts, ...]
    rows: int
    counts: dict[str, int]
    reasons: dict[str, int]
    bad: tuple[BadFacts, ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example."""

    shortest: int
    median: float
    mean: float
    p95: float
    longest: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Balance:
    """Measure how much longer than the mean the longest of `ranks` works, in tokens; `batch` items to a step."""

    ranks: int
    batch: int
    over: float


@dataclass(frozen=True)
class Packing:
    """How full batches are, for each packing.

    Attributes:
        method: the recipe's packing.
        balances: with this packing, by number of ranks.
        padding: share of padding that `none` has on one rank.
        packs, filled: packs that `dataset` makes, and the share of them that is not empty; None for validation data,
            which is never packed so.
    """

    method: str
    balances: tuple[Balance, ...]
    padding: float
    packs: int | None
    filled: float | None


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True)
class SampleFacts:
    """One example. `stop` is its last supervised token, as a rule the end of the turn."""

    source: str
    row: int
    tokens: int
    supervised: int
    stop: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class SplitReport:
    """The examples of one side. `duplicates` are rows that say the same as an earlier one."""

    name: str
    examples: int
    rows: int
    duplicates: int
    tokens: int
    supervised: int
    lengths: Lengths
    packing: Packing
    samples: tuple[SampleFacts, ...]


@dataclass(frozen=True)
class DataReport:
    """The whole report. `overlap`: validation examples that are also in the training part; None without validation."""

    recipe: str
    settings: dict[str, str]
    readings: tuple[SourceReport, ...]
    parts: tuple[SplitReport, ...]
    overlap: int | None


def gather(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, recipe: str, samples: int) -> DataReport:
    """Tokenise the recipe's data, or load what was tokenised before, and look at it. Bad rows are quarantined.

    Args:
        recipe: its name.
        samples: examples to show of each part, spread over the lengths.

    Raises:
        UserError: a source cannot be read, or no row of it can be used.
    """
    whole = _prepared(config.data_path, tokenizer, config)
    train, evaluation = whole.split(config.eval_split) if config.eval_split else (whole, None)
    train = train.tempered(config)
    readings = [_reading("data_path", whole, train)]
    if config.eval_data_path:
        evaluation = _prepared(config.eval_data_path, tokenizer, config)
        readings.append(_reading("eval_data_path", evaluation, evaluation))
    parts = [_part("training", train, tokenizer, config, seed=config.order_seed, samples=samples)]
    if evaluation:
        parts.append(_part("validation", evaluation, tokenizer, config, seed=None, samples=samples))
    overlap = int(np.isin(evaluation.content, train.content).sum()) if evaluation else None
    return DataReport(recipe, _settings(config), tuple(readings), tuple(parts), overlap)


def of_run(config: TrainConfig, train: Examples, evaluation: Examples | None) -> dict:
    """Describe a run's data as JSON values: readings and parts as in a DataReport, without what only an inspection shows."""
    readings = [_reading("data_path", train, train)]
    if evaluation and not config.eval_split:
        readings.append(_reading("eval_data_path", evaluation, evaluation))
    parts = {"training": train} | ({"validation": evaluation} if evaluation else {})
    return {
        "readings": [asdict(reading) for reading in readings],
        "parts": [
            {
                "name": name,
                "examples": len(part),
                "tokens": int(part.lengths.sum()),
                "supervised": int(part.supervised.sum()),
                "lengths": asdict(_lengths(part.lengths)),
                "read": sum(part.report.rows),
                "out_of": sum(part.report.out_of),
            }
            for name, part in parts.items()
        ],
    }


def _settings(config: TrainConfig) -> dict[str, str]:
    keys = ("max_length", "overlong", "packing", "duplicates", "on_bad_row", "thinking")
    named = {"model": config.model_name_or_path, "chat_template": config.chat_template or "the tokenizer's"}
    choices = ("roles_to_train", "train_on_eos", "train_on_last_turn", "train_on_prompt", "train_on_opening")
    learned = {key: str(value) for key in choices if (value := getattr(config, key)) != FIELDS[key].default}
    split = {"eval_split": f"{config.eval_split:g}"} if config.eval_split else {}
    return named | {key: str(getattr(config, key)) for key in keys} | learned | split


def _prepared(sources: Sequence[DataSource], tokenizer, config: TrainConfig) -> Examples:
    first = LOOKED_AT if config.streaming else None
    try:
        return prepare(sources, tokenizer, config.model_copy(update={"on_bad_row": "skip"}), needed=first)
    except UserError as nothing:
        # Where no row is left because all are bad, the error that names them says more.
        prepare(sources, tokenizer, config.model_copy(update={"on_bad_row": "error"}), needed=first)
        raise nothing


# What was read


def _reading(name: str, examples: Examples, used: Examples) -> SourceReport:
    """What was read as `examples`, of which `used` are those of an epoch."""
    return SourceReport(
        name=name,
        sources=tuple(_source(number, examples, used) for number in range(len(examples.paths))),
        rows=sum(examples.report.rows),
        counts=dict(examples.report.counts),
        reasons=dict(bad_reasons(examples.report).most_common()),
        bad=tuple(BadFacts(row["place"], row["reason"], row["detail"]) for row in islice(examples.report.bad(), SHOWN)),
    )


def _source(number: int, examples: Examples, used: Examples) -> SourceFacts:
    own = examples.source == number
    return SourceFacts(
        path=examples.paths[number],
        format_type=examples.report.formats[number],
        weight=used.weights[number],
        rows=examples.report.rows[number],
        examples=int(own.sum()),
        in_epoch=used.in_epoch[number],
        tokens=int(examples.lengths[own].sum()),
        supervised=int(examples.supervised[own].sum()),
    )


# What is learned from


def _part(
    name: str, examples: Examples, tokenizer, config: TrainConfig, *, seed: int | None, samples: int
) -> SplitReport:
    rows = _row_count(examples)
    return SplitReport(
        name=name,
        examples=len(examples),
        rows=rows,
        duplicates=rows - len(np.unique(examples.content)),
        tokens=int(examples.lengths.sum()),
        supervised=int(examples.supervised.sum()),
        lengths=_lengths(examples.lengths),
        packing=_packing(examples, tokenizer, config, seed=seed),
        samples=tuple(_sample(examples[int(chosen)], tokenizer) for chosen in spread(examples.lengths, samples)),
    )


def _row_count(examples: Examples) -> int:
    """Rows that the examples come from; the pieces of a row are one."""
    numbers = examples.dataset.select_columns("row")[:]["row"][examples.index]
    return len(np.unique(np.stack([examples.source, numbers]), axis=1).T)


def _lengths(lengths: np.ndarray) -> Lengths:
    return Lengths(
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        p95=float(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        bars=bars(lengths),
    )


def _packing(examples: Examples, tokenizer, config: TrainConfig, *, seed: int | None) -> Packing:
    # Validation data is never put into packs, and keeps its order; see `trainer`.
    method = "step" if seed is None and config.packing == "dataset" else config.packing
    micro = config.per_device_train_batch_size
    if seed is None:
        micro = config.per_device_eval_batch_size or micro
    balances = []
    for ranks in RANKS:
        loader = StepLoader(
            examples=examples,
            batch_size=micro * ranks if seed is None else config.batch(ranks),
            micro_batch_size=micro,
            max_length=config.max_length,
            packing=method,
            pad_token=tokenizer.pad_token_id,
            rank=0,
            ranks=ranks,
            seed=seed,
        )
        balances.append(Balance(ranks, loader.batch_size, loader.imbalance(STEPS)))
    order = np.arange(len(examples)) if seed is None else epoch_order(examples, seed, 0)
    lengths = examples.lengths[order]
    packs = None if seed is None else len(dataset_layout(lengths, capacity=config.max_length))
    return Packing(
        method=method,
        balances=tuple(balances),
        padding=padding(lengths, batch=balances[0].batch, rows=micro),
        packs=packs,
        filled=float(lengths.sum()) / (packs * config.max_length) if packs else None,
    )


def padding(lengths: np.ndarray, *, batch: int, rows: int) -> float:
    """The share of padding where steps of `batch` examples are padded in micro-batches of `rows`, on one rank."""
    first = np.arange(len(lengths))
    first = first[first % batch % rows == 0]
    sizes = np.diff(first, append=len(lengths))
    return 1 - float(lengths.sum() / (np.maximum.reduceat(lengths, first) * sizes).sum())


# Samples


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` examples from the shortest to the longest; one alone is the median."""
    order, count = np.argsort(lengths, kind="stable"), min(count, len(lengths))
    at = np.linspace(0, len(order) - 1, count) if count > 1 else np.full(count, len(order) // 2)
    return order[at.round().astype(int)]


def _sample(example: dict, tokenizer: PreTrainedTokenizerBase) -> SampleFacts:
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    learned = [token for token, label in zip(ids, labels) if label != IGNORE]
    return SampleFacts(
        source=example["source"],
        row=int(example["row"]),
        tokens=len(ids),
        supervised=len(learned),
        stop=_read(tokenizer, learned[-1:]),
        pieces=tuple(pieces(tokenizer, ids, labels)),
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> list[Piece]:
    """The tokens as text, in runs of one kind."""
    special = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}
    special |= set(tokenizer.all_special_ids)
    kinds = [(label != IGNORE, token in special) for token, label in zip(ids, labels)]
    edges = [0, *(at for at in range(1, len(ids)) if kinds[at] != kinds[at - 1]), len(ids)]
    result = []
    for start, end in pairwise(edges):
        # Some decoders drop the blank in front of a text's first word, so a run is read after what comes before it.
        whole, before = _read(tokenizer, ids[:end]), _read(tokenizer, ids[:start])
        text = whole[len(before) :] if whole.startswith(before) else _read(tokenizer, ids[start:end])
        result.append(Piece(text, *kinds[start]))
    return result


def _read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
