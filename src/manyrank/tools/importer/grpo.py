"""The dialect of `trl grpo`, by version 1.16: what it has beside the options of `trl sft`.

Its defaults stand in trl/trainer/grpo_config.py, its reward functions in trl/rewards/ and trl/scripts/grpo.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

from ...config.data_source import DataSource
from ...config.resolve import FIELDS
from ...config.value_types import as_sources
from ...data.formats import ANSWERS
from ...data.sources import Source, known_format, read_rows
from ...errors import UserError
from . import trl
from .translation import UNKNOWN, Translation, usual, with_another

# trl's think_format_reward, which matches at the beginning.
THINKS = {"reward": "format", "pattern": r"\A(?ms:<think>(?!.*<think>)(.*?)</think>.*$)"}
# What trl does unless it is asked for something else, and nothing here does otherwise.
ONLY: dict[str, tuple[Any, ...]] = {
    "num_iterations": (1,),
    "epsilon": (0.2,),
    "epsilon_high": (0.2,),
    "delta": (),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "generation_kwargs": ({},),
    "importance_sampling_level": ("token",),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "top_entropy_quantile": (1, 1.0),
    "entropy_coef": (0, 0.0),
    "use_adaptive_entropy": (False,),
    "off_policy_mask_threshold": (),
    "use_bias_correction_kl": (True,),
    "sync_ref_model": (False,),
    "shuffle_dataset": (True,),
    "vllm_importance_sampling_correction": (True,),
    "vllm_importance_sampling_mode": ("sequence_mask",),
    "vllm_importance_sampling_clip_max": (3, 3.0),
    "vllm_importance_sampling_clip_min": (),
    "vllm_structured_outputs_regex": (),
    "generation_batch_size": (),
}
_DROPPED = {
    "log_completions num_completions_to_print log_unique_prompts wandb_log_unique_prompts log_multimodal "
    "log_completions_hub_repo": "logs/completions.jsonl has completions",
    "ref_model_mixup_alpha ref_model_sync_steps": "they count with sync_ref_model",
    "ds3_gather_for_generation cache_implementation use_transformers_paged use_transformers_continuous_batching": "a GPU "
    "holds the whole model while it generates",
    "use_liger_loss": "this project has kernels of its own",
    "vllm_device vllm_model_impl vllm_enable_sleep_mode vllm_server_timeout vllm_group_port vllm_max_model_length "
    "vllm_tensor_parallel_size": "vLLM has its defaults",
    "num_generations_eval": "validation has as many completions as training",
    "disable_dropout": "completions are computed without dropout",
}
DROPPED = trl.DROPPED | {name: why for names, why in _DROPPED.items() for name in names.split()}


def _rewards(t: Translation, value: Any) -> None:
    """Read the reward model and the reward functions; their weights stand in the same order."""
    if t.has("rewards"):
        return
    functions = t.theirs.get("reward_funcs") or []
    functions = [functions] if isinstance(functions, str) else list(functions)
    model = t.theirs.get("reward_model_name_or_path")
    names = [str(model)] if model else []
    if unknown := [name for name in functions if name != "think_format_reward"]:
        t.notes["rewards"] = _instead(unknown[0])
        return
    rewards = [{"reward": "model", "model": name} for name in names] + [THINKS] * len(functions)
    weights = t.theirs.get("reward_weights") or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError("a weight for each reward")
    values = {name: {**reward, "weight": weight} for name, reward, weight in zip(names + functions, rewards, weights)}
    t.give("rewards", values, "reward_funcs" if functions else "reward_model_name_or_path")


def _instead(name: str) -> str:
    """Say what to write for a reward function that is not here."""
    near = {"accuracy_reward": "numeric or exact", "get_soft_overlong_punishment": "length, which counts words"}
    if name in near:
        return f"nothing scores as {name} does; {near[name]} comes near"
    module, _, function = name.rpartition(".")
    own = f"{module or 'my_module'}:{function}"
    return f"{name} takes all completions of a step; write {own} as a function of (answer, reference, row) to a number"


def _prompts(t: Translation, value: Any) -> None:
    t.give("max_length", value, "max_prompt_length", "a longer prompt is an error, where TRL has cut it")


def _vllm(t: Translation, value: Any) -> None:
    if not value:
        return
    mode = t.theirs.get("vllm_mode", "colocate")
    t.give("use_vllm", mode, "use_vllm, vllm_mode")
    if mode == "server":
        host, port = t.theirs.get("vllm_server_host", "0.0.0.0"), t.theirs.get("vllm_server_port", 8000)
        address = t.theirs.get("vllm_server_base_url", f"http://{host}:{port}")
        t.give("vllm_server_base_url", address, "vllm_server_host")


def _generations(t: Translation, value: Any) -> None:
    if value != t.theirs.get("gradient_accumulation_steps", 1):
        t.decide("steps_per_generation", value, "completions are made for each step")


def _only(key: str, values: tuple[Any, ...]):
    """Translate a key that the schema has; of others, only what trl does by itself."""

    def handler(t: Translation, value: Any) -> None:
        if key in FIELDS:
            t.give(key, value, key)
        elif value not in values:
            t.decide(key, value, UNKNOWN)

    return handler


def _rows(t: Translation) -> None:
    """Ask for the reference, which rows of trl need not have, and for prompts that are no messages."""
    place = next((entry for entry in t.settings if entry.key == "data_path"), None)
    if place is None or not place.where.startswith(t.file) or t.has("columns"):
        return
    try:
        row = _first_row(DataSource(**as_sources(place.value)[0]))
    except (UserError, TypeError):
        why = "the rows are not here: each needs a prompt in messages, and a reference: columns: {completion: NAME}"
        t.decide("columns", "not given", why)
        return
    answers = [name for name in row if name in ANSWERS]
    if isinstance(row.get("prompt"), str):
        t.decide("dataset_name", "prompts as text", "TRL gives them as they are; here the chat template renders them")
    elif "completion" not in answers and len(answers) == 1:
        t.give("columns", {"completion": answers[0]}, "dataset_name", "the reference")
    elif "completion" not in answers:
        t.decide("columns", "not given", "which column is the reference does not show: columns: {completion: NAME}")


def _first_row(source: DataSource) -> dict[str, Any]:
    known = known_format(Source(source.path, split=source.split, name=source.name, format_type="prompt_completion"))
    return next((row.value for row in islice(read_rows(known), trl.LOOKED_AT) if isinstance(row.value, dict)), {})


def _finish(t: Translation) -> None:
    """Add the defaults that differ, see the module's docstring."""
    t.default("task", "grpo")
    trl.finish_arguments(t)
    trl.finish_adapters(t)
    t.default("learning_rate", 1e-6)
    t.default("num_generations", 8)
    t.default("max_completion_length", 512)
    t.default("beta", 0.0)
    dropout = t.theirs.get("lora_dropout", "not given")
    if t.theirs.get("use_peft") and dropout and not t.theirs.get("disable_dropout"):
        t.decide("lora_dropout", dropout, "TRL has 0.05 by itself; adapters are computed without dropout here")
    _rows(t)


