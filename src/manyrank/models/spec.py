"""Shapes of models, read from `config.json` without torch or weights.

    embedding -> [layer kinds with their counts] -> norm -> head
                  linears by name, experts, everything that is no matrix product

Families differ in a few traits (FAMILIES); a type that is not there is read as a Llama and says so in `guessed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Linear:
    """A matrix of `outputs` x `inputs`, and a bias or none."""

    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * self.bias


@dataclass(frozen=True)
class Experts:
    """Gated experts, of which each token takes `per_token`; transformers 5 keeps them in two tensors without modules."""

    number: int
    per_token: int
    hidden: int
    intermediate: int
    biases: bool = False

    @property
    def weights(self) -> int:
        return self.number * 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.weights + self.biases * self.number * (2 * self.intermediate + self.hidden)


@dataclass(frozen=True)
class Attention:
    """Widths of what attention multiplies, in elements of a token, over all heads."""

    heads: int
    query: int
    key: int
    value: int
    window: int | None = None
    latent: tuple[int, ...] = ()  # widths of low-rank queries and key-values (multi-head latent attention)
    normed: int = 0  # of query and key, what goes through a norm

    @property
    def output(self) -> int:
        return self.value if self.latent else self.query


@dataclass(frozen=True)
class Layer:
    """`count` decoder layers that are alike."""

    count: int
    attention: Attention
    linears: Mapping[str, Linear]
    experts: Experts | None
    norms: int  # over the hidden width
    rest: int  # parameters of norms, routers, sinks
    parallel: bool = False  # attention and MLP read the same norm

    @property
    def parameters(self) -> int:
        return (
            sum(linear.parameters for linear in self.linears.values())
            + self.rest
            + (self.experts.parameters if self.experts else 0)
        )

    @property
    def active(self) -> int:
        """Weights that multiply a token."""
        experts = self.experts
        routed = experts.weights // experts.number * experts.per_token if experts else 0
        return sum(linear.weights for linear in self.linears.values()) + routed


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model. Widths are in elements; `head_as_is` says that logits are a plain product."""

    name: str
    model_type: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    final_norm: int  # parameters
    tied: bool
    head_as_is: bool
    soft_capped: bool  # attention scores
    norm: str  # see Family
    swiglu: bool  # a gated MLP's activation is SiLU
    rope: int  # width of a rotary table
    max_positions: int | None
    guessed: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def depth(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return sum(layer.count * layer.parameters for layer in self.layers) + self.outside

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embedding, head and final norm."""
        return self.embedding * (1 if self.tied else 2) + self.final_norm

    @property
    def active(self) -> int:
        """Weights of the layers that multiply a token; the head not counted."""
        return sum(layer.count * layer.active for layer in self.layers)

    def each(self) -> Iterator[Layer]:
        """The kind of every layer, from the first to the last."""
        for layer in self.layers:
            for _ in range(layer.count):
                yield layer


@dataclass(frozen=True)
class Family:
    """Differences of a model type from Llama."""

    norms: int = 2
    norm: str = "rms"  # "wide": RMS that is scaled in float32; "layer": torch's; "centred": Cohere's
    qk_norm: str = ""  # "head": over each head; "full": over all of them
    qkv_bias: bool | None = None  # None: as attention_bias in the config says
    o_bias: bool | None = None
    fused: bool = False  # q, k, v in one, gate and up in one
    fused_mlp: bool = False
    tied: bool = False  # where the config does not say
    head_dim: int | None = None
    activation: str = "silu"  # of a gated MLP, where the config does not say
    plain_mlp: tuple[str, str] | None = None  # names of two matrices without a gate
    parallel: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False),
    "mixtral": Family(qkv_bias=False),
    "ministral": Family(qkv_bias=False),
    "granite": Family(),
    "smollm3": Family(),
    "seed_oss": Family(),
    "qwen2": Family(qkv_bias=True, o_bias=False),
    "qwen2_moe": Family(qkv_bias=True, o_bias=False),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "gemma": Family(norm="wide", tied=True, head_dim=256, activation="gelu"),
    "gemma2": Family(norms=4, norm="wide", tied=True, head_dim=256, activation="gelu"),
    "gemma3_text": Family(norms=4, norm="wide", tied=True, head_dim=256, activation="gelu", qk_norm="head"),
    "phi3": Family(fused=True, qkv_bias=False, o_bias=False),
    "olmo2": Family(norm="wide", qk_norm="full"),
    "olmoe": Family(qk_norm="full"),
    "glm4": Family(norms=4, fused_mlp=True, o_bias=False),
    "cohere": Family(norms=1, norm="centred", tied=True, parallel=True),
    "cohere2": Family(norms=1, norm="centred", tied=True, parallel=True),
    "starcoder2": Family(norm="layer", tied=True, plain_mlp=("c_fc", "c_proj")),
    "gpt_oss": Family(norm="wide"),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
}
# Models whose logits are changed after the head (see `fused_head.fuse`).
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class ConfigReader:
    """The keys of a config.json under their several names; for a model of several parts those of its text count."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        text = config.get("text_config")
        self.config, self.where = {**config, **(text if isinstance(text, dict) else {})}, where

    def __call__(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        return default

    def width(self, *names: str, default: int | None = None) -> int:
        value = self(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            what = f"{names[0]} is {value!r}, not a count" if value is not None else f"there is no {names[0]}"
            raise UserError(what, where=self.where, fix="give the config.json of a causal language model")
        return value


def from_config(config: Mapping[str, Any], *, name: str, where: str = "config.json") -> ModelSpec:
    """Read a config.json's content.

    Raises:
        UserError: a width is missing or not a count, or a key is of a kind that no model here has.
    """
    try:
        return _from_config(config, name=name, where=where)
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        what = f"its keys are not understood: {type(error).__name__}: {error}"
        raise UserError(what, where=where, fix="give the config.json of a causal language model") from None


def _from_config(config: Mapping[str, Any], *, name: str, where: str) -> ModelSpec:
    get = ConfigReader(config, where)
    model_type = get("model_type", default="")
    model_type = model_type if model_type in FAMILIES else model_type.removesuffix("_text")
    model_type = "gemma3_text" if model_type == "gemma3" else model_type
    family = FAMILIES.get(model_type, Family(qkv_bias=get("qkv_bias", "use_qkv_bias")))
    hidden = get.width("hidden_size", "n_embd", "d_model")
    head_dim = get.width("head_dim", default=family.head_dim or hidden // get.width("num_attention_heads", "n_head"))
    norm = hidden * (2 if family.norm == "layer" else 1)
    rope = get("qk_rope_head_dim", default=int(head_dim * (get("partial_rotary_factor") or 1)))
    return ModelSpec(
        name=name,
        model_type=model_type,
        hidden=hidden,
        vocabulary=get.width("vocab_size"),
        layers=tuple(_layers(get, family, hidden=hidden, head_dim=head_dim, norm=norm)),
        final_norm=norm,
        tied=bool(get("tie_word_embeddings", default=family.tied)),
        head_as_is=all(get(key) in (None, 1.0, 1) for key in CHANGES_LOGITS),
        soft_capped=bool(get("attn_logit_softcapping")),
        norm=family.norm,
        swiglu=get("hidden_act", "hidden_activation", default=family.activation) in ("silu", "swish"),
        rope=rope,
        max_positions=get("max_position_embeddings", "n_positions"),
        guessed=model_type not in FAMILIES,
        config=get.config,
    )


def _layers(get: ConfigReader, family: Family, *, hidden: int, head_dim: int, norm: int) -> Iterator[Layer]:
    depth = get.width("num_hidden_layers", "n_layer")
    kinds: dict[tuple, int] = {}
    for index in range(depth):
        kind = (_is_sparse(get, index), _window(get, index))
        kinds[kind] = kinds.get(kind, 0) + 1
    for (sparse, window), count in kinds.items():
        attention, linears, extra = _attention(get, family, hidden=hidden, head_dim=head_dim, window=window)
        mlp, experts, router = _mlp(get, family, hidden=hidden, sparse=sparse)
        yield Layer(
            count=count,
            attention=attention,
            linears={**linears, **mlp},
            experts=experts,
            norms=family.norms,
            rest=family.norms * norm + extra + router,
            parallel=family.parallel,
        )


def _is_sparse(get: ConfigReader, index: int) -> bool:
    if not get("num_local_experts", "num_experts", "n_routed_experts"):
        return False
    if index < (get("first_k_dense_replace") or 0) or index in (get("mlp_only_layers") or ()):
        return False
    return (index + 1) % (get("decoder_sparse_step") or 1) == 0 and index % (get("moe_layer_freq") or 1) == 0


def _window(get: ConfigReader, index: int) -> int | None:
    window = get("sliding_window")
    if not window or get("use_sliding_window") is False:
        return None
    if kinds := get("layer_types"):
        return window if kinds[index] == "sliding_attention" else None
    if get("model_type") == "gemma2":
        return None if index % 2 else window
    if pattern := get("sliding_window_pattern"):
        return window if (index + 1) % pattern else None
    return window if index >= (get("max_window_layers") or 0) or not get("use_sliding_window") else None


def _attention(get: ConfigReader, family: Family, *, hidden: int, head_dim: int, window: int | None):
    """The widths, the matrices by name, and the parameters of norms and sinks."""
    heads = get.width("num_attention_heads", "n_head")
    bias = bool(get("attention_bias", "use_bias", default=get("model_type") == "gpt_oss"))
    if get("kv_lora_rank"):
        return _latent_attention(get, hidden=hidden, heads=heads, bias=bias, window=window)
    groups = get.width("num_key_value_heads", default=heads)
    query, key = heads * head_dim, groups * head_dim
    qkv = bias if family.qkv_bias is None else family.qkv_bias
    out = (bias if family.qkv_bias is None else False) if family.o_bias is None else family.o_bias
    if family.fused:
        linears = {"qkv_proj": Linear(hidden, query + 2 * key, qkv)}
    else:
        linears = {
            "q_proj": Linear(hidden, query, qkv),
            "k_proj": Linear(hidden, key, qkv),
            "v_proj": Linear(hidden, key, qkv),
        }
    linears["o_proj"] = Linear(query, hidden, out)
    per_head = family.qk_norm == "head" or bool(get("use_qk_norm"))
    extra = {"head": 2 * head_dim, "full": query + key}.get(
        family.qk_norm, (heads + groups) * head_dim if per_head else 0
    )
    normed = query + key if family.qk_norm or per_head else 0
    sinks = heads if get("model_type") == "gpt_oss" else 0
    return Attention(heads, query, key, key, window, normed=normed), linears, extra + sinks


def _latent_attention(get: ConfigReader, *, hidden: int, heads: int, bias: bool, window: int | None):
    rotary, plain = get.width("qk_rope_head_dim"), get.width("qk_nope_head_dim")
    value, rank, query_rank = get.width("v_head_dim"), get.width("kv_lora_rank"), get("q_lora_rank")
    query = heads * (rotary + plain)
    if query_rank:
        linears = {"q_a_proj": Linear(hidden, query_rank, bias), "q_b_proj": Linear(query_rank, query)}
    else:
        linears = {"q_proj": Linear(hidden, query)}
    linears |= {
        "kv_a_proj_with_mqa": Linear(hidden, rank + rotary, bias),
        "kv_b_proj": Linear(rank, heads * (plain + value)),
        "o_proj": Linear(heads * value, hidden, bias),
    }
    latent = (*([query_rank] if query_rank else []), rank)
    return Attention(heads, query, query, heads * value, window, latent=latent), linears, sum(latent)


def _mlp(get: ConfigReader, family: Family, *, hidden: int, sparse: bool):
    """The matrices by name, the experts, and the parameters of the router."""
    if not sparse:
        return _dense(get, family, hidden, get.width("intermediate_size", "n_inner", default=4 * hidden)), None, 0
    number = get.width("num_local_experts", "num_experts", "n_routed_experts")
    width = get.width("moe_intermediate_size", "intermediate_size")
    per_token = get.width("num_experts_per_tok", "experts_per_token", "num_experts_per_token")
    oss = get("model_type") == "gpt_oss"
    router = number * hidden
    # DeepSeek-V3's correction of the scores is a buffer; gpt-oss has a bias.
    router += number if oss else 0
    shared: dict[str, Linear] = {}
    if count := get("n_shared_experts"):
        shared = _dense(get, family, hidden, count * width)
    elif inner := get("shared_expert_intermediate_size"):
        shared = {**_dense(get, family, hidden, inner), "shared_expert_gate": Linear(hidden, 1)}
    return shared, Experts(number, per_token, hidden, width, biases=oss), router


def _dense(get: ConfigReader, family: Family, hidden: int, inner: int) -> dict[str, Linear]:
    bias = bool(get("mlp_bias", "use_bias"))
    if family.plain_mlp:
        first, second = family.plain_mlp
        return {first: Linear(hidden, inner, bias), second: Linear(inner, hidden, bias)}
    if family.fused or family.fused_mlp:
        return {"gate_up_proj": Linear(hidden, 2 * inner, bias), "down_proj": Linear(inner, hidden, bias)}
    return {
        "gate_proj": Linear(hidden, inner, bias),
        "up_proj": Linear(hidden, inner, bias),
        "down_proj": Linear(inner, hidden, bias),
    }
