"""The command line of every command. Options are fields of a model, declared once with type, bounds and description.

    argv ──> Parser ──> words, and settings in order, as they were spelled
                         ├── fields of a command's own model ──> that model, typed
                         └── keys of a recipe ──> CommandLine.overrides, for `resolve`

Dashes and underscores in names are the same, and `--help` works anywhere in a line. Of a recipe's keys it shows those
that a command names as its first; `--help all` shows all, in the groups of the schema. What is wrong is a UserError.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ..errors import UserError
from .resolve import FIELDS, SWITCHES, Setting, invalid_value, normal, presets, unknown_key, written_as_list
from .schema import TrainConfig
from .spellings import ALIASES, DATA_ALIASES, METHOD_FLAGS, OTHER_TOOLS, VALUES
from .value_types import Int

JOBS = ("slurm",)  # these write a job's file, and start nothing on this machine
YES_NO = ("true", "false", "yes", "no", "on", "off", "1", "0", "auto", "none")
VALUE_NAMES = {int: "N", float: "X", str: "TEXT", Path: "PATH", list: "A,B"}  # how help texts write a value
INDENT = 24  # of the descriptions in a help text


class Options(BaseModel):
    """Base of the options of a command; its docstring is the head of their help text.

    Attributes:
        first: of options that are not the command's own, those that `--help` shows; () for all of them.
        examples: command lines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    first: ClassVar[Collection[str]] = ()
    examples: ClassVar[Sequence[str]] = ()


def arg(default: Any, description: str, *, also: Sequence[str] = (), repeated: bool = False, **bounds: Any) -> Any:
    """Declare an option: a field with its default.

    Args:
        also: other spellings.
        repeated: whether each time that the option is given adds a value to a list.
        bounds: of its values, as pydantic's `Field` takes them.
    """
    how: dict[str, Any] = {"also": also, "repeated": repeated}
    return Field(default, description=description, json_schema_extra=how, **bounds)


def word(default: Any, description: str, *, also: Sequence[str] = ()) -> Any:
    """Declare a word without a name (its default is ... where it must be given); of a list, all words that are left."""
    how: dict[str, Any] = {"also": also, "positional": True}
    return Field(default, description=description, json_schema_extra=how)


Model = TypeVar("Model", bound=Options)


def _name(value: str) -> str:
    if value == "" or value != value.strip() or not value.isprintable():
        raise ValueError("not a name")
    return value


Name = Annotated[str, AfterValidator(_name)]


class LaunchOptions(Options):
    """Where to run: node facts, which are never part of a recipe."""

    nproc: Int | None = arg(
        None, "processes on this machine (default: one per GPU)", also=["num_processes", "nproc_per_node"], gt=0
    )
    nnodes: Int = arg(1, "machines", also=["num_machines"], gt=0)
    node_rank: Int = arg(0, "number of this machine, from 0", ge=0)
    rdzv_endpoint: Name | None = arg(None, "HOST:PORT of machine 0, for several machines")
    max_restarts: Int | None = arg(
        None, "restarts of the workers after a failure (default: 3 with several machines)", ge=0
    )
    rdzv_timeout: Int = arg(600, "seconds that the machines wait for each other", gt=0)
    via: Literal["python", "accelerate", "torchrun", "slurm"] | None = arg(
        None,
        "python (one process), accelerate, torchrun; or slurm, to write a job (for Kubernetes, edit launch/kubernetes.yaml)",
    )
    check: bool = arg(False, "check the recipe, show the plan and start nothing")
    print: bool = arg(False, "show every machine's command, its environment and the files; start nothing")


