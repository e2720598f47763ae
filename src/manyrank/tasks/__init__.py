"""What a run learns from. Examples alone (SFT) need nothing more than the trainer; every other task is a module here."""

from __future__ import annotations

from types import ModuleType

from ..config.resolve import TrainConfig


def of(config: TrainConfig) -> ModuleType | None:
    """The recipe's task, see `training.run.Task`; None for SFT."""
    if not config.is_grpo:
        return None
    from .grpo import task as grpo  # not before: trl takes seconds to import

    return grpo
