"""The recipe: a flat YAML file or command line, turned into one typed, frozen `TrainConfig`.

Precedence: defaults < the recipe's `base:` < the recipe < command line. Names are those of transformers'
TrainingArguments; `spellings` holds the other names that people type. Every value remembers where
it came from, so that an error can name the place.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..errors import UserError, UserErrors
from ..project_files import EMBEDDED, asset
from ..runs import artifact, hub
from ..runs.artifact import ModelSource
from .data_source import DataSource
from .peft_config import adapter_keys, check_weights
from .recipe_file import Known, Setting, normal, read_entries, refuse_data
from .schema import TrainConfig
from .spellings import (
    ALIASES,
    DATA_ALIASES,
    INSTEAD,
    METHOD_FLAGS,
    METHOD_VALUES,
    OPPOSITES,
    OTHER_TOOLS,
    WHEN,
    as_ours,
)
from .value_types import Method

FIELDS = TrainConfig.model_fields
METHODS = frozenset(get_args(Method))

# What is trained where nobody names a model, and on what where nobody names data either.
DEFAULT_MODEL, SAMPLE = "Qwen/Qwen2.5-1.5B-Instruct", "data/sample.jsonl"
NOT_GIVEN, NOT_THERE = "not given", "not there"
ASSUMED = {
    "model_name_or_path": f"no model is given: {DEFAULT_MODEL} (--model NAME takes another; --model embedded is a small one, made here)",
    "data_path": "no data is given: the bundled sample, 160 questions and answers (--data FILE takes yours)",
}
# What the task grpo sets where nobody says otherwise: answers are padded, and the best model has the best reward.
BY_TASK = "task grpo"
DEFAULTS_OF_GRPO = {"packing": "none", "metric_for_best_model": "eval_reward", "greater_is_better": True}
YES = ("true", "yes", "on", "1")
METHOD_PREFERENCE = ("lora", "qlora", "int8", "fp8", "full")
SWITCHES = frozenset({*METHOD_FLAGS, "wandb"})
OF_TOKENS = ("add_tokens", "add_special_tokens")
TYPED = frozenset({"trust_remote_code"})  # what a run's own config cannot switch on: it may be somebody else's
KNOWN = Known(
    {**{key: key for key in (*FIELDS, *SWITCHES)}, **ALIASES, **OTHER_TOOLS},
    frozenset(key for key, field in FIELDS.items() if re.search("dict|DataSource", str(field.annotation))),
)


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with the provenance of each of its values."""

    config: TrainConfig
    provenance: dict[str, str] = field(default_factory=dict)

    def where(self, *keys: str) -> str:
        """Name the places where these keys were given, for an error."""
        return ", ".join(f"{key} ({self.provenance.get(key, 'default')})" for key in keys)

    def assumed(self) -> list[str]:
        """Say what was not given and is needed."""
        data = self.provenance.get("data_path", "")
        missing = [f"{data}: the bundled sample (--data FILE takes yours)"] if data.endswith(NOT_THERE) else []
        return [line for key, line in ASSUMED.items() if self.provenance.get(key) == NOT_GIVEN] + missing

    def as_yaml(self) -> str:
        """The whole config as YAML, each line with its provenance; it can be trained again as it is."""
        lines = []
        for key, value in self.config.plain().items():
            text = yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=True, width=10_000)
            lines.append(f"{text.strip()[1:-1]}  # {' '.join(self.provenance.get(key, 'default').split())}")
        return "\n".join(lines) + "\n"


def canonical(key: str) -> str:
    """The key that a spelling stands for; data and dataset, where they are no sections of a recipe, are data_path."""
    name = normal(key)
    return KNOWN.spellings.get(name) or DATA_ALIASES.get(name, name)


def presets() -> list[str]:
    return sorted(path.stem for path in asset("launch", "recipes").glob("*.yaml"))


