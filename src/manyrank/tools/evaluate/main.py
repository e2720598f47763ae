"""`manyrank evaluate`: one or several models on the same rows: loss, answers, scores, and whether they differ.

Each process holds the whole model and takes a part of the rows; no process waits for another. What it finds it writes
into a folder, of which the command makes the results:

    job/part-00000.jsonl    a line for each model and row        job/questions-00000.jsonl    prompt and reference
    job/tasks-00000.json    results of the harness               job/notes.json               what rank 0 says of the data

    python -m manyrank.tools.evaluate.main FOLDER    what each process of --nproc runs, with the arguments of FOLDER/argv.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...config.args import CommandLine, Parser, Where
from ...config.resolve import FIELDS
from ...config.schema import TrainConfig
from ...data.scores import SCORES, row_scores
from ...errors import UserError
from ...launch import command as launcher
from ...runs.folder import written_beside
from ...signals import end_with_parent
from ...topology import gpus as hardware
from ...topology import ranks as topology
from ...topology.ranks import Topology
from ...topology.strategies import STRATEGIES, default_strategy
from ...training.exits import guarded, leave
from . import contestants, harness
from . import report as eval_report
from .contestants import DATA_KEYS, Load

LOSS = ("loss", "perplexity")
DEFAULT = "loss,normalised,f1"
SWITCHES = ("trust_remote_code", "train_on_last_turn", "train_on_prompt", "train_on_opening")


def main(argv: Sequence[str]) -> int:
    """Evaluate, print the table (or with --json the results), and write both files.

    Returns:
        0, or the exit code of a process that failed.

    Raises:
        UserError: something is wrong that can be known before, or a row, model or metric turns out to be.
    """
    options = parse(argv)
    loads, config = check(options)
    output = _output(options.output)
    with tempfile.TemporaryDirectory(prefix="manyrank-evaluate-") as temporary:
        folder = Path(temporary)
        machine = hardware.probe()
        nproc = options.nproc or max(1, len(machine.gpus))
        _refuse_too_many(nproc, len(machine.gpus))
        if nproc == 1:
            launcher.before_imports(machine)
            work(options, Topology(), folder)
        elif code := _launch(argv, nproc, folder, machine):
            return code
        content, rows = _gather(options, loads, config, folder, nproc)
    with written_beside(output, overwrite=False) as partial:
        eval_report.write(partial, content, rows)
    _show(options, content, output)
    return 0


def check(options: argparse.Namespace) -> tuple[list[Load], TrainConfig | None]:
    """What is loaded, and how rows are read (None: only tasks are run). No torch.

    Raises:
        UserError: a name, a metric, a task or a value is wrong.
    """
    row_scores([name for name in options.metrics or [] if name not in LOSS])
    harness.check(options.tasks, options.tasks_folder)
    loads = contestants.line_up(options.names, bases=not options.no_base)
    if options.tasks and options.data is None and not contestants.has_data(loads):
        _refuse_options_of_rows(options)
        return loads, None
    given = {key: getattr(options, key) for key in (*DATA_KEYS, "seed", "trust_remote_code")}
    given = {key: str(value) for key, value in given.items() if value is not None}
    return loads, contestants.reading(loads, options.data, given, max_rows=options.max_rows).config


def _refuse_options_of_rows(options: argparse.Namespace) -> None:
    """What would be ignored where only tasks are run."""
    for key in ("metrics", "max_rows", *DATA_KEYS):
        if key != "chat_template" and getattr(options, key) is not None:
            name = f"--{key.replace('_', '-')}"
            raise UserError(f"{name} without data", where=name, fix="give --data, or leave it out")


def _refuse_too_many(nproc: int, gpus: int) -> None:
    if gpus and nproc > gpus:
        raise UserError(f"{nproc} processes on {gpus} GPUs", where="--nproc", fix=f"at most {gpus}")


def _output(given: Path | None) -> Path:
    """The folder to write, which is not there yet."""
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


def _launch(argv: Sequence[str], nproc: int, folder: Path, machine: hardware.Hardware) -> int:
    line = CommandLine(None, [], Where(nproc=nproc, via="torchrun"))
    (folder / "argv.json").write_text(
        json.dumps(list(argv)), encoding="utf-8"
    )  # torchrun would take --nproc as its own
    program = ("manyrank.tools.evaluate.main", str(folder))
    plan = launcher.plan(
        line, strategy=default_strategy(nproc), nproc=nproc, output_dir=str(folder), hardware=machine, program=program
    )
    return launcher.run(plan, stay=True)


def rank_main(argv: Sequence[str]) -> int:
    """What each process of --nproc runs."""
    end_with_parent()
    place = topology.from_environment()
    launcher.before_imports(hardware.probe())
    folder = Path(argv[0])
    given = json.loads((folder / "argv.json").read_text(encoding="utf-8"))
    return guarded(lambda: work(parse(given), place, folder), place)


def work(options: argparse.Namespace, place: Topology, folder: Path) -> None:
    """This process's part of everything, written into the folder."""
    loads, config = check(options)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the results
        from .process import Process

        Process(options, config, place, folder).run(loads)


