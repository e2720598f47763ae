"""Rules about the base model, as far as its small files tell; none where they are not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config.schema import TrainConfig
from ..models.model_facts import ModelFacts
from ..topology.strategies import EngineKind
from .context import RunContext
from .rule import error, warning

HEADS = ("lm_head", "embed_out")
NOT_CAUSAL = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# Experts of these types get adapters under all-linear: peft 0.21 gives them for the names that transformers 4 had, and
# then leaves the dense matrices of those names without (peft/utils/transformers_weight_conversion.py).
ADAPTED_EXPERTS = {
    "mixtral": ("w1", "w2", "w3"),
    **dict.fromkeys(("qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"), ("gate_proj", "down_proj", "up_proj")),
}


def adapts_experts(config: TrainConfig, model_type: str) -> bool:
    """Return whether peft puts adapters on the experts of this kind of model."""
    targets, names = config.lora_target_modules, ADAPTED_EXPERTS.get(model_type, ())
    if not config.uses_lora or not names:
        return False
    if targets == "all-linear":  # which is a list of linear layers where layers are chosen
        return not config.layers_to_transform
    return any(name in targets for name in names)


BITS = {"qlora": "load_in_4bit", "int8": "load_in_8bit"}


def _of_model(look: Callable[[RunContext, ModelFacts], str | None]) -> Callable[[RunContext], str | None]:
    """A rule's `broken` for a model whose files are here."""
    return lambda s: look(s, s.model) if s.model else None


def _adapter(s: RunContext) -> str | None:
    here = Path(s.config.model_name_or_path).expanduser() / "adapter_config.json"
    is_adapter = here.is_file() or (s.model is not None and s.model.find("adapter_config.json") is not None)
    return f"{s.config.model_name_or_path} is an adapter" if is_adapter else None


def _not_causal(s: RunContext, model: ModelFacts) -> str | None:
    kinds = [name for name in model.whole.get("architectures") or [] if name.endswith(NOT_CAUSAL)]
    if model.whole.get("is_encoder_decoder"):
        return f"{model.name} is an encoder with a decoder ({model.model_type})"
    return f"{model.name} is a {kinds[0]}" if kinds else None


def _bitsandbytes(model: ModelFacts) -> bool:
    return model.quantisation.get("quant_method") == "bitsandbytes" or any(
        model.quantisation.get(key) for key in BITS.values()
    )


def _quantised(s: RunContext, model: ModelFacts) -> str | None:
    method, quantised = s.config.method, model.quantisation
    if not quantised or (method == "lora" and not _bitsandbytes(model)):
        return None
    if method in BITS and _bitsandbytes(model) and quantised.get(BITS[method]):
        return None
    bits = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}
    kind = next((text for key, text in bits.items() if quantised.get(key)), quantised.get("quant_method", "other"))
    return f"method {method}, and the weights of {model.name} are quantised already ({kind})"


def _stored_in_4_bits(s: RunContext, model: ModelFacts) -> str | None:
    stored = model.quantisation
    if s.config.method != "qlora" or not stored.get("load_in_4bit"):
        return None
    usual = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}  # bitsandbytes'
    given = {key: getattr(s.config, key) for key in usual}
    wrong = [
        f"{key} {str(value).lower()}"
        for key, value in given.items()
        if value is not None and value != stored.get(key, usual[key])
    ]
    return f"{' and '.join(wrong)}, and {model.name} is stored otherwise" if wrong else None


def _experts(*methods: str) -> Callable[[RunContext, ModelFacts], str | None]:
    """Object to methods that convert linear layers alone, where most weights are those of experts."""

    def problem(s: RunContext, model: ModelFacts) -> str | None:
        if s.config.method not in methods or model.experts < 2:
            return None
        return f"method {s.config.method}, and {model.name} has {model.experts} experts"

    return problem


def _packing(s: RunContext, model: ModelFacts) -> str | None:
    reasons = list(model.mixing()) if s.config.packing != "none" else []
    return f"packing: {s.config.packing} with {', '.join(reasons)} of a {model.model_type} model" if reasons else None


def _slow_attention(s: RunContext, model: ModelFacts) -> str | None:
    if not s.gpus or not s.precision.half or s.config.packing == "none":
        return None
    keys = ("attention_dropout", "attn_pdrop", "attn_logit_softcapping")
    obstacles = [f"{key} {model.config[key]:g}" for key in keys if model.config.get(key)]
    obstacles += [f"heads of {width}" for width in sorted(set(model.head_widths)) if width % 8 or width > 256]
    obstacles += ["values as wide as no query"] if len(set(model.head_widths[:2])) > 1 else []
    return f"{', '.join(obstacles)} in {model.place('config.json')}" if obstacles else None