def resolve(recipe: str | None, overrides: Sequence[Setting] = (), *, finished: bool = False) -> ResolvedConfig:
    """Merge defaults, the recipe and its base, and the command line.

    Args:
        recipe: a YAML file or a preset's name; None for the command line alone.
        overrides: the command line's values, in order.
        finished: of a run that is over: what it went on from need not be there, and TYPED keys count from `overrides`
            alone.

    Raises:
        UserError: an unknown key, a wrong type, a contradiction, or a file that cannot be read.
    """
    merged: dict[str, Setting] = {}
    layers = _layers(recipe) if recipe else []
    if finished:
        layers = [[entry for entry in layer if normal(entry.key) not in TYPED] for layer in layers]
    for entries in (*layers, overrides):
        merged = _with_layer(merged, _canonical(entries, merged.get("method")))
    if "bf16" in merged and str(merged["bf16"].value).lower() in ("none", "null"):
        del merged["bf16"]
    merged = {key: e for key, e in merged.items() if e.value is not None or FIELDS[key].default not in ([], {})}
    if "task" in merged and merged["task"].value == "grpo":
        merged = {key: Setting(key, value, BY_TASK) for key, value in DEFAULTS_OF_GRPO.items()} | merged
    for key in ("sft_model", "adapter"):
        if not finished and key in merged and merged[key].value not in (None, "none", "null"):
            merged = _gone_on_from(merged[key], merged)
    merged = _with_model(_with_data(merged))
    return ResolvedConfig(_validate(merged), {key: entry.where for key, entry in merged.items()})


def _with_layer(merged: dict[str, Setting], layer: dict[str, Setting]) -> dict[str, Setting]:
    """Put a layer's entries over those below; bf16 replaces an fp16 there, and fp16 a bf16."""
    on = [key for key in ("bf16", "fp16") if key in layer and str(layer[key].value).lower() in YES]
    if len(on) > 1:
        raise _contradiction([layer[key] for key in on])
    below = {key: entry for key, entry in merged.items() if not (on and key in ("bf16", "fp16"))}
    return below | layer


def _with_model(merged: dict[str, Setting]) -> dict[str, Setting]:
    """Add the default model where something is given, but no model; for this and the embedded one the sample, too."""
    model = merged.get("model_name_or_path")
    if not merged or (model and model.value != EMBEDDED):
        return merged
    default = {"model_name_or_path": DEFAULT_MODEL, "data_path": SAMPLE}
    return {key: Setting(key, value, NOT_GIVEN) for key, value in default.items()} | merged


def _with_data(merged: dict[str, Setting]) -> dict[str, Setting]:
    """Put the sample in the place of a file that a preset names and that is not here."""
    entry = merged.get("data_path")
    of_preset = entry and entry.where.startswith(str(asset("launch", "recipes"))) and str(entry.value).endswith(".json")
    if not entry or not of_preset or Path(entry.value).exists() or asset(entry.value).is_file():
        return merged
    return merged | {"data_path": Setting("data_path", SAMPLE, f"{entry.value} is {NOT_THERE}")}


def recipe_of(source: ModelSource) -> TrainConfig | None:
    """The recipe of the run that an artifact comes from."""
    file = source.run / "config.yaml" if source.run else None
    return resolve(str(file), finished=True).config if file and file.is_file() else None


def _gone_on_from(entry: Setting, merged: dict[str, Setting]) -> dict[str, Setting]:
    """Add the base of the model that is trained on, its rendering options, and the shape of its adapter, which cannot change."""
    if not Path(str(entry.value)).expanduser().is_dir() and not hub.fetch_adapter(str(entry.value)):
        what = f"there is no folder {entry.value!r}, and no such adapter can be had from the hub"
        fix = "give the folder of a run, a checkpoint or an adapter, or a name on the hub that can be reached"
        raise UserError(what, where=entry.where, fix=fix)
    source = artifact.find(str(entry.value))
    if canonical(entry.key) == "adapter" and not source.adapter:
        fix = f"start from it with model_name_or_path: {entry.value}"
        raise UserError(f"{entry.value} is a whole model, and no adapter", where=entry.where, fix=fix)
    if source.adapter and not (source.adapter / "adapter_model.safetensors").is_file():
        what = f"{entry.value} has no adapter_model.safetensors; a pickle (adapter_model.bin) is not read"
        fix = "write it anew: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER); or give a whole adapter"
        raise UserError(what, where=entry.where, fix=fix)
    if source.adapter:
        check_weights(source.adapter, entry)
    base = merged.get("model_name_or_path", Setting("model_name_or_path", source.base, entry.where))
    if not source.adapter and str(base.value) != source.base:
        what = f"{entry.value} is a whole model, and model_name_or_path is {base.value}"
        raise UserError(what, where=f"{base.where}; {entry.where}", fix="leave model_name_or_path out")
    new = merged.get("new_adapter")
    is_new = canonical(entry.key) == "adapter" and new is not None and str(new.value).lower() in YES
    shape = adapter_keys(source.adapter, entry) if source.adapter and not is_new else {}
    if shape and (recipe := recipe_of(source)):  # rows of tokens are saved by number
        shape |= {key: getattr(recipe, key) for key in OF_TOKENS}
    for key, theirs in shape.items():
        setting = merged.get(key)
        if setting and not _is_same(setting, theirs):
            beside = (
                "" if canonical(entry.key) == "sft_model" else ", or write new_adapter: true for another one on top"
            )
            raise UserError(
                f"{key} is {setting.value}, and that of {entry.value} is {theirs}",
                where=f"{setting.where}; {entry.where}",
                fix=f"leave {key} out: the same adapter is trained on{beside}",
            )
    own = {key: Setting(key, value, entry.where) for key, value in (_speech(source) | shape).items()}
    return own | merged | {"model_name_or_path": base} | {key: own[key] for key in shape}