class SlurmOptions(Options):
    """The job (--via slurm): what it requests from its cluster."""

    submit: bool = arg(False, "hand the job in")
    gpus: Int | None = arg(None, "GPUs of each machine (default: one for each process)", ge=0)
    cpus: Int | None = arg(None, "CPU cores of each machine (default: one a process)", gt=0)
    time: Name | None = arg(None, "time limit, as 1-12:00:00 (default: the partition's)")
    partition: Name | None = arg(None, "partition")
    account: Name | None = arg(None, "account")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the recipe (a file or preset), the overrides in order, and where to run."""

    recipe: str | None
    overrides: list[Setting]
    options: LaunchOptions = field(default_factory=LaunchOptions)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    @property
    def argv(self) -> list[str]:
        """The arguments that give the train module the same recipe and overrides."""
        settings = [f"--{normal(entry.key)}={entry.value}" for entry in self.overrides]
        return [*([self.recipe] if self.recipe else []), *settings]


class RecipeWord(Options):
    """The recipe."""

    recipe: str | None = word(
        None, f"a YAML file, or a preset's name; presets: {', '.join(presets())}", also=["config", "recipe", "preset"]
    )


# Options


@dataclass(frozen=True)
class Option:
    """An option or a positional word of a command: a field of `owner`, a model; see `arg` and `word`."""

    owner: type[BaseModel]
    field: str
    info: FieldInfo
    also: Sequence[str] = ()
    positional: bool = False
    repeated: bool = False

    @property
    def name(self) -> str:
        return self.field.removeprefix("as_")  # a field `json` would hide a method of pydantic's models

    @property
    def spellings(self) -> Sequence[str]:
        """The names of the option, without dashes."""
        return self.also if self.positional else (self.name, *self.also)

    @property
    def values_after(self) -> re.Pattern | None:
        """For an option that alone means yes, the words that are its value where they follow it; None: it needs a value."""
        types, others = _alternatives(self.info.annotation), VALUES.get(self.field, {})
        alone = bool in types or ("off" in types and self._takes("true")) or ("true" in others and str not in types)
        words = [kind for kind in (*types, *others) if isinstance(kind, str)]
        words += ["-?[0-9.]+"] if int in types else []
        return re.compile("|".join([*YES_NO, *words]), re.IGNORECASE) if alone else None

    def _takes(self, value: str) -> bool:
        try:
            self.owner(**{self.field: value})
        except ValidationError as invalid:  # other fields may be missing
            return all(problem["loc"][0] != self.field for problem in invalid.errors())
        return True

    @property
    def label(self) -> str:
        """The option with its value, or the word, as help texts write it."""
        types = _alternatives(self.info.annotation)
        if self.positional:
            return self.name.upper() + (" ..." if self.takes_many else "")
        choices = [kind for kind in types if isinstance(kind, str)]
        for kind, shown in {bool: "true|false", int: "N", float: "X"}.items():
            choices += [shown] if choices and kind in types else []
        usual = "" if bool in types else VALUE_NAMES.get(types[-1], "X")
        value = "|".join(choices) if choices and list not in types else usual
        return f"--{self.name} {value}".rstrip()

    @property
    def meaning(self) -> str:
        return f"{self.label}: {self.info.description}"

    @property
    def group(self) -> str:
        """The title of its group in help texts: that of the model that declares it, the owner or a base of it."""
        if self.field in SWITCHES:
            return "Short forms"
        bases = (kind for kind in reversed(self.owner.__mro__) if issubclass(kind, BaseModel))
        home = next(kind for kind in bases if self.field in kind.model_fields)
        return re.split("[:.]", str(home.__doc__))[0]

    @property
    def takes_many(self) -> bool:
        """Whether its values make a list."""
        is_list = list in _alternatives(self.info.annotation)
        return self.repeated or (self.positional and is_list)

    def help(self, width: int, *, whole: bool = True) -> list[str]:
        """Lay out its lines of a help text; not `whole`: up to a semicolon, and with one shorter spelling."""
        text = self.info.description or ""
        also = [f"--{name}" for name in self.also if name not in OTHER_TOOLS]
        if not whole:
            text, also = text.split(";")[0], [name for name in also if len(name) < len(self.name)][:1]
        default = None if self.info.is_required() or self.info.default_factory else self.info.default
        if default is not None and default is not False and default not in ("", [], {}) and "(default" not in text:
            text += f" (default: {default})"
        text += f" (also {', '.join(also)})" if also else ""
        lines = textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT) or [""]
        head = f"  {self.label}"
        return [head, *lines] if len(head) > INDENT - 2 else [head + lines[0][len(head) :], *lines[1:]]


Given = tuple[Option, Setting]


def _alternatives(annotation: Any) -> list[Any]:
    """The literal values and plain types that an annotation allows beside None; a list is `list`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (None, Literal, list, dict):
        return [] if annotation is NoneType else list(inner) if origin is Literal else [origin or annotation]
    return [kind for part in (inner[:1] if origin is Annotated else inner) for kind in _alternatives(part)]