def _head_targets(s: RunContext) -> list[str]:
    wanted = s.config.lora_target_modules
    if not s.config.uses_lora or isinstance(wanted, str):
        return []
    return [target for target in wanted if target.rpartition(".")[2] in HEADS]


def _is_tied(s: RunContext) -> bool:
    return s.model is not None and s.model.ties_embeddings


def _tied_target(s: RunContext, *, fsdp: bool) -> str | None:
    targets = _head_targets(s) if _is_tied(s) and (s.files.kind == EngineKind.FSDP) == fsdp else []
    return f"adapters on {targets[0]}, which shares its weights with the embeddings" if targets else None


def head_target(s: RunContext) -> str | None:
    targets = _head_targets(s)
    return f"adapters on lm_head ({targets[0]})" if targets and not _is_tied(s) else None


def _unknown_targets(s: RunContext, model: ModelFacts) -> list[str]:
    wanted = s.config.lora_target_modules
    if not s.config.uses_lora or isinstance(wanted, str) or not model.weights:
        return []
    missing = [target for target in wanted if not model.has_module(target)]
    # The tied head has no weight of its own.
    return [target for target in missing if not (target in HEADS and model.ties_embeddings)]


def _some_targets_missing(s: RunContext, model: ModelFacts) -> str | None:
    missing = _unknown_targets(s, model)
    some = 0 < len(missing) < len(s.config.lora_target_modules)
    return f"no module of {model.name} is called {' or '.join(missing)}" if some else None


def _all_targets_missing(s: RunContext) -> str | None:
    """Name the targets, where the model has none of them."""
    model = s.model
    missing = _unknown_targets(s, model) if model else []
    none = missing and len(missing) == len(s.config.lora_target_modules)
    return f"no module of {s.config.model_name_or_path} is called {' or '.join(missing)}" if none else None


def _layers(s: RunContext, model: ModelFacts) -> str | None:
    recomputed, chosen = s.config.gradient_checkpointing, s.config.layers_to_transform
    wanted = {
        "gradient_checkpointing": recomputed if isinstance(recomputed, int) else 0,
        "layers_to_transform": max(chosen, default=-1) + 1,
    }
    beyond = [key for key, count in wanted.items() if model.layers and count > model.layers]
    return f"{beyond[0]} {getattr(s.config, beyond[0])}, and {model.name} has {model.layers} layers" if beyond else None


def _positions(s: RunContext, model: ModelFacts) -> str | None:
    if not model.positions or s.config.max_length <= model.positions:
        return None
    return f"max_length {s.config.max_length}, and {model.name} has {model.positions} positions"


def _vocabulary(s: RunContext, model: ModelFacts) -> str | None:
    beyond = model.beyond_vocabulary(s.template)
    size = model.config.get("vocab_size")
    return f"{', '.join(beyond)} of the tokenizer is beyond the {size} tokens of {model.name}" if beyond else None


def _stop(s: RunContext, model: ModelFacts) -> str | None:
    template, stops = s.template, model.stops()
    if not template or not stops or not s.chats:
        return None
    written = set(s.config.stop_tokens) or {stop for stop in stops if stop in template}
    if written & stops or (not s.config.stop_tokens and "eos_token" in template):
        return None
    return f"the chat template writes none of the tokens that end an answer: {', '.join(sorted(stops))}"


def _remote_code(s: RunContext) -> str | None:
    name = s.config.model_name_or_path
    if not s.config.trust_remote_code or name == "embedded" or Path(name).expanduser().is_dir():
        return None
    return f"trust_remote_code with the hub name {name}"


