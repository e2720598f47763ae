"""Rules about adapters: what they start from, and which of their options go together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..config.patterns import matching
from ..config.peft_config import token_ids
from ..models.model_facts import find_facts, read_header
from ..runs import artifact
from .context import RunContext
from .model import ADAPTED_EXPERTS, HEADS, adapts_experts
from .rule import error, unless, warning

EMBEDDINGS_IN = ("embed_tokens", "wte", "embed_in")
EMBEDDINGS = (*EMBEDDINGS_IN, *HEADS)  # modules of the vocabulary's size
PLAIN = re.compile(r"(?<!\.experts)(?<!\.base_layer)\.lora_[AB](\.default)?\.weight$")  # names of tensors of plain LoRA
PATTERNS = ("rank_pattern", "alpha_pattern")
# Names of repositories that hold the same weights in 4 bits, or mirror them.
COPIES = re.compile(r"[-_](unsloth|bnb|4bit)\b", re.IGNORECASE)


def _keeps_below(s: RunContext) -> str | None:
    """The option that freezes an adapter below the trained one."""
    if s.config.new_adapter:
        return "new_adapter"
    return f"init_lora_weights {s.config.init_lora_weights}" if s.config.subtracts_start else None


def _start_of_saved(s: RunContext) -> str | None:
    kind, saved = s.config.init_lora_weights, s.config.adapter or (s.config.sft_model and s.goes_on_from_adapter)
    if kind == "true" or not saved or s.config.new_adapter:
        return None
    return f"init_lora_weights {kind}, and the adapter {s.config.start_model} has its values"


def _together(s: RunContext) -> str | None:
    """Name two options of which one leaves no room for the other."""
    config, below = s.config, _keeps_below(s)
    own = not config.start_model or config.new_adapter  # else patterns are peft's, of a saved adapter
    own_start = config.init_lora_weights not in ("true", "gaussian")
    parameters, embedding = _adapted_parameters(s), _embedding_target(s)
    pairs = {
        (f"lora_target_modules {embedding}", "use_dora"): embedding and config.use_dora,
        (f"lora_target_modules {embedding}", "lora_bias"): embedding and config.lora_bias,
        (f"lora_target_modules {embedding}", f"init_lora_weights {config.init_lora_weights}"): embedding and own_start,
        ("use_dora", below or f"init_lora_weights {config.init_lora_weights}"): config.use_dora
        and bool(below or config.init_lora_weights == "loftq"),
        ("use_dora", "lora_bias"): config.use_dora and config.lora_bias,
        ("use_dora", f"method {config.method}"): config.use_dora and config.method == "fp8",
        (f"{parameters}", "use_dora"): parameters and config.use_dora,
        (f"{parameters}", "lora_bias"): parameters and config.lora_bias,
        (f"{parameters}", "lora_dropout"): parameters and bool(config.lora_dropout),
        (f"{parameters}", below or f"init_lora_weights {config.init_lora_weights}"): parameters
        and (own_start or bool(below)),
    } | {
        (f"{parameters}", key): parameters and own and _fits_experts(s, getattr(config, key))
        for key in (*PATTERNS, "exclude_modules")
    }
    return next((" with ".join(pair) for pair, meet in pairs.items() if meet), None)


def _adapted_parameters(s: RunContext) -> str | None:
    """Name what puts adapters on parameters that are no linear layers: the recipe, or peft on experts."""
    if s.config.target_parameters or not s.config.uses_lora:
        return "target_parameters" if s.config.target_parameters else None
    if s.model and adapts_experts(s.config, s.model.model_type):
        everything, names = s.config.lora_target_modules == "all-linear", ADAPTED_EXPERTS[s.model.model_type]
        return f"lora_target_modules {'all-linear' if everything else ', '.join(names)} on experts"
    return None


def _fits_experts(s: RunContext, patterns: Iterable[str]) -> bool:
    """Return whether a pattern fits experts, to which peft gives ranks and alphas of its own, excluded or not."""
    layers = [f"model.layers.{number}.mlp" for number in range((s.model and s.model.layers) or 1)]
    names = [layer + part for layer in layers for part in ("", ".experts", ".experts.gate_up_proj")]
    return any(matching(name, patterns) for name in names)


def _embedding_target(s: RunContext) -> str | None:
    names = s.config.lora_target_modules
    return next((name for name in names if name.rpartition(".")[2] in EMBEDDINGS_IN), None)


def _odd_rank(s: RunContext) -> str | None:
    ranks = [s.config.lora_r, *s.config.rank_pattern.values()]
    odd = [rank for rank in ranks if rank % 2]
    return (
        f"init_lora_weights orthogonal with rank {odd[0]}"
        if s.config.init_lora_weights == "orthogonal" and odd
        else None
    )


def _below_in_grpo(s: RunContext) -> str | None:
    below = _keeps_below(s)
    return f"{below} with task grpo" if below and s.config.is_grpo else None


def _whole_tied(s: RunContext) -> str | None:
    names = [name for name in s.config.modules_to_save if name.rpartition(".")[2] in EMBEDDINGS]
    tied = s.config.uses_lora and s.model is not None and s.model.ties_embeddings
    return f"modules_to_save {names[0]}, whose weights are those of another module" if names and tied else None


def _whole_and_tokens(s: RunContext) -> str | None:
    ids, whole = s.config.trainable_token_indices, s.config.modules_to_save
    modules = {*ids} if isinstance(ids, dict) else {*EMBEDDINGS_IN} if ids else set()
    both = [name for name in whole if name.rpartition(".")[2] in {module.rpartition(".")[2] for module in modules}]
    return f"modules_to_save {', '.join(both)}, and trainable_token_indices of the same" if both else None


def _tied_tokens(s: RunContext) -> str | None:
    ids = s.config.trainable_token_indices
    tied = isinstance(ids, dict) and len(ids) > 1 and s.model is not None and s.model.ties_embeddings
    return f"trainable_token_indices of {' and '.join(ids)}, which share their weights" if tied else None


def _tokens_beyond(s: RunContext) -> str | None:
    ids, size = s.config.trainable_token_indices, s.model.config.get("vocab_size") if s.model else None
    new = s.config.add_tokens or s.config.add_special_tokens
    beyond = [number for number in token_ids(ids) if isinstance(size, int) and number >= size and not new]
    return f"trainable_token_indices {beyond[0]}, and the model has {size} tokens" if beyond else None


def _more_below(s: RunContext) -> str | None:
    """What a frozen adapter has beside A and B."""
    file = s.adapter / "adapter_model.safetensors" if s.config.new_adapter and s.config.adapter and s.adapter else None
    names = sorted(read_header(file)) if file and file.is_file() else []
    more = next((name for name in names if name != "__metadata__" and not PLAIN.search(name)), None)
    return (
        f"new_adapter on {s.config.adapter}, which is more than A and B of linear layers: it has {more}"
        if more
        else None
    )


def _known_tokens(s: RunContext) -> str | None:
    wanted = [*s.config.add_tokens, *s.config.add_special_tokens]
    if s.config.adapter or not s.model:  # whose tokenizer has them
        return None
    known = [token for token in wanted if s.model.has_token(token)]
    return f"the tokenizer of {s.model.name} has {', '.join(known)}" if known else None


def _frozen_tokens(s: RunContext) -> str | None:
    """Look for new tokens whose rows full fine-tuning does not train."""
    config, names = s.config, [f"model.{name}.weight" for name in EMBEDDINGS]
    new, unfrozen = [*config.add_tokens, *config.add_special_tokens], config.unfrozen_parameters or [".*"]
    trained = any(matching(name, unfrozen, below=True) for name in names)
    frozen = any(matching(name, config.frozen_parameters, below=True) for name in names)
    if config.method != "full" or not new or (trained and not frozen):
        return None
    return f"new tokens {', '.join(new)}, and frozen embeddings"


def _rows_of_saved(s: RunContext) -> str | None:
    """Look for new tokens of a saved adapter that has no rows for them."""
    config, words = s.config, [*s.config.add_tokens, *s.config.add_special_tokens]
    if not words or not config.adapter or config.new_adapter or not s.model or not s.model.has_tokens:
        return None
    whole = any(name.rpartition(".")[2] in EMBEDDINGS_IN for name in config.modules_to_save)
    rows = whole or max(token_ids(config.trainable_token_indices), default=0) >= s.model.next_id
    return None if rows else f"add_tokens {', '.join(words)}, and the adapter {config.adapter} has no rows for them"


def _tokens_in_pieces(s: RunContext) -> str | None:
    """Name what a chat template writes as a token, and the tokenizer takes apart."""
    if not s.chats or not s.template or not s.model or not s.model.has_tokens:
        return None
    written = dict.fromkeys(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", s.template))
    pieces = [t for t in written if not s.model.has_token(t) and t not in s.config.add_special_tokens]
    return f"the tokenizer of {s.model.name} has no token {', '.join(pieces)}" if pieces else None


# The base of an adapter


def _other_base(s: RunContext) -> str | None:
    if not s.config.adapter or s.config.allow_base_change:
        return None
    source, name = artifact.find(s.config.adapter), s.config.model_name_or_path
    made_for, here = _fingerprint(source.base), _fingerprint(name)
    recorded = _recorded(source)
    if here and recorded:
        other = f"{s.config.adapter} was trained on other weights than those of {name}"
        return None if here == recorded else other
    if here and made_for:
        return None if here == made_for else f"{s.config.adapter} is for {source.base}, and {name} has other weights"
    if _plain(source.base) == _plain(name):
        return None
    return f"{s.config.adapter} is for {source.base}, and the base is {name}"


def _fingerprint(name: str) -> str | None:
    """That of a base whose files are here, in a folder."""
    facts = find_facts(name) if name == "embedded" or Path(name).expanduser().is_dir() else None
    config = facts and facts.find("config.json")
    return artifact.base_fingerprint(str(config.parent), None) if config else None


def _recorded(source: artifact.ModelSource) -> str | None:
    """The fingerprint of the base in a checkpoint of the adapter's run."""
    places = [source.adapter, *sorted(source.run.glob("checkpoint-*"))] if source.run else [source.adapter]
    for place in filter(None, places):
        if (place / "run.json").is_file():
            own = json.loads((place / "run.json").read_text(encoding="utf-8")).get("model")
            return own if own and "@" not in own else None
    return None


