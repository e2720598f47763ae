"""Rules about where rows come from, and what of them is learned."""

from __future__ import annotations

from .context import RunContext
from .rule import error, unless, warning

PARTS = ("train_on_last_turn", "roles_to_train", "train_on_eos")  # of a conversation, to be learned alone


def _endless(s: RunContext) -> str | None:
    c = s.config
    if not c.streaming or c.max_rows or all(source.max_rows for source in c.data_path):
        return None
    needs_all = {
        "no max_steps": c.max_steps <= 0,
        "several sources": len(c.data_path) > 1,
        "eval_split": c.eval_split,
        "packing: dataset": c.packing == "dataset",
    }
    whole = next((what for what, so in needs_all.items() if so), None)
    return f"streaming with {whole}, and no max_rows" if whole else None


def _parts_of_everything(s: RunContext) -> str | None:
    plain = type(s.config).model_fields
    parts = [k for k in PARTS if getattr(s.config, k) != plain[k].default] if s.config.train_on_prompt else []
    return f"train_on_prompt and {' and '.join(parts)}" if parts else None


def _validates_training_rows(s: RunContext) -> str | None:
    training = {(source.path, source.split, source.name) for source in s.config.data_path}
    both = [x.path for x in s.config.eval_data_path or [] if (x.path, x.split, x.name) in training]
    return f"{both[0]} is trained on and validated with" if both else None


# These look at nothing but the recipe, so `data inspect` checks them too.
SOURCE_RULES = (
    error(
        "parts-of-everything",
        ("train_on_prompt", *PARTS),
        _parts_of_everything,
        reason="With train_on_prompt every token is learned, and the others choose a part of them.",
        fix="keep one of them",
    ),
    error(
        "last-turn-of-roles",
        ("train_on_last_turn", "roles_to_train"),
        unless(
            lambda s: s.config.train_on_last_turn and s.config.roles_to_train != ["assistant"],
            "train_on_last_turn, and roles_to_train {c.roles_to_train}",
        ),
        reason="It learns the last turn of the assistant.",
        fix="keep one of them",
    ),
    error(
        "one-validation-set",
        ("eval_data_path", "eval_split"),
        unless(
            lambda s: bool(s.config.eval_data_path and s.config.eval_split), "eval_data_path and eval_split together"
        ),
        reason="A run validates with one set: rows of its own, or a part of the training rows.",
        fix="keep one of them",
    ),
    error(
        "weighted-validation",
        ("eval_data_path",),
        unless(
            lambda s: any(source.weight != 1 for source in s.config.eval_data_path or []),
            "a source of eval_data_path has a weight",
        ),
        reason="Validation takes every row once.",
        fix="leave the weight out",
    ),
    error(
        "streaming-without-end",
        ("streaming", "max_rows", "max_steps", "data_path"),
        _endless,
        reason="A stream is read as far as max_rows, or max_steps of a run with one source, say; what needs all rows has no end.",
        fix="give max_rows, beside data_path or of each source, or max_steps; or leave streaming out",
    ),
    error(
        "packs-of-parts",
        ("packing", "data_path", "sampling_temperature"),
        unless(
            lambda s: (
                s.config.packing == "dataset"
                and (s.config.sampling_temperature != 1 or any(source.weight % 1 for source in s.config.data_path))
            ),
            "packing: dataset, and rows that are not seen a whole number of times in an epoch",
        ),
        reason="Packs over the data set need the same examples in every epoch.",
        fix="use packing: step, or whole weights and no sampling_temperature",
    ),
    error(
        "weights-and-temperature",
        ("data_path", "sampling_temperature"),
        unless(
            lambda s: s.config.sampling_temperature != 1 and any(source.weight != 1 for source in s.config.data_path),
            "a source with a weight, and sampling_temperature {c.sampling_temperature:g}",
        ),
        reason="Both say how often the rows of a source are seen.",
        fix="keep one of them",
    ),
)

VALIDATION_RULES = (
    warning(
        "validated-with-training-rows",
        ("data_path", "eval_data_path"),
        _validates_training_rows,
        reason="The validation loss then tells how well the rows are remembered, and falls all the time.",
        fix="give other rows, or keep a part back with --eval_split",
    ),
)
