"""The dialects of `trl sft`, by version 1.16, and of transformers' TrainingArguments.

Their defaults stand in trl/trainer/sft_config.py, trl/trainer/model_config.py and trl/scripts/utils.py, and in
transformers/training_args.py; which modules peft adapts where none are named, in peft/utils/constants.py.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from ...config.data_source import DataSource
from ...config.value_types import as_sources
from ...data.sources import Source, known_format, read_rows
from ...errors import UserError
from ...models.model_facts import find_facts
from ...plan.command import read_model
from . import strategies
from .sources import ATTENTION, model_of, split_of
from .translation import Dialect, Translation, usual, with_another

OF_OTHER_TRAINERS = (
    "reward_funcs num_generations max_completion_length beta max_prompt_length reward_model_path desirable_weight"
)
_DROPPED = {
    "dtype torch_dtype": "weights that are trained are float32, the others bf16; bf16 and fp16 set what is computed in",
    "bnb_4bit_quant_storage": "it is the type that is computed in, so that it can be sharded",
    "activation_offloading": "gradient_checkpointing recomputes as few layers as memory asks for",
    "padding_free pad_to_multiple_of pad_token": "there is no padding",
    "lora_task_type": "models are causal language models",
    "ignore_bias_buffers project trackio_space_id trackio_bucket_id trackio_static_space_id": "the engine, and report_to",
    "hub_revision": "push_to_hub uploads to the main branch",
    "dataloader_in_order": "a thread reads the next step",
    "parallelism_config config_file accelerator_config": "the strategy decides it",
    "env": "set variables in front of the command",
    "use_liger": "this project has kernels of its own",
    "benchmarks hub_model_revision": "manyrank evaluate, and push",
}
DROPPED = {name: why for names, why in _DROPPED.items() for name in names.split()}
LOOKED_AT = 20  # rows


def _dataset_name(t: Translation, value: Any) -> None:
    rows = {"name": t.theirs["dataset_config"]} if t.theirs.get("dataset_config") else {}
    train, test = t.theirs.get("dataset_train_split", "train"), t.theirs.get("dataset_test_split", "test")
    validates = str(t.theirs.get("eval_strategy", "no")).lower() not in ("no", "false")
    if "datasets" in t.theirs:
        t.drop("dataset_name", value, "datasets counts")
        return
    t.give("data_path", {"path": value, **rows, **({"split": train} if train != "train" else {})}, "dataset_name")
    if validates:
        t.give("eval_data_path", {"path": value, **rows, "split": test}, "dataset_name, dataset_test_split")


def _datasets(t: Translation, value: Any) -> None:
    sources = []
    for entry in value:
        source = {name: inner for name, inner in entry.items() if inner is not None}
        rows = split_of(t, "datasets", source)
        path, files = source.pop("path", ""), source.pop("data_files", None)
        if source.pop("columns", None):
            t.drop("datasets.columns", entry["columns"], "other columns of a row are not read")
        for name in source:
            t.decide(f"datasets.{name}", source[name])
        paths = [files] if isinstance(files, str) else files or [path]
        sources += [{"path": inner, **rows} for inner in paths]
    t.give("data_path", sources, "datasets")


def _mixture(t: Translation, value: dict[str, Any]) -> None:
    """Read the data of the alignment handbook's recipes; a weight there is a part that stays the same in each epoch."""
    entries = [{"path": entry["id"], **entry} for entry in value["datasets"]]
    for entry in entries:
        entry["name"] = entry.pop("config", None)
        if (part := entry.pop("weight", None)) not in (None, 1):
            t.decide("dataset_mixture.weight", part, "the same rows each epoch: write max_rows, which the seed chooses")
        del entry["id"]
    _datasets(t, entries)
    if value.get("test_split_size"):
        t.give("eval_split", value["test_split_size"], "dataset_mixture.test_split_size")


def _text_field(t: Translation, value: Any) -> None:
    t.give("format_type", "text", "dataset_text_field")
    if value != "text":
        t.give("columns", {"text": value}, "dataset_text_field")


def _packing(t: Translation, value: Any) -> None:
    strategy = t.theirs.get("packing_strategy", "bfd")
    if not value:
        return
    t.give("packing", "dataset", "packing")
    if strategy == "bfd_split":
        t.give("overlong", "split", "packing_strategy")
    elif strategy != "bfd":
        t.decide("packing_strategy", strategy, "documents are cut anywhere and attend to each other; bfd does not")


def _only(t: Translation, value: Any) -> None:
    """Read assistant_only_loss and completion_only_loss: either leaves the prompt out, as is done here."""
    names = ("assistant_only_loss", "completion_only_loss")
    either = any(t.theirs.get(name) for name in names)
    if (either or t.theirs.get("completion_only_loss") is False) and not t.has("train_on_prompt"):
        t.give("train_on_prompt", not either, ", ".join(name for name in names if name in t.theirs))


def _loss(t: Translation, value: Any) -> None:
    if value in ("nll", "chunked_nll", "dft"):
        t.give("dft_loss", value == "dft", "loss_type")
    else:
        t.decide("loss_type", value, "losses are cross-entropy, and dft")


def _eos(t: Translation, value: Any) -> None:
    facts = find_facts(model_of(t))
    if not facts or facts.tokenizer.get("eos_token") != value:
        t.decide("eos_token", value, "it ends rows of text; an answer ends as its template says")


def _template(t: Translation, value: Any) -> None:
    """Read the template of a recipe; its text, as the alignment handbook has it, must stand in a file here."""
    if "{" in str(value):
        t.decide("chat_template", "Jinja text", "write it into a file, and chat_template: FILE into the recipe")
    else:
        t.give("chat_template", value, "chat_template")


