"""Standard benchmarks, run by lm-evaluation-harness (`pip install 'manyrank[eval]'`) on a model that is loaded already."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import UserError
from .options import EvaluateOptions


def check(tasks: Sequence[str], folders: Sequence[str]) -> None:
    """Check before the models are loaded that the tasks can be run.

    Raises:
        UserError: lm_eval is not installed, there is no such folder, or it knows no such task.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install the extra `eval`: pip install 'manyrank[eval]'"
        raise UserError("lm-evaluation-harness is not installed", where="--tasks", fix=fix)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}", where="--tasks-folder", fix="name a folder of task YAMLs")
    for task in tasks:
        if not _manager(tuple(folders)).match_tasks([task]):
            fix = "see `lm_eval ls tasks`; your own YAMLs need --tasks-folder"
            raise UserError(f"there is no task {task!r}", where="--tasks", fix=fix)


@lru_cache
def _manager(folders: tuple[str, ...]):  # it reads some ten thousand files
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None)


def run(model, tokenizer, tasks: Sequence[str], options: EvaluateOptions) -> dict[str, dict[str, float]]:
    """Run the tasks, and return the metrics of each, as `lm_eval.simple_evaluate` gives them.

    Args:
        options: of the command line: tasks_folder, shots, limit, no_chat, batch_size and seed.

    Raises:
        UserError: a task fails: its data cannot be read, or it does not go with the model.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        evaluated = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=list(tasks),
            num_fewshot=options.shots,
            limit=options.limit,
            apply_chat_template=bool(tokenizer.chat_template) and not options.no_chat,
            task_manager=_manager(tuple(options.tasks_folder)),
            bootstrap_iters=1000,
            log_samples=False,
            **dict.fromkeys(seeds, options.seed),
        )
    except Exception as error:  # what its tasks, datasets and the network raise
        what = f"lm-evaluation-harness: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(what, where=f"--tasks {','.join(tasks)}", fix="fix the task, or leave it out") from error
    return {task: _metrics(results) for task, results in evaluated["results"].items()}


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers; "acc,none" is the metric acc after no filter."""
    numbers = {key: value for key, value in results.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
