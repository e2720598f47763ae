"""Examples to batches: which examples a step has, and who forwards them with whom.

    step k -> batch_size items -> rank -> micro-batches          `StepLoader`, a pure function of (seed, k)

An item is an example, or with `packing: dataset` a pack of examples. The order depends on the seed and the epoch only,
so any number of processes sees the same steps, and the step number is all that a resumed run has to know.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..chat_template.types import IGNORE
from ..errors import UserError
from ..models.varlen import DocumentLengths
from .dataset import Examples
from .packing import Packs, dataset_layout, imbalance, padded_layout, step_layout


@dataclass(frozen=True)
class MicroBatch:
    """The examples that one process forwards at once.

    Attributes:
        inputs: the model's keyword arguments; input_ids is (1, tokens) when packed, (rows, longest) when padded.
        positions, targets: (supervised,), as `loss.TokenLoss` takes them.
        rows: the source of each row and its number there, to name them in an error.
    """

    inputs: dict
    positions: torch.Tensor
    targets: torch.Tensor
    rows: list[tuple[str, int]]

    def documents(self) -> list[tuple[int, int]]:
        """The first token (row * tokens + token) and the length of each example."""
        if (mask := self.inputs.get("attention_mask")) is not None:
            return [(row * mask.shape[1], length) for row, length in enumerate(mask.sum(1).tolist())]
        bounds = self.inputs["cu_seq_lens_q"].tolist()
        return [(start, end - start) for start, end in pairwise(bounds)]

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device. Copies to CUDA are from pinned memory, and nothing waits for them."""
        tensors = [value for value in (*self.inputs.values(), self.positions, self.targets) if torch.is_tensor(value)]
        copies = {id(tensor): _copied(tensor, device) for tensor in {id(one): one for one in tensors}.values()}
        inputs = {key: copies.get(id(value), value) for key, value in self.inputs.items()}
        return MicroBatch(inputs, copies[id(self.positions)], copies[id(self.targets)], self.rows)


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's micro-batches, and counts over *all* ranks.

    Attributes:
        computed_tokens: tokens that are computed: also padding, and what a rank without an example forwards.
        sum_squared_lengths: the squared lengths of the examples, added up.
    """

    micro_batches: list[MicroBatch]
    examples: int
    supervised: int
    tokens: int
    computed_tokens: int
    sum_squared_lengths: int


@dataclass(frozen=True)
class StepLoader:
    """Deals the examples of each step to ranks and micro-batches.

    Attributes:
        batch_size: items to one step, over all ranks.
        max_length: most tokens of an example, and of a pack.
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

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch; a UserError where the weight of a source leaves nothing of it to one."""
        items = len(self._packs(0)) if self.packing == "dataset" else len(self._order(0))
        return -(-items // self.batch_size)

    def step(self, number: int) -> Step:
        """The step of this number, counted from 0 over all epochs; an epoch's last step takes what is left."""
        epoch, turn = divmod(number, self.steps_per_epoch)
        items = self._items(epoch, slice(turn * self.batch_size, (turn + 1) * self.batch_size))
        chosen = np.concatenate(items)
        build = self._padded if self.packing == "none" else side_by_side
        dealt = self._deal(items)
        lengths = self.examples.lengths[chosen]
        return Step(
            micro_batches=[build(self._read(chosen[0], members)) for members in dealt[self.rank]],
            examples=len(chosen),
            supervised=int(self.examples.supervised[chosen].sum()),
            tokens=int(lengths.sum()),
            computed_tokens=sum(
                self._computed_tokens(members or [chosen[0]]) for micro_batches in dealt for members in micro_batches
            ),
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def imbalance(self, steps: int = 20) -> float:
        """Measure how much longer than the mean the longest rank works, over the first steps."""
        shares = []
        for number in range(min(steps, self.steps_per_epoch)):
            items = self._items(0, slice(number * self.batch_size, (number + 1) * self.batch_size))
            lengths = [int(self.examples.lengths[item].sum()) for item in items]
            shares.append(imbalance(self._layout(lengths), lengths))
        return float(np.mean(shares))

    def _items(self, epoch: int, part: slice) -> list[np.ndarray]:
        if self.packing == "dataset":
            packs = self._packs(epoch)
            return [packs[int(pack)] for pack in _permutation(self.seed, epoch, len(packs))[part]]
        return [np.array([example]) for example in self._order(epoch)[part]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.examples)) if self.seed is None else epoch_order(self.examples, self.seed, epoch)

    def _packs(self, epoch: int) -> Packs:
        """The same number of packs in every epoch: the lengths are the same, only equal ones change places."""
        return _packs_of(self.examples, self.seed, epoch, self.max_length)

    def _deal(self, items: list[np.ndarray]) -> list[list[list[int]]]:
        """[rank][micro-batch] -> examples."""
        layout = self._layout([int(self.examples.lengths[item].sum()) for item in items])
        return [
            [[int(example) for item in members for example in items[item]] for members in micro_batches]
            for micro_batches in layout
        ]

    def _layout(self, lengths: list[int]) -> list[list[list[int]]]:
        if self.packing == "none":
            return padded_layout(len(lengths), ranks=self.ranks, batch_size=self.micro_batch_size)
        return step_layout(lengths, ranks=self.ranks, token_budget=self.micro_batch_size * self.max_length)

    def _computed_tokens(self, members: list[int]) -> int:
        lengths = self.examples.lengths[members]
        return int(lengths.max()) * len(members) if self.packing == "none" else int(lengths.sum())

    def _read(self, first: int, members: list[int]) -> list[dict]:
        if members:
            return [self.examples[example] for example in members]
        # A rank without an example forwards one anyway, unsupervised: the others wait for it in every collective.
        filler = self.examples[int(first)]
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


