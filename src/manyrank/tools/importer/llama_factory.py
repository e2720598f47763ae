"""The dialect of LLaMA-Factory, by version 0.9.5.

Its defaults stand in src/llamafactory/hparams/ (data_args.py, finetuning_args.py, model_args.py), the others are those of
transformers' TrainingArguments; its templates in src/llamafactory/data/template.py, and dataset_info.json is read as
src/llamafactory/data/parser.py and converter.py do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.spellings import INSTEAD
from ...errors import UserError
from ...runs.mapping_files import read_json_object
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
    split_of,
)
from .translation import Dialect, Translation, usual, with_another

INFO = "dataset_info.json"
STAGES = {
    "pt": "pretrains on text; a recipe with data of format_type: text does, too",
    "rm": "trains a reward model",
    "ppo": "trains by a reward model",
    "dpo": "trains by preferences",
    "kto": "trains by preferences",
}
# Templates that write the same text here; of a reasoning model none does, where a conversation has several turns.
TEMPLATES = {"llama3": "llama3", "chatml": "chatml", "qwen3_nothink": "chatml"}
OWN_TEMPLATES = {"qwen": QWEN25}  # that are the model's own
COLUMNS = {  # of dataset_info.json: the field here, and the column where none is named
    "alpaca": {
        "prompt": ("instruction", "instruction"),
        "query": ("input", "input"),
        "response": ("output", "output"),
        "history": ("history", None),
        "system": ("system", None),
        "tools": ("tools", None),
    },
    "sharegpt": {
        "messages": ("messages", "conversations"),
        "system": ("system", None),
        "tools": ("tools", None),
    },
}
TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "system_tag": ("system", "system"),
}
_DROPPED = {
    "overwrite_cache tokenized_path": "tokenised rows are kept, and made anew where something changed",
    "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels": "this project has kernels of its own",
    "infer_backend infer_dtype export_dir export_size export_device export_legacy_format": "manyrank merge and serve",
    "do_train do_predict predict_with_generate": "`manyrank train` trains",
    "upcast_layernorm": "norms are computed in float32 as the model does",
    "media_dir image_max_pixels image_min_pixels video_max_pixels video_maxlen freeze_vision_tower "
    "freeze_multi_modal_projector": "rows are text",
    "ignore_pad_token_for_loss": "there is no padding",
    "print_param_status ray_num_workers": "the start of a run shows what is trained",
    "use_swanlab swanlab_project swanlab_run_name": "report_to names the trackers",
    "compute_accuracy": "manyrank evaluate",
    "enable_thinking preserve_thinking": "templates that are read here have no thinking",
    "pissa_iter": "it counts with pissa_init alone",
    "pissa_convert": "what is saved always fits the original base",
    "quantization_device_map": "the strategy decides where weights are",
}
DROPPED = {name: why for names, why in _DROPPED.items() for name in names.split()}


def _stage(t: Translation, value: Any) -> None:
    if value != "sft":
        t.refuse("stage", value, STAGES.get(value, "is not known"))


def _dataset(t: Translation, value: Any) -> None:
    t.give("data_path", _sources(t, "dataset", value), "dataset")


def _eval_dataset(t: Translation, value: Any) -> None:
    t.give("eval_data_path", _sources(t, "eval_dataset", value), "eval_dataset")


def _sources(t: Translation, key: str, value: Any) -> list[dict[str, Any]]:
    names = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    folder, info = _info(t, names)
    rows = t.theirs.get("max_samples")
    return [_source(t, key, name, folder, info) | ({"max_rows": rows} if rows else {}) for name in names]


def _info(t: Translation, names: list[str]) -> tuple[Path, dict[str, Any]]:
    """Read dataset_info.json: in dataset_dir, in dataset_dir beside the recipe, or beside the recipe."""
    named, beside = Path(str(t.theirs.get("dataset_dir") or "data")), Path(t.file).parent
    folders = [named, beside / named, beside]
    folder = next((folder for folder in folders if (folder / INFO).is_file()), None)
    if folder is None:
        what = f"the data sets {', '.join(names)} stand in {INFO}, and it is not in {named}/ or beside {t.file}"
        raise UserError(what, where=f"{t.file}, dataset", fix=f"put {INFO} beside it, or name the data: --data FILE")
    return folder, read_json_object(folder / INFO)


def _source(t: Translation, key: str, name: str, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    if name not in info:
        raise UserError(f"there is no data set {name!r}", where=f"{folder / INFO}", fix="name one that is there")
    entry = {inner: value for inner, value in info[name].items() if value is not None}
    place = f"{key}.{name}"
    if path := entry.pop("hf_hub_url", None):
        entry.pop("ms_hub_url", None)
        entry.pop("om_hub_url", None)
    elif path := entry.pop("file_name", None):
        path = str(folder / path)
    else:
        what = f"{name} is neither a file nor of the Hugging Face hub"
        raise UserError(what, where=f"{folder / INFO}, {name}", fix="load it, and name the file: --data FILE")
    entry["name"] = entry.pop("subset", None)
    source = {"path": path, **split_of(t, place, entry), **_format(t, place, entry)}
    for inner in entry:
        if entry[inner]:
            t.decide(f"{place}.{inner}", entry[inner])
    return source


def _format(t: Translation, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    formatting = entry.pop("formatting", "alpaca")
    theirs = entry.pop("columns", {})
    form = "alpaca" if formatting == "alpaca" else "sharegpt"
    fields = COLUMNS[form]
    for name in theirs.keys() - fields.keys():
        t.decide(f"{key}.columns.{name}", theirs[name])
    named = {field: theirs.get(name, None if theirs else usual) for name, (field, usual) in fields.items()}
    if form == "sharegpt":
        named["messages"] = named["messages"] or "conversations"
        _check_tags(t, key, entry.pop("tags", {}), openai=formatting == "openai")
    optional = ("input", "system", "tools", "history")
    columns = {
        field: f"{column}?" if field in optional else column
        for field, column in named.items()
        if column and column != field
    }
    return {"format_type": "alpaca" if form == "alpaca" else "messages"} | ({"columns": columns} if columns else {})


def _check_tags(t: Translation, key: str, tags: dict[str, str], *, openai: bool) -> None:
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    check_turns(t, f"{key}.tags", role, content)
    check_roles(t, f"{key}.tags", {ours: [tags.get(tag, usual)] for tag, (ours, usual) in TAGS.items()})
    if (call := tags.get("function_tag", "function_call")) != "function_call" and not openai:
        t.decide(f"{key}.tags.function_tag", call, "a call stands in a turn of function_call")


def _template(t: Translation, value: Any) -> None:
    if value in TEMPLATES:
        t.give("chat_template", TEMPLATES[value], f"template {value}")
    elif is_own_template(t, OWN_TEMPLATES.get(value)):
        t.drop("template", value, "it is the model's own, which is used")
    else:
        t.decide("template", value, OWN_OR_JINJA)


def _history(t: Translation, value: Any) -> None:
    if value:
        t.give("train_on_last_turn", True, "mask_history")


def _packing(t: Translation, value: Any) -> None:
    if not value:
        t.drop("packing", value, "off")
    elif not t.theirs.get("neat_packing"):
        t.decide(
            "packing", value, "documents of a pack attend to each other there; neat_packing: true is packing: dataset"
        )


def _neat_packing(t: Translation, value: Any) -> None:
    if value:
        t.give("packing", "dataset", "neat_packing")
        if "cutoff_len" not in t.theirs:
            _length(t, 2048)


def _length(t: Translation, value: Any) -> None:
    packs = bool(t.theirs.get("neat_packing"))
    t.give("max_length", int(value) - packs, "cutoff_len", "less 1, as for its packs" if packs else "")


def _no_checkpointing(t: Translation, value: Any) -> None:
    if value:
        t.give("gradient_checkpointing", "off", "disable_gradient_checkpointing")


def _pissa(t: Translation, value: Any) -> None:
    if value:
        steps = t.theirs.get("pissa_iter", 16)
        t.give("init_lora_weights", "pissa" if steps == -1 else f"pissa_niter_{steps}", "pissa_init")


def _adapter(t: Translation, value: Any) -> None:
    if "," in str(value):
        t.decide("adapter_name_or_path", value, "one adapter is trained further; merge the others first")
    else:
        t.give("adapter", value, "adapter_name_or_path")


def _new_adapter(t: Translation, value: Any) -> None:
    if value and t.theirs.get("adapter_name_or_path"):
        t.give("new_adapter", True, "create_new_adapter")


def _new_tokens(t: Translation) -> None:
    """Ask what is trained of embeddings beside new rows, where LLaMA-Factory trains all of them."""
    grows = t.theirs.get("resize_vocab") or t.has("add_tokens") or t.has("add_special_tokens")
    adapts = t.theirs.get("finetuning_type", "lora") == "lora"
    if grows and adapts and not t.has("modules_to_save"):
        why = "LLaMA-Factory trains the whole embedding and lm_head then, this project the rows of new tokens"
        t.decide("additional_target", "not given", why)


def _stop_early(t: Translation, value: Any) -> None:
    t.give("early_stopping_patience", value, "early_stopping_steps")


def _finish(t: Translation) -> None:
    """Add the defaults that differ, see the module's docstring."""
    _new_tokens(t)
    t.default("lora_r", 8)
    rank = next((entry.value for entry in t.settings if entry.key in ("lora_rank", "lora_r")), 8)
    if not t.has("lora_alpha"):
        t.default("lora_alpha", 2 * int(rank), "twice the rank")
    t.default("max_length", 2048)
    t.default("per_device_train_batch_size", 8)
    t.default("learning_rate", 5e-5)
    t.default("lr_scheduler_type", "linear")
    t.default("num_train_epochs", 3.0)
    keep_shape(t)


