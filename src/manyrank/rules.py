"""Combinations that are known not to work, checked before a process starts. One table, no torch."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .config import Resolved, TrainConfig
from .errors import UserError
from .formats import BadRow, needs_template, to_sample
from .hardware import Hardware
from .schema import DataSource
from .sources import known_format, read_rows, source_of
from .turns import bad_rows_error, usual_fix

LOOKED_AT = 100  # rows of a source before the launch
NO_TEMPLATE_FIX = "give one: --chat_template chatml, or a file"
SHARDED = ("fsdp", "fsdp_offload", "zero3", "zero3_offload")
ZERO = ("zero2", "zero3", "zero3_offload")
# The trackers of transformers, by the package that each needs.
TRACKERS = {
    "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "comet_ml": "comet_ml", "neptune": "neptune",
    "clearml": "clearml", "dvclive": "dvclive", "swanlab": "swanlab", "trackio": "trackio", "codecarbon": "codecarbon",
}  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """A resolved recipe and where it is to run."""

    resolved: Resolved
    strategy: str
    nproc: int  # on this machine
    world_size: int
    hardware: Hardware

    @property
    def config(self) -> TrainConfig:
        return self.resolved.config

    @property
    def gpus(self) -> int:
        return len(self.hardware.gpus)


@dataclass(frozen=True)
class Rule:
    """`broken` says what is wrong, or None. `keys` are the options that the user set or may set."""

    name: str
    keys: tuple[str, ...]
    broken: Callable[[Situation | Resolved], str | None]
    fix: str


def _batch_product(s: Situation) -> str | None:
    c = s.config
    if not (c.global_batch_size and c.gradient_accumulation_steps):
        return None
    product = c.per_device_train_batch_size * c.gradient_accumulation_steps * s.world_size
    if product == c.global_batch_size:
        return None
    return (
        f"{c.per_device_train_batch_size} examples x {c.gradient_accumulation_steps} accumulation x {s.world_size} "
        f"processes = {product}, not global_batch_size {c.global_batch_size}"
    )


def _batch_divides(s: Situation) -> str | None:
    batch, micro = s.config.batch(s.world_size), s.config.per_device_train_batch_size
    if s.config.packing == "none" and batch % (micro * s.world_size):
        return f"a global batch of {batch} examples does not divide into {s.world_size} processes x {micro} padded rows"
    return None


def _tracker(s: Situation) -> str | None:
    for name in s.config.report_to:
        if name not in TRACKERS:
            return f"there is no tracker {name!r}; known: none, {', '.join(TRACKERS)}"
        if importlib.util.find_spec(TRACKERS[name]) is None:
            return f"tracker {name} needs the package {TRACKERS[name]}, which is not installed"
    return None


def _unless(wrong: Callable[[Situation], bool], what: str) -> Callable[[Situation], str | None]:
    return lambda s: what.format(s=s, c=s.config) if wrong(s) else None


# These look at nothing but the recipe, so `data inspect` checks them too.
SOURCE_RULES = (
    Rule(
        "one validation set", ("eval_data_path", "eval_split"),
        _unless(lambda s: bool(s.config.eval_data_path and s.config.eval_split), "eval_data_path and eval_split together"),
        "keep one of them",
    ),
    Rule(
        "validation sees every row once", ("eval_data_path",),
        _unless(
            lambda s: any(source.weight != 1 for source in s.config.eval_data_path or []),
            "a source of eval_data_path has a weight, and validation takes every row once",
        ),
        "leave the weight out",
    ),
    Rule(
        "packs of whole sources", ("packing", "data_path"),
        _unless(
            lambda s: s.config.packing == "dataset" and any(source.weight % 1 for source in s.config.data_path),
            "packing: dataset needs the same examples in every epoch, and a weight is not a whole number",
        ),
        "use packing: step, or whole weights",
    ),
)  # fmt: skip
RULES = (
    *SOURCE_RULES,
    Rule(
        "one process for single", ("strategy",),
        _unless(lambda s: s.strategy == "single" and s.world_size > 1, "strategy single with {s.world_size} processes"),
        "use ddp, or one process",
    ),
    Rule(
        "a GPU for each process", ("nproc",),
        _unless(
            lambda s: bool(s.gpus) and s.nproc > s.gpus,
            "{s.nproc} processes on a machine with {s.gpus} GPUs",
        ),
        "start at most one process for each GPU (--nproc)",
    ),
    Rule(
        "bf16 where it is native", ("bf16",),
        _unless(lambda s: s.config.bf16 is True and not s.hardware.has_bf16, "bf16 is not supported by this machine"),
        "set bf16: false",
    ),
    Rule(
        "offload needs a GPU", ("strategy",),
        _unless(
            lambda s: s.strategy == "fsdp_offload" and not s.gpus,
            "fsdp_offload moves shards between host and GPU memory, and there is no GPU",
        ),
        "use fsdp on CPUs",
    ),
    Rule(
        "no 8-bit base in shards", ("method", "strategy"),
        _unless(lambda s: s.config.method == "int8" and s.strategy in SHARDED, "int8 weights cannot be sharded ({s.strategy})"),
        "use method qlora, or strategy ddp or zero2",
    ),
    Rule(
        "torch optimizers in shards", ("optim", "strategy"),
        _unless(
            lambda s: s.config.optim not in ("adamw_torch", "sgd") and s.strategy in (*SHARDED, *ZERO),
            "{c.optim} keeps 8-bit or paged state that {s.strategy} cannot shard",
        ),
        "use optim adamw_torch: sharding makes its state small already",
    ),
    Rule(
        "AdamW under offload", ("optim", "strategy"),
        _unless(
            lambda s: s.config.optim == "sgd" and s.strategy == "zero3_offload",
            "zero3_offload steps on the CPU with DeepSpeed's AdamW; {c.optim} is not known there",
        ),
        "use optim adamw_torch",
    ),
    Rule("batch adds up", ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"), _batch_product,
         "leave one of the three away"),
    Rule("batch divides", ("global_batch_size", "per_device_train_batch_size"), _batch_divides,
         "choose a multiple"),
    Rule(
        "validation needs data", ("eval_steps", "eval_data_path"),
        _unless(lambda s: bool(s.config.eval_steps) and not s.config.has_validation, "eval_steps without validation data"),
        "give --eval_data_path or --eval_split",
    ),
    Rule(
        "validation data needs steps", ("eval_steps", "eval_data_path", "eval_split"),
        _unless(lambda s: s.config.has_validation and not s.config.eval_steps, "validation data without eval_steps"),
        "say how often with --eval_steps",
    ),
    Rule(
        "the best needs validation", ("load_best_model_at_end", "early_stopping_patience"),
        _unless(
            lambda s: (s.config.load_best_model_at_end or bool(s.config.early_stopping_patience)) and not s.config.eval_steps,
            "the best model and early stopping need validation",
        ),
        "give --eval_data_path and --eval_steps",
    ),
    Rule(
        "elastic runs resume", ("elastic", "resume_from_checkpoint"),
        _unless(
            lambda s: s.config.elastic and s.config.resume_from_checkpoint != "auto",
            "an elastic run starts its workers anew when a machine comes or goes, and they would begin at step 0",
        ),
        "give --resume_from_checkpoint auto, and --save_steps",
    ),
    Rule(
        "elastic runs keep their batch", ("elastic", "global_batch_size", "gradient_accumulation_steps"),
        _unless(
            lambda s: s.config.elastic and (not s.config.global_batch_size or bool(s.config.gradient_accumulation_steps)),
            "an elastic run has more processes at one time than at another, and its batch would follow their number",
        ),
        "give global_batch_size, and leave gradient_accumulation_steps out",
    ),
    Rule("trackers are there", ("report_to",), _tracker, "install the package, or choose another tracker"),
)  # fmt: skip


def check_sources(resolved: Resolved) -> None:
    """Check what a recipe says of its sources, wherever it is to run.

    Raises:
        UserError: the first thing that is wrong.
    """
    for rule in SOURCE_RULES:
        if problem := rule.broken(resolved):
            raise UserError(problem, where=resolved.where(*rule.keys), fix=rule.fix)


def check(situation: Situation) -> None:
    """Check the table, then the files that the recipe names.

    Raises:
        UserError: the first thing that is wrong.
    """
    for rule in RULES:
        problem = rule.broken(situation)
        if problem:
            raise UserError(problem, where=situation.resolved.where(*rule.keys), fix=rule.fix)
    for problem in _file_problems(situation.resolved):
        raise problem


def _file_problems(resolved: Resolved) -> Iterator[UserError]:
    config = resolved.config
    formats = {check_data(source, config) for source in [*config.data_path, *(config.eval_data_path or [])]}
    yield from _template_problems(resolved)
    asked = bool(config.sample_questions)
    yield from _model_problems(resolved, chats=asked or any(map(needs_template, formats)))


def check_data(source: DataSource, config: TrainConfig) -> str:
    """Read the start of a source as the run will, up to the first good row.

    Returns:
        Its format.

    Raises:
        UserError: it cannot be read, or its first LOOKED_AT rows are all bad. Later bad rows are found by the run,
            which tells of all of them.
    """
    found = known_format(source_of(source, config))
    bad: list[tuple[str, BadRow]] = []
    for row in islice(read_rows(found), LOOKED_AT):
        try:
            to_sample(row.readable(), found.format_type, found.columns)
            return found.format_type
        except BadRow as problem:
            bad.append((row.place, problem))
    if config.on_bad_row == "error":
        reasons = Counter(problem.reason for _, problem in bad)
        first = ((place, str(problem)) for place, problem in bad)
        raise bad_rows_error(first, reasons, out_of=f"the first {len(bad):,} rows", fix=usual_fix(reasons))
    return found.format_type


def _template_problems(resolved: Resolved) -> Iterator[UserError]:
    name = resolved.config.chat_template
    looks_like_file = bool(name) and ("/" in name or "." in name)
    if looks_like_file and not Path(name).is_file():
        yield UserError(f"there is no file {name}", where=resolved.where("chat_template"), fix="name a Jinja file")


def _model_problems(resolved: Resolved, *, chats: bool) -> Iterator[UserError]:
    name, where = resolved.config.model_name_or_path, resolved.where("model_name_or_path")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            yield UserError(f"there is no folder {name}", where=where, fix="check the path")
        return
    if not (folder / "config.json").is_file():
        yield UserError(f"{name} has no config.json", where=where, fix="name the folder of a whole model")
    if not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        yield UserError(
            f"{name} has no weights", where=where, fix="it needs model*.safetensors (or pytorch_model*.bin)"
        )
    if chats and not resolved.config.chat_template and not _has_chat_template(folder):
        yield UserError("the tokenizer has no chat template", where=where, fix=NO_TEMPLATE_FIX)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    try:
        return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    except (ValueError, AttributeError):
        raise UserError("not a JSON object", where=str(config), fix="give the tokenizer of a whole model") from None


def check_output_dir(config: TrainConfig, output_dir: Path) -> None:
    """Refuse to write among another run's files.

    Raises:
        UserError: the folder has files, and this run does not resume.
    """
    above = next(parent for parent in (output_dir, *output_dir.parents) if parent.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file", where="output_dir", fix="choose another --output_dir")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above} cannot be written to", where="output_dir", fix="choose another --output_dir")
    if config.dry_run or config.resume_from_checkpoint or not output_dir.exists():
        return
    if any(output_dir.iterdir()):
        raise UserError(
            f"the output folder {output_dir} is not empty",
            where="output_dir",
            fix="choose another --output_dir, or continue that run with --resume_from_checkpoint auto",
        )
