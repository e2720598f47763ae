"""Rules about what a recipe says, alone or against the place where it runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from ..config.identity import OF_GRPO, early_changes
from ..config.resolve import DEFAULTS_OF_GRPO
from ..config.schema import OF_FULL, AdapterKeys
from ..project_files import asset
from .arguments import ARGUMENT_RULES
from .context import RunContext
from .reporting import REPORTING_RULES
from .rows import SOURCE_RULES, VALIDATION_RULES
from .rule import error, unless, warning

RECIPES = str(asset("launch", "recipes"))
# Peak learning rates that people use, by method.
USUAL_RATES = {
    "full": (1e-6, 1e-4),
    "lora": (1e-5, 1e-3),
    "qlora": (1e-5, 1e-3),
    "int8": (1e-5, 1e-3),
    "fp8": (1e-5, 1e-3),
}
FAR = 10
OF_SFT = (
    "label_smoothing_factor",
    "roles_to_train",
    "train_on_eos",
    "dft_loss",
    "neftune_noise_alpha",
    "train_on_last_turn",
    "train_on_prompt",
    "train_on_opening",
    "lora_dropout",
    "per_device_eval_batch_size",
)
OF_ANY_METHOD = ("adapter", "new_adapter", "add_tokens", "add_special_tokens")  # of the adapters' keys
# Options, and what makes them count.
DEPENDENT = (
    (
        tuple(key for key in AdapterKeys.model_fields if key not in OF_ANY_METHOD),
        lambda c: c.uses_lora,
        "method full",
    ),
    (OF_FULL, lambda c: not c.uses_lora, "another method than full"),
    (("allow_base_change",), lambda c: c.adapter, "no adapter"),
    (("layers_pattern",), lambda c: c.layers_to_transform, "no layers_to_transform"),
    (
        (
            "quantized_cache",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage",
        ),
        lambda c: c.method == "qlora",
        "another method than qlora",
    ),
    (("adam_beta1", "adam_beta2"), lambda c: c.optim not in ("sgd", "adafactor"), "optim sgd or adafactor"),
    (("adam_epsilon",), lambda c: "adam" in c.optim or c.optim == "muon", "optim sgd, adafactor or lion"),
    (
        ("metric_for_best_model", "greater_is_better"),
        lambda c: c.load_best_model_at_end or c.early_stopping_patience,
        "neither load_best_model_at_end nor early_stopping_patience",
    ),
    (("per_device_eval_batch_size", "eval_on_start"), lambda c: c.has_validation, "no validation"),
    (("early_stopping_threshold",), lambda c: c.early_stopping_patience, "no early_stopping_patience"),
    (("sampling_temperature",), lambda c: len(c.data_path) > 1, "one source"),
    (("max_repeats",), lambda c: c.sampling_temperature != 1, "sampling_temperature 1"),
    (("wandb_project", "wandb_tags"), lambda c: "wandb" in c.report_to, "report_to without wandb"),
    (("hub_model_id", "hub_private_repo"), lambda c: c.push_to_hub, "no push_to_hub"),
    (("resume_changes",), lambda c: c.resume_from_checkpoint, "no resume_from_checkpoint"),
    (("sample_max_new_tokens",), lambda c: c.sample_questions, "no sample_questions"),
    (OF_GRPO, lambda c: c.is_grpo, "task sft"),
    (OF_SFT, lambda c: not c.is_grpo, "task grpo"),
    (("vllm_server_base_url",), lambda c: c.use_vllm == "server", "use_vllm not server"),
    (("vllm_gpu_memory_utilization",), lambda c: c.use_vllm == "colocate", "use_vllm not colocate"),
)
LOCAL_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})
MOUNTS = Path("/proc/mounts")


def _batch_product(s: RunContext) -> str | None:
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


def _batch_divides(s: RunContext) -> str | None:
    batch, micro = s.config.batch(s.world_size), s.config.micro_batch
    if s.config.packing == "none" and not s.config.is_grpo and batch % (micro * s.world_size):
        return f"a global batch of {batch} examples does not divide into {s.world_size} processes x {micro} padded rows"
    return None


def _best_metric(s: RunContext) -> str | None:
    rewards = ["eval_reward", *(f"eval_rewards/{name}/mean" for name in s.config.rewards)]
    known = rewards if s.config.is_grpo else ["eval_loss", "eval_perplexity"]
    if not s.config.has_validation or s.config.metric_for_best_model in known:
        return None
    return f"validation gives {', '.join(known)}, and metric_for_best_model is {s.config.metric_for_best_model}"


def _far_rate(s: RunContext) -> str | None:
    low, high = USUAL_RATES[s.config.method]
    rate = s.config.learning_rate
    if s.config.optim in ("sgd", "muon") or low / FAR <= rate <= high * FAR:
        return None
    return f"learning_rate {rate:g}, where method {s.config.method} usually takes {low:g} to {high:g}"


def _type_of_4_bits(s: RunContext) -> str | None:
    keys = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
    given = {key: getattr(s.config, key) for key in keys}
    wrong = [f"{key} {value}" for key, value in given.items() if value not in (None, s.precision.dtype)]
    used = s.config.method == "qlora"
    return f"{' and '.join(wrong)}, and the run computes in {s.precision.label}" if wrong and used else None


def _overwrites(s: RunContext) -> str | None:
    if not s.config.overwrite_output_dir or s.config.dry_run:
        return None
    if s.config.resume_from_checkpoint:
        return "overwrite_output_dir and resume_from_checkpoint together"
    if (number := os.environ.get("SLURM_RESTART_COUNT", "0")) not in ("", "0"):
        return f"overwrite_output_dir in a job that was queued again (SLURM_RESTART_COUNT is {number})"
    sources = (*s.config.data_path, *(s.config.eval_data_path or ()))
    inputs = [s.config.model_name_or_path, s.config.start_model, s.config.chat_template, *(x.path for x in sources)]
    below = [path for path in filter(None, inputs) if s.output_dir and _is_below(path, s.output_dir)]
    return f"overwrite_output_dir would remove {below[0]}, which the run reads" if below else None


def _is_below(path: str, folder: Path) -> bool:
    file = Path(path).expanduser()
    return file.exists() and file.resolve().is_relative_to(folder.resolve())


def _unused(s: RunContext) -> str | None:
    unused, usual = [], DEFAULTS_OF_GRPO if s.config.is_grpo else {}
    for keys, counts, because in DEPENDENT:
        plain = type(s.config).model_fields
        unread = [
            k
            for k in keys
            if getattr(s.config, k) != usual.get(k, plain[k].default)
            and not s.resolved.provenance.get(k, RECIPES).startswith(RECIPES)  # a preset's are for other methods, too
        ]
        if unread and not counts(s.config):
            unused.append(f"{', '.join(unread)} with {because}")
    return f"{'; '.join(unused)}: nothing reads it" if unused else None


def _changed(s: RunContext) -> str | None:
    if s.config.dry_run or not s.checkpoint:
        return None
    try:
        changes = early_changes(s.checkpoint, s.config, s.precision)
    except (OSError, ValueError, AttributeError):  # a damaged checkpoint, which the run tells of or passes over
        return None
    return f"the resumed run would not be the same: {'; '.join(changes)}" if changes else None


def _unsaved_at_limit(s: RunContext) -> str | None:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdecimal():
        return None
    left, every = int(end) - time.time(), s.config.save_steps
    if every in ("auto", "epoch") or (every != "off" and every < 1):
        return None  # the steps of an epoch, or of the run, are not known yet
    if every == "off":
        return f"the job ends in {left / 3600:.1f} hours, and nothing is saved before"
    took = _seconds_per_step(s)
    if took and every * took > left:
        return (
            f"{every} steps took {every * took / 3600:.1f} hours until now, and the job ends in {left / 3600:.1f} hours"
        )
    return None


def _seconds_per_step(s: RunContext) -> float | None:
    """Seconds of a step in the resumed run, validations and saves included, by its newest two lines of losses."""
    file = s.output_dir / "logs" / "metrics.jsonl" if s.output_dir and s.config.resume_from_checkpoint else None
    if not file or not file.is_file():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    points = [(line["step"], line["time"]) for line in lines if "loss" in line][-2:]
    if len(points) < 2 or points[1][0] <= points[0][0]:
        return None
    return (points[1][1] - points[0][1]) / (points[1][0] - points[0][0])


def _local_output(s: RunContext) -> str | None:
    if s.nnodes == 1 or not s.output_dir or not MOUNTS.is_file():
        return None
    kind = filesystem(s.output_dir)
    return f"{s.nnodes} machines, and {s.output_dir} is on {kind}" if kind in LOCAL_FILESYSTEMS else None


def filesystem(path: Path) -> str:
    """The kind of file system that a path is or will be on, as /proc/mounts calls it; empty where it is not told."""
    real, best = path.absolute().resolve(), ("", "")
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if real.is_relative_to(mount) and len(mount) >= len(best[0]):  # of two at one place the later one counts
            best = (mount, kind)
    return best[1]


BATCH_RULES = (
    error(
        "batch-product",
        ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
        _batch_product,
        reason="The three say the batch twice, and differently.",
        fix="leave one of the three away",
    ),
    error(
        "batch-division",
        ("global_batch_size", "per_device_train_batch_size"),
        _batch_divides,
        reason="Padded rows are not dealt freely: every process takes whole micro-batches.",
        fix="choose a multiple",
    ),
    warning(
        "idle-ranks",
        ("global_batch_size",),
        unless(
            lambda s: s.config.batch(s.world_size) < s.world_size,
            "{c.global_batch_size} examples to a step, and {s.world_size} processes",
        ),
        reason="In every step some processes have no example and wait.",
        fix="raise global_batch_size, or start fewer processes",
    ),
    error(
        "overwritten-input",
        ("overwrite_output_dir", "resume_from_checkpoint"),
        _overwrites,
        reason="It removes the run that is in output_dir, with all its checkpoints, when the new one starts.",
        fix="leave overwrite_output_dir out; or resume no run (as jobs do by themselves), and read nothing of output_dir",
    ),
    error(
        "changed-since-checkpoint",
        ("checkpoint:", "resume_changes"),
        _changed,
        reason="A resumed run continues as if it had never been stopped, so what shapes its result stays.",
        fix="give the values of the checkpoint, or the --resume_changes of each change, as one list; or another --output_dir "
        "for a new run",
    ),
)

STEP_RULES = (
    error(
        "validation-without-data",
        ("eval_steps", "eval_data_path"),
        unless(
            lambda s: s.config.eval_steps not in (None, "off") and not s.config.has_validation,
            "eval_steps without validation data",
        ),
        reason="There is nothing to validate with.",
        fix="give --eval_data_path or --eval_split, or set --eval_steps none",
    ),
    error(
        "best-without-validation",
        ("load_best_model_at_end", "early_stopping_patience"),
        unless(
            lambda s: (
                (s.config.load_best_model_at_end or bool(s.config.early_stopping_patience))
                and not s.config.has_validation
            ),
            "the best model or early stopping without validation",
        ),
        reason="Validation decides which model is the best one, and when to stop.",
        fix="give --eval_data_path or --eval_split",
    ),
    error(
        "unknown-best-metric",
        ("metric_for_best_model",),
        _best_metric,
        reason="The run would end at its first validation, which has no such metric.",
        fix="leave it out, or choose one of these",
    ),
    warning(
        "never-saved",
        ("save_steps", "max_steps"),
        unless(
            lambda s: isinstance(s.config.save_steps, int) and 0 < s.config.max_steps < s.config.save_steps,
            "save_steps {c.save_steps}, and the run has {c.max_steps} steps",
        ),
        reason="The first checkpoint is that of the end: a run that is killed starts from the beginning.",
        fix="lower save_steps",
    ),
    warning(
        "save-interval-beyond-limit",
        ("save_steps", "environment:SLURM_JOB_END_TIME"),
        _unsaved_at_limit,
        reason="A job that comes to its time limit loses what it has not saved; the signal before it may not reach it, "
        "or leave it too little time.",
        fix="save more often with --save_steps, or ask for more time",
    ),
    warning(
        "machines-without-saves",
        ("save_steps",),
        unless(lambda s: s.nnodes > 1 and s.config.save_steps == "off", "{s.nnodes} machines, and save_steps is off"),
        reason="When a machine goes away, the others resume from the newest checkpoint, and there is none.",
        fix="leave save_steps out, or give a number",
    ),
    warning(
        "machine-local-output",
        ("output_dir",),
        _local_output,
        reason="Checkpoints are written by the first machine and read by all, so the folder must be shared; file systems "
        "of this kind belong to one machine.",
        fix="give an output_dir on a file system that all machines share",
    ),
    error(
        "elastic-without-resume",
        ("elastic", "resume_from_checkpoint"),
        unless(
            lambda s: s.config.elastic and s.config.resume_from_checkpoint != "auto",
            "an elastic run that does not resume by itself",
        ),
        reason="It starts its workers anew when a machine comes or goes, and they would begin at step 0.",
        fix="give --resume_from_checkpoint auto",
    ),
    error(
        "elastic-batch",
        ("elastic", "global_batch_size", "gradient_accumulation_steps"),
        unless(
            lambda s: (
                s.config.elastic and (not s.config.global_batch_size or bool(s.config.gradient_accumulation_steps))
            ),
            "an elastic run whose batch follows the number of processes",
        ),
        reason="It has more processes at one time than at another.",
        fix="give global_batch_size, and leave gradient_accumulation_steps out",
    ),
)

OPTIMISATION_RULES = (
    error(
        "two-losses",
        ("dft_loss", "label_smoothing_factor"),
        unless(
            lambda s: s.config.dft_loss and bool(s.config.label_smoothing_factor),
            "dft_loss and label_smoothing_factor together",
        ),
        reason="One weighs a token by what the model gives the target alone, and the other spreads the target.",
        fix="keep one of them",
    ),
    *ARGUMENT_RULES,
    error(
        "type-of-4-bits",
        ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bf16", "fp16"),
        _type_of_4_bits,
        reason="A 4-bit base is multiplied in the precision of the run, and packed into that type: as bytes it could not be sharded.",
        fix="leave it out, and say the precision: bf16: true, fp16: true, or bf16: false for float32",
    ),
    warning(
        "warmup-beyond-end",
        ("warmup_steps", "max_steps"),
        unless(
            lambda s: 0 < s.config.max_steps <= s.config.warmup_steps,
            "warmup_steps {c.warmup_steps}, and the run has {c.max_steps} steps",
        ),
        reason="The learning rate never gets to learning_rate.",
        fix="lower warmup_steps to a few per cent of the run",
    ),
    warning(
        "unusual-learning-rate",
        ("learning_rate", "method"),
        _far_rate,
        reason="It is more than ten times outside of what the method usually takes; full fine-tuning takes about a tenth "
        "of what adapters take.",
        fix="look for a slip in the exponent",
    ),
    warning(
        "unused-options",
        tuple(key for keys, *_ in DEPENDENT for key in keys),
        _unused,
        reason="The option only counts with another one, which is off.",
        fix="leave it out, or switch on what it belongs to",
        of_many=True,
    ),
)
# What the number of steps decides, which without max_steps shows when the data is counted.
LENGTH_RULES = tuple(
    rule for rule in (*STEP_RULES, *OPTIMISATION_RULES) if rule.name in ("never-saved", "warmup-beyond-end")
)
RECIPE_RULES = (*SOURCE_RULES, *VALIDATION_RULES, *BATCH_RULES, *STEP_RULES, *OPTIMISATION_RULES, *REPORTING_RULES)
