"""Where a run resumes: rank 0 looks, and every rank gets the same answer."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..runs import run_folder
from ..topology.ranks import restarts

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, None for a new run. `notes` are for the user, `run` is its identity."""

    folder: Path | None
    notes: tuple[str, ...] = ()
    run: dict = field(default_factory=dict)


def find_start(config: TrainConfig, output_dir: Path, accelerator: Accelerator) -> Start:
    """Remove what a killed run left, and find the checkpoint to resume from. All ranks together.

    A run that a launcher has started anew after a failure goes on from its newest checkpoint without being told.

    Raises:
        UserError: the checkpoint cannot be used, or the machines do not share the run's folder; on every rank.
    """
    places = [config.resume_from_checkpoint] if config.resume_from_checkpoint else []
    if any(gather_object([restarts()])) and places != ["auto"]:
        places = ["auto", *places]  # what this run has saved itself comes before where it began
    start = broadcast_from_rank0(accelerator, lambda: _start(config, output_dir, places))
    _check_shared(output_dir, start.folder, accelerator)
    return start


def _start(config: TrainConfig, output_dir: Path, places: list[str]) -> Start:
    notes: list[str] = []
    if config.overwrite_output_dir and run_folder.is_marked(output_dir):  # what is there is the run before
        return Start(None)
    if places and not config.dry_run:  # without them the folder is new
        notes += run_folder.tidy(output_dir)
    for place in places:
        checkpoint = run_folder.find(output_dir, place)
        notes += [f"passed over: {problem}" for problem in checkpoint.passed_over]
        if checkpoint.folder:
            return Start(checkpoint.folder, tuple(notes), json.loads((checkpoint.folder / "run.json").read_text()))
    if places:
        notes.append(f"{output_dir} has no checkpoint yet: starting from the beginning")
    return Start(None, tuple(notes))


def broadcast_from_rank0(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; a UserError is raised on every rank."""
    results: list = [None]
    if accelerator.is_main_process:
        try:
            results = [work()]
        except UserError as error:
            results = [error]
    broadcast_object_list(results)
    if isinstance(results[0], UserError):
        raise results[0]
    return results[0]


def _check_shared(output_dir: Path, folder: Path | None, accelerator: Accelerator) -> None:
    """Every machine must see what rank 0 writes: found now, and not at the first save.

    Raises:
        UserError: one of them does not; on every rank.
    """
    token = output_dir / f".shared-{broadcast_from_rank0(accelerator, lambda: secrets.token_hex(8))}"
    several = accelerator.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if not several:
        return
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        token.touch()
    accelerator.wait_for_everyone()
    sees = token.exists() and (folder is None or (folder / run_folder.MANIFEST).exists())
    blind = [host for host, sees in gather_object([(os.uname().nodename, sees)]) if not sees]
    if accelerator.is_main_process:
        token.unlink()
    if blind:
        what = f"{', '.join(sorted(set(blind)))} cannot see {output_dir} of machine 0"
        raise UserError(what, where="output_dir", fix="give a folder that all machines share")
