"""Saves of a run: at its steps, on request, before it stops; and what follows when one fails."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..errors import SaveError
from ..parallel.engine import Engine
from ..runs import logs, run_folder
from .state import save_checkpoint

FAILURES = 2  # in a row, after which a run stops


class Saver:
    """Writes a run's checkpoints and removes old ones.

    Args:
        run: the values that a resumed run must share with this one.
        limit: checkpoints to keep; None keeps all.
    """

    def __init__(self, engine: Engine, output_dir: Path, *, run: dict, limit: int | None) -> None:
        self.engine, self.output_dir, self.run, self.limit = engine, output_dir, run, limit
        self.saved: int | None = None  # the step of the last one
        self.failures = 0

    @property
    def wished(self) -> bool:
        """Whether the run's folder has a file SAVE_NOW."""
        return (self.output_dir / run_folder.SAVE_NOW).exists()

    def save(self, step: int, state: dict, *, best: Path | None, must: bool = False) -> bool:
        """Write a checkpoint. All ranks together.

        One that cannot be written is told, and the training goes on; the checkpoints before it are untouched.

        Returns:
            Whether it is written.

        Raises:
            SaveError: it is the second one in a row, or it must not fail.
        """
        main = self.engine.accelerator.is_main_process
        try:
            folder = save_checkpoint(self.engine, self.output_dir, step, state=state, run=self.run)
        except SaveError as error:
            if must:
                raise
            self._failed(step, error)
            return False
        self.saved, self.failures = step, 0
        if main:
            with contextlib.suppress(OSError):  # an old one that stays does no harm
                run_folder.retain(self.output_dir, self.limit, keep=[folder, *([best] if best else [])])
            with contextlib.suppress(OSError):
                (self.output_dir / run_folder.SAVE_NOW).unlink()
        return True

    def _failed(self, step: int, error: SaveError) -> None:
        self.failures += 1
        if self.failures == FAILURES:
            raise SaveError(f"checkpoint-{step} could not be written, nor the one before it: {error}") from None
        if self.engine.accelerator.is_main_process:
            logs.warn(
                self.output_dir,
                f"checkpoint-{step} could not be written: {error}. Training continues; one more failure and it stops",
            )
