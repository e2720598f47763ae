"""Rewards in the form that trl calls: functions of a completion, and reward models.

A reward model is a sequence classifier with one label, whole on every rank, that reads prompt and completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import unset_hf_deepspeed_config

from ...config.resolve import TrainConfig
from ...data.questions import Question
from ...data.rewards import Reward, rewarded, scorers
from ...errors import UserError
from ...models.load import needs_its_code, untrusted

AT_ONCE = 8  # conversations
THREADS = 8  # that wait for the programs of a reward


def reward_functions(
    rewards: Sequence[Reward],
    config: TrainConfig,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> list[Callable]:
    """Make the functions that trl calls: token ids of completions and the numbers of their questions, to a score each."""
    scores = scorers(rewards)
    return [
        _with_model(reward, config, questions, tokenizer, device)
        if reward.model
        else _reward_function(reward, scores[reward.name], config, questions, tokenizer)
        for reward in rewards
    ]


def _reward_function(reward: Reward, score, config: TrainConfig, questions: Sequence[Question], tokenizer) -> Callable:
    def score_one(text: str, number: int) -> float:
        question = questions[number]
        return rewarded(
            reward,
            score,
            text,
            question.reference,
            question.row,
            place=question.place,
            on_error=config.on_reward_error,
        )

    def function(completion_ids: list, number: list[int], **_) -> list[float]:
        texts = _texts(tokenizer, completion_ids)
        if reward.kind != "command":
            return list(map(score_one, texts, number))
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(score_one, texts, number))

    function.__name__ = reward.name
    return function


def _with_model(
    reward: Reward, config: TrainConfig, questions: Sequence[Question], tokenizer, device: torch.device
) -> Callable:
    judge = _reward_model(reward, config, device)

    def function(completion_ids: list, number: list[int], **_) -> list[float]:
        texts = _texts(tokenizer, completion_ids)
        conversations = [
            [*questions[row].prompt, {"role": "assistant", "content": text}] for row, text in zip(number, texts)
        ]
        return [
            rewarded(
                reward,
                lambda *_, value=value: value,
                text,
                questions[row].reference,
                {},
                place=questions[row].place,
                on_error=config.on_reward_error,
            )
            for row, text, value in zip(number, texts, judge(conversations))
        ]

    function.__name__ = reward.name
    return function


def _texts(tokenizer: PreTrainedTokenizerBase, completions: list[list[int]]) -> list[str]:
    """Decode completions with their thinking, which trl removes for some tokenizers."""
    return [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]


def _reward_model(
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
    if faults := [problem for problem, is_there in problems.items() if is_there]:
        fix = "give a trained classifier with one label, whose tokenizer has a chat template"
        raise UserError(f"no reward model: {'; '.join(faults)}", where=where, fix=fix)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read at the last token
    model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def scored(conversations: list[list[dict]]) -> list[float]:
        texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
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
