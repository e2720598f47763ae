"""The prompts of a GRPO step, and the ranks that complete them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...data.dataset import Examples
from ...data.loader import MicroBatch, epoch_order


@dataclass
class PromptStep:
    """One optimizer step: the questions of this rank, and counts over all ranks that are known after generation.

    Attributes:
        numbers: of the questions, once for each completion.
        micro_batches: the rows, for each part of the step the same: trl shuffles the completions.
    """

    numbers: list[int]
    micro_batches: list[MicroBatch]
    examples: int
    supervised: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    sum_squared_lengths: int = 0


@dataclass(frozen=True)
class PromptLoader:
    """Deals the prompts of each step to ranks, each as often as it is completed.

    Attributes:
        batch_size: completions of one step, over all ranks. micro_batch_size: those that a process forwards at once.
        completions: of each prompt.
        seed: of the order; None for the order of the file.
    """

    examples: Examples
    batch_size: int
    micro_batch_size: int
    completions: int
    rank: int
    ranks: int
    seed: int | None

    @cached_property
    def keys(self) -> list[tuple[str, int]]:
        """The source and the row's number of each example."""
        return self.examples.keys()

    @property
    def prompts(self) -> int:
        """The prompts of a step."""
        return self.batch_size // self.completions

    @property
    def steps_per_epoch(self) -> int:
        """Every row is used in an epoch; its last step is filled up with its first rows."""
        return -(-len(self._order(0)) // self.prompts)

    def step(self, number: int) -> PromptStep:
        """The step of this number, counted from 0 over all epochs."""
        epoch, turn = divmod(number, self.steps_per_epoch)
        order = np.resize(self._order(epoch), self.steps_per_epoch * self.prompts)
        examples = np.repeat(order[turn * self.prompts : (turn + 1) * self.prompts], self.completions)
        numbers = examples.reshape(self.ranks, -1)[self.rank].tolist()
        rows = [self.keys[at] for at in dict.fromkeys(numbers)]
        nothing = torch.empty(0, dtype=torch.long)
        accumulation = self.batch_size // (self.micro_batch_size * self.ranks)
        return PromptStep(numbers, [MicroBatch({}, nothing, nothing, rows)] * accumulation, len(examples))

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.examples)) if self.seed is None else epoch_order(self.examples, self.seed, epoch)
