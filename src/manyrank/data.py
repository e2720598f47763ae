"""Files to batches: rows are rendered once, cached, and dealt out step by step.

    file -> rows -> conversations -> token ids and labels      `prepare`, cached by datasets
    step k -> global_batch_size examples -> rank -> micro-batches  `StepLoader`, a pure function of (seed, k)

The order of examples depends on the seed and the epoch only, so any number of processes sees the same steps, and the
step number is all that a resumed run has to know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from .config import TrainConfig
from .errors import UserError
from .formats import BadRow, detect, read_rows, to_messages
from .packing import padded_layout, step_layout
from .render import IGNORE, render

KEPT, CUT, TOO_LONG, NOTHING_TO_LEARN = "kept", "cut", "too long", "nothing to learn"
FEATURES = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "labels": Sequence(Value("int32")),
        "row": Value("int64"),
        "fate": Value("string"),
    }
)
CACHE_VERSION = 1  # raise it when the same input gives other tokens


@dataclass(frozen=True)
class Examples:
    """One tokenised file, in the order of the file.

    Attributes:
        lengths: (examples,), tokens of each.
        supervised: (examples,), supervised tokens of each; at least one.
        counts: rows by what became of them.
    """

    dataset: Dataset
    lengths: np.ndarray
    supervised: np.ndarray
    format_type: str
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.lengths)

    def describe(self) -> str:
        share = self.supervised.sum() / self.lengths.sum()
        lost = [f"{count:,} {fate}" for fate, count in self.counts.items() if fate != KEPT]
        return (
            f"{len(self):,} examples ({self.format_type}), {self.lengths.sum():,} tokens, {share:.0%} supervised"
            f"{'; ' + ', '.join(lost) if lost else ''}"
        )


def prepare(path: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Examples:
    """Tokenise a file, or load what was tokenised before.

    Every rank calls this. On each machine the first one works and the others wait for its file lock, without a
    time-out, and read the result.

    Raises:
        UserError: a file, row or conversation that cannot be used, with its place.
    """
    file = Path(path)
    format_type = config.format_type
    if format_type == "auto":
        number, row = next(read_rows(file), (0, {}))
        format_type = detect(row, where=f"{file}, row {number}")
    options = {
        "file": str(file.resolve()), "format_type": format_type, "max_length": config.max_length, "overlong": config.overlong,
    }  # fmt: skip
    disable_progress_bars()
    try:
        whole = Dataset.from_generator(
            _tokenised,
            features=FEATURES,
            gen_kwargs={"tokenizer": tokenizer, "options": options},
            fingerprint=_fingerprint(file, tokenizer, options),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    fates = np.array(whole["fate"])
    dataset = whole.select(np.flatnonzero((fates == KEPT) | (fates == CUT)))
    if not len(dataset):
        raise UserError("no row is left to train on", where=str(file), fix="raise max_length or look at the file")
    names, numbers = np.unique(fates, return_counts=True)
    labels = dataset.with_format("numpy")["labels"][:]
    return Examples(
        dataset=dataset.with_format("numpy"),
        lengths=np.array([len(row) for row in labels]),
        supervised=np.array([int((row != IGNORE).sum()) for row in labels]),
        format_type=format_type,
        counts=dict(zip(names.tolist(), numbers.tolist())),
    )


def _fingerprint(file: Path, tokenizer: PreTrainedTokenizerBase, options: dict) -> str:
    digest = hashlib.sha256(file.read_bytes())
    state = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    for part in (state, str(tokenizer.chat_template), json.dumps(options, sort_keys=True), str(CACHE_VERSION)):
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def _tokenised(tokenizer: PreTrainedTokenizerBase, options: dict) -> Iterator[dict]:
    file, limit = options["file"], options["max_length"]
    for number, row in read_rows(Path(file)):
        where = f"{file}, row {number}"
        try:
            rendered = render(tokenizer, to_messages(row, options["format_type"]))
        except BadRow as problem:
            raise UserError(str(problem), where=where, fix="mend or remove the row") from None
        ids, labels = rendered.input_ids, rendered.labels
        fate = KEPT
        if len(ids) > limit:
            if options["overlong"] == "error":
                raise UserError(
                    f"{len(ids)} tokens, more than {limit}", where=where, fix="raise max_length, or set overlong"
                )
            fate = CUT if options["overlong"] == "truncate" else TOO_LONG
            ids, labels = ids[:limit], labels[:limit]
        # The first token has nothing in front that could predict it.
        labels[0] = IGNORE
        if fate != TOO_LONG and all(label == IGNORE for label in labels):
            fate = NOTHING_TO_LEARN
        yield {"input_ids": ids, "labels": labels, "row": number, "fate": fate}


@dataclass(frozen=True)
class MicroBatch:
    """What one process forwards at once.

    Attributes:
        inputs: the model's keyword arguments; input_ids is (1, tokens) when packed, (rows, longest) when padded.
        positions, targets: (supervised,), as `loss.token_loss_sum` takes them.
        rows: numbers of the rows in their file, to name them in an error.
    """

    inputs: dict
    positions: torch.Tensor
    targets: torch.Tensor
    rows: list[int]

    def to(self, device: torch.device) -> MicroBatch:
        move = {key: value.to(device) if torch.is_tensor(value) else value for key, value in self.inputs.items()}
        return MicroBatch(move, self.positions.to(device), self.targets.to(device), self.rows)


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's micro-batches, and token counts over *all* ranks."""

    micro_batches: list[MicroBatch]
    supervised: int
    tokens: int


