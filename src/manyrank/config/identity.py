"""The identity of a run: the values that a resumed run must share with its checkpoint. No torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..runs import run_folder
from ..topology.precision import Precision
from .resolve import FIELDS, TrainConfig
from .schema import OF_FULL

# What shapes the result; a resumed run must not differ in it.
IDENTITY = (
    "method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "max_length",
    "packing",
    "chat_template_kwargs",
    "train_on_last_turn",
    "train_on_prompt",
    "train_on_opening",
    "thinking",
    "stop_tokens",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
# What makes the shape of adapters, and of what is saved.
OF_ADAPTERS = (
    "new_adapter",
    "rank_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "init_lora_weights",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "add_tokens",
    "add_special_tokens",
)
# What checkpoints of earlier versions do not have.
LATER = (
    *OF_ADAPTERS,
    *OF_FULL,
    "use_rslora",
    "alpha_pattern",
    "loraplus_lr_ratio",
    "lr_scheduler_kwargs",
    "label_smoothing_factor",
    "data_seed",
    "roles_to_train",
    "train_on_eos",
    "sampling_temperature",
    "max_repeats",
    "streaming",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "optim_args",
    "dft_loss",
    "neftune_noise_alpha",
    "tf32",
)
UNSAID = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # what None means
OF_GRPO = (
    "rewards",
    "on_reward_error",
    "num_generations",
    "max_completion_length",
    "beta",
    "temperature",
    "top_p",
    "loss_type",
    "scale_rewards",
    "mask_truncated_completions",
    "use_vllm",
)
# What a run's identity calls otherwise than the recipe does.
CALLED = {
    "per_device_train_batch_size": ("batch_per_process",),
    "gradient_accumulation_steps": ("batch_per_process",),
    "data_path": ("data", "examples", "tokens", "rows"),
    "model_name_or_path": ("model",),
    "sft_model": ("sft_model",),
    "num_train_epochs": ("total_steps",),
    "max_steps": ("total_steps",),
}
FIXED = (
    "task",
    "method",
    "lora_r",
    "lora_target_modules",
    "optim",
    "optim_args",
    *OF_ADAPTERS,
    "frozen_parameters",
    "unfrozen_parameters",
)  # the shape of the saved state


def identity(config: TrainConfig, precision: Precision, **facts: object) -> dict:
    """Collect the values that must be the same when the run is resumed."""
    own = {key: getattr(config, key) for key in OF_GRPO} if config.is_grpo else {}
    # A checkpoint of an earlier version does not name fp16, nor these.
    computed = {"bf16": precision is Precision.BF16, "fp16": precision is Precision.FP16 or None}
    later = {key: getattr(config, key) for key in LATER}
    usual = {key: UNSAID.get(key, FIELDS[key].default) for key in LATER}
    computed |= {key: value if value != usual[key] else None for key, value in later.items()}
    return {"task": config.task} | computed | {key: getattr(config, key) for key in IDENTITY} | own | facts


def batch_per_process(config: TrainConfig) -> int | None:
    """Examples of one process in a step, where that is what the recipe says."""
    if config.global_batch_size:
        return None
    return config.micro_batch * (config.gradient_accumulation_steps or 1)


def early_changes(folder: Path, config: TrainConfig, precision: Precision) -> list[str]:
    """List what a resume would change and may not, as far as the recipe alone tells, as `shown` writes it."""
    batch = {"batch_per_process": batch_per_process(config), "global_batch_size": config.global_batch_size}
    run = identity(config, precision, **{key: value for key, value in batch.items() if value})
    return shown(run_folder.changes(folder, run, allowed=allowed_names(config.resume_changes)))


def keys_of(name: str) -> tuple[str, ...]:
    """The keys that let a value of a run's identity change, as resume_changes takes them; none where it cannot."""
    called = tuple(key for key, names in CALLED.items() if name in names)
    return called or ((name,) if name in FIELDS and name not in FIXED else ())


def shown(changes: list[str]) -> list[str]:
    """Changes as 'name: before -> now', with the keys that allow them."""
    return [_shown(change, change.partition(": ")[0]) for change in changes]


def _shown(change: str, name: str) -> str:
    keys = keys_of(name)
    return f"{change} (--resume_changes {' or '.join(keys)})" if keys else f"{change} (cannot change)"


def _how_to_allow(names: list[str], allowed: list[str]) -> str:
    """Say what to type so that these values of a run's identity may change, beside keys that are allowed."""
    if fixed := [name for name in names if not keys_of(name)]:
        return f"give the checkpoint's {', '.join(fixed)}, which cannot change, or another --output_dir for a new run"
    keys = list(allowed)
    for options in sorted(map(keys_of, names), key=len):
        keys += [] if set(options) & set(keys) else options[:1]
    return f"to allow it, add --resume_changes {','.join(keys)}; or give another --output_dir for a new run"


def allowed_names(keys: list[str]) -> set[str]:
    """Translate keys that may differ into the names of a run's identity."""
    return {name for key in keys for name in CALLED.get(key, (key,))}


def refuse_changes(folder: Path, run: dict, *, allowed: list[str]) -> list[str]:
    """Compare a run with the checkpoint that it goes on from.

    Args:
        allowed: keys of the recipe that may differ.

    Returns:
        What differs and is allowed to, as 'key: before -> now'.

    Raises:
        UserError: something else differs, or a key cannot be allowed.
    """
    names = allowed_names(allowed)
    for key in allowed:
        if key not in FIELDS or not set(CALLED.get(key, (key,))) <= run.keys():
            known = sorted({*IDENTITY, *LATER, *OF_GRPO, *CALLED, "global_batch_size", "bf16", "fp16"} - set(FIXED))
            fix = f"known: {known}"
            if key not in FIELDS and key in run and (keys := keys_of(key)):
                fix = f"name the key that it comes from: {' or '.join(keys)}"
            raise UserError(f"{key} is nothing that a resume compares", where="resume_changes", fix=fix)
        if key in FIXED:
            fix = "start a new run"
            raise UserError(f"{key} cannot change: it shapes the saved state", where="resume_changes", fix=fix)
    if changed := run_folder.changes(folder, run, allowed=names):
        raise UserError(
            f"the resumed run would not be the same: {'; '.join(shown(changed))}",
            where=str(folder),
            fix=_how_to_allow([change.partition(": ")[0] for change in changed], allowed),
        )
    return run_folder.changes(folder, run, allowed=run.keys() - names)
