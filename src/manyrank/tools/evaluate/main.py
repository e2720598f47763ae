"""`manyrank evaluate`: one or several models on the same rows: loss, answers, scores, and whether they differ.

Each process holds the whole model and takes a part of the rows; rank 0 gathers them at the end, see `worker`.

    python -m manyrank.tools.evaluate.main ARGV    what each process of --nproc runs; ARGV is a JSON list in one word
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config.args import CommandLine, Parser, Where
from ...config.resolve import FIELDS
from ...config.schema import TrainConfig
from ...data.scores import SCORES, row_scores
from ...errors import UserError
from ...launch.command import before_imports, plan_launch, run_launch
from ...runs.run_folder import atomic_directory
from ...signals import end_with_parent
from ...topology import gpus, ranks
from ...topology.ranks import Topology
from ...topology.strategies import default_strategy
from ...training.exits import exit_now, run_with_exit_codes
from . import lm_eval
from .plan import DATA_KEYS, Weights, plan_evaluation, recipes_of, resolve_data

LOSS = ("loss", "perplexity")
SWITCHES = ("trust_remote_code", "train_on_last_turn", "train_on_prompt", "train_on_opening")
# Settings of the results that are options of the same name.
SETTINGS = (
    "quantization",
    "dtype",
    "batch_size",
    "max_new_tokens",
    "max_rows",
    "seed",
    "temperature",
    "top_p",
    "top_k",
)


def main(argv: Sequence[str]) -> int:
    """Evaluate, print the table (or with --json the results), and write both files.

    Returns:
        0, or the exit code of a process that failed.

    Raises:
        UserError: something is wrong that can be known before, or a row, model or metric turns out to be.
    """
    options = parse(argv)
    check(options)
    output = _output(options.output)
    machine = gpus.probe()
    nproc = options.nproc or max(1, len(machine.gpus))
    if machine.gpus and nproc > len(machine.gpus):
        count = len(machine.gpus)
        raise UserError(f"{nproc} processes on {count} GPUs", where="--nproc", fix=f"at most {count}")
    if nproc > 1:
        return _launch([*argv, "--output", str(output)], nproc, machine)
    before_imports(machine)
    evaluate(options, Topology(), output)
    return 0


def check(options: argparse.Namespace) -> tuple[list[Weights], TrainConfig | None]:
    """Decide what is loaded, and how rows are read (None: only tasks are run). No torch.

    Raises:
        UserError: a name, a metric, a task or a value is wrong.
    """
    row_scores([name for name in options.metrics or [] if name not in LOSS])
    lm_eval.check(options.tasks, options.tasks_folder)
    plan = plan_evaluation(options.names, bases=not options.no_base)
    runs = recipes_of(plan)
    if options.tasks and options.data is None and not (runs and runs[0][1].eval_data_path):
        _refuse_options_of_rows(options)
        return plan, None
    overrides = {key: getattr(options, key) for key in (*DATA_KEYS, "seed", "trust_remote_code")}
    overrides = {key: str(value) for key, value in overrides.items() if value is not None}
    return plan, resolve_data(plan, options.data, overrides, max_rows=options.max_rows).config


def _refuse_options_of_rows(options: argparse.Namespace) -> None:
    """Refuse what would be ignored where only tasks are run."""
    for key in ("metrics", "max_rows", *DATA_KEYS):
        if key != "chat_template" and getattr(options, key) is not None:
            name = f"--{key.replace('_', '-')}"
            raise UserError(f"{name} without data", where=name, fix="give --data, or leave it out")


def _output(given: Path | None) -> Path:
    """Choose the folder to write, which is not there yet."""
    if given:
        if given.exists() and (not given.is_dir() or any(given.iterdir())):
            raise UserError(f"there is something at {given}", where="--output", fix="name another folder")
        return given
    base, number = Path("output") / "evaluation", 1
    folder = base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _launch(argv: list[str], nproc: int, machine: gpus.Hardware) -> int:
    line = CommandLine(None, [], Where(nproc=nproc, via="torchrun"))
    program = ("manyrank.tools.evaluate.main", json.dumps(argv))  # in one word: torchrun would take --nproc as its own
    plan = plan_launch(
        line, strategy=default_strategy(nproc), nproc=nproc, output_dir="", hardware=machine, program=program
    )
    return run_launch(plan, stay=True)


def rank_main(argv: Sequence[str]) -> int:
    """Run one process of --nproc."""
    end_with_parent()
    place = ranks.from_environment()
    before_imports(gpus.probe())
    options = parse(json.loads(argv[0]))
    return run_with_exit_codes(lambda: evaluate(options, place, options.output), place)


def evaluate(options: argparse.Namespace, place: Topology, output: Path) -> None:
    """Compute this process's part of everything; on rank 0 also write and print the results of all."""
    plan, config = check(options)
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
    if options.json:
        print(json.dumps({**content, "output": str(output)}, indent=1, ensure_ascii=False))
    else:
        print("\n".join([*data.notes, "", report.table(content), *_remarks(content), "", f"written to {output}"]))


