"""Conversations to token ids and labels: the loss is on what the assistant says and on the token that ends its turn.

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    labels  ------------------------------------------------------- Hello<|im_end|> --

The conversation is rendered whole by the tokenizer's own chat template; `templates` finds the turns in it. What is
learned is the turn's content, with the tool calls and thinking that the template keeps, up to the end-of-turn token.
The tokens are checked again: none reaches over the edge of a turn, and the learned ones read as the turn does. Where
a check fails the conversation is refused, with the reason; there is no wrong mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from .formats import BadRow, Message
from .templates import Layout, Template

IGNORE = -100
THINK_TAGS = {"<think>", "</think>"}  # as tokens they are what they say
THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class RenderOptions:
    """What is rendered, and what of it is learned.

    Attributes:
        last_turn_only: only the last assistant turn is learned.
        train_on_prompt: every token is learned.
        train_on_opening: also what the template itself writes between the generation prompt and the content, such as
            an empty thinking block.
        thinking: "strip" removes the assistant's thinking before the template sees it.
        chat_template: a template's text, or the name of one of the tokenizer's; None for the tokenizer's own.
        template_kwargs: variables of the template.
        stop_tokens: what ends a turn, for templates that do not write it, such as GLM's, whose model stops with the
            marker of the next role; the first one ends an open last turn.
    """

    last_turn_only: bool = False
    train_on_prompt: bool = False
    train_on_opening: bool = False
    thinking: Literal["keep", "strip"] = "keep"
    chat_template: str | None = None
    template_kwargs: dict = field(default_factory=dict)
    stop_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """One conversation as the model sees it.

    Attributes:
        text: the rendered conversation.
        input_ids: its tokens.
        labels: the token id where supervised, IGNORE elsewhere; as long as input_ids.
        supervised_texts: the text of each maximal supervised run, end-of-turn token included.
        notes: what a user should know: special-token text that became plain text, thinking that the template dropped.
    """

    text: str
    input_ids: list[int]
    labels: list[int]
    supervised_texts: list[str]
    notes: tuple[str, ...] = ()


_TEMPLATES: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> {(source, variables, ...): Template}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    options: RenderOptions = RenderOptions(),
) -> Rendered:
    """Render one conversation with a chat template and find what is to be learned.

    Raises:
        BadRow: the template or the content does not allow a mask that is certainly right.
    """
    template = _template(tokenizer, options, tools)
    messages = _prepared(messages, options)
    layout = template.layout([_bare(message) for message in messages], tools=tools, documents=documents)
    plain = _special_strings(template, layout, tools)
    ids, offsets, spans = _tokens(tokenizer, layout.text, _learned(messages, layout, options), plain)
    labels, runs = [IGNORE] * len(ids), []
    for start, end in spans:
        first, last = _token_range(offsets, start, end)
        labels[first:last] = ids[first:last]
        runs.append(_read_back(tokenizer, ids[first:last], layout.text[start:end]))
    if options.train_on_prompt:
        labels, runs = list(ids), [tokenizer.decode(ids)]
    notes = [
        f"{text} in the text is not read as a special token" for text in sorted({layout.text[a:b] for a, b in plain})
    ]
    notes += [f"the chat template drops the thinking of message {index + 1}" for index in layout.dropped_thinking]
    return Rendered(layout.text, ids, labels, runs, tuple(notes))


def stop_ids(tokenizer: PreTrainedTokenizerBase, options: RenderOptions) -> set[int]:
    """The tokens with which a model that learned from this template ends its turn.

    Raises:
        BadRow: there is no template, or it ends turns with nothing.
    """
    stops = _template(tokenizer, options, None).stops
    encoded = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
    return {ids[0] for ids in encoded if len(ids) == 1} | {tokenizer.eos_token_id}


def _template(tokenizer: PreTrainedTokenizerBase, options: RenderOptions, tools: list | None) -> Template:
    try:
        source = tokenizer.get_chat_template(options.chat_template, tools)
    except ValueError as error:
        raise BadRow(f"no chat template: {error}", reason="no template") from None
    known = _TEMPLATES.setdefault(tokenizer, {})
    key = (source, json.dumps(options.template_kwargs, sort_keys=True), len(tokenizer), options.stop_tokens)
    if key not in known:
        known[key] = Template(tokenizer, source, options.template_kwargs, stops=options.stop_tokens, tools=tools)
    return known[key]


def _prepared(messages: Sequence[Message], options: RenderOptions) -> list[Message]:
    """The messages with the thinking and the call ids that the template is to see."""
    made, calls = [], []
    for number, message in enumerate(messages, 1):
        message = {**message, "content": message.get("content") or ""}
        if options.thinking == "strip" and message["role"] == "assistant":
            message.pop("reasoning_content", None)
            message["content"] = THOUGHT.sub("", message["content"], count=1)
        if message.get("tool_calls"):
            calls = [
                {"type": "function", "id": f"call{number:03d}{k:02d}", **call}
                for k, call in enumerate(message["tool_calls"])
            ]
            message["tool_calls"] = calls
            calls = list(calls)
        elif message["role"] == "tool" and calls:
            message.setdefault("tool_call_id", calls.pop(0)["id"])
        elif not message["content"].strip() and message["role"] != "tool":
            raise BadRow(f"message {number} ({message['role']}) is empty", reason="empty field")
        made.append(message)
    return made


def _bare(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _learned(messages: list[Message], layout: Layout, options: RenderOptions) -> list[tuple[int, int, int]]:
    """The ranges of characters to learn, each with the end of the generation prompt in front of it."""
    turns = [index for index in layout.turns if messages[index].get("weight", 1)]
    if options.last_turn_only:
        turns = [index for index in turns if index == max(layout.turns)]
    if not turns and not options.train_on_prompt:
        raise BadRow("no assistant turn is to be learned", reason="no assistant turn")
    spans = []
    for index in turns:
        start, end = layout.turns[index]
        if options.train_on_opening:
            if layout.openings[index] is None:
                raise BadRow(
                    f"where the opening of message {index + 1} begins cannot be told", reason="changed by template"
                )
            start = min(start, layout.openings[index])
        opening = layout.openings[index]
        spans.append((start, end, start if opening is None else min(start, opening)))
    return spans


def _special_strings(template: Template, layout: Layout, tools: list | None) -> list[tuple[int, int]]:
    """Where somebody's words read like a special token, or like the template's end of a turn."""
    words = {*template.special, *template.stops} - THINK_TAGS
    if tools and any(word in json.dumps(tools, ensure_ascii=False) for word in words):
        raise BadRow("a tool's definition contains the text of a special token", reason="special text in tools")
    found = []
    for start, end in layout.strings:
        if any(word in layout.text[start:end] for word in words):
            found += [
                (start + token.start(), start + token.end())
                for token in template.tokens.finditer(layout.text[start:end])
                if token[0] in words
            ]
    return found


# Text to tokens


def _tokens(tokenizer, text: str, learned: list[tuple[int, int, int]], plain: list[tuple[int, int]]):
    """Token ids, for each its range of characters, and the ranges to learn in whole tokens."""
    if not tokenizer.is_fast:
        spans = [(start, end) for start, end, _ in learned]
        return *_encoded_pieces(tokenizer, text, {edge for span in spans for edge in span}, plain), spans
    ids, offsets = _encoded_pieces(tokenizer, text, set(), plain)
    spans = [(_with_blank(offsets, text, start, opening), end) for start, end, opening in learned]
    across = {edge for span in spans for edge in span if _is_within(offsets, edge)}
    if across:
        ids, offsets = _encoded_pieces(tokenizer, text, across, plain)
    return ids, offsets, spans


def _with_blank(offsets: list[tuple[int, int]], text: str, start: int, opening: int) -> int:
    """The start of a turn, moved over a blank that is one token with its first word.

    Templates such as Llama 2's end the prompt before that blank: the model writes it, as part of the word.
    """
    across = next((left for left, right in offsets if left < start < right), start)
    return across if across >= opening and not text[across:start].strip() else start


def _encoded_pieces(tokenizer, text: str, cuts: set[int], plain: list[tuple[int, int]]):
    """Encode the text cut into pieces, where a token would reach over an edge or read as a special one."""
    if not cuts and not plain:
        return _encoded(tokenizer, text, plain=False)
    ids, offsets = [], []
    inside = set(plain)
    edges = sorted({0, len(text), *cuts, *(edge for both in plain for edge in both)})
    for start, end in pairwise(edges):
        more, places = _encoded(tokenizer, text[start:end], plain=(start, end) in inside, first=start == 0)
        if (start, end) in inside and tokenizer.convert_tokens_to_ids(text[start:end]) in more:
            raise BadRow(f"the tokenizer reads {text[start:end]} in the text as a special token", reason="special text")
        ids += more
        offsets += [(start + left, start + right) for left, right in places]
    return ids, offsets


def _encoded(tokenizer, text: str, *, plain: bool, first: bool = True):
    """Ids and ranges. A later piece is encoded after a newline, so that no blank is added in front as for a new text."""
    lead = "" if first else "\n"
    if not tokenizer.is_fast:
        alone = tokenizer.encode(lead, add_special_tokens=False) if lead else []
        ids = tokenizer.encode(lead + text, add_special_tokens=False, split_special_tokens=plain)
        if ids[: len(alone)] != alone:
            alone, ids = [], tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return ids[len(alone) :], [(0, len(text))] * (len(ids) - len(alone))
    encoded = tokenizer(lead + text, add_special_tokens=False, split_special_tokens=plain)[0]
    if first:
        return encoded.ids, encoded.offsets
    if lead and _is_within(encoded.offsets, 1):
        lead, encoded = "", tokenizer(text, add_special_tokens=False, split_special_tokens=plain)[0]
    skip = sum(right <= len(lead) for _, right in encoded.offsets) if lead else 0
    return encoded.ids[skip:], [(left - len(lead), right - len(lead)) for left, right in encoded.offsets[skip:]]


def _is_within(offsets: list[tuple[int, int]], edge: int) -> bool:
    return any(left < edge < right for left, right in offsets)


def _token_range(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens of a range of characters."""
    first = next((i for i, (_, right) in enumerate(offsets) if right > start), len(offsets))
    last = next((i for i in range(len(offsets), first, -1) if offsets[i - 1][0] < end), first)
    if first == last or offsets[first][0] < start or offsets[last - 1][1] > end:
        raise BadRow("a token reaches over the edge of the assistant's turn", reason="token over an edge")
    return first, last


def _read_back(tokenizer, ids: list[int], meant: str) -> str:
    """The text of these tokens, if it is what was meant."""
    read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if read == meant:
        return read
    # The tokenizer's own normalisation (NFC, for instance), and blanks that its decoder adds or drops.
    if tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer:
        meant = tokenizer.backend_tokenizer.normalizer.normalize_str(meant).replace("▁", " ")
    if "".join(read.split()) != "".join(meant.split()):
        raise BadRow(
            f"the tokenizer cannot write the answer: {meant[:40]!r} is read back as {read[:40]!r}",
            reason="lost in tokens",
        )
    return read


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The maximal supervised runs, as (first, last + 1)."""
    start = None
    for index, label in enumerate([*labels, IGNORE]):
        if label != IGNORE and start is None:
            start = index
        elif label == IGNORE and start is not None:
            yield start, index
            start = None