def options_of(model: type[BaseModel], keys: Collection[str] | None = None) -> list[Option]:
    """The options that a model declares, or those of some of its fields."""
    return [
        Option(model, name, info, **cast(dict, info.json_schema_extra or {}))
        for name, info in model.model_fields.items()
        if keys is None or name in keys
    ]


def recipe_options(keys: Collection[str] = (*FIELDS, *sorted(SWITCHES))) -> list[Option]:
    """The keys of a recipe as options, with their other spellings."""
    options = []
    for key in keys:
        also = [alias for alias, target in (DATA_ALIASES | ALIASES | OTHER_TOOLS).items() if target == key]
        options.append(Option(TrainConfig, key, FIELDS.get(key) or _switch(key), also))
    return options


def _switch(key: str) -> FieldInfo:
    methods = ", ".join(sorted(METHOD_FLAGS.get(key, ())))
    text = f"short form of --method, one of {methods}" if methods else "short form of --report_to wandb"
    return FieldInfo(annotation=bool, default=False, description=text)


# Parsing


class Parser:
    """Reads the command lines of a command.

    Args:
        model: the command's own options; its docstring says what the command does.
        options: all options; where two have a spelling in common, it is that of the first.
    """

    def __init__(self, prog: str, model: type[Options], options: Sequence[Option]) -> None:
        self.model = model
        self.options: dict[str, Option] = {}  # by spelling
        for option in options:
            for name in option.spellings:
                self.options.setdefault(name, option)
        self.words = [option for option in options if option.positional]
        self.shown = [o for o in options if o.positional or self.options[o.name] is o]
        words = [o.label if o.info.is_required() else f"[{o.label}]" for o in self.words]
        self.usage = " ".join([prog, *words, *(["[--key value ...]"] if self.options else [])])

    def help(self, *, whole: bool) -> str:
        """The help text, as wide as the terminal; not `whole`: the command's own options, and the first of the others."""
        width = max(60, shutil.get_terminal_size().columns - 2)
        first = set(self.model.first) if not whole else set()
        shown = [o for o in self.shown if not first or o.owner is self.model or o.positional or o.name in first]
        groups: dict[str, list[str]] = {}
        for option in sorted(shown, key=self._place):
            title = "Options" if option.owner is self.model else option.group
            groups.setdefault(title, []).extend(option.help(width, whole=not first))
        name, text = ("--help all", f"show all {len(self.shown)} options") if first else ("--help", "show this text")
        groups.setdefault("Options", []).append(f"  {name:<{INDENT - 2}}{text}")
        if self.model.examples:
            groups["Examples"] = [f"  {line}" for line in self.model.examples]
        parts = [[f"{title}:", *lines] for title, lines in groups.items()]
        head = [f"usage: {self.usage}", "", *textwrap.wrap(" ".join(str(self.model.__doc__).split()), width)]
        return "\n\n".join("\n".join(lines) for lines in (head, *parts)) + "\n"

    def _place(self, option: Option) -> int:
        """Its place among the groups: the command's own, words, keys of a recipe in their order, and where to run."""
        owners = (self.model, RecipeWord, TrainConfig)
        return owners.index(option.owner) if option.owner in owners else len(owners)

    def split(self, argv: Sequence[str]) -> list[Given]:
        """Split a command line into settings, in order; `--` ends its options.

        Raises:
            UserError: an unknown option, one without its value, or a word too many.
            SystemExit: the help text was asked for, and is printed.
        """
        if asked := [at for at, word in enumerate(argv) if word in ("-h", "--help")]:
            print(self.help(whole=list(argv[asked[0] + 1 : asked[0] + 2]) == ["all"]), end="", flush=True)
            raise SystemExit(0)
        words, settings, rest, at_option = [], [], deque(argv), False
        beside: dict[int, Given] = {}  # by number of a word, the option whose value it may be
        while rest:
            word = rest.popleft()
            if word == "--":
                words += rest
                break
            if not re.match("--|-[A-Za-z]", word):
                if settings and (list in _alternatives(settings[-1][0].info.annotation) or at_option):
                    beside[len(words)] = settings[-1]
                words, at_option = [*words, word], False
                continue
            name, equals, value = word.partition("=")
            name = ("--" if word.startswith("--") else "-") + normal(name)
            option = self.options.get(name.removeprefix("--"))
            if option is None:
                raise unknown_key(Setting(name, value, "command line"), self.options)
            before, value = len(rest), value if equals else self._value(name, option, rest)
            at_option = not equals and before == len(rest)
            _refuse_empty(name, option, value)
            settings.append((option, Setting(name, value, f"command line, {name}")))
        return [*self._words(words, beside), *settings]

    def _value(self, name: str, option: Option, rest: deque[str]) -> str:
        """Take the value of an option from the words after it."""
        if option.values_after:
            return rest.popleft() if rest and option.values_after.fullmatch(rest[0]) else "true"
        if not rest or re.fullmatch(r"--|--?[A-Za-z]\S*", rest[0]):
            fix = f"write {name}={rest[0]} if that is its value" if rest else option.meaning
            raise UserError(f"{name} needs a value", where="command line", fix=fix)
        return rest.popleft()

    def _words(self, words: Sequence[str], beside: Mapping[int, Given]) -> list[Given]:
        """Give the words without a name to the positional options, in order; the last one may take all that are left."""
        places = list(self.words)
        if places and get_origin(places[-1].info.annotation) is list:
            places += places[-1:] * (len(words) - len(places))
        if len(words) > len(places):
            what, fix = f"one word too many: {words[len(places)]!r} in {' '.join(words)!r}", f"usage: {self.usage}"
            option, entry = beside.get(len(places), (None, None))
            if option and entry and option.values_after:
                what, fix = f"{entry.key}: {words[len(places)]!r} is none of its values", option.meaning
            elif entry:
                first = min(at for at, given in beside.items() if given[1] is entry)
                fix = written_as_list(entry, words[first:])
            raise UserError(what, where="command line", fix=fix)
        for option, word in zip(places, words):
            _refuse_empty(option.label, option, word)
        return [(o, Setting(o.field, word, f"command line, {o.label}")) for o, word in zip(places, words)]

    def build(self, model: type[Model], settings: Sequence[Given]) -> Model:
        """Make a model of its settings.

        Raises:
            UserError: a value is missing or wrong, or a word is given in two ways.
        """
        values, places, keys = {}, {}, {}
        for option, entry in settings:
            if option.owner is not model:
                continue
            before = values.get(option.field)
            # Of an option that is given twice, the last value counts; two spellings, or two words, are a mistake.
            again = (
                before is not None and not option.takes_many and (option.positional or keys[option.field] != entry.key)
            )
            if again and Path(str(before)).absolute() != Path(str(entry.value)).absolute():
                what = f"{option.label} is given twice: {before} and {entry.value}"
                raise UserError(what, where="command line", fix="keep one of them")
            keys[option.field] = entry.key
            values[option.field] = [*(before or []), entry.value] if option.takes_many else entry.value
            places[option.field] = entry.where
        try:
            return model(**values)
        except ValidationError as invalid:
            problems = invalid.errors()
        key = str(problems[0]["loc"][0])
        option = next(option for option in self.shown if option.owner is model and option.field == key)
        if problems[0]["type"] == "missing":
            raise UserError(f"{option.name.upper()} must be given", where="command line", fix=f"usage: {self.usage}")
        same = [problem for problem in problems if problem["loc"][0] == key]
        raise invalid_value(option.name, values[key], same, places[key], option.info)


