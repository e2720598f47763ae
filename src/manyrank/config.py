"""The recipe: a flat YAML file or command line, turned into one typed, frozen `TrainConfig`.

Precedence: defaults < the recipe's `base:` < the recipe < command line. Names are those of transformers'
TrainingArguments; ALIASES and METHOD_FLAGS hold the other spellings that people type. Every value remembers where
it came from, so that an error can name the place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import UserError

Method = Literal["full", "lora", "qlora", "int8"]
Strategy = Literal["single", "ddp", "fsdp", "fsdp_offload", "zero2", "zero3", "zero3_offload"]
Format = Literal["auto", "question_answer", "alpaca", "sharegpt", "messages", "prompt_completion"]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip
Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"]


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a yes/no value is not a number")
    if str(value).strip().lower().lstrip("+-") in ("inf", "infinity", "nan", ".inf", ".nan"):
        raise ValueError("not a finite number")
    return value


def _listed(value: Any) -> Any:
    """One string may stand for a list: a YAML list in brackets, or items between commas."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [item for item in value.split(",") if item]
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError("not a list like [a, b]") from None


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Strings = Annotated[list[str], BeforeValidator(_listed)]


class TrainConfig(BaseModel):
    """Everything that one run needs to know. Frozen; batch counts are in examples, lengths in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Model
    model_name_or_path: str = Field(
        min_length=1, description="a folder, a hub name, or 'embedded' for the small model made here"
    )
    chat_template: str | None = Field(
        None, min_length=1, description="a Jinja file to use instead of the tokenizer's own template"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    method: Method = Field("lora", description="full, lora, qlora (NF4, double quantisation) or int8 (8-bit LoRA)")
    lora_r: Int = Field(16, gt=0, description="rank of the adapters")
    lora_alpha: Float = Field(32, gt=0, description="adapters are scaled by lora_alpha / lora_r")
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters")
    lora_target_modules: Literal["all-linear"] | Strings = Field(
        "all-linear", description="'all-linear' (every linear layer but the head) or a list of module names"
    )

    # Data
    data_path: str = Field(min_length=1, description="training data: a JSON or JSONL file")
    eval_data_path: str | None = Field(None, min_length=1, description="validation data, used every eval_steps")
    format_type: Format = Field("auto", description="how rows are read; 'auto' looks at the first row")
    max_length: Int = Field(1024, gt=1, description="tokens of one example; longer ones are handled as `overlong` says")
    overlong: Literal["truncate", "drop", "error"] = Field("truncate", description="what to do with a longer example")
    packing: Literal["step", "none"] = Field(
        "step", description="'step': each step's examples side by side, no padding; 'none': padded rows"
    )

    # Batch
    per_device_train_batch_size: Int = Field(4, gt=0, description="examples of max_length that one process holds")
    gradient_accumulation_steps: Int | None = Field(None, gt=0, description="micro-batches to one optimizer step")
    global_batch_size: Int | None = Field(None, gt=0, description="examples to one optimizer step, over all processes")
    per_device_eval_batch_size: Int | None = Field(None, gt=0, description="as for training, unless given")

    # Optimisation
    learning_rate: Float = Field(2e-4, ge=0, description="peak learning rate")
    lr_scheduler_type: Schedule = Field("cosine", description="shape of the learning rate")
    warmup_steps: Int = Field(0, ge=0, description="steps from 0 to learning_rate")
    num_train_epochs: Float = Field(3.0, gt=0, description="passes over the data")
    max_steps: Int = Field(-1, ge=-1, description="optimizer steps; overrides num_train_epochs when positive")
    optim: Optimizer = Field("adamw_torch", description="optimizer")
    weight_decay: Float = Field(0.0, ge=0, description="decay of matrices (not of biases and norms)")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: Float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: Float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 does not clip")
    seed: Int = Field(42, ge=0, description="seed of the adapter's start, data order and dropout")

    # Precision and memory
    bf16: bool | Literal["auto"] = Field("auto", description="compute in bf16; auto: on GPUs that have it")
    gradient_checkpointing: bool = Field(False, description="keep fewer activations and compute them again")

    # Where it runs
    strategy: Strategy | None = Field(None, description="an accelerate_configs/ name; one process: single, more: ddp")

    # Logging, validation, saving
    output_dir: str | None = Field(
        None, min_length=1, description="the run's folder; made from the recipe's name when not given"
    )
    run_name: str | None = Field(None, min_length=1, description="name of the run in the trackers")
    logging_steps: Int = Field(10, gt=0, description="steps between two lines of metrics")
    report_to: Strings = Field([], description="trackers: none, wandb, tensorboard, mlflow, ...")
    wandb_project: str | None = Field(None, min_length=1, description="W&B project")
    eval_steps: Int | None = Field(None, gt=0, description="steps between two validations; needs eval_data_path")
    save_steps: Int | None = Field(None, gt=0, description="steps between two checkpoints; none when not given")
    save_total_limit: Int | None = Field(3, gt=0, description="checkpoints to keep; the best one stays")
    load_best_model_at_end: bool = Field(False, description="final_model is the checkpoint with the best metric")
    metric_for_best_model: str = Field("eval_loss", description="validation metric that decides which is best")
    greater_is_better: bool = Field(False, description="whether a greater metric is better")
    early_stopping_patience: Int | None = Field(None, gt=0, description="validations without a better metric to stop")
    resume_from_checkpoint: str | None = Field(
        None, min_length=1, description="a checkpoint folder, or 'auto' for the run's newest"
    )
    callbacks: Strings = Field([], description="your TrainerCallback classes, as module:Class")
    sample_questions: Strings = Field([], description="questions answered before and after the training")
    sample_max_new_tokens: Int = Field(64, gt=0, description="tokens of such an answer")
    dry_run: bool = Field(False, description="load everything, one step forward and backward, save nothing")

    @property
    def uses_lora(self) -> bool:
        return self.method != "full"

    def batch(self, world_size: int) -> int:
        """Examples to one optimizer step; the product with `world_size` unless the recipe fixes it."""
        return self.global_batch_size or (
            self.per_device_train_batch_size * (self.gradient_accumulation_steps or 1) * world_size
        )


FIELDS = TrainConfig.model_fields
METHODS = frozenset(get_args(Method))

# Other spellings of a key. Dashes and underscores are the same everywhere.
ALIASES = {
    "train_data": "data_path",
    "dataset_path": "data_path",
    "val_data": "eval_data_path",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "experiment_name": "run_name",
    "resume_from": "resume_from_checkpoint",
}

# Yes/no keys that each allow some methods; "no" allows the others. Together they must leave at least one.
METHOD_FLAGS = {
    "use_lora": frozenset({"lora", "qlora", "int8"}),
    "no_lora": frozenset({"full"}),
    "use_qlora": frozenset({"qlora"}),
    "use_4bit": frozenset({"qlora"}),
    "no_4bit": frozenset({"full", "lora", "int8"}),
    "use_8bit": frozenset({"int8"}),
}
METHOD_PREFERENCE = ("lora", "qlora", "int8", "full")
SWITCHES = frozenset({*METHOD_FLAGS, "wandb"})


@dataclass(frozen=True)
class Entry:
    """One value as it was given, and where."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class Resolved:
    """A config with the origin of each of its values."""

    config: TrainConfig
    origin: dict[str, str] = field(default_factory=dict)

    def where(self, *keys: str) -> str:
        """Where these keys were given, for an error."""
        return ", ".join(f"{key} ({self.origin.get(key, 'default')})" for key in keys)

    def as_yaml(self) -> str:
        """The whole config as YAML, each line with its origin; it can be trained again as it is."""
        lines = []
        for key, value in self.config.model_dump().items():
            text = yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=True, width=10_000)
            lines.append(f"{text.strip()[1:-1]}  # {' '.join(self.origin.get(key, 'default').split())}")
        return "\n".join(lines) + "\n"