def _settings(options: argparse.Namespace, config: TrainConfig | None, nproc: int) -> dict:
    plain = config.plain() if config else {}
    reading = {key: plain[key] for key in DATA_KEYS if key in plain}
    chosen = {key: getattr(options, key) for key in SETTINGS}
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


# Options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options of a command line.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    options = _parser().parse_args([_dashed(word) for word in argv])
    if not options.tasks and (options.tasks_folder or options.shots is not None or options.limit or options.no_chat):
        raise UserError(
            "this is for --tasks", where="--tasks-folder, --shots, --limit or --no-chat", fix="give --tasks"
        )
    return options


def _dashed(word: str) -> str:
    """Write dashes for underscores in names of options, where both are the same."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="manyrank evaluate", allow_abbrev=False, description=__doc__.split("\n\n")[0].partition(": ")[2]
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="a model, a run's folder, a checkpoint, an adapter, or a merged model")
    add(
        "--data",
        metavar="SOURCE",
        help="a file, folder, hub name or {path: ..., split: ...} (default: the run's eval_data_path)",
    )
    add(
        "--metrics",
        type=_list,
        metavar="A,B",
        help=f"loss, {', '.join(SCORES)}, module:function (default: loss,normalised,f1)",
    )
    add("--no-base", action="store_true", help="leave out the base of runs and adapters")
    add("--max-rows", type=_count, metavar="N", help="at most so many rows of each source, chosen by the seed")
    add("--batch-size", type=_count, default=8, metavar="N", help="rows at once (default: 8)")
    add(
        "--seed",
        type=_number(int, 0),
        default=42,
        metavar="N",
        help="of the chosen rows, draws and intervals (default: 42)",
    )
    add(
        "--output", type=Path, metavar="DIR", help="a new folder (default: output/evaluation, output/evaluation-2, ...)"
    )
    add("--json", action="store_true", help="print the results instead of the table")
    loading = parser.add_argument_group("how models are loaded")
    loading.add_argument("--quantization", choices=("4bit", "8bit"), help="of the base")
    loading.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="(default: auto)"
    )
    loading.add_argument(
        "--nproc", type=_count, metavar="N", help="processes; each has the whole model (default: one per GPU)"
    )
    _add_answering(parser.add_argument_group("how answers are chosen"))
    _add_tasks(parser.add_argument_group("standard benchmarks, by lm-evaluation-harness (the extra `eval`)"))
    reading = parser.add_argument_group("how rows are read, as in a recipe (default: as the first run was trained)")
    for key in (*DATA_KEYS, "trust_remote_code"):
        switch = {"nargs": "?", "const": "true"} if key in SWITCHES else {}
        reading.add_argument(
            f"--{key.replace('_', '-')}", metavar="X", help=FIELDS[key].description.replace("%", "%%"), **switch
        )
    return parser


def _add_answering(group) -> None:
    group.add_argument(
        "--max-new-tokens", type=_count, default=256, metavar="N", help="tokens of an answer (default: 256)"
    )
    group.add_argument(
        "--temperature", type=_number(float, 0), default=0.0, metavar="X", help="0, the default, is greedy"
    )
    group.add_argument("--top-p", type=_number(float, 0), default=1.0, metavar="X", help="(default: 1)")
    group.add_argument("--top-k", type=_number(int, 0), default=0, metavar="N", help="0, the default, is all")


def _add_tasks(group) -> None:
    group.add_argument("--tasks", type=_list, default=[], metavar="A,B", help="such as arc_easy,gsm8k")
    group.add_argument("--tasks-folder", action="append", default=[], metavar="DIR", help="of your own task YAMLs")
    group.add_argument(
        "--shots", type=_number(int, 0), metavar="N", help="examples in each prompt (default: the task's)"
    )
    group.add_argument("--limit", type=_count, metavar="N", help="rows of each task")
    group.add_argument("--no-chat", action="store_true", help="prompts as they are, without the chat template")


def _list(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different names like a,b")
    return found


def _count(text: str) -> int:
    return _number(int, 1)(text)


def _number(kind: type, least: float):
    def parsed(text: str):
        try:
            number = kind(text)
        except ValueError:
            number = -1
        if not least <= number < 2**32:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number from {least}")
        return number

    return parsed


if __name__ == "__main__":
    exit_now(rank_main(sys.argv[1:]))