@dataclass(frozen=True)
class StepLoader:
    """Deals the examples of each step to ranks and micro-batches.

    Attributes:
        batch_size: examples to one step, over all ranks.
        micro_batch_size: examples of max_length that one process may hold; times max_length, its token budget.
        seed: of the order of examples; None for the order of the file.
    """

    examples: Examples
    batch_size: int
    micro_batch_size: int
    max_length: int
    packing: str
    pad_token: int
    rank: int
    ranks: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def step(self, number: int) -> Step:
        """The step of this number, counted from 0 over all epochs; an epoch's last step takes what is left."""
        epoch, turn = divmod(number, self.steps_per_epoch)
        chosen = self._order(epoch)[turn * self.batch_size : (turn + 1) * self.batch_size]
        lengths = self.examples.lengths[chosen]
        build = _packed if self.packing == "step" else self._padded
        return Step(
            micro_batches=[build(self._read(chosen, members)) for members in self._layout(lengths.tolist())],
            supervised=int(self.examples.supervised[chosen].sum()),
            tokens=int(lengths.sum()),
        )

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.examples))
        return _permutation(self.seed, epoch, len(self.examples))

    def _layout(self, lengths: list[int]) -> list[list[int]]:
        if self.packing == "none":
            return padded_layout(len(lengths), ranks=self.ranks, batch_size=self.micro_batch_size)[self.rank]
        budget = self.micro_batch_size * self.max_length
        return step_layout(lengths, ranks=self.ranks, token_budget=budget)[self.rank]

    def _read(self, chosen: np.ndarray, members: list[int]) -> list[dict]:
        if members:
            return [self.examples.dataset[int(chosen[i])] for i in members]
        # A rank without an example forwards one anyway, unsupervised: the others wait for it in every collective.
        filler = self.examples.dataset[int(chosen[0])]
        return [{**filler, "labels": np.full_like(filler["labels"], IGNORE)}]

    def _padded(self, rows: list[dict]) -> MicroBatch:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_token)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORE)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.as_tensor(row["input_ids"])
            labels[index, :length] = torch.as_tensor(row["labels"])
            mask[index, :length] = 1
        return _micro_batch({"input_ids": ids, "attention_mask": mask}, labels.flatten(), rows)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _packed(rows: list[dict]) -> MicroBatch:
    lengths = [len(row["input_ids"]) for row in rows]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    inputs = {
        "input_ids": torch.as_tensor(np.concatenate([row["input_ids"] for row in rows])).long()[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _micro_batch(inputs, torch.as_tensor(np.concatenate([row["labels"] for row in rows])).long(), rows)


def _micro_batch(inputs: dict, labels: torch.Tensor, rows: list[dict]) -> MicroBatch:
    # The hidden state before a token predicts it. A document's first token is never supervised, so this never reaches
    # back into another document.
    at = (labels != IGNORE).nonzero().squeeze(1)
    return MicroBatch(inputs, at - 1, labels[at], [int(row["row"]) for row in rows])
