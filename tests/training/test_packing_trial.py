"""Every kind of attention that transformers has: packed as one by one, or refused before the training."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from manyrank.data.loader import side_by_side
from manyrank.errors import UserError
from manyrank.models.attention import PACKED, own_attention, packed_attention, use_packed_attention
from manyrank.training.packing_trial import prove_packing

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
    head_dim=4,
)
# What is told of a kind's attention; None: it is packed.
KINDS = {
    "llama": ({}, None),
    "mistral": ({"sliding_window": 8}, None),
    "gemma2": ({"sliding_window": 8}, None),  # soft-caps
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, None),  # learnt positions
    "granite_swa": ({"sliding_window": 8}, None),  # sinks
    "gpt_oss": ({**EXPERTS, "sliding_window": 8}, None),  # sinks, experts
    "mimo_v2_flash": ({**EXPERTS, "sliding_window": 8, "n_routed_experts": 4, "v_head_dim": 8}, None),
    "jetmoe": ({"kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 4}, None),  # .view of what is returned
    "afmoe": ({**EXPERTS, "sliding_window": 8}, None),  # .view, too
    "deepseek_v3": ({**EXPERTS, **LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1}, None),  # wide values
    "doge": ({}, "a mask of its own"),
    "nemotron": ({}, "attention that is not given the bounds of documents"),
    "phimoe": ({**EXPERTS, "sliding_window": 8}, "the window of 2 attention layers"),
    "bert": ({"is_decoder": False}, "attention to later tokens"),
    "llama4_text": ({**EXPERTS, "attention_chunk_size": 8}, "chunked_attention layers"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "no pluggable attention"),
}


def make(kind: str, **given):
    known = AutoConfig.for_model(kind)
    names = {name for name in SMALL if hasattr(known, name)} | set(given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{k: (SMALL | given)[k] for k in names}))
    for name, parameter in model.named_parameters():  # as wide as trained ones, so that a small part counts
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif "sink" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def documents(*lengths: int) -> list[dict]:
    drawn = [np.random.default_rng(length).integers(10, 120, length) for length in lengths]
    return [{"input_ids": ids, "labels": ids, "source": "test", "row": 0} for ids in drawn]


def losses(model, rows: list[dict]) -> torch.Tensor:
    inputs = side_by_side(rows).inputs
    if len(rows) == 1:
        inputs = {"input_ids": inputs["input_ids"]}
    logits = model(**inputs, use_cache=False).logits[0].split([len(row["labels"]) for row in rows])
    pairs = [(part[:-1], torch.as_tensor(row["labels"])[1:]) for part, row in zip(logits, rows)]
    return torch.stack([torch.nn.functional.cross_entropy(*pair, reduction="sum") for pair in pairs])


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_packed_as_one_by_one_or_refused(kind):
    """Documents longer than the windows, in float32; with the attention that the model was loaded with, one by one."""
    given, refused = KINDS[kind]
    model, rows = make(kind, **given), documents(25, 13, 30)
    if refused:
        with pytest.raises(UserError, match=f"packing does not know {refused}.* of a {kind} model"):
            use_packed_attention(model)
            prove_packing(model, model, exact=True)
        return
    alone = torch.cat([losses(model, [row]) for row in rows])
    wanted = gradients(model, alone.sum())
    use_packed_attention(model)
    prove_packing(model, model, exact=True)
    assert model.config._attn_implementation == PACKED
    packed = losses(model, rows)
    found = gradients(model, packed.sum())
    assert torch.allclose(packed, alone, rtol=1e-5) and set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5, name


# The trial, with models that go wrong in one way each.


def small(kind: type[PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(kind.config_class(**SMALL)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    use_packed_attention(model)
    return model


class Shifted(LlamaForCausalLM):
    """Mixes each token with a little of the one before it, also over the bounds of documents."""

    def forward(self, input_ids, **inputs):
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + 0.1 * embedded.roll(1, dims=1), **inputs)


class Counting(GPT2LMHeadModel):
    """Counts positions itself. (A rotation does not mind, as it only knows distances.)"""

    def forward(self, input_ids, position_ids=None, **inputs):
        return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **inputs)


class Sharp(modeling_llama.LlamaAttention):
    """Hands over less than it does by itself."""

    def forward(self, hidden_states, **inputs):
        out, weights = super().forward(hidden_states, **inputs)
        return (out if self.config._attn_implementation == PACKED else out * 1.5), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "told"), [(Shifted, "mixes the tokens"), (Counting, "counts positions")])
def test_documents_that_see_each_other_are_found(kind, told, dtype):
    exact = dtype == torch.float32
    sound, model = small(kind.__base__).to(dtype), small(kind).to(dtype)
    prove_packing(sound, sound, exact=exact)
    with pytest.raises(UserError, match=told) as caught:
        prove_packing(model, model, exact=exact)
    assert caught.value.where == "packing" and "packing: none" in caught.value.fix
    assert model.config._attn_implementation == PACKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_attention_than_the_models_own_is_found(dtype):
    model = small().to(dtype)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Sharp
    with pytest.raises(UserError, match="some part of the attention"):
        prove_packing(model, model, exact=dtype == torch.float32)


def test_windows_that_are_only_in_the_mask_are_found_and_configs_are_left_as_they_were():
    shape = {**SMALL, **EXPERTS, "sliding_window": 4096, "max_position_embeddings": 8192}
    told, untold = MistralForCausalLM(MistralConfig(**shape)), PhimoeForCausalLM(PhimoeConfig(**shape))
    for model in (told, untold):
        use_packed_attention(model)
    prove_packing(told.eval(), told, exact=True)
    with pytest.raises(UserError, match="window of 2 attention layers"):
        prove_packing(untold.eval(), untold, exact=True)
    assert told.config.sliding_window == untold.config.sliding_window == 4096


@pytest.mark.parametrize(("kind", "layers"), [("llama", 40), ("deepseek_v3", 40), ("granite_swa", 20)])
def test_a_model_that_rounds_in_each_layer_is_packed(kind, layers):
    """In bf16; experts are chosen otherwise after another kernel's rounding, and logits move far."""
    model = make(kind, **KINDS[kind][0], num_hidden_layers=layers).bfloat16()
    use_packed_attention(model)
    prove_packing(model, model, exact=False)


