"""Tasks: what a run learns from. Each is a file or folder here, behind the interface of `training.task`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.resolve import TrainConfig

if TYPE_CHECKING:
    from ..training.task import Task


def find_task(config: TrainConfig) -> type[Task]:
    """The kind of task that a recipe names. What it needs is imported now: trl alone takes seconds."""
    if config.task == "grpo":
        from .grpo.task import GRPO

        return GRPO
    from .sft import SFT

    return SFT