def _callbacks(t: Translation, value: Any) -> None:
    if all(":" in str(name) for name in value):
        t.give("callbacks", value, "callbacks")
    else:
        t.drop("callbacks", value, "a script's own names: write module:Class")


def _other_trainer(t: Translation, key: str, value: Any) -> None:
    t.refuse(key, value, "is a key of another trainer than SFT's")


def _finish(t: Translation) -> None:
    """Add the defaults that differ, see the module's docstring."""
    finish_arguments(t)
    t.default("learning_rate", 2e-5)
    finish_adapters(t)
    t.default("lora_dropout", 0.05)
    _what_is_learned(t)


def finish_adapters(t: Translation) -> None:
    """Add the defaults of trl's ModelConfig."""
    if not t.theirs.get("use_peft"):
        t.default("method", "full")
    elif not t.has("lora_target_modules"):
        _usual_modules(t)
    t.default("bnb_4bit_use_double_quant", False)


def finish_arguments(t: Translation) -> None:
    """Add the defaults of transformers' TrainingArguments."""
    t.default("per_device_train_batch_size", 8)
    t.default("lr_scheduler_type", "linear")
    t.default("num_train_epochs", 3.0)


def _finish_transformers(t: Translation) -> None:
    finish_arguments(t)
    t.default("learning_rate", 5e-5)
    t.default("method", "full", "TrainingArguments know of no adapter")


def _usual_modules(t: Translation) -> None:
    """Set the modules that peft adapts in this architecture."""
    name = model_of(t)
    try:
        kind = read_model(name).model_type
    except UserError:
        kind = ""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    modules = USUAL.get(kind)
    if isinstance(modules, list):
        t.default("lora_target_modules", modules, f"peft's for {kind}")
    else:
        why = (
            f"peft names modules by architecture, and that of {name} does not show here; all-linear is more than these"
        )
        t.decide("lora_target_modules", "not given", why)


def _what_is_learned(t: Translation) -> None:
    """Of messages TRL learns every token, of a prompt and its completion the completion: the rows decide."""
    if t.has("train_on_prompt") or t.has("format_type"):
        return
    value = next((entry.value for entry in t.settings if entry.key == "data_path"), [])
    sources = [DataSource(**({"path": x} if isinstance(x, str) else x)) for x in as_sources(value)]
    try:
        kinds = {_kind(source) for source in sources}
    except UserError:
        kinds = set()
    why = "TRL learns every token of messages, and the completion alone of a prompt with one; "
    if kinds == {"prompt and completion as text"}:
        t.decide("dataset_name", *kinds, "TRL joins them as text; here the chat template renders them")
    elif kinds == {"messages"}:
        t.default("train_on_prompt", True, "for rows of messages")
    elif len(kinds) > 1:
        t.decide("completion_only_loss", "not given", f"{why}there are {' and '.join(sorted(kinds))}")
    elif not kinds:
        why += "the rows are not here: write completion_only_loss: true or false there"
        t.decide("completion_only_loss", "not given", why)


def _kind(source: DataSource) -> str:
    """What the first row of a source is."""
    known = known_format(Source(source.path, split=source.split, name=source.name))
    row = next((row.value for row in islice(read_rows(known), LOOKED_AT) if isinstance(row.value, dict)), {})
    if "prompt" in row and "completion" in row:
        return "prompt and completion as text" if isinstance(row["prompt"], str) else "prompt and completion"
    return "text" if "text" in row and "messages" not in row else "messages"


_HANDLERS = {
    **strategies.HANDLERS,
    **ATTENTION,
    "callbacks": _callbacks,
    **{name: (lambda t, value, name=name: _other_trainer(t, name, value)) for name in OF_OTHER_TRAINERS.split()},
    "train_sampling_strategy": usual(
        "train_sampling_strategy", "random", "group_by_length", why="rows are shuffled anew in every epoch"
    ),
}
MARKS = "dataset_name use_peft dataset_text_field assistant_only_loss completion_only_loss dataset_num_proc packing_strategy "
MARKS += (
    "attn_implementation dataset_train_split dataset_config dataset_mixture max_length eos_token model_name_or_path"
)
DIALECT = Dialect(
    name="trl",
    title="TRL",
    marks=frozenset(MARKS.split()),
    renamed={"use_bnb_nested_quant": "bnb_4bit_use_double_quant"},
    handlers={
        **_HANDLERS,
        "dataset_name": _dataset_name,
        "datasets": _datasets,
        "dataset_mixture": _mixture,
        "dataset_text_field": _text_field,
        "packing": _packing,
        **dict.fromkeys(
            ("packing_strategy", "dataset_config", "dataset_train_split", "dataset_test_split"), with_another
        ),
        "assistant_only_loss": _only,
        "completion_only_loss": _only,
        "loss_type": _loss,
        "model_revision": usual("model_revision", "main", why="the main branch is loaded; name a folder with another"),
        "eos_token": _eos,
        "chat_template": _template,
        "truncation_mode": usual("truncation_mode", "keep_start", why="rows that are too long lose their end"),
    },
    dropped=DROPPED,
    finish=_finish,
    differs=("rows are shuffled by the seed in another order, and packed into other packs",),
)
TRANSFORMERS = Dialect(
    name="transformers",
    title="transformers",
    marks=frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "output_dir", "learning_rate"}),
    handlers=_HANDLERS,
    dropped=DROPPED,
    finish=_finish_transformers,
    differs=("rows are shuffled by the seed in another order, and read by their format",),
)