def _is_same(setting: Setting, theirs: Any) -> bool:
    """Return whether a value fits the adapter. A preset's is for other models, too, and all-linear became a list in it."""
    if setting.where.startswith(str(asset("launch", "recipes"))) or setting.value == "all-linear":
        return True
    key, needed = canonical(setting.key), {"model_name_or_path": "-", "data_path": "-"}
    try:
        value = getattr(TrainConfig.model_validate(needed | {key: setting.value}), key)
    except ValidationError:  # which `_validate` says better
        return True
    if isinstance(value, list) and isinstance(theirs, list) and key not in OF_TOKENS:
        return set(value) == set(theirs)
    return value == theirs


def _speech(source: ModelSource) -> dict[str, Any]:
    """Return the rendering options of the SFT recipe; a template of its own is kept with its tokenizer."""
    recipe = recipe_of(source)
    if not recipe:
        return {}
    keys = ("chat_template_kwargs", "stop_tokens", "thinking", "chat_template", *OF_TOKENS)
    options = {key: getattr(recipe, key) for key in keys}
    if source.own_tokenizer:
        del options["chat_template"]
    return {key: value for key, value in options.items() if value != FIELDS[key].default}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by preset name."""
    path = Path(name)
    refuse_data(name, fix=f"manyrank train --model NAME --data {name}, or manyrank data inspect {name}")
    if path.is_file():
        return path
    preset = asset("launch", "recipes", f"{name}.yaml")
    if re.fullmatch(r"[\w-]+", name) and preset.is_file():
        return preset
    close = difflib.get_close_matches(name, presets(), 1)
    raise UserError(
        f"there is no file {name}" if path.suffix in (".yaml", ".yml") else f"there is no recipe {name!r}",
        where="the recipe, which is a YAML file or a preset's name",
        fix=(f"did you mean {close[0]}? " if close else "") + f"presets: {', '.join(presets())}",
    )


def _entries(path: Path) -> list[Setting]:
    """A recipe's entries; of the config that a run has written, without TYPED keys: the run may be somebody else's."""
    entries = read_entries(path, KNOWN)
    if path.name != "config.yaml" or not artifact.is_run(path.parent):
        return entries
    return [entry for entry in entries if normal(entry.key) not in TYPED]


def _layers(recipe: str, above: tuple[Path, ...] = ()) -> list[list[Setting]]:
    """Read a recipe, and before it its base, that one's base and so on; `above` are those that stand on it."""
    path = find_recipe(recipe)
    entries = _entries(path)
    bases = [entry for entry in entries if entry.key == "base"]
    if not bases:
        return [entries]
    if not isinstance(bases[0].value, str):
        raise UserError("base is not a name", where=bases[0].where, fix="give a recipe's file or a preset's name")
    if path.resolve() in above:
        raise UserError(f"{path} is its own base", where=bases[0].where, fix="leave the base out in one of the recipes")
    beside = path.parent / bases[0].value
    base = str(beside) if beside.is_file() else bases[0].value
    try:
        find_recipe(base)
    except UserError as error:
        raise UserError(error.what, where=bases[0].where, fix=error.fix) from None
    return [*_layers(base, (*above, path.resolve())), [entry for entry in entries if entry.key != "base"]]