def _refuse_empty(name: str, option: Option, value: str) -> None:
    """Refuse an empty value, as of a variable of a shell that is not set; only text may be empty."""
    is_text = option.owner is TrainConfig or (_alternatives(option.info.annotation) == [str] and not option.positional)
    if value == "" and not is_text:
        raise UserError(f"{name} is empty", where="command line", fix="give a value, or leave it out")


def read_options(argv: Sequence[str], model: type[Model], *, prog: str) -> Model:
    """Read the command line of a command that takes no keys of a recipe.

    Raises:
        UserError: an unknown option, a wrong value, a word too many or one that is missing.
    """
    return read_with_keys(argv, model, [], prog=prog)[0]


def no_options(argv: Sequence[str], *, prog: str, about: str) -> None:
    """Read the command line of a command without options, for its --help and what is wrong."""
    read_options(argv, type("NoOptions", (Options,), {"__doc__": about}), prog=prog)


def read_with_keys(
    argv: Sequence[str], model: type[Model], keys: Sequence[Option], *, prog: str
) -> tuple[Model, dict[str, str]]:
    """Read the command line of a command, with options whose values are returned by field, as they were given."""
    parser = Parser(prog, model, [*options_of(model), *keys])
    settings = parser.split(argv)
    return parser.build(model, settings), {o.field: entry.value for o, entry in settings if o.owner is not model}