BASE_RULES = (
    error(
        "adapter-as-base",
        ("model_name_or_path",),
        _adapter,
        reason="A run trains adapters on a whole model, or the model itself; adapters on adapters are not known here.",
        fix="name the model that the adapter was trained on, or merge the adapter into it first",
    ),
    error(
        "base-not-causal",
        ("model_name_or_path", "model:config.json"),
        _of_model(_not_causal),
        reason="What is learned is the next token of a text: the base must be a causal language model.",
        fix="choose a causal language model",
    ),
    error(
        "quantised-base",
        ("method", "model:config.json"),
        _of_model(_quantised),
        reason="The quantisation in the files wins over the method: full cannot train or save such weights, and the other "
        "methods would not do what they are called.",
        fix="use qlora for a base of bitsandbytes in 4 bits and int8 for 8 bits, or name the model in 16 bits",
    ),
    error(
        "stored-quantisation",
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "model:config.json"),
        _of_model(_stored_in_4_bits),
        reason="A base that is stored in 4 bits is used as it is, and not quantised again.",
        fix="leave it out, or name the model in 16 bits",
    ),
    warning(
        "experts-not-quantised",
        ("method", "model:config.json"),
        _of_model(_experts(*BITS)),
        reason="transformers 5 keeps all experts of a layer in one parameter, and bitsandbytes quantises only linear "
        "layers: most of the model stays in 16 bits.",
        fix="plan for the memory of method lora, and shard it with fsdp or zero3",
        upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849",
    ),
    error(
        "experts-not-in-float8",
        ("method", "model:config.json"),
        _of_model(_experts("fp8")),
        reason="transformers 5 keeps all experts of a layer in one parameter, and only linear layers are put into float8: "
        "most of the model would stay in 16 bits, and what chooses the experts would be rounded.",
        fix="use method lora",
    ),
    error(
        "packing-unknown-layers",
        ("packing", "model:config.json"),
        _of_model(_packing),
        reason="Packed examples must not see each other, and these parts do not stop at the bounds of documents.",
        fix="set packing: none, which pads instead",
        upstream="https://github.com/huggingface/transformers/issues/46093",
    ),
    warning(
        "attention-by-documents",
        ("packing", "model:config.json"),
        _of_model(_slow_attention),
        reason="The kernel for packed rows knows neither dropout nor soft-caps, and takes heads of up to 256 in multiples of "
        "8 with values as wide as queries: attention takes one document at a time, slower and with more memory.",
        fix="set dropout to 0 in config.json; soft-caps and heads belong to the model and stay",
    ),
    warning(
        "length-beyond-positions",
        ("max_length", "model:config.json"),
        _of_model(_positions),
        reason="The model was not trained on positions that far, and some models have no more.",
        fix="lower max_length, or stretch the rope in config.json",
    ),
    error(
        "layers-beyond-model",
        ("gradient_checkpointing", "layers_to_transform"),
        _of_model(_layers),
        reason="The one says how many layers are recomputed, the other which have adapters, from 0.",
        fix="give a smaller number",
        of_many=True,
    ),
    error(
        "tokens-beyond-vocabulary",
        ("model:tokenizer.json", "model:config.json"),
        _of_model(_vocabulary),
        reason="The model has no embedding for these tokens, and embeddings are not resized here: under ZeRO-3 it goes "
        "wrong, and adapters would not hold the new rows.",
        fix="use the tokenizer that belongs to the model, or resize and save the model before",
        upstream="https://github.com/huggingface/transformers/issues/41959",
    ),
    warning(
        "unknown-stop",
        ("chat_template", "model:generation_config.json"),
        _of_model(_stop),
        reason="The model learns to end its turns with a token at which generation does not stop: completions run to the "
        "length limit.",
        fix="choose a template that ends turns with such a token, or set eos_token_id in the final model's "
        "generation_config.json",
        upstream="https://github.com/QwenLM/Qwen3/issues/927",
    ),
    warning(
        "remote-code-from-hub",
        ("trust_remote_code", "model_name_or_path"),
        _remote_code,
        reason="The code may be another one tomorrow, and it runs with all your rights.",
        fix="download the model, read its code, and name the folder",
    ),
)

ADAPTER_RULES = (
    error(
        "adapters-on-tied-head-under-fsdp",
        ("lora_target_modules", "strategy", "model:config.json"),
        lambda s: _tied_target(s, fsdp=True),
        reason="accelerate has the two tied again once they are sharded, and that fails on the adapter's layer.",
        fix="leave lm_head out of lora_target_modules, or use ddp or zero3",
    ),
    warning(
        "adapters-on-tied-head",
        ("lora_target_modules", "model:config.json"),
        lambda s: _tied_target(s, fsdp=False),
        reason="Merging such adapters changes the embeddings with lm_head, and the merged model is another one.",
        fix="leave lm_head out of lora_target_modules, or never merge these adapters",
        upstream="https://github.com/huggingface/peft/issues/2018",
    ),
    warning(
        "adapters-on-head",
        ("lora_target_modules",),
        head_target,
        reason="The loss is then computed from whole logits, tokens x vocabulary: slower, and with far more memory.",
        fix="leave lm_head out of lora_target_modules",
    ),
    warning(
        "unknown-targets",
        ("lora_target_modules", "model:model.safetensors"),
        _of_model(_some_targets_missing),
        reason="peft puts adapters on the names that it finds, and passes over the others without a word.",
        fix="look for a slip in the names",
    ),
    error(
        "no-targets",
        ("lora_target_modules", "model:model.safetensors"),
        _all_targets_missing,
        reason="Nothing would be trained.",
        fix="write all-linear, or names of the model's linear layers, as q_proj,v_proj",
    ),
)
MODEL_RULES = (*BASE_RULES, *ADAPTER_RULES)
