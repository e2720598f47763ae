"""What a run learns from. Examples alone (SFT) need nothing more than the trainer; every other task is a module here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.resolve import TrainConfig

if TYPE_CHECKING:
    from ..training.run import Task


def of(config: TrainConfig) -> Task | None:
    """The recipe's task, None for SFT."""
    if not config.is_grpo:
        return None
    from .grpo import task  # not before: trl takes seconds to import

    return task