MODEL_KEYS = ("model_name_or_path", "method", "lora_r")
BATCH_KEYS = ("per_device_train_batch_size", "global_batch_size", "learning_rate")
RUN_KEYS = ("output_dir", "save_steps", "resume_from_checkpoint", "report_to", "strategy", "nproc", "check")


class TrainOptions(Options):
    """Fine-tune a model as a recipe says."""

    first = (
        *MODEL_KEYS,
        *("data_path", "eval_data_path", "eval_split", "max_length", "packing"),
        *("num_train_epochs", "max_steps", *BATCH_KEYS),
        *RUN_KEYS,
    )
    examples = (
        "manyrank train quickstart",
        "manyrank train --model Qwen/Qwen2.5-7B --data my.jsonl --method qlora",
        "manyrank train my.yaml --lr 1e-4 --nproc 4 --strategy fsdp",
    )


class GrpoOptions(Options):
    """Train with rewards (GRPO), from a base or from an SFT run."""

    first = (
        *MODEL_KEYS,
        *("sft_model", "data_path", "rewards", "num_generations", "max_completion_length", "beta", "temperature"),
        *BATCH_KEYS,
        *RUN_KEYS,
    )
    examples = (
        "manyrank grpo --sft_model output/my --data my.jsonl --rewards '{numeric: 1}'",
        "manyrank grpo math_grpo --model Qwen/Qwen2.5-1.5B --data my.jsonl",
        "manyrank grpo my.yaml --num_generations 8 --check",
    )


def parse(
    argv: Sequence[str], *, prog: str, launch: bool, model: type[TrainOptions | GrpoOptions] = TrainOptions
) -> CommandLine:
    """Read the command line of a train command.

    Args:
        launch: whether it takes LaunchOptions and SlurmOptions.
        model: the command's own help.

    Raises:
        UserError: an unknown option, a wrong value, or two recipes.
    """
    return parse_with(argv, model, prog=prog, launch=launch)[0]


def parse_with(argv: Sequence[str], model: type[Model], *, prog: str, launch: bool) -> tuple[CommandLine, Model]:
    """Read a recipe, its overrides, and the options of a command of its own."""
    models = (RecipeWord, model, LaunchOptions, SlurmOptions) if launch else (RecipeWord, model)
    parser = Parser(prog, model, [*(option for kind in models for option in options_of(kind)), *recipe_options()])
    settings = parser.split(argv)
    recipe, options = parser.build(RecipeWord, settings).recipe, parser.build(LaunchOptions, settings)
    slurm = [option.field for option, _ in settings if option.owner is SlurmOptions]
    if slurm and options.via not in JOBS:
        fix = "write --nproc, the processes of this machine" if slurm[0] == "gpus" else "leave it out"
        raise UserError(f"--{slurm[0]} is for --via slurm", where="command line", fix=f"{fix}, or add --via slurm")
    # In the spelling of a recipe, for the train module and for `resolve`.
    overrides = [
        replace(entry, key=f"--{option.field}") if normal(entry.key) in DATA_ALIASES else entry
        for option, entry in settings
        if option.owner is TrainConfig
    ]
    return CommandLine(recipe, overrides, options, parser.build(SlurmOptions, settings)), parser.build(model, settings)


def as_grpo(line: CommandLine) -> CommandLine:
    """The same with the task GRPO; of a preset NAME its preset grpo_NAME, where there is one, and without one grpo_default."""
    task = Setting("--task", "grpo", "manyrank grpo")
    named = f"grpo_{line.recipe or 'default'}"
    return replace(line, recipe=named if named in presets() else line.recipe, overrides=[task, *line.overrides])
