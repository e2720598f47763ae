"""Answers of a model that trains on packs: greedy, with a cache, and the attention of the training is put back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from manyrank.chat_template.render import RenderOptions
from manyrank.models.attention import PACKED, PACKED_PLAIN, use_packed_attention
from manyrank.models.generate import generate_completions

QUESTION = ["How many beads are on the string?"]


def said(model, tokenizer) -> list[str]:
    with torch.no_grad():
        return generate_completions(
            model.eval(),
            model,
            tokenizer,
            QUESTION,
            options=RenderOptions(),
            max_new_tokens=12,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_answers_are_those_of_the_model_as_loaded(kind, plain, embedded_model, tokenizer):
    torch.manual_seed(0)
    small = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_pretrained(embedded_model) if kind == "qwen3" else Gemma2ForCausalLM(small)
    wanted = said(model, tokenizer)
    use_packed_attention(model, plain=plain)
    assert said(model, tokenizer) == wanted != [""]
    assert model.config._attn_implementation == (PACKED_PLAIN if plain else PACKED)
