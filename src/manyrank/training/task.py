"""The interface between the training loop and a task; `tasks` holds the tasks. Methods are called in this order:

select_examples -> prepare_model -> (the strategy wraps the model) -> attach -> loader -> check
a step          forward_backward        a line of metrics   metrics
a validation    evaluate                a checkpoint        state, restore
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..config.resolve import DEFAULT_MODEL, TrainConfig
from ..data.dataset import Examples
from ..data.loader import Step
from ..parallel.engine import Engine
from ..topology.precision import Precision
from .loss import LossFunction


@dataclass(frozen=True)
class UserObjects:
    """Objects passed from Python that replace or extend what the recipe names.

    Attributes:
        model: the base, without adapters; the recipe's method puts them on it.
        tokenizer: with a chat template, where the data needs one.
        callbacks: transformers callbacks, beside those of the recipe.
        loss: logits (n, vocabulary) in float32 and targets (n,) of supervised tokens to their summed loss, a scalar.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    callbacks: Sequence[TrainerCallback] = ()
    loss: LossFunction | None = None


class Loader(Protocol):
    """Deals examples to steps and ranks; a step is a function of its number."""

    @property
    def examples(self) -> Examples: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, number: int) -> Step:
        """The step of this number, counted from 0 over all epochs."""
        ...


@dataclass(frozen=True)
class StepLoss:
    """The losses of this rank's micro-batches, and what makes the step's mean of their sum over all ranks."""

    losses: list[torch.Tensor]
    divisor: int


class Task(ABC):
    """Base class of tasks: what a run learns from.

    Args:
        config: the recipe, with everything settled that a launch decides.
        objects: what a script passes.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    output_dir: Path
    in_phase: Callable[[str], None]

    def __init__(self, config: TrainConfig, objects: UserObjects) -> None:
        self.config, self.objects = config, objects

    @property
    def model_name(self) -> str:
        """The base's name for people; of one that a script passes without naming it, the name that it has itself."""
        own = self.objects.model
        if own is None or self.config.model_name_or_path != DEFAULT_MODEL:
            return self.config.model_name_or_path
        return own.name_or_path or type(own).__name__

    @staticmethod
    def rows_needed(config: TrainConfig, batch: int) -> int:
        """Count the rows of data that fill so many places of a batch."""
        return batch

    @abstractmethod
    def select_examples(
        self, train: Examples, evaluation: Examples | None, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Examples, Examples | None]:
        """The examples that the run uses.

        Raises:
            UserError: one of them cannot be used.
        """

    def prepare_model(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Precision,
    ) -> None:
        """Use the loaded model before the strategy wraps it."""

    def attach(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        output_dir: Path,
        in_phase: Callable[[str], None],
    ) -> None:
        """Take the wrapped model; `in_phase` gives a sign of life and names what this rank does."""
        self.engine, self.tokenizer, self.output_dir, self.in_phase = engine, tokenizer, output_dir, in_phase
        self.use_engine()

    def use_engine(self) -> None:
        """Set up what needs the wrapped model; the last step of `attach`."""

    @abstractmethod
    def loader(self, examples: Examples, *, training: bool) -> Loader:
        """The steps of the training or of the validation."""

    def begin(self, loader: Any) -> None:
        """Give a new run's model what the data decides of its start. All ranks together.

        Raises:
            UserError: the data does not suffice.
        """

    def check(self, *, precision: Precision) -> None:
        """Try the model on a few tokens. All ranks together.

        Raises:
            UserError: the model cannot be trained in this way.
        """

    @abstractmethod
    def forward_backward(self, step: Any, *, number: int) -> StepLoss:
        """Add the gradients of a step on this rank. `number` is that of the step, counted from 0."""

    @abstractmethod
    def zero_step(self, step: Any) -> None:
        """Forward and backward of a loss that is exactly zero."""

    @abstractmethod
    def evaluate(self, loader: Any, *, number: int) -> dict[str, float]:
        """Metrics of the validation data, the same on all ranks. `number` counts the steps until now."""

    def metrics(self, *, number: int) -> dict[str, float]:
        """The task's own metrics since the last call."""
        return {}

    def state(self) -> dict:
        """Return the task's state for a checkpoint, as JSON values."""
        return {}

    def restore(self, state: dict) -> None:
        """Take back what `state` gave."""

    def identity(self) -> dict[str, str | None]:
        """Fingerprints that a resumed run must share with its checkpoint.

        `sft_model`: of the adapter that the run begins with. `rows`: of what is read of the rows beside their tokens.
        """
        return {"sft_model": None, "rows": None}

    def describe(self, loader: Any) -> str | None:
        """A line for the user about how examples are laid out."""
        return None

    def close(self) -> None:
        """Give back what was changed in the model."""
