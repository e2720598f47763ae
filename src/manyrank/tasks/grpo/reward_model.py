"""A reward model as a reward: a sequence classifier with one label, whole on every rank, reads prompt and answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from ...config.resolve import TrainConfig
from ...data.rewards import Reward
from ...errors import UserError
from ...models.load import needs_its_code, untrusted

AT_ONCE = 8  # conversations


def reward_model(
    reward: Reward, config: TrainConfig, device: torch.device
) -> Callable[[list[list[dict]]], list[float]]:
    """A function of conversations, each with its answer, to a score each.

    Raises:
        UserError: it cannot be loaded, is no classifier with one label, or its tokenizer has no chat template.
    """
    where = f"rewards, {reward.name}"
    try:
        with _whole():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                reward.model, trust_remote_code=config.trust_remote_code, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(reward.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        if needs_its_code(error):
            raise untrusted(str(reward.model), where=where) from None
        what = f"the reward model cannot be loaded: {str(error).splitlines()[0]}"
        raise UserError(what, where=where, fix="give a folder or a hub name") from None
    problems = {
        f"it has {model.config.num_labels} labels": model.config.num_labels != 1,
        "it has no weights for its score": bool(info["missing_keys"]),
        "its tokenizer has no chat template": not tokenizer.chat_template,
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        fix = "give a trained classifier with one label, whose tokenizer has a chat template"
        raise UserError(f"no reward model: {'; '.join(found)}", where=where, fix=fix)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read at the last token
    model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def scored(talks: list[list[dict]]) -> list[float]:
        texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
        scores: list[float] = []
        for at in range(0, len(texts), AT_ONCE):
            inputs = tokenizer(
                texts[at : at + AT_ONCE],
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
            ).to(device)
            scores += model(**inputs).logits[:, 0].float().tolist()
        return scores

    return scored


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Load without the shards that transformers makes of every model under ZeRO-3."""
    plugin = AcceleratorState().deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin:
            plugin.set_deepspeed_weakref()
