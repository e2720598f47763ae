"""The dialect of Axolotl, by version 0.19.

Its defaults stand in src/axolotl/utils/schemas/ (training.py, config.py, peft.py, datasets.py), that of the warmup in
src/axolotl/core/builders/base.py, that of long rows in src/axolotl/utils/data/utils.py.
"""

from __future__ import annotations

import re
from typing import Any

from ...config.resolve import FIELDS
from ...data.messages import REASONING, ROLES
from ...models.model_facts import find_facts
from ...project_files import template_names
from . import strategies
from .sources import (
    ATTENTION,
    ONE_RATE,
    OWN_OR_JINJA,
    QWEN25,
    check_roles,
    check_turns,
    is_own_template,
    keep_shape,
    model_of,
    split_of,
)
from .translation import UNKNOWN, Dialect, Translation, usual, with_another

OTHER_TASKS = {
    "rl": "trains by preferences or rewards",
    "reward_model": "trains a reward model",
    "process_reward_model": "trains a reward model",
    "pretraining_dataset": "streams text to pretrain on; data of `type: completion` is read",
}
PREPARED = {"type", "path", "data_files", "ds_type", "trust_remote_code", "preprocess_shards"}
OF_ALL_SOURCES = {"chat_template", "chat_template_jinja", "roles_to_train", "train_on_eos", "train_on_eot"}
# Templates that are the own ones of some models.
OWN_TEMPLATES = {"tokenizer_default": ".*", "qwen_25": QWEN25, "gemma3": "gemma-3-.*-it"}
ONE_BATCH = "so many processes see one micro-batch; write global_batch_size"
NO_KERNELS = "this project has kernels of its own"
_DROPPED = {
    "plugins": "plugins are code of Axolotl's; those that change the loss have keys of their own",
    "lora_mlp_kernel lora_qkv_kernel lora_o_kernel liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
    "liger_rms_norm_gated liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy cut_cross_entropy use_kernels "
    "unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rope unsloth_rms_norm unsloth_cross_entropy_loss "
    "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp fused_attn_kernel tiled_mlp "
    "use_scattermoe use_sonicmoe experts_implementation": NO_KERNELS,
    "flex_attention flex_attn_compile_kwargs gemma4_hybrid_attn_impl": "documents of a pack attend by "
    "flash attention wherever the GPU has it",
    "sample_packing_group_size sample_packing_bin_size sample_packing_mp_start_method multipack_real_batches "
    "pretrain_multipack_attn batch_flattening": "packing is best fit over the whole data set",
    "skip_prepare_dataset dataset_keep_in_memory dataset_shard_num push_dataset_to_hub hf_use_auth_token "
    "dataset_prepared_path": "tokenised rows are kept, and made anew where something changed",
    "activation_offloading": "gradient_checkpointing recomputes as few layers as memory asks for",
    "loss_watchdog_threshold loss_watchdog_patience": "a loss that is not finite ends the run",
    "tokenizer_legacy tokenizer_save_jinja_files": "the model's own files say it",
    "is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model": "the model's own files say it",
    "lora_on_cpu qlora_sharded_model_loading experimental_skip_move_to_device merge_lora merge_method": "weights are "
    "loaded in shards",
    "dp_shard_size dp_replicate_size fsdp_version fsdp_final_state_dict_type": "the strategy decides it",
    "wandb_watch wandb_log_model wandb_mode wandb_run_id use_wandb use_otel_metrics": "report_to names the trackers",
    "swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace use_swanlab "
    "swanlab_log_completions swanlab_log_model": "report_to names the trackers",
    "eval_table_size eval_max_new_tokens do_bench_eval do_causal_lm_eval eval_causal_lm_metrics": "manyrank evaluate",
    "streaming_multipack_buffer_size ple_cpu_offload base_model_ignore_patterns lora_fan_in_fan_out": "nothing to set here",
    "use_dsv4_kernels use_glm_dsa_kernels expert_parallel_num_nvl_bytes expert_parallel_token_capacity": NO_KERNELS,
    "profiler_steps profiler_steps_start include_tkps": "metrics have tokens a second",
    "eot_tokens": "what ends an answer is read from the template, and learned",
    "accelerator_config": "the strategy is a file of its own",
    "swanlab_completion_log_interval swanlab_completion_max_buffer": "report_to names the trackers",
    "shuffle_merged_datasets": "rows are shuffled anew in every epoch, by the seed",
}
DROPPED = {name: why for names, why in _DROPPED.items() for name in names.split()}
RENAMED = {
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "tokens": "add_tokens",
    "adam_eps": "adam_epsilon",
}