class Prefetcher:
    """The steps of a loader in their order, each read by a thread while the one before it trains."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader
        self.reader = ThreadPoolExecutor(1, "reader")
        self.number, self.coming = -1, None

    def step(self, number: int, *, last: int) -> Step:
        """The step of this number; the next one is read unless it is after `last`."""
        coming = self.coming if self.number == number else self.reader.submit(self.loader.step, number)
        step = coming.result()
        self.number = number + 1
        self.coming = self.reader.submit(self.loader.step, number + 1) if number < last else None
        return step


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@lru_cache(maxsize=1)
def _packs_of(examples: Examples, seed: int, epoch: int, capacity: int) -> Packs:
    order = epoch_order(examples, seed, epoch)
    packs = dataset_layout(examples.lengths[order], capacity=capacity)
    return Packs(order[packs.members], packs.bounds)


@lru_cache(maxsize=2)
def epoch_order(examples: Examples, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch in their order, by the weights of their sources.

    A source of weight 2.5 is there twice, and with half of its examples once more, each epoch with the next half.
    """
    if all(weight == 1 for weight in examples.weights):
        return _permutation(seed, epoch, len(examples))
    chosen = []
    for number, (weight, total) in enumerate(zip(examples.weights, examples.in_epoch)):
        own, whole = np.flatnonzero(examples.source == number), int(weight)
        if len(own) and not total:
            raise UserError(
                f"the weight {weight:g} leaves no example of {len(own)} to an epoch",
                where=examples.paths[number],
                fix="give a larger weight, or leave the source out",
            )
        rest = total - whole * len(own)
        turn = np.arange(epoch * rest, (epoch + 1) * rest) % max(1, len(own))
        chosen += [own] * whole + [own[np.random.default_rng([seed, number]).permutation(len(own))[turn]]]
    together = np.concatenate(chosen)
    return together[_permutation(seed, epoch, len(together))]


def side_by_side(rows: list[dict]) -> MicroBatch:
    """Rows side by side, as documents of one row."""
    lengths = [len(row["input_ids"]) for row in rows]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    inputs = {
        "input_ids": torch.as_tensor(np.concatenate([row["input_ids"] for row in rows])).long()[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": DocumentLengths(tuple(lengths)),
    }
    return _micro_batch(inputs, torch.as_tensor(np.concatenate([row["labels"] for row in rows])).long(), rows)


def trial(*, packed: bool) -> MicroBatch:
    """A few tokens to try a model with, the same on every rank."""
    ids = np.arange(4)
    micro = side_by_side([{"input_ids": ids, "labels": np.where(ids, ids, IGNORE), "source": "trial", "row": 0}])
    return micro if packed else replace(micro, inputs={"input_ids": micro.inputs["input_ids"]})


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _micro_batch(inputs: dict, labels: torch.Tensor, rows: list[dict]) -> MicroBatch:
    # The hidden state before a token predicts it. A document's first token is never supervised, so this never reaches
    # back into another document.
    at = (labels != IGNORE).nonzero().squeeze(1)
    return MicroBatch(inputs, at - 1, labels[at], [(row["source"], int(row["row"])) for row in rows])
