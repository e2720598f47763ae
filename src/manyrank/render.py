"""Conversations to token ids and labels: the loss is on what the assistant says and on the token that ends its turn.

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    labels  ------------------------------------------------------- Hello<|im_end|> --

The spans come from the tokenizer's own chat template: the text that the template adds when one more assistant turn is
appended. Every step is checked, and where a check fails the conversation is refused: a template that rewrites earlier
turns, or content that contains special tokens, never gives a wrong mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .formats import BadRow, Messages

IGNORE = -100


@dataclass(frozen=True)
class Rendered:
    """One conversation as the model sees it.

    Attributes:
        text: the rendered conversation.
        input_ids: its tokens.
        labels: the token id where supervised, IGNORE elsewhere; as long as input_ids.
        supervised_texts: the text of each supervised span, end-of-turn token included.
    """

    text: str
    input_ids: list[int]
    labels: list[int]
    supervised_texts: list[str]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Rendered:
    """Render one conversation with the tokenizer's template and find what is to be learned.

    Raises:
        BadRow: the template or the content does not allow a mask that is certainly right.
    """
    _refuse_special_text(tokenizer, messages)
    text, spans = _spans(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORE] * len(ids)
    supervised = []
    for start, end in spans:
        inside = [i for i, (left, right) in enumerate(offsets) if left >= start and right <= end and right > left]
        across = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
        if inside != across or not inside:
            raise BadRow("a token reaches over the edge of the assistant's turn")
        for i in inside:
            labels[i] = ids[i]
        supervised.append(text[start:end])
    return Rendered(text, ids, labels, supervised)


def _spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the character range of each assistant turn with its end-of-turn token."""
    text = _apply(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            if message["content"].strip() not in text:
                raise BadRow(f"the chat template drops the {message['role']} message {index + 1}")
            continue
        before = _apply(tokenizer, messages[:index], add_generation_prompt=True)
        after = text if index + 1 == len(messages) else _apply(tokenizer, messages[: index + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise BadRow(
                f"the chat template rewrites the conversation around turn {index + 1}; it cannot be masked yet"
            )
        start = len(before)
        spans.append((start, start + _turn_length(tokenizer, after[start:], message["content"], index + 1)))
    return text, spans


def _turn_length(tokenizer: PreTrainedTokenizerBase, turn: str, content: str, number: int) -> int:
    """Characters of content and end-of-turn token at the start of `turn`."""
    for said in dict.fromkeys((content, content.strip())):
        if turn.startswith(said):
            rest = turn[len(said) :]
            stops = [stop for stop in _special_texts(tokenizer) if rest.startswith(stop)]
            if not stops:
                raise BadRow(f"the chat template ends turn {number} without an end-of-turn token")
            return len(said) + len(max(stops, key=len))
    raise BadRow(f"the chat template changes the content of turn {number}")


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, **kwargs) -> str:
    if not messages and not kwargs:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # a template raises what it likes: jinja2 errors, TypeError, ...
        raise BadRow(f"the chat template refuses the conversation: {error}") from None


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _refuse_special_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    for special in _special_texts(tokenizer):
        for number, message in enumerate(messages, 1):
            if special in message["content"]:
                raise BadRow(f"turn {number} contains {special}, which the tokenizer would read as a special token")