def _canonical(entries: Sequence[Setting], method: Setting | None) -> dict[str, Setting]:
    """Bring one layer's entries under their canonical keys; `method` is what lower layers chose."""
    settings: dict[str, Setting] = {}
    allowed, because, unknown = METHODS, [], []
    for entry in entries:
        key = canonical(entry.key)
        if _says_method(entry, entries):
            allowed, because = allowed & _methods(entry), [*because, entry]
            continue
        if normal(entry.key) in WHEN:
            entry = _by_steps(entry, key, entries)
            if entry is None:
                continue
        if key == "wandb":
            entry = Setting("report_to", ["wandb"] if _yes(entry) else [], entry.where)
            key = "report_to"
        if key == "loss_type" and str(entry.value).lower() in ("dft", "nll"):  # trl's, of SFT
            entry, key = Setting("dft_loss", str(entry.value).lower() == "dft", entry.where), "dft_loss"
        if key not in FIELDS:
            unknown.append(unknown_key(entry))
            continue
        value = not _yes(entry) if normal(entry.key) in OPPOSITES else as_ours(key, entry.value)
        entry = replace(entry, value=value)
        if key in settings and settings[key].value != entry.value:
            raise _contradiction([settings[key], entry])
        settings[key] = entry
    if unknown:
        raise unknown[0] if len(unknown) == 1 else UserErrors(unknown)
    if because:
        if "method" in settings:
            allowed, because = allowed & {str(settings["method"].value)}, [*because, settings["method"]]
        if not allowed:
            raise _contradiction(because)
        current = str(method.value) if method else "lora"
        if method and current not in METHODS:
            raise UserError(
                f"method: {current!r} is none of {', '.join(METHOD_PREFERENCE)}", where=method.where, fix="choose one"
            )
        value = current if current in allowed else next(name for name in METHOD_PREFERENCE if name in allowed)
        settings["method"] = Setting("method", value, "; ".join(entry.where for entry in because))
    return settings


def _located(config: TrainConfig) -> TrainConfig:
    """The config with the project's own data files, which are found from any folder."""

    def resolved_path(path: str) -> str:
        own = asset(path)
        home = str(Path(path).expanduser())
        return str(own) if not Path(home).exists() and own.is_file() else home

    sources = {
        key: [source.model_copy(update={"path": resolved_path(source.path)}) for source in getattr(config, key)]
        for key in ("data_path", "eval_data_path")
        if getattr(config, key)
    }
    return config.model_copy(update=sources)


def _by_steps(entry: Setting, steps: str, entries: Sequence[Setting]) -> Setting | None:
    """Read a key of WHEN as its key of steps; None leaves it to the number beside it."""
    values, value = WHEN[normal(entry.key)], str(entry.value).strip().lower()
    if value == "steps":
        if any(normal(other.key) not in WHEN and canonical(other.key) == steps for other in entries):
            return None
        raise UserError(
            f"{entry.key}: steps, and no {steps} beside it", where=entry.where, fix=f"write {steps}: a number"
        )
    value = {"false": "no"}.get(value, value)  # as YAML reads a bare no
    if value not in values:
        better = "; load_best_model_at_end: true saves each best one" if value == "best" else ""
        fix = f"choose one of {', '.join((*values, 'steps'))}{better}"
        raise UserError(f"{entry.key}: {entry.value!r} is not known here", where=entry.where, fix=fix)
    return replace(entry, value={"no": "off"}.get(value, value))


def _says_method(entry: Setting, entries: Sequence[Setting]) -> bool:
    """Return whether a key of METHOD_FLAGS or METHOD_VALUES chooses a method; adapter is also the key of a folder."""
    name = normal(entry.key)
    if name in METHOD_FLAGS or name not in METHOD_VALUES:
        return name in METHOD_FLAGS
    if name in FIELDS and entry.value is None:  # Axolotl's full fine-tuning; a run's own config has a method, too
        return all(canonical(other.key) != "method" for other in entries)
    return name not in FIELDS or str(entry.value).strip().lower() in METHOD_VALUES[name]


def _methods(entry: Setting) -> frozenset[str]:
    """The methods that a key of METHOD_FLAGS or METHOD_VALUES allows."""
    if flag := METHOD_FLAGS.get(normal(entry.key)):
        return flag if _yes(entry) else METHODS - flag
    values = METHOD_VALUES[normal(entry.key)]
    if (value := str(entry.value).strip().lower()) in values:
        return values[value]
    what = f"{entry.key}: {entry.value!r} is none of {', '.join(values)}"
    raise UserError(what, where=entry.where, fix=f"write method: {', '.join(METHOD_PREFERENCE)}")


def _yes(entry: Setting) -> bool:
    if str(entry.value).lower() in YES:
        return True
    if str(entry.value).lower() in ("false", "no", "off", "0"):
        return False
    raise UserError(f"{entry.key}: {entry.value!r} is not true or false", where=entry.where, fix="give true or false")


