"""Standard benchmarks, run by lm-evaluation-harness (`pip install 'manyrank[eval]'`) on a model that is loaded already."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import UserError


def check(tasks: Sequence[str], folders: Sequence[str]) -> None:
    """See before the models are loaded that the tasks can be run.

    Raises:
        UserError: lm_eval is not installed, there is no such folder, or it knows no such task.
    """
    if not tasks:
        return
    if not _installed():
        fix = "install the extra `eval`: pip install 'manyrank[eval]'"
        raise UserError("lm-evaluation-harness is not installed", where="--tasks", fix=fix)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}", where="--tasks-folder", fix="name a folder of task YAMLs")
    manager = _manager(tuple(folders))
    for task in tasks:
        if not manager.match_tasks([task]):
            fix = "see `lm_eval ls tasks`; your own YAMLs need --tasks-folder"
            raise UserError(f"there is no task {task!r}", where="--tasks", fix=fix)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("lm_eval") is not None
    except ValueError:  # somebody has put something in its place
        return False


def run(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    folders: Sequence[str],
    shots: int | None,
    limit: int | None,
    chat: bool,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The results of each task: its metrics, as `lm_eval.simple_evaluate` gives them.

    Args:
        folders: of the user's own tasks.
        shots: examples in each prompt; None: as the task says.
        limit: rows of each task; None: all.
        chat: whether prompts go through the chat template.

    Raises:
        UserError: a task fails: its data cannot be read, or it does not go with the model.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat,
            task_manager=_manager(tuple(folders)),
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    except Exception as error:  # what its tasks, datasets and the network raise
        what = f"lm-evaluation-harness: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(what, where=f"--tasks {','.join(tasks)}", fix="mend the task, or leave it out") from error
    return {task: _plain(results) for task, results in found["results"].items()}


@lru_cache
def _manager(folders: tuple[str, ...]):
    """It reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(Path(folder)) for folder in folders] or None)


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """ "acc,none" is the metric acc after no filter."""
    numbers = {key: value for key, value in results.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
