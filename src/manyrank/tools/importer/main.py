"""`manyrank import`: translate a recipe of Axolotl, LLaMA-Factory, TRL or transformers into one of this project.

No torch, but where peft is asked for its names of modules.

    axolotl.yaml ──> keys ──> dialect ──> `translation` ──> rules ──> recipe, on stdout or --output
                                              └── what changes the loss and is not known here: an error, until --allow KEY

manyrank import axolotl.yaml > my.yaml
manyrank import llamafactory.yaml --output my.yaml --allow template
manyrank import train.sh --from trl         a command line: trl sft --model_name_or_path ...
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ...config.args import Options, arg, read_options, word
from ...config.resolve import ResolvedConfig, canonical
from ...config.value_types import Mapping
from ...errors import UserError, UserErrors
from ...rules.check import find_violations
from ...rules.context import RunContext
from ...rules.rule import Rule
from ...runs.mapping_files import read_yaml
from ...runs.run_folder import check_writable
from ...topology.gpus import planned_hardware
from ...topology.strategies import default_strategy, named_strategy
from . import axolotl, grpo, llama_factory, trl
from .translation import Dialect, Left, Translation

DIALECTS = {
    dialect.name: dialect for dialect in (axolotl.DIALECT, llama_factory.DIALECT, trl.DIALECT, trl.TRANSFORMERS)
}
COMMAND = re.compile(r"(?:\btrl\s+(sft|grpo)|\S*(sft|grpo)\w*\.py)\s(.*)", re.DOTALL)  # of TRL, in a shell script
# Rules about where a run is launched: what is installed, and the number of processes.
OF_A_MACHINE = frozenset({"grpo-without-trl", "generation-by-vllm", "whole-groups"})
ALL = "all"


class ImportOptions(Options):
    """Translate a recipe of Axolotl, LLaMA-Factory, TRL or transformers: YAML, JSON, or a script with `trl sft` or `trl grpo`.

    The defaults of the other tool are written down. What changes the loss and nothing here does is an error.
    """

    examples = (
        "manyrank import axolotl.yaml > my.yaml",
        "manyrank import llamafactory.yaml --output my.yaml --allow template",
        "manyrank import training_args.json --model Qwen/Qwen2.5-1.5B --data my.jsonl",
        "manyrank import grpo.sh --rewards '{numeric: 1}'",
    )
    file: Path = word(..., "the recipe of the other tool")
    as_from: Literal["axolotl", "llamafactory", "trl", "transformers"] | None = arg(
        None, "whose recipe it is (default: by its keys)"
    )
    output: Path | None = arg(None, "the recipe to write (default: standard output)", also=["o"])
    force: bool = arg(False, "write over a file that is there")
    allow: list[str] = arg([], "a key that changes the loss, and that may be left out; all for each", repeated=True)
    model: str | None = arg(None, "another model", also=["model_name_or_path"], min_length=1)
    data: str | None = arg(None, "other training data", also=["data_path"], min_length=1)
    rewards: Mapping = arg({}, "other rewards, as {numeric: 1}: functions of TRL are not translated")


def main(argv: Sequence[str]) -> int:
    """Translate, and print or write the recipe.

    Raises:
        UserError: the file is not a recipe of one of the tools, or something in it has no place here.
    """
    options = read_options(argv, ImportOptions, prog="manyrank import")
    if options.output:
        _check_output(options.output, force=options.force)
    translation, resolved, allowed = translate(options)
    text = translation.text(resolved, allowed)
    for left in (*allowed, *translation.dropped):
        print(f"left out: {left}", file=sys.stderr)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
        shown = shlex.quote(str(options.output))
        print(f"written to {options.output}; next: manyrank train {shown} --check", file=sys.stderr)
    else:
        print(text, end="")
    return 0


def translate(options: ImportOptions) -> tuple[Translation, ResolvedConfig, list[Left]]:
    """Translate a file.

    Returns:
        The translation, its config, and what is left out by --allow.

    Raises:
        UserError: as `main`.
    """
    theirs = read(options.file)
    dialect = DIALECTS[options.as_from] if options.as_from else recognise(theirs, str(options.file))
    dialect = grpo.DIALECT if dialect is trl.DIALECT and grpo.MARKS & theirs.keys() else dialect
    translation = Translation(dialect, str(options.file), theirs)
    _replace(translation, options)
    translation.read()
    needed = NEEDED | ({"rewards": "rewards"} if dialect is grpo.DIALECT else {})
    missing = [_missing(translation, key, option) for key, option in needed.items() if not translation.has(key)]
    resolved = None if missing else translation.resolve()
    allowed = [left for left in translation.open if {left.key, ALL} & set(options.allow)]
    problems = [_problem(left, options.file) for left in translation.open if left not in allowed] + missing
    problems += [_variable(key, options.file) for key, value in translation.theirs.items() if str(value)[:1] == "$"]
    if not problems:
        _check_allowed(options, translation)
    if resolved and not problems:
        problems = _broken_rules(resolved)
    if problems or not resolved:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return translation, resolved, allowed


# The file


def read(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file, or of the command line of `trl sft` or `trl grpo` in a script.

    Raises:
        UserError: it cannot be read, or has neither.
    """
    fix = "give a recipe in YAML or JSON, or a script with `trl sft ...` or `trl grpo ...`"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", where="FILE", fix=fix) from None
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        if not (command := COMMAND.search(text.replace("\\\n", " "))):
            raise UserError("there is no command `trl sft` or `trl grpo` in it", where=str(path), fix=fix)
        task = {"task": "grpo"} if "grpo" in command.groups() else {}
        return task | _options(command[3].splitlines()[0], path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError("it has no keys", where=str(path), fix=fix)
    return content


def _options(line: str, path: Path) -> dict[str, Any]:
    """The options of a command line; one without a value is yes, several words are a list."""
    keys: dict[str, list[str]] = {}
    name = ""
    for part in shlex.split(line, comments=True):
        if part.startswith("--"):
            name, equals, value = part.removeprefix("--").partition("=")
            keys[name] = [value] if equals else []
        elif name:
            keys[name].append(part)
    config = keys.pop("config", None)
    read_from = read(path.parent / config[0]) if config else {}
    return read_from | {key: _value(words) for key, words in keys.items()}


def _value(words: list[str]) -> Any:
    values = [yaml.safe_load(text) for text in words]
    return values if len(values) > 1 else values[0] if values else True


def recognise(theirs: dict[str, Any], file: str) -> Dialect:
    """The dialect of which most keys are there; transformers' where no other has two.

    Raises:
        UserError: no key is known.
    """
    counts = {name: len(dialect.marks & theirs.keys()) for name, dialect in DIALECTS.items()}
    counts["trl"] += len(grpo.MARKS & theirs.keys())
    tool = max((name for name in counts if name != "transformers"), key=lambda name: counts[name])
    tool = tool if counts[tool] > 1 else "transformers"
    if not counts[tool] or "data_path" in theirs:
        what = "it is a recipe of manyrank" if "data_path" in theirs else "it is a recipe of no tool that is known here"
        raise UserError(what, where=file, fix=f"say whose it is: --from {', '.join(DIALECTS)}")
    return DIALECTS[tool]


def _check_output(file: Path, *, force: bool) -> None:
    if file.exists() and not force:
        raise UserError(f"{file} is already there", where="--output", fix="give another name, or add --force")
    if not file.parent.is_dir():
        raise UserError(
            f"there is no folder {file.parent}", where="--output", fix="name a file in a folder that is there"
        )
    check_writable(file, where="--output", fix="name a file that can be written")


# What is in it

NEEDED = {"model_name_or_path": "model", "data_path": "data"}
ROWS = ("dataset_text_field", "dataset_mixture")  # how rows are read that other data need not have


def _replace(translation: Translation, options: ImportOptions) -> None:
    """Put the model and data of the command line in the place of the file's."""
    if options.model:
        _forget(translation, "model_name_or_path")
        translation.replace("model_name_or_path", options.model, "command line, --model")
    if options.data:
        _forget(translation, "data_path")
        translation.replace("data_path", options.data, "command line, --data")
    if options.rewards:
        for name in ("reward_funcs", "reward_weights", "reward_model_name_or_path"):
            translation.theirs.pop(name, None)
        translation.replace("rewards", options.rewards, "command line, --rewards")


def _forget(translation: Translation, key: str) -> None:
    """Take out the keys of the file that a key of the command line replaces."""
    for name in [
        name for name in translation.theirs if canonical(name) == key or (key == "data_path" and name in ROWS)
    ]:
        del translation.theirs[name]


def _check_allowed(options: ImportOptions, translation: Translation) -> None:
    known = {left.key for left in translation.open} | {ALL}
    for key in options.allow:
        if key not in known:
            fix = f"allow one of {', '.join(sorted(known))}" if len(known) > 1 else "leave it out"
            raise UserError(f"{key} needs no --allow", where="--allow", fix=fix)


def _problem(left: Left, file: Path) -> UserError:
    what = f"{left.key} changes the loss, and is not translated: {left.value}"
    return UserError(what, where=f"{file}, {left.key}", fix=f"--allow {left.key} leaves it out", why=left.why)


def _variable(key: str, file: Path) -> UserError:
    return UserError(f"{key} is a variable of the shell", where=f"{file}, {key}", fix="write its value there")


def _missing(translation: Translation, key: str, option: str) -> UserError:
    value = "'{NAME: WEIGHT}', as docs/grpo.md has them" if option == "rewards" else "NAME"
    why = translation.notes.get(key)
    return UserError(f"{key} is not in it", where=translation.file, fix=f"add --{option} {value}", why=why)


def _broken_rules(resolved: ResolvedConfig) -> list[UserError]:
    """Check the rules on GPUs of unknown memory; data of the hub is left to the launch."""
    strategy = named_strategy(resolved.config.strategy)
    processes = 2 if strategy and strategy.shards else 1
    hardware = planned_hardware(processes, None)
    context = RunContext(resolved, strategy or default_strategy(processes), processes, processes, hardware)
    local = [source for source in resolved.config.data_path if Path(source.path).exists()]
    context = context.with_options(data_path=local)
    broken = [violation for violation in find_violations(context) if violation.rule.severity == "error"]
    return [violation.error() for violation in broken if not _is_of_a_machine(violation.rule)]


def _is_of_a_machine(rule: Rule) -> bool:
    """Return whether a rule looks at where a run is launched, such as its logins."""
    return rule.name in OF_A_MACHINE or any(key.startswith("environment:") for key in rule.keys)