def asset(*parts: str) -> Path:
    """A file of the project: from the checkout, or from the installed package."""
    packaged = Path(__file__).parent / "assets"
    root = packaged if packaged.exists() else Path(__file__).parents[2]
    return root.joinpath(*parts)


def presets() -> list[str]:
    return sorted(path.stem for path in asset("launch", "recipes").glob("*.yaml"))


def normal(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def resolve(recipe: str | None, overrides: Sequence[Entry] = ()) -> Resolved:
    """Merge defaults, the recipe and its base, and the command line.

    Args:
        recipe: a YAML file or a preset's name; None for the command line alone.
        overrides: the command line's values, in order.

    Raises:
        UserError: an unknown key, a wrong type, a contradiction, or a file that cannot be read.
    """
    merged: dict[str, Entry] = {}
    for entries in (*(_layers(recipe) if recipe else ()), overrides):
        merged |= _canonical(entries, merged.get("method"))
    if "bf16" in merged and str(merged["bf16"].value).lower() in ("none", "null"):
        del merged["bf16"]
    return Resolved(_validate(merged), {key: entry.where for key, entry in merged.items()})


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by preset name."""
    path = Path(name)
    if path.is_file():
        return path
    preset = asset("launch", "recipes", f"{name}.yaml")
    if re.fullmatch(r"[\w-]+", name) and preset.is_file():
        return preset
    close = difflib.get_close_matches(name, presets(), 1)
    raise UserError(
        f"there is no recipe {name!r}",
        where="the recipe, which is a YAML file or a preset's name",
        fix=(f"did you mean {close[0]}? " if close else "") + f"presets: {', '.join(presets())}",
    )


def _layers(recipe: str) -> list[list[Entry]]:
    path = find_recipe(recipe)
    entries = _read(path)
    bases = [entry for entry in entries if entry.key == "base"]
    if not bases:
        return [entries]
    if not isinstance(bases[0].value, str):
        raise UserError("base is not a name", where=bases[0].where, fix="give a recipe's file or a preset's name")
    beside = path.parent / str(bases[0].value)
    base = _read(find_recipe(str(beside) if beside.is_file() else str(bases[0].value)))
    if any(entry.key == "base" for entry in base):
        raise UserError(
            f"the base {bases[0].value!r} has a base itself",
            where=bases[0].where,
            fix="one level of base is all there is",
        )
    return [base, [entry for entry in entries if entry.key != "base"]]


class _OneKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML would take the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> list[Entry]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OneKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = str(error).replace("\n", " ")
        raise UserError(f"not valid YAML: {problem}", where=str(path), fix="mend the file") from None
    if not isinstance(content, dict):
        raise UserError(
            "a recipe is a list of `key: value` lines", where=str(path), fix="see launch/recipes/default.yaml"
        )
    return [Entry(str(key), value, f"{path}, {key}") for key, value in content.items()]


def _canonical(entries: Iterable[Entry], method: Entry | None) -> dict[str, Entry]:
    """One layer's entries under their canonical keys; `method` is what lower layers chose."""
    found: dict[str, Entry] = {}
    allowed, because = METHODS, []
    for entry in entries:
        key = ALIASES.get(normal(entry.key), normal(entry.key))
        if key in METHOD_FLAGS:
            chosen = METHOD_FLAGS[key] if _yes(entry) else METHODS - METHOD_FLAGS[key]
            allowed, because = allowed & chosen, [*because, entry]
            continue
        if key == "wandb":
            entry = Entry("report_to", ["wandb"] if _yes(entry) else [], entry.where)
            key = "report_to"
        if key not in FIELDS:
            raise unknown_key(entry)
        if key in found and found[key].value != entry.value:
            raise _contradiction([found[key], entry])
        found[key] = entry
    if because:
        if "method" in found:
            allowed, because = allowed & {str(found["method"].value)}, [*because, found["method"]]
        if not allowed:
            raise _contradiction(because)
        current = str(method.value) if method else "lora"
        if current not in METHODS:
            raise UserError(
                f"method: {current!r} is none of {', '.join(METHOD_PREFERENCE)}", where=method.where, fix="choose one"
            )
        value = current if current in allowed else next(name for name in METHOD_PREFERENCE if name in allowed)
        found["method"] = Entry("method", value, "; ".join(entry.where for entry in because))
    return found


def _located(path: str) -> str:
    """A data file of the project is found from any folder."""
    own = asset(path)
    return str(own) if not Path(path).exists() and own.is_file() else path


def _yes(entry: Entry) -> bool:
    if str(entry.value).lower() in ("true", "yes", "on", "1"):
        return True
    if str(entry.value).lower() in ("false", "no", "off", "0"):
        return False
    raise UserError(f"{entry.key}: {entry.value!r} is not true or false", where=entry.where, fix="give true or false")


def unknown_key(entry: Entry, more: Iterable[str] = ()) -> UserError:
    """The error for a key that does not exist, with the nearest that does (`more` are other valid names)."""
    close = difflib.get_close_matches(normal(entry.key), [*FIELDS, *ALIASES, *SWITCHES, *more], 1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else "`manyrank train --help` lists every option"
    return UserError(f"there is no option {entry.key!r}", where=entry.where, fix=fix)


def _contradiction(entries: Sequence[Entry]) -> UserError:
    said = " against ".join(f"{entry.key}={entry.value}" for entry in entries)
    return UserError(
        f"these contradict each other: {said}",
        where="; ".join(entry.where for entry in entries),
        fix="keep one of them",
    )


def _validate(merged: dict[str, Entry]) -> TrainConfig:
    values = {key: entry.value for key, entry in merged.items()}
    if values.get("report_to") in ("none", ["none"]):
        values["report_to"] = []
    for key in ("data_path", "eval_data_path"):
        values |= {key: _located(values[key])} if isinstance(values.get(key), str) else {}
    try:
        return TrainConfig(**values)
    except ValidationError as invalid:
        problems = invalid.errors()
    missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing"]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given",
            where="the recipe and the command line",
            fix=" ".join(f"--{key} ({FIELDS[key].description})" for key in missing),
        )
    key = str(problems[0]["loc"][0])
    expected = problems[0]["msg"].removeprefix("Value error, ")
    raise UserError(
        f"{key}: {values[key]!r} is not right: {expected[0].lower()}{expected[1:]}",
        where=merged[key].where,
        fix=f"{key} is: {FIELDS[key].description}",
    )
