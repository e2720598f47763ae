"""What schedules and optimizers take beside the keys of a recipe, and rules about it."""

from __future__ import annotations

from .context import RunContext
from .rule import error

# What each schedule of transformers takes in lr_scheduler_kwargs, and of which it needs one.
_MIN_LR = ("num_cycles", "min_lr", "min_lr_rate")
_STABLE = ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles")
SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "cosine": (("num_cycles",), ()),
    "cosine_with_restarts": (("num_cycles",), ()),
    "cosine_with_min_lr": (_MIN_LR, ("min_lr", "min_lr_rate")),
    "cosine_warmup_with_min_lr": ((*_MIN_LR, "warmup_lr_rate"), ("min_lr", "min_lr_rate")),
    "warmup_stable_decay": (_STABLE, ("num_decay_steps",)),
    "polynomial": (("lr_end", "power"), ()),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "inverse_sqrt": (("timescale",), ()),
}
# What each optimizer takes in optim_args; others take nothing.
_OF_8_BITS = ("min_8bit_size",)
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adafactor": ("clip_threshold", "decay_rate", "beta1", "scale_parameter"),
    "muon": ("momentum", "nesterov", "ns_steps", "adjust_lr_fn"),
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"), _OF_8_BITS),
}


def _schedule(s: RunContext) -> str | None:
    kind, given = s.config.lr_scheduler_type, s.config.lr_scheduler_kwargs
    taken, needed = SCHEDULES[kind]
    if unknown := [key for key in given if key not in taken]:
        known = f"it takes {', '.join(taken)}" if taken else "it takes none"
        return f"lr_scheduler_kwargs {', '.join(unknown)} of the schedule {kind}; {known}"
    if needed and not set(needed) & set(given):
        return f"the schedule {kind} without {' or '.join(needed)} in lr_scheduler_kwargs"
    return None


def _optimizer(s: RunContext) -> str | None:
    taken = OPTIMIZERS.get(s.config.optim, ())
    unknown = [key for key in s.config.optim_args if key not in taken]
    known = f"it takes {', '.join(taken)}" if taken else "it takes none"
    words = [f"{key} {value}" for key, value in s.config.optim_args.items() if not isinstance(value, int | float)]
    if wrong := [word for word in words if not word.startswith("adjust_lr_fn") and not unknown]:
        return f"optim_args {', '.join(wrong)} of {s.config.optim}, which is no number"
    return f"optim_args {', '.join(unknown)} of {s.config.optim}; {known}" if unknown else None


ARGUMENT_RULES = (
    error(
        "schedule-arguments",
        ("lr_scheduler_kwargs", "lr_scheduler_type"),
        _schedule,
        reason="The schedule could not be made.",
        fix="give those it takes, as --lr_scheduler_kwargs '{min_lr_rate: 0.1}'",
    ),
    error(
        "optimizer-arguments",
        ("optim_args", "optim"),
        _optimizer,
        reason="The optimizer could not be made.",
        fix="give those it takes, as --optim_args momentum=0.9; learning_rate, weight_decay, adam_beta1, adam_beta2 and "
        "adam_epsilon are keys of their own",
    ),
)