def unknown_key(entry: Setting, known: Iterable[str] = KNOWN.spellings) -> UserError:
    """The error for a key that does not exist, with the nearest of the known ones."""
    close = difflib.get_close_matches(normal(entry.key), known, 1)
    dashes = "--" if entry.key.startswith("-") else ""
    fix = f"did you mean {dashes}{close[0]}?" if close else "`--help all` lists every option"
    fix = INSTEAD.get(normal(entry.key), fix) if FIELDS.keys() & set(known) else fix
    return UserError(f"there is no option {entry.key!r}", where=entry.where, fix=fix)


def written_as_list(entry: Setting, words: Sequence[str]) -> str:
    """Say how an option and the words behind it are written as a list; a path may hold commas, so paths stand in brackets."""
    items = [entry.value, *words]
    if canonical(entry.key) in ("data_path", "eval_data_path"):
        return f"write {entry.key}='[{', '.join(items)}]'"
    return f"write {entry.key}={','.join(items)}"


def _contradiction(entries: Sequence[Setting]) -> UserError:
    settings = " against ".join(f"{entry.key}={entry.value}" for entry in entries)
    return UserError(
        f"these contradict each other: {settings}",
        where="; ".join(entry.where for entry in entries),
        fix="keep one of them",
    )


def _validate(merged: dict[str, Setting]) -> TrainConfig:
    values = {key: entry.value for key, entry in merged.items()}
    if values.get("report_to") in ("none", ["none"]):
        values["report_to"] = []
    # What a base sets can be taken back: `--eval_data_path none`.
    values |= {key: None for key, value in values.items() if value in ("none", "null") and FIELDS[key].default is None}
    try:
        return _located(TrainConfig(**values))
    except ValidationError as invalid:
        problems = invalid.errors()
    missing = [
        str(problem["loc"][0]) for problem in problems if problem["type"] == "missing" and len(problem["loc"]) == 1
    ]
    if missing:
        usual = {"model_name_or_path": "embedded", "data_path": "data/sample.jsonl"}
        example = shlex.join(f"--{key}={values.get(key, value)}" for key, value in usual.items())
        raise UserError(
            f"{' and '.join(missing)} must be given",
            where="the recipe and the command line",
            fix=f"give {' and '.join(f'--{key}' for key in missing)}, or a recipe; as in: manyrank train {example}",
        )
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        by_key.setdefault(str(problem["loc"][0]), []).append(problem)
    wrong = [invalid_value(key, values[key], of_key, merged[key].where, FIELDS[key]) for key, of_key in by_key.items()]
    raise wrong[0] if len(wrong) == 1 else UserErrors(wrong)


def invalid_value(key: str, value: Any, problems: Sequence[Any], where: str, info: FieldInfo) -> UserError:
    """The error for a value that pydantic refuses, from its problems with the field."""
    # Of the alternatives of a type, a number is held against that of numbers.
    numeric = str(value).lstrip("-").replace(".", "", 1).isdecimal()
    problem = next((p for p in problems if not (numeric and p["type"] == "literal_error")), problems[0])
    if problem["type"] == "extra_forbidden":
        inside = str(problem["loc"][-1])
        close = difflib.get_close_matches(inside, DataSource.model_fields, 1, cutoff=0.5)
        fix = f"did you mean {close[0]}?" if close else f"a source has {', '.join(DataSource.model_fields)}"
        if canonical(inside) in FIELDS.keys() - {"data_path", "eval_data_path"}:
            fix = f"write {canonical(inside)} beside {key}, for all of its sources"
        fix = INSTEAD.get(normal(inside), fix)
        fix = "write weight: how often a row is used in an epoch" if inside in ("epochs", "repeats") else fix
        return UserError(f"{key}: a source has no {inside!r}", where=where, fix=fix)
    expected = problem["msg"].removeprefix("Value error, ")
    inner = "".join(
        f"{part}: "
        for part in problem["loc"][1:]
        if isinstance(part, str) and not part.startswith(("function-", "constrained-", "literal["))
    )
    fix = f"{key} is: {info.description}"
    if problem["type"] == "literal_error" and not inner and len(problems) == 1:  # else other values are possible, too
        choices = re.findall(r"'([^']+)'", expected)
        close = difflib.get_close_matches(str(value), choices, cutoff=0.5)
        if info.default in (close or choices):
            fix = f"write {info.default}, the default"
        elif close:
            fix = f"write {close[0]}"
    return UserError(f"{key}: {value!r} is invalid: {inner}{expected[0].lower()}{expected[1:]}", where=where, fix=fix)
