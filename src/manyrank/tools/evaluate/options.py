"""The options of `manyrank evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from ...config.args import Options, arg, read_with_keys, recipe_options, word
from ...config.model_options import Count, ModelOptions, OptionalCount, SamplingOptions
from ...config.value_types import Int, listed
from ...data.scores import SCORES
from ...errors import UserError
from .plan import DATA_KEYS


def _different(names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError("not a list of different names like a,b")
    return names


Names = Annotated[list[str], BeforeValidator(listed), AfterValidator(_different)]


class BenchmarkOptions(Options):
    """Standard benchmarks, by lm-evaluation-harness (the extra `eval`)."""

    tasks: Names = arg([], "names, such as arc_easy,gsm8k", min_length=1)
    tasks_folder: list[str] = arg([], "a folder of your own task YAMLs", repeated=True)
    shots: Int | None = arg(None, "examples in each prompt (default: the task's)", ge=0)
    limit: OptionalCount = arg(None, "rows of each task")
    no_chat: bool = arg(False, "prompts as they are, without the chat template")


class EvaluateOptions(BenchmarkOptions, SamplingOptions, ModelOptions):
    """Evaluate one or several models on the same rows: loss, completions, scores, and whether they differ."""

    names: list[str] = word(..., "a model, a run's folder, a checkpoint, an adapter, or a merged model")
    data: str | None = arg(
        None,
        "a file, folder, hub name or {path: ..., split: ...} (default: the run's eval_data_path)",
        also=["data_path"],
    )
    metrics: Names = arg([], f"loss, {', '.join(SCORES)}, module:function (default: loss,normalised,f1)", min_length=1)
    no_base: bool = arg(False, "leave out the base of runs and adapters")
    max_rows: OptionalCount = arg(None, "at most so many rows of each source, chosen by the seed")
    batch_size: Count = arg(8, "rows at once")
    seed: Int = arg(42, "seed of the chosen rows, draws and intervals", ge=0, lt=2**32)
    output: Path | None = arg(
        None, "a new folder (default: output/evaluation, output/evaluation-2, ...)", also=["output_dir"]
    )
    as_json: bool = arg(False, "print the results instead of the table")
    nproc: OptionalCount = arg(None, "processes; each has the whole model (default: one per GPU)")


def read(argv: Sequence[str]) -> tuple[EvaluateOptions, dict[str, str]]:
    """Read a command line.

    Returns:
        The options, and the keys of a recipe that say how rows are read (default: as the first run was trained).

    Raises:
        UserError: an unknown option or a wrong value.
    """
    keys = recipe_options([key for key in DATA_KEYS if key not in EvaluateOptions.model_fields])
    options, reading = read_with_keys(argv, EvaluateOptions, keys, prog="manyrank evaluate")
    if not options.tasks and (options.tasks_folder or options.shots is not None or options.limit or options.no_chat):
        where = "--tasks-folder, --shots, --limit or --no-chat"
        raise UserError("this is for --tasks", where=where, fix="give --tasks")
    return options, reading
