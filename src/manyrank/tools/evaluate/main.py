"""`manyrank evaluate`: one or several models on the same rows: loss, answers, scores, and whether they differ.

Each process holds the whole model and takes a part of the rows; rank 0 gathers them at the end, see `worker`.

    python -m manyrank.tools.evaluate.main ARGV    what each process of --nproc runs; ARGV is a JSON list in one word
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config.args import CommandLine, LaunchOptions
from ...config.model_options import SamplingOptions
from ...config.schema import TrainConfig
from ...data.scores import row_scores
from ...errors import UserError
from ...launch.command import before_imports, plan_launch, run_launch
from ...runs.run_folder import atomic_directory, check_writable, free_folder
from ...signals import begin_worker
from ...topology import gpus, ranks
from ...topology.ranks import Topology
from ...topology.strategies import default_strategy
from ...training.exits import exit_now, run_with_exit_codes
from . import lm_eval
from .options import EvaluateOptions, read
from .plan import DATA_KEYS, Weights, plan_evaluation, recipes_of, resolve_data

LOSS = ("loss", "perplexity")
# Settings of the results that are options of the same name.
SETTINGS = {*SamplingOptions.model_fields, "quantization", "dtype", "batch_size", "max_rows"}


def main(argv: Sequence[str]) -> int:
    """Evaluate, print the table (or with --json the results), and write both files.

    Returns:
        0, or the exit code of a process that failed.

    Raises:
        UserError: something is wrong that can be known before, or a row, model or metric turns out to be.
    """
    options, reading = read(argv)
    check(options, reading)
    output = _output(options.output)
    machine = gpus.probe()
    nproc = options.nproc or max(1, len(machine.gpus))
    if machine.gpus and nproc > len(machine.gpus):
        count = len(machine.gpus)
        raise UserError(f"{nproc} processes on {count} GPUs", where="--nproc", fix=f"at most {count}")
    if nproc > 1:
        return _launch([*argv, "--output", str(output)], nproc, machine)
    before_imports(machine)
    evaluate(options, reading, Topology(), output)
    return 0


def check(options: EvaluateOptions, reading: dict[str, str]) -> tuple[list[Weights], TrainConfig | None]:
    """Decide what is loaded, and how rows are read (None: only tasks are run). No torch.

    Args:
        reading: keys of a recipe that say how rows are read.

    Raises:
        UserError: a name, a metric, a task or a value is wrong.
    """
    row_scores([name for name in options.metrics if name not in LOSS])
    lm_eval.check(options.tasks, options.tasks_folder)
    plan = plan_evaluation(options.names, bases=not options.no_base)
    runs = recipes_of(plan)
    if options.tasks and options.data is None and not (runs and runs[0][1].eval_data_path):
        _refuse_options_of_rows(options, reading)
        return plan, None
    overrides = reading | {"seed": str(options.seed)}
    if options.chat_template is not None:
        overrides["chat_template"] = options.chat_template
    if options.trust_remote_code:
        overrides["trust_remote_code"] = "true"
    return plan, resolve_data(plan, options.data, overrides, max_rows=options.max_rows).config


def _refuse_options_of_rows(options: EvaluateOptions, reading: dict[str, str]) -> None:
    """Refuse what would be ignored where only tasks are run."""
    for key, value in {"metrics": options.metrics, "max_rows": options.max_rows, **reading}.items():
        if value not in (None, []):
            name = f"--{key}"
            raise UserError(f"{name} without data", where=name, fix="give --data, or leave it out")


def _output(folder: Path | None) -> Path:
    """Choose the folder to write, which is not there yet."""
    if folder:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"there is something at {folder}", where="--output", fix="name another folder")
    else:
        _, folder = free_folder(Path("output") / "evaluation")
    check_writable(folder, where="--output", fix="name another folder")
    return folder


def _launch(argv: list[str], nproc: int, machine: gpus.Hardware) -> int:
    line = CommandLine(None, [], LaunchOptions(nproc=nproc, via="torchrun"))
    program = ("manyrank.tools.evaluate.main", json.dumps(argv))  # in one word: torchrun would take --nproc as its own
    plan = plan_launch(
        line, strategy=default_strategy(nproc), nproc=nproc, output_dir="", hardware=machine, program=program
    )
    return run_launch(plan, stay=True)


def rank_main(argv: Sequence[str]) -> int:
    """Run one process of --nproc."""
    begin_worker()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which leaves no temporary folders
    place = ranks.from_environment()
    before_imports(gpus.probe())
    options, reading = read(json.loads(argv[0]))
    return run_with_exit_codes(lambda: evaluate(options, reading, place, options.output), place)


def evaluate(options: EvaluateOptions, reading: dict[str, str], place: Topology, output: Path) -> None:
    """Compute this process's part of everything; on rank 0 also write and print the results of all."""
    plan, config = check(options, reading)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the results
        from . import report
        from .worker import Worker

        data = Worker(options, config, place).run(plan)
    if data is None:
        return
    models = [model for weights in plan for model in weights.models]
    settings = _settings(options, config, place.world_size) | {"notes": list(data.notes)}
    content = report.results(models, data, settings, seed=options.seed)
    with atomic_directory(output, overwrite=False) as partial:
        report.write(partial, content, report.predictions(models, data))
    if options.as_json:
        print(json.dumps({**content, "output": str(output)}, indent=1, ensure_ascii=False))
    else:
        print("\n".join([*data.notes, "", report.table(content), *_remarks(content), "", f"written to {output}"]))


def _settings(options: EvaluateOptions, config: TrainConfig | None, nproc: int) -> dict:
    plain = config.plain() if config else {}
    reading = {key: plain[key] for key in DATA_KEYS if key in plain}
    chosen = options.model_dump(include=SETTINGS)
    return {"data": plain.get("data_path"), "reading": reading, **chosen, "nproc": nproc}


def _remarks(content: dict) -> list[str]:
    """Tell of comparisons that were left out, and of answers that were cut."""
    left_out = [
        f"{one['metric']} of {one['model']} is not compared with {one['against']}: {one['left_out']}"
        for one in content["comparisons"]
        if "left_out" in one
    ]
    cut = [
        f"{label}: {model['not_finished']:,} of {model['answers']:,} answers were cut at --max-new-tokens or the model's context"
        for label, model in content["models"].items()
        if model.get("not_finished")
    ]
    return left_out + cut


if __name__ == "__main__":
    exit_now(rank_main(sys.argv[1:]))