MARKS = (
    "stage finetuning_type cutoff_len template lora_rank lora_target dataset_dir do_train quantization_bit neat_packing"
)
DIALECT = Dialect(
    name="llamafactory",
    title="LLaMA-Factory",
    marks=frozenset(MARKS.split()),
    handlers={
        **strategies.HANDLERS,
        **ATTENTION,
        "stage": _stage,
        "dataset": _dataset,
        "eval_dataset": _eval_dataset,
        "dataset_dir": with_another,
        "max_samples": with_another,
        "cutoff_len": _length,
        "template": _template,
        "mask_history": _history,
        "packing": _packing,
        "neat_packing": _neat_packing,
        "disable_gradient_checkpointing": _no_checkpointing,
        "adapter_name_or_path": _adapter,
        "create_new_adapter": _new_adapter,
        "resize_vocab": with_another,
        "mix_strategy": usual("mix_strategy", "concat", why=INSTEAD["mix_strategy"]),
        "loraplus_lr_embedding": usual("loraplus_lr_embedding", 1e-6, why=ONE_RATE),
        "quantization_method": usual("quantization_method", "bnb", "bitsandbytes", why="bitsandbytes quantises"),
        "pissa_init": _pissa,
        "early_stopping_steps": _stop_early,
    },
    dropped=DROPPED,
    finish=_finish,
    differs=(
        "rows are shuffled by the seed in another order, and max_rows are chosen by the seed, not the first ones",
        "rows that are too long lose their end, where LLaMA-Factory cuts prompts and answers in proportion",
        "instruction and input of a row are joined by a blank line, where LLaMA-Factory has a new line",
        "what a template writes behind the token that ends an answer is not learned, where LLaMA-Factory learns it",
    ),
)