def _other_task(t: Translation, key: str, value: Any) -> None:
    if value:
        t.refuse(key, value, OTHER_TASKS[key])


def _datasets(t: Translation, value: Any) -> None:
    t.give("data_path", _sources(t, "datasets", value), "datasets")


def _test_datasets(t: Translation, value: Any) -> None:
    t.give("eval_data_path", _sources(t, "test_datasets", value), "test_datasets")


def _sources(t: Translation, key: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sources = []
    for entry in entries:
        source = {name: value for name, value in entry.items() if value is not None and name not in OF_ALL_SOURCES}
        rows = split_of(t, key, source) | _format(t, key, source)
        for name in source.keys() - PREPARED:
            t.decide(f"{key}.{name}", source[name])
        paths = source.get("data_files") or source["path"]
        sources += [{"path": path, **rows} for path in ([paths] if isinstance(paths, str) else paths)]
    return sources


def _format(t: Translation, key: str, source: dict[str, Any]) -> dict[str, Any]:
    """How the rows of a source are read."""
    kind = str(source.get("type", ""))
    if kind == "completion":
        field = source.pop("field", "text")
        return {"format_type": "text"} | ({"columns": {"text": field}} if field != "text" else {})
    if _has_turns(source):
        return _messages(t, key, source, shared_gpt=kind.startswith("sharegpt"))
    why = "it writes a prompt of its own; here the chat template renders the rows (write one as chat_template)"
    t.decide(f"{key}.type", source.get("type", "none"), why)
    return {"format_type": "alpaca"} if kind.startswith("alpaca") else {}


def _has_turns(source: dict[str, Any]) -> bool:
    kind = str(source.get("type", ""))
    return kind.partition(".")[0] in ("chat_template", "sharegpt") and kind != "chat_template.argilla"


def _messages(t: Translation, key: str, source: dict[str, Any], *, shared_gpt: bool) -> dict[str, Any]:
    names = dict(source.pop("message_property_mappings", {}))
    role = source.pop("message_field_role", names.pop("role", "from" if shared_gpt else "role"))
    content = source.pop("message_field_content", names.pop("content", "value" if shared_gpt else "content"))
    check_turns(t, f"{key}.message_property_mappings", role, content)
    if extra := {name: column for name, column in names.items() if name != column}:
        t.decide(f"{key}.message_property_mappings", extra, "other keys of a message keep their names")
    check_roles(t, key, source.pop("roles", None))
    if (training := source.pop("message_field_training", "weight")) != "weight":
        t.decide(f"{key}.message_field_training", training, "a turn that is not learned has weight: 0")
    for name in ("field_thinking", "template_thinking_key"):
        if source.get(name) in REASONING:
            source.pop(name)
    if source.get("drop_system_message") is False:
        source.pop("drop_system_message")
    columns = {"messages": source.pop("field_messages", "conversations" if shared_gpt else "messages")}
    if (tools := source.pop("field_tools", "tools")) != "tools":
        columns["tools"] = f"{tools}?"
    plain = {name: column for name, column in columns.items() if name != column}
    return {"format_type": "messages"} | ({"columns": plain} if plain else {})


def _of_all_sources(t: Translation) -> None:
    """Set what sources say each for itself and a recipe says for all: the template, and what is learned."""
    entries = [entry for key in ("datasets", "test_datasets") for entry in t.theirs.get(key, [])]
    chats = [entry for entry in entries if _has_turns(entry)]
    jinja = ("chat_template", "chat_template_jinja")
    own = tuple(t.theirs.get(name) for name in jinja)
    templates = {tuple(entry.get(name) for name in jinja) for entry in chats} or {own}
    templates = {own if template == (None, None) else template for template in templates}
    if len(templates) == 1:
        _template(t, *templates.pop())
    else:
        t.decide("datasets.chat_template", [name for name, _ in templates], "one template renders all sources")
    roles = [sorted({ROLES.get(role, role) for role in entry.get("roles_to_train") or ()}) for entry in chats]
    _learned(t, "roles_to_train", [names or ["assistant"] for names in roles], ["assistant"])
    _learned(
        t, "train_on_eos", [entry.get("train_on_eot", entry.get("train_on_eos", "turn")) for entry in chats], "turn"
    )
    texts = [entry.get("type") == "completion" for entry in entries]
    if any(texts) and not all(texts) and not t.has("overlong"):
        t.decide(
            "datasets.type", "completion", "longer text is split there, and other rows dropped; overlong is for all"
        )
    t.default("overlong", "split" if texts and all(texts) else "drop")


def _learned(t: Translation, name: str, values: list[Any], usual: Any) -> None:
    """Set a key of what is learned where the schema has it, and all sources say the same."""
    others = [value for value in values if value != usual]
    if others and name in FIELDS and all(value == others[0] for value in values):
        t.give(name, others[0], f"datasets.{name}")
    elif others:
        t.decide(f"datasets.{name}", others[0], "it is for all sources" if name in FIELDS else UNKNOWN)


def _template(t: Translation, value: Any, jinja: Any) -> None:
    """Set the template; of the same name, those of Axolotl and this project write the same text."""
    if not jinja and is_own_template(t, OWN_TEMPLATES.get(value or "tokenizer_default")):
        return
    if value in (None, "jinja") and jinja and "{" not in str(jinja):
        t.give("chat_template", jinja, "chat_template_jinja")
    elif value in template_names() and not jinja:
        t.give("chat_template", value, "chat_template")
    else:
        t.decide("chat_template", value or "jinja", OWN_OR_JINJA)


def _adapter(t: Translation, value: Any) -> None:
    if value not in ("lora", "qlora"):
        t.decide("adapter", value, "adapters are LoRA")
    else:
        t.give(f"use_{value}", True, "adapter")


def _four_bits(t: Translation, value: dict[str, Any]) -> None:
    """Read what the recipe says of a base in 4 bits, where that changes the loss."""
    for name, inner in value.items():
        if name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            t.give(name, inner, f"bnb_config_kwargs.{name}")
        else:
            t.decide(f"bnb_config_kwargs.{name}", inner)


def _peft(t: Translation, value: dict[str, Any]) -> None:
    if value == {"loftq_config": {"loftq_bits": 4}} and t.theirs.get("adapter") == "qlora":
        t.give("init_lora_weights", "loftq", "peft.loftq_config")
    else:
        t.decide("peft", value, "LoftQ starts from a base in 4 bits: adapter: qlora")


def _targets(t: Translation, value: Any) -> None:
    if isinstance(value, str) and re.search(r"[\[(*+\\]", value):
        t.decide("lora_target_modules", value, "a pattern; write the names of the modules")
    elif value and not t.theirs.get("lora_target_linear"):
        t.give("lora_target_modules", value, "lora_target_modules")
    elif extra := {"lm_head", "embed_tokens"} & set(value or ()):
        t.decide("lora_target_modules", sorted(extra), "with lora_target_linear these have adapters, too")


def _target_linear(t: Translation, value: Any) -> None:
    if value:
        t.give("lora_target_modules", "all-linear", "lora_target_linear")


def _total_batch(t: Translation, value: Any) -> None:
    """`batch_size` is that of one process over all its micro-batches."""
    t.give("gradient_accumulation_steps", value // int(t.theirs.get("micro_batch_size") or 1), "batch_size")


def _special_tokens(t: Translation, value: Any) -> None:
    facts = find_facts(model_of(t))
    own = {name: facts.tokenizer.get(name) for name in value or {}} if facts else {}
    other = {name: token for name, token in (value or {}).items() if token not in (None, own.get(name))}
    other.pop("pad_token", None)
    if more := other.pop("additional_special_tokens", None):
        t.give("add_special_tokens", more, "special_tokens.additional_special_tokens")
    if other:
        t.decide("special_tokens", other, "the tokenizer's own are used; stop_tokens names what ends a turn")
    elif value and not more:
        t.drop("special_tokens", value, "the tokenizer has them, and there is no padding")


def _schedule(t: Translation, value: Any) -> None:
    """Read the schedule; that of transformers that ends above zero has the formula of Axolotl's."""
    least = t.theirs.get("cosine_min_lr_ratio")
    if least is None:
        t.give("lr_scheduler", value, "lr_scheduler")
    elif value != "cosine" or t.theirs.get("cosine_constant_lr_ratio"):
        t.decide("cosine_min_lr_ratio", least, "of the schedules that are known here cosine_with_min_lr has a minimum")
    else:
        t.give("lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler, cosine_min_lr_ratio")
        t.give("lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio")


def _min_lr(t: Translation, value: Any) -> None:
    if "lr_scheduler" not in t.theirs:
        _schedule(t, "cosine")


def _half(key: str, old: str):
    """Read float16 or bfloat16, weights in 16 bits, with fp16 or bf16 as what is computed in."""

    def handler(t: Translation, value: Any) -> None:
        names = [name for name in (key, old) if t.theirs.get(name)] or [key]
        if not t.has(key):
            t.give(key, t.theirs.get(old) or value, ", ".join(names))

    return handler


def _long_rows(t: Translation, value: Any) -> None:
    t.give("overlong", {"raise": "error"}.get(value, value), "excess_length_strategy")


def _each_epoch(key: str):
    """Read N times in an epoch as a share of the run's steps."""

    def handler(t: Translation, value: Any) -> None:
        name = {"save_steps": "saves_per_epoch", "eval_steps": "evals_per_epoch"}[key]
        epochs = float(t.theirs.get("num_epochs") or 1)
        if value == 1 or not value:
            t.give(key, "epoch" if value else "off", name)
        elif t.theirs.get("max_steps"):
            t.drop(name, value, "max_steps decides where an epoch is cut; --save_steps and --eval_steps set others")
        else:
            t.give(key, round(1 / (value * epochs), 6), name, f"{value} in an epoch")

    return handler


def _trackers(t: Translation, value: Any) -> None:
    """Read wandb_project and use_tensorboard."""
    names = {"wandb_project": "wandb", "use_tensorboard": "tensorboard", "use_mlflow": "mlflow"}
    given = {name: tracker for name, tracker in names.items() if t.theirs.get(name)}
    if given and not t.has("report_to"):
        t.give("report_to", list(given.values()), ", ".join(given))
    if t.theirs.get("wandb_project") and not t.has("wandb_project"):
        t.give("wandb_project", t.theirs["wandb_project"], "wandb_project")


def _hub(t: Translation, value: Any) -> None:
    t.give("hub_model_id", value, "hub_model_id")
    t.give("push_to_hub", True, "hub_model_id")
    t.give("hub_private_repo", True, "hub_model_id")


def _checkpointing(t: Translation, value: Any) -> None:
    """Read what is offloaded as what is recomputed."""
    t.give("gradient_checkpointing", "full" if isinstance(value, str) else value, "gradient_checkpointing")


def _resume(t: Translation, value: Any) -> None:
    if value:
        t.give("resume_from_checkpoint", "auto", "auto_resume_from_checkpoints")


def _unfrozen(t: Translation, value: Any) -> None:
    """Read patterns that fit the beginning of a parameter's name; those with a range of its rows are left to the user."""
    if any(re.search(r"\[\d*:\d*\]$", pattern) for pattern in value):
        t.decide("unfrozen_parameters", value, "here a parameter is trained whole; new tokens have add_tokens")
    else:
        wanted = ["^" + pattern.removeprefix("^") + ("" if pattern.endswith("$") else ".*") for pattern in value]
        t.give("unfrozen_parameters", wanted, "unfrozen_parameters", "patterns of whole names here")


def _deduplicate(t: Translation, value: Any) -> None:
    t.give("duplicates", "drop" if value else "keep", "dataset_exact_deduplication")


def _finish(t: Translation) -> None:
    """Add the defaults that differ, see the module's docstring."""
    _of_all_sources(t)
    if not t.has("learning_rate"):
        t.decide("learning_rate", "not given", "Axolotl has no default; write one")
    if not any(entry.key in ("use_lora", "use_qlora") for entry in t.settings):
        t.default("method", "full")
    elif not t.has("lora_target_modules") and not any(left.key == "lora_target_modules" for left in t.open):
        t.decide("lora_target_modules", "not given", "Axolotl trains no module then; write all-linear, or names")
    t.default("max_length", 512)
    t.default("num_train_epochs", 1.0)
    t.default("per_device_train_batch_size", 1)
    t.default("warmup_steps", 0.03, "at most 100 steps: with more than 3,333 write 100")
    t.default("lr_scheduler_type", "cosine")
    t.default("weight_decay", 0.0)
    keep_shape(t)


MARKS = "base_model sequence_len micro_batch_size num_epochs sample_packing val_set_size adapter lora_target_linear datasets"
DIALECT = Dialect(
    name="axolotl",
    title="Axolotl",
    marks=frozenset(MARKS.split()),
    handlers={
        **{key: (lambda t, value, key=key: _other_task(t, key, value)) for key in OTHER_TASKS},
        **strategies.HANDLERS,
        **ATTENTION,
        "processor_type": usual("processor_type", why="images and sound of the rows are not read"),
        "datasets": _datasets,
        "test_datasets": _test_datasets,
        **dict.fromkeys(("chat_template", "chat_template_jinja"), with_another),
        "adapter": _adapter,
        "bnb_config_kwargs": _four_bits,
        "peft": _peft,
        "unfrozen_parameters": _unfrozen,
        "added_tokens_overrides": usual("added_tokens_overrides", {}, why="write add_tokens: [...], which adds rows"),
        "loraplus_lr_embedding": usual("loraplus_lr_embedding", 1e-6, why=ONE_RATE),
        "lora_target_modules": _targets,
        "lora_target_linear": _target_linear,
        "batch_size": _total_batch,
        "special_tokens": _special_tokens,
        "excess_length_strategy": _long_rows,
        "lr_scheduler": _schedule,
        "cosine_min_lr_ratio": _min_lr,
        **{name: _half("fp16", "float16") for name in ("fp16", "float16")},
        **{name: _half("bf16", "bfloat16") for name in ("bf16", "bfloat16")},
        **{
            name: usual(name, 1, why=ONE_BATCH)
            for name in ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")
        },
        "saves_per_epoch": _each_epoch("save_steps"),
        "evals_per_epoch": _each_epoch("eval_steps"),
        **dict.fromkeys(("wandb_project", "use_tensorboard", "use_mlflow"), _trackers),
        "hub_model_id": _hub,
        "dataset_exact_deduplication": _deduplicate,
        "auto_resume_from_checkpoints": _resume,
        "gradient_checkpointing": _checkpointing,
    },
    renamed=RENAMED,
    dropped=DROPPED,
    finish=_finish,
    differs=(
        "rows are shuffled by the seed in another order, and packed into other packs",
        "losses are averaged over the tokens of a step, where Axolotl averages each process by itself",
    ),
)