def _gather(
    options, loads: list[Load], config: TrainConfig | None, folder: Path, nproc: int
) -> tuple[dict, list[dict]]:
    """The results and the lines of predictions, of what the processes have written."""
    models = [model for load in loads for model in load.models]
    found: dict[str, eval_report.Found] = {}
    for line in _lines(folder, "part"):
        label, key = line.pop("model"), tuple(line.pop("key"))
        own = found.setdefault(label, {})
        own[key] = eval_report.merged(own[key], line) if key in own else line
    questions = {tuple(line.pop("key")): line for line in _lines(folder, "questions")}
    tasks: dict[str, dict] = {}
    for file in sorted(folder.glob("tasks-*.json")):
        for label, own in json.loads(file.read_text(encoding="utf-8")).items():
            tasks.setdefault(label, {}).update(own)
    settings = _settings(options, config, nproc) | json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    content = eval_report.results(models, found, tasks, settings, seed=options.seed)
    return content, eval_report.predictions(models, found, questions)


def _lines(folder: Path, name: str):
    for file in sorted(folder.glob(f"{name}-*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _settings(options: argparse.Namespace, config: TrainConfig | None, nproc: int) -> dict:
    plain = config.plain() if config else {}
    return {
        "data": plain.get("data_path"),
        "reading": {key: plain[key] for key in DATA_KEYS if key in plain},
        **{
            key: getattr(options, key)
            for key in ("quantization", "dtype", "batch_size", "max_new_tokens", "max_rows", "seed")
        },
        **{key: getattr(options, key) for key in ("temperature", "top_p", "top_k")},
        "nproc": nproc,
    }


def _show(options: argparse.Namespace, content: dict, output: Path) -> None:
    if options.json:
        print(json.dumps({**content, "output": str(output)}, indent=1, ensure_ascii=False))
        return
    for note in content["settings"]["notes"]:
        print(note)
    print(f"\n{eval_report.table(content)}")
    for one in content["comparisons"]:
        if "left_out" in one:
            print(f"{one['metric']} of {one['model']} is not compared with {one['against']}: {one['left_out']}")
    for label, model in content["models"].items():
        if model.get("not_finished"):
            print(
                f"{label}: {model['not_finished']:,} of {model['answers']:,} answers were cut at --max-new-tokens or the model's context"
            )
    print(f"\nwritten to {output}")


# Options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    options = _parser().parse_args([_dashed(word) for word in argv])
    options.default_metrics = _list(DEFAULT)
    if options.strategy and (options.strategy not in STRATEGIES or STRATEGIES[options.strategy].shards):
        fix = "each process holds the whole model: leave it out; --quantization 4bit makes the model smaller"
        raise UserError(f"evaluation does not shard models ({options.strategy})", where="--strategy", fix=fix)
    if not options.tasks and (options.tasks_folder or options.shots is not None or options.limit or options.no_chat):
        raise UserError(
            "this is for --tasks", where="--tasks-folder, --shots, --limit or --no-chat", fix="give --tasks"
        )
    return options


def _dashed(word: str) -> str:
    """Dashes and underscores are the same in names of options."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _parser() -> argparse.ArgumentParser:
    made = Parser(prog="manyrank evaluate", allow_abbrev=False, description=__doc__.split("\n\n")[0].partition(": ")[2])
    add = made.add_argument
    add("names", nargs="+", metavar="NAME", help="a model, a run's folder, a checkpoint, an adapter, or a merged model")
    add(
        "--data",
        metavar="SOURCE",
        help="a file, folder, hub name or {path: ..., split: ...} (default: the run's eval_data_path)",
    )
    add("--metrics", type=_list, metavar="A,B", help=f"loss, {', '.join(SCORES)}, module:function (default: {DEFAULT})")
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
    loading = made.add_argument_group("how models are loaded")
    loading.add_argument("--quantization", choices=("4bit", "8bit"), help="of the base")
    loading.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="(default: auto)"
    )
    loading.add_argument(
        "--nproc", type=_count, metavar="N", help="processes; each has the whole model (default: one per GPU)"
    )
    loading.add_argument("--strategy", metavar="NAME", help=argparse.SUPPRESS)
    _add_answering(made.add_argument_group("how answers are chosen"))
    _add_tasks(made.add_argument_group("standard benchmarks, by lm-evaluation-harness (the extra `eval`)"))
    reading = made.add_argument_group("how rows are read, as in a recipe (default: as the first run was trained)")
    for key in (*DATA_KEYS, "trust_remote_code"):
        switch = {"nargs": "?", "const": "true"} if key in SWITCHES else {}
        reading.add_argument(
            f"--{key.replace('_', '-')}", metavar="X", help=FIELDS[key].description.replace("%", "%%"), **switch
        )
    return made


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
    leave(rank_main(sys.argv[1:]))