# What attention is handed.


def call(module=None, mask=None, **given):
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32), "max_length_q": 4}
    return packed_attention(module or torch.nn.Module(), query, key, key, mask, **{**bounds, **given})[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"position_bias": torch.zeros(6, 6)}, "the argument position_bias"),
        ({"head_mask": 1.0, "alibi": True}, "the argument alibi, the argument head_mask"),
        ({"mask": torch.zeros(1, 1, 6, 6)}, "a mask of its own"),
        ({"is_causal": False}, "attention to later tokens"),
        ({"cu_seq_lens_q": None}, "not given the bounds"),
    ],
)
def test_what_is_not_known_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        call(**given)


def test_what_says_nothing_changes_nothing():
    torch.manual_seed(0)
    plain = call()
    torch.manual_seed(0)
    silent = {"position_ids": torch.arange(6), "use_cache": False, "encoder_hidden_states": None, "max_length_k": 4}
    assert torch.equal(call(**silent, output_attentions=False), plain) and plain.is_contiguous()


def test_sinks_are_a_key_without_a_value():
    """One more key, whose logit is the sink and whose value is zero; in float64, with a window and grouped heads."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    sinks, bounds = torch.randn(4, dtype=torch.float64), torch.tensor([0, 7], dtype=torch.int32)
    out, _ = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=bounds,
        max_length_q=7,
        sliding_window=3,
        s_aux=sinks,
        scaling=0.3,
    )
    for head in range(4):
        for at in range(7):
            seen = slice(max(0, at - 2), at + 1)
            logits = torch.cat([0.3 * key[0, head // 2, seen] @ query[0, head, at], sinks[head : head + 1]])
            wanted = logits.softmax(0)[:-1] @ value[0, head // 2, seen]
            assert torch.allclose(out[0, at, head], wanted)


@pytest.mark.parametrize("make_model", [small, lambda: make("gemma2", sliding_window=8)])
def test_own_attention_is_that_of_before(make_model: Callable):
    model = copy.deepcopy(make_model())
    before = model.config._attn_implementation
    if before != PACKED:
        use_packed_attention(model)
    own = "sdpa" if before == PACKED else before
    with own_attention(model):
        assert model.config._attn_implementation == own
    assert model.config._attn_implementation == PACKED
