"""Greedy answers to a few questions, before and after training."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast
from transformers import PreTrainedTokenizerBase

from ..chat_template.render import RenderOptions, stop_ids
from .attention import own_attention


def generate_completions(
    wrapped: torch.nn.Module,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    *,
    options: RenderOptions,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """Answer each question greedily. All ranks together, in evaluation mode.

    `model.generate` calls the model past its wrapper, which FSDP2 does not survive (the root must run first); so this
    is the loop itself, through the same forward as the training.

    Args:
        wrapped: what the engine forwards.
        model: the same model without its wrapper.
        device: on which it computes; its parameters may rest in host memory.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with own_attention(base):  # packed attention knows no key-value cache
        return [_answer(wrapped, tokenizer, question, options, max_new_tokens, device) for question in questions]


def _answer(
    wrapped: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    options: RenderOptions,
    max_new_tokens: int,
    device: torch.device,
) -> str:
    stops = stop_ids(tokenizer, options)
    prompt = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options.template_kwargs
    )
    ids, cache, tokens = inputs["input_ids"].to(device), None, []
    while len(tokens) < max_new_tokens:
        out = wrapped(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Rank 0 decides, so that all ranks stop together.
        ids, cache = broadcast(out.logits[:, -1].argmax(-1, keepdim=True)), out.past_key_values
        if ids.item() in stops:
            break
        tokens.append(ids.item())
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