_MARKS = (
    "task reward_funcs reward_weights reward_model_name_or_path num_generations max_completion_length beta use_vllm "
    "max_prompt_length scale_rewards mask_truncated_completions epsilon num_iterations"
)
MARKS = frozenset(_MARKS.split())
DIALECT = replace(
    trl.DIALECT,
    title="TRL's GRPO",
    handlers={
        **{key: handler for key, handler in trl.DIALECT.handlers.items() if key not in trl.OF_OTHER_TRAINERS.split()},
        **{key: _only(key, values) for key, values in ONLY.items()},
        "loss_type": lambda t, value: t.give("loss_type", value, "loss_type"),
        "reward_funcs": _rewards,
        "reward_model_name_or_path": lambda t, value: None if "reward_funcs" in t.theirs else _rewards(t, value),
        **dict.fromkeys(("reward_weights", "vllm_mode", "vllm_server_host", "vllm_server_port"), with_another),
        **dict.fromkeys(("vllm_server_base_url", "lora_dropout"), with_another),
        "max_prompt_length": _prompts,
        "use_vllm": _vllm,
        "steps_per_generation": _generations,
        "chat_template_path": usual("chat_template_path", why="write chat_template: and a Jinja file"),
    },
    dropped=DROPPED,
    finish=_finish,
    differs=("prompts are drawn by the seed in another order",),
)