def _plain(name: str) -> str:
    return COPIES.sub("", Path(name).name).lower()


def _misfit(s: RunContext) -> str | None:
    """Compare an adapter's matrices with the base's, by the heads of their files."""
    adapter, model = s.adapter, s.model
    if not adapter or not model or model.quantisation:
        return None
    file, base = adapter / "adapter_model.safetensors", model.headers()
    for name, shape in adapted_in(read_header(file)) if file.is_file() else ():
        here = base.get(f"{name}.weight", [])
        if len(here) == 2 and sorted(here) != sorted(shape):  # Conv1D has (in, out)
            return f"the adapter's {name} is for {shape} weights, and that of {model.name} has {here}"
    return None


def adapted_in(header: dict) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes (out, in) of the matrices that plain adapters are for."""
    for name, entry in header.items():
        if match := re.match(r"(?:base_model\.model\.)?(.+)\.lora_A\.(?:default\.)?weight", name):
            up = header.get(name.replace(".lora_A.", ".lora_B."))
            if up:
                yield match[1], [up["shape"][0], entry["shape"][1]]


ADAPTER_RULES = (
    error(
        "two-starts",
        ("adapter", "sft_model"),
        unless(lambda s: bool(s.config.adapter and s.config.sft_model), "adapter and sft_model together"),
        reason="A run starts from one adapter.",
        fix="keep one of them",
    ),
    error(
        "adapter-of-full",
        ("adapter", "method"),
        unless(lambda s: bool(s.config.adapter) and s.config.method == "full", "method full, and adapter {c.adapter}"),
        reason="Full fine-tuning has no place for an adapter.",
        fix="merge it first (manyrank merge), and train the result; or use method lora",
    ),
    error(
        "new-adapter-on-none",
        ("new_adapter", "adapter"),
        unless(lambda s: s.config.new_adapter and not s.config.adapter, "new_adapter, and no adapter below it"),
        reason="It freezes the adapter that is given, and trains another on top.",
        fix="give it as adapter: FOLDER, or leave new_adapter out",
    ),
    error(
        "new-adapter-on-more",
        ("new_adapter", "adapter"),
        _more_below,
        reason="The frozen adapter and the new one are saved as one, which holds for matrices A and B alone.",
        fix="leave new_adapter out, to train the adapter itself; or merge it first (manyrank merge), where it merges",
    ),
    error(
        "another-base",
        ("adapter", "model_name_or_path"),
        _other_base,
        reason="An adapter is a difference to the weights that it was trained on; on others it is noise.",
        fix="leave model_name_or_path out, or, if it is meant so, set allow_base_change: true",
    ),
    error(
        "adapter-does-not-fit",
        ("adapter", "sft_model", "model:model.safetensors"),
        _misfit,
        reason="Its matrices cannot be added to those of the base.",
        fix="give the base that the adapter was trained on",
    ),
    error(
        "start-of-saved-adapter",
        ("init_lora_weights", "adapter", "sft_model"),
        _start_of_saved,
        reason="The option says how new adapters start.",
        fix="leave init_lora_weights out, or write new_adapter: true for another adapter on top",
    ),
    error(
        "adapter-options-together",
        (
            "lora_target_modules",
            "use_dora",
            "lora_bias",
            "target_parameters",
            "init_lora_weights",
            "new_adapter",
            "lora_dropout",
            "rank_pattern",
            "alpha_pattern",
            "exclude_modules",
            "method",
        ),
        _together,
        reason="peft does not have these together, they are not started here, or the saved adapter would not load in peft.",
        fix="keep one of the two, or list lora_target_modules without experts",
        of_many=True,
    ),
    error(
        "dora-on-4-bits-in-shards",
        ("use_dora", "method", "strategy"),
        unless(
            lambda s: s.config.use_dora and s.config.method == "qlora" and "parameters" in s.strategy.shards,
            "use_dora with method qlora on {s.strategy.name}",
        ),
        reason="DoRA takes its first magnitudes from whole weights, which no process has where they are loaded in shards.",
        fix="use ddp or zero2, or method: lora; or leave use_dora out: use_rslora with a larger rank costs less",
    ),
    error(
        "dora-on-8-bits",
        ("use_dora", "method"),
        unless(lambda s: s.config.use_dora and s.config.method == "int8", "use_dora with method int8"),
        reason="DoRA writes out the base's weights in each forward, and on CPUs peft 0.21 then loses their 8-bit scales; on "
        "GPUs it is not tried.",
        fix="use method: lora or qlora, or leave use_dora out",
    ),
    error(
        "loftq-without-4-bits",
        ("init_lora_weights", "method"),
        unless(
            lambda s: s.config.init_lora_weights == "loftq" and s.config.method != "qlora",
            "init_lora_weights loftq with method {c.method}",
        ),
        reason="It makes up for what a base in 4 bits has lost.",
        fix="use method: qlora, or leave init_lora_weights out",
    ),
    error(
        "orthogonal-with-odd-rank",
        ("init_lora_weights", "lora_r", "rank_pattern"),
        _odd_rank,
        reason="Half of the rank's directions are for A, the other half for B.",
        fix="give even ranks",
    ),
    error(
        "eva-in-grpo",
        ("init_lora_weights", "task"),
        unless(
            lambda s: s.config.init_lora_weights == "eva" and s.config.is_grpo, "init_lora_weights eva with task grpo"
        ),
        reason="EVA starts adapters from learned tokens of the data, and its rows are prompts.",
        fix="leave it out",
    ),
    error(
        "frozen-adapter-in-grpo",
        ("new_adapter", "init_lora_weights", "task"),
        _below_in_grpo,
        reason="trl switches adapters on and off to compare the model with its start, all of them alike.",
        fix="merge the adapter below first (manyrank merge), or leave the option out",
        of_many=True,
    ),
    error(
        "whole-tied-embeddings",
        ("modules_to_save", "model:config.json"),
        _whole_tied,
        reason="The copy that is trained would part from the other module, and the saved model would be neither.",
        fix="use trainable_token_indices for single tokens, or method: full",
    ),
    error(
        "whole-module-and-its-tokens",
        ("modules_to_save", "trainable_token_indices"),
        _whole_and_tokens,
        reason="Where a module is trained whole, its tokens are, too.",
        fix="keep one of them",
    ),
    error(
        "tokens-of-tied-modules",
        ("trainable_token_indices", "model:config.json"),
        _tied_tokens,
        reason="What is trained of one counts for the other.",
        fix="give the ids as one list",
    ),
    error(
        "tokens-beyond-model",
        ("trainable_token_indices", "model:config.json"),
        _tokens_beyond,
        reason="The embedding has no such rows.",
        fix="give ids of the tokenizer's tokens",
    ),
    error(
        "tokens-that-are-there",
        ("add_tokens", "add_special_tokens", "model:tokenizer.json"),
        _known_tokens,
        reason="Their embeddings are the base's, and new ones would replace them.",
        fix="leave them out; trainable_token_indices trains the embeddings of tokens that are there",
    ),
    error(
        "new-tokens-of-saved-adapter",
        ("add_tokens", "add_special_tokens", "adapter"),
        _rows_of_saved,
        reason="Its shape cannot change.",
        fix="leave them out, write new_adapter: true for another adapter on top, or merge it first (manyrank merge)",
    ),
    error(
        "new-tokens-in-frozen-rows",
        ("add_tokens", "add_special_tokens", "frozen_parameters", "unfrozen_parameters"),
        _frozen_tokens,
        reason="Their rows start as the mean of all others, and would stay so.",
        fix="train the embeddings and lm_head, too, or use method: lora, which trains these rows alone",
    ),
    error(
        "new-tokens-in-grpo",
        ("add_tokens", "add_special_tokens", "task"),
        unless(
            lambda s: s.config.is_grpo and bool(s.config.add_tokens or s.config.add_special_tokens),
            "add_tokens or add_special_tokens with task grpo",
        ),
        reason="Completions would be sampled from embeddings that nothing has trained.",
        fix="add and train them by SFT, merge the result (manyrank merge), and start from that",
    ),
    warning(
        "template-tokens-in-pieces",
        ("chat_template", "model:tokenizer.json"),
        _tokens_in_pieces,
        reason="The model reads each as several tokens, and generation stops at none of them.",
        fix="add them, as add_special_tokens: ['<|im_start|>', '<|im_end|>'], or choose a template of tokens that are there",
    ),
    error(
        "unmergeable-for-vllm",
        ("use_vllm", "lora_bias", "trainable_token_indices", "target_parameters"),
        unless(
            lambda s: (
                s.config.use_vllm != "off"
                and bool(s.config.lora_bias or s.config.trainable_token_indices or s.config.target_parameters)
            ),
            "use_vllm {c.use_vllm} with adapters that are more than A and B of linear layers",
        ),
        reason="trl hands vLLM the merged weights after each step, and these do not merge.",
        fix="set use_vllm: off, or leave them out",
    ),
)
