"""Conversations to token ids and labels: the loss is on what the assistant says and on the token that ends its turn.

By option other roles' messages are learned too, or other end-of-turn tokens.

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    labels  ------------------------------------------------------- Hello<|im_end|> --

The conversation is rendered whole by the tokenizer's own chat template; `template` finds the turns in it. What is
learned is the turn's content, with the tool calls and thinking that the template keeps, up to the end-of-turn token.
The tokens are checked again: none reaches over the edge of a turn, and the learned ones read as the turn does. Where
a check fails the conversation is refused, with the reason; no mask is guessed.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, pairwise
from typing import Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..config.resolve import TrainConfig
from ..errors import UserError
from .end_of_turn import adjacent
from .placeholders import CHANGED, DROPPED, NO_STOP, REFUSED, THINK_END, THINK_TAGS, Layout, any_of
from .template import Template
from .types import (
    END_AT_THE_START,
    IGNORE,
    ROLE_NOT_NAMED,
    ROLE_WITHOUT_END,
    BadRow,
    Message,
    bare,
    is_learned,
)

TEMPLATE_REASONS = frozenset({REFUSED, DROPPED, CHANGED, NO_STOP, "no template"})


@dataclass(frozen=True)
class RenderOptions:
    """Render conversations, with a mask of what is learned.

    Attributes:
        roles: whose messages are learned.
        train_on_eos: which end-of-turn tokens are learned: those of the learned turns, all, or the last one.
        last_turn_only: only the last turn of these roles is learned.
        train_on_prompt: every token is learned, but for messages of weight 0.
        train_on_opening: also what the template itself writes between the generation prompt and the content, such as
            an empty thinking block.
        thinking: "strip" removes the assistant's thinking before the template sees it.
        chat_template: a template's text, or the name of one of the tokenizer's; None for the tokenizer's own.
        template_kwargs: variables of the template.
        stop_tokens: what ends a turn, for templates that do not write it, such as GLM's, whose model stops with the
            marker of the next role; the first one ends an open last turn.
    """

    roles: tuple[str, ...] = ("assistant",)
    train_on_eos: Literal["turn", "all", "last"] = "turn"
    last_turn_only: bool = False
    train_on_prompt: bool = False
    train_on_opening: bool = False
    thinking: Literal["keep", "strip"] = "keep"
    chat_template: str | None = None
    template_kwargs: dict = field(default_factory=dict)
    stop_tokens: tuple[str, ...] = ()


def render_options(config: TrainConfig) -> RenderOptions:
    """Take the rendering options of a recipe; its template is the tokenizer's already."""
    return RenderOptions(
        roles=tuple(config.roles_to_train),
        train_on_eos=config.train_on_eos,
        last_turn_only=config.train_on_last_turn,
        train_on_prompt=config.train_on_prompt,
        train_on_opening=config.train_on_opening,
        thinking=config.thinking,
        template_kwargs=config.chat_template_kwargs,
        stop_tokens=tuple(config.stop_tokens),
    )


class Notice(StrEnum):
    """A note for the user about a conversation."""

    SPECIAL_TEXT = "special_text"  # text of a special token became plain text
    DROPPED_THINKING = "dropped_thinking"  # the template dropped earlier thinking
    LOOSE_END = "loose_end"  # the tokenizer does not know the end of turn as a token


@dataclass(frozen=True)
class Note:
    """A notice, and its words for people."""

    kind: Notice
    text: str


@dataclass(frozen=True)
class Rendered:
    """One conversation as the model sees it.

    Attributes:
        text: the rendered conversation.
        input_ids: its tokens.
        labels: the token id where supervised, IGNORE elsewhere; as long as input_ids.
        supervised_texts: the text of each maximal supervised run, end-of-turn token included.
        notes: what a user should know.
    """

    text: str
    input_ids: list[int]
    labels: list[int]
    supervised_texts: list[str]
    notes: tuple[Note, ...] = ()


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
    layout = template.layout(list(map(bare, messages)), tools=tools, documents=documents)
    plain = _control_strings(template, layout, messages, tools, documents)
    tokens, spans = _tokens(tokenizer, layout.text, _learned(template, messages, layout, options), plain)
    _refuse_false_specials(template, tokens, layout)
    ranges = [tokens.range(start, end) for start, end in spans]
    runs = [
        _read_back(tokenizer, tokens.ids[first:last], layout.text[start:end])
        for (first, last), (start, end) in zip(ranges, spans)
    ]
    if options.train_on_prompt:  # all but these
        edges = [0, *chain.from_iterable(ranges), len(tokens.ids)]
        ranges = [(first, last) for first, last in zip(edges[::2], edges[1::2]) if first < last]
        runs = [tokenizer.decode(tokens.ids[first:last]) for first, last in ranges]
    labels = [IGNORE] * len(tokens.ids)
    for first, last in ranges:
        labels[first:last] = tokens.ids[first:last]
    literal_texts = sorted({layout.text[start:end] for start, end in plain})
    notes = [Note(Notice.SPECIAL_TEXT, f"{word} in the text is not read as a special token") for word in literal_texts]
    notes += [
        Note(Notice.DROPPED_THINKING, f"the chat template drops the thinking of message {index + 1}")
        for index in layout.dropped_thinking
    ]
    loose = [stop for stop in template.stops if not template.tokens.search(stop)]
    notes += [Note(Notice.LOOSE_END, f"the end of turn {stop} is no token") for stop in loose]
    return Rendered(layout.text, tokens.ids, labels, runs, tuple(notes))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    options: RenderOptions = RenderOptions(),
) -> list[int]:
    """The tokens after which the assistant answers. What somebody wrote is never read as a special token.

    Raises:
        BadRow: the template refuses the messages, or there is none.
    """
    template = _template(tokenizer, options, tools)
    messages = list(map(bare, _prepared(messages, options)))
    text = template.prompt_text(messages, tools=tools, documents=documents)
    words = template.controls - THINK_TAGS
    plain = []
    if any(word in json.dumps(messages, ensure_ascii=False) for word in words):
        whole = [*messages, {"role": "assistant", "content": "."}]
        layout = template.layout(whole, tools=tools, documents=documents)
        plain = _control_strings(template, layout, whole, tools, documents)
        if plain and layout.text[: plain[-1][1]] != text[: plain[-1][1]]:
            raise BadRow("where special text stands in the prompt cannot be told", reason="special text")
    return _encoded_pieces(tokenizer, text, set(), plain).ids


def stop_ids(tokenizer: PreTrainedTokenizerBase, options: RenderOptions) -> set[int]:
    """The tokens with which a model that learned from this template ends its turn.

    Raises:
        BadRow: there is no template, or it ends turns with nothing.
    """
    stops = _template(tokenizer, options, None).stops
    encoded = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
    return {ids[0] for ids in encoded if len(ids) == 1} | {tokenizer.eos_token_id}


def stop_tokens(tokenizer: PreTrainedTokenizerBase, options: RenderOptions, *, where: str) -> set[int]:
    """Tokens that end a completion of a model that somebody has named.

    Raises:
        UserError: the tokenizer has no chat template that can be used.
    """
    try:
        return stop_ids(tokenizer, options) - {None}  # some tokenizers have no end of text
    except BadRow as error:
        fix = "give one: --chat-template chatml, or a Jinja file"
        raise UserError(str(error), where=where, fix=fix) from None


def _template(tokenizer: PreTrainedTokenizerBase, options: RenderOptions, tools: list | None) -> Template:
    try:
        source = tokenizer.get_chat_template(options.chat_template, tools)
    except ValueError as error:
        raise BadRow(f"no chat template: {error}", reason="no template") from None
    known = _TEMPLATES.setdefault(tokenizer, {})
    variables = json.dumps(options.template_kwargs, sort_keys=True, default=repr)
    key = (source, variables, len(tokenizer), tokenizer.eos_token, options.stop_tokens, bool(tools))
    if key not in known:
        known[key] = Template(tokenizer, source, options.template_kwargs, stops=options.stop_tokens, tools=tools)
    return known[key]


def _prepared(messages: Sequence[Message], options: RenderOptions) -> list[Message]:
    """The messages with the thinking and the call ids that the template is to see."""
    if not messages:
        raise BadRow("no messages", reason="empty field")
    adapted, calls = [], []
    for number, message in enumerate(messages, 1):
        message = {**message, "content": message.get("content") or ""}
        if options.thinking == "strip" and message["role"] == "assistant":
            message.pop("reasoning_content", None)
            message["content"] = _without_thought(message["content"])
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
        if not message["content"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
            raise BadRow(
                f"message {number} has half a surrogate pair, which is no text", reason="half a surrogate pair"
            )
        adapted.append(message)
    return adapted


def _without_thought(content: str) -> str:
    start, end = "<think>", THINK_END
    thought = content.lstrip().startswith(start) and end in content
    return content.partition(end)[2].lstrip() if thought else content


def _learned(
    template: Template, messages: list[Message], layout: Layout, options: RenderOptions
) -> list[tuple[int, int, int]]:
    """The ranges of characters to learn, each with where blanks in front of it that are part of it may begin.

    With train_on_prompt, those of messages of weight 0, which are not.
    """
    if options.train_on_prompt:
        excluded = [index for index, message in enumerate(messages) if not message.get("weight", 1)]
        turns = [_turn(layout, messages, index) for index in excluded]
    else:
        indices = _learned_messages(messages, options)
        if options.train_on_opening:
            _check_openings(template, layout, indices)
        turns = [_turn(layout, messages, index, opened=options.train_on_opening) for index in indices]
    if options.train_on_prompt or options.train_on_eos == "turn":
        return [(start, end, opening) for start, _, end, opening in turns]
    ends = _ends(template, layout)[-1 if options.train_on_eos == "last" else 0 :]
    contents = [(start, end if (stop, end) in ends else stop, opening) for start, stop, end, opening in turns]
    inside = {(stop, end) for _, stop, end, _ in turns}
    return sorted([*contents, *((start, end, 0) for start, end in ends if (start, end) not in inside)])


def _learned_messages(messages: list[Message], options: RenderOptions) -> list[int]:
    """The messages to learn, by their roles and weights."""
    for number, message in enumerate(messages, 1):
        if message.get("weight") and message["role"] not in options.roles:
            what = f"message {number} is to be learned, and roles_to_train does not name its role, {message['role']}"
            raise BadRow(what, reason=ROLE_NOT_NAMED)
    turns = [index for index, message in enumerate(messages) if message["role"] in options.roles]
    turns = turns[-1:] if options.last_turn_only else turns
    turns = [index for index in turns if is_learned(messages[index])]
    if not turns:
        raise BadRow(f"no {' or '.join(options.roles)} turn is to be learned", reason="nothing to learn")
    return turns


def _turn(layout: Layout, messages: list[Message], index: int, *, opened: bool = False) -> tuple[int, int, int, int]:
    """Where a message begins, where its end-of-turn token does, where it ends, and where blanks in front of it may begin.

    Those of an assistant's message begin where the generation prompt ends, and so does the message where it is `opened`.
    """
    if index in layout.turns:
        start, stop, end = layout.turns[index]
        opening = layout.openings[index]
        opening = start if opening is None else min(start, opening)
        return opening if opened else start, stop, end, opening
    if index not in layout.others:
        what = f"the chat template does not write message {index + 1} ({messages[index]['role']}) as it is"
        raise BadRow(f"{what}, with an end-of-turn token after it", reason=ROLE_WITHOUT_END)
    return (*layout.others[index], 0)


def _check_openings(template: Template, layout: Layout, indices: list[int]) -> None:
    for index in indices:
        if index in layout.turns and (layout.openings[index] is None or not template.prompts):
            raise BadRow(f"where the opening of message {index + 1} begins cannot be told", reason=CHANGED)


def _ends(template: Template, layout: Layout) -> list[tuple[int, int]]:
    """The end-of-turn tokens of a conversation: those of the assistant's turns, and all others of the template's text.

    Raises:
        BadRow: the template begins with such a token, so it does not always end a turn.
    """
    stops, turns = any_of(template.stops), list(layout.turns.values())
    edges = [0, *chain.from_iterable(layout.strings), len(layout.text)]
    ends = [stop.span() for a, b in zip(edges[::2], edges[1::2]) for stop in stops.finditer(layout.text, a, b)]
    first = "".join(adjacent(layout.text, template.tokens))
    if stop := stops.search(first):
        raise BadRow(f"the conversation begins with {stop[0]}, which also ends turns", reason=END_AT_THE_START)
    others = [end for end in ends if not any(start <= end[0] < last for start, _, last in turns)]
    return sorted([*others, *((stop, end) for _, stop, end in turns)])


def _control_strings(
    template: Template, layout: Layout, messages: list[Message], tools, documents
) -> list[tuple[int, int]]:
    """Find the places where contents read like a special token, or like what the template writes around turns."""
    words = template.controls - THINK_TAGS
    others = [tools, documents, [[m.get("tool_calls"), m.get("name"), m.get("tool_call_id")] for m in messages]]
    text = json.dumps(others, ensure_ascii=False)
    if any(word in text for word in words):
        raise BadRow(
            "a call, a tool's definition or a document contains the text of a special token", reason="special text"
        )
    supervised = []
    for start, end in layout.strings:
        if any(word in layout.text[start:end] for word in words):
            supervised += [
                (start + token.start(), start + token.end())
                for token in template.tokens.finditer(layout.text[start:end])
                if token[0] in words
            ]
    return supervised


def _refuse_false_specials(template: Template, tokens: Tokens, layout: Layout) -> None:
    """No special token stands for what somebody wrote, whatever the tokenizer's normalisation made of it."""
    ends = [end for _, end in layout.strings]
    for token, left, right in zip(tokens.ids, tokens.lefts, tokens.rights):
        if token in template.false_ids and left < right:
            k = bisect_right(ends, left)
            if k < len(ends) and layout.strings[k][0] < right and layout.strings[k][0] <= left:
                raise BadRow(
                    f"the tokenizer reads {layout.text[left:right]!r} in the text as a special token",
                    reason="special text",
                )


# Text to tokens


@dataclass(frozen=True)
class Tokens:
    """Ids, and for each the first character of the text and the one after its last."""

    ids: list[int]
    lefts: list[int]
    rights: list[int]

    def across(self, edge: int) -> tuple[int, int] | None:
        """The range of a token that reaches over an edge."""
        k = bisect_right(self.rights, edge)
        return (self.lefts[k], self.rights[k]) if k < len(self.ids) and self.lefts[k] < edge else None

    def range(self, start: int, end: int) -> tuple[int, int]:
        """The tokens of a range of characters."""
        first, last = bisect_right(self.rights, start), bisect_left(self.lefts, end)
        if first >= last or self.lefts[first] < start or self.rights[last - 1] > end:
            raise BadRow("a token reaches over the edge of the assistant's turn", reason="token over an edge")
        return first, last


def _tokens(tokenizer, text: str, learned: list[tuple[int, int, int]], plain: list[tuple[int, int]]):
    """The tokens of the text, and the ranges to learn in whole tokens."""
    tokens = _encoded_pieces(tokenizer, text, set(), plain)
    spans = [_with_blanks(tokens, text, *turn) for turn in learned]
    cuts = {edge for span in spans for edge in span if tokens.across(edge) or text[edge - 1 : edge + 1].isspace()}
    return (_encoded_pieces(tokenizer, text, cuts, plain) if cuts else tokens), spans


def _with_blanks(tokens: Tokens, text: str, start: int, end: int, opening: int) -> tuple[int, int]:
    """The turn, moved over blanks that are one token with its first word or with the token that ends it.

    Templates such as Llama 2's end the prompt before that blank: the model writes it, as part of the word. Tokenizers
    such as Phi-3's read the blanks after a special token as part of it.
    """
    before, after = tokens.across(start), tokens.across(end)
    if before and before[0] >= opening and not text[before[0] : start].strip():
        start = before[0]
    if after and not text[end : after[1]].strip():
        end = after[1]
    return start, end


def _encoded_pieces(tokenizer, text: str, cuts: set[int], plain: list[tuple[int, int]]) -> Tokens:
    """Encode the text cut into pieces, where a token would reach over an edge or read as a special one."""
    ids, offsets = [], []
    inside = set(plain)
    edges = sorted({0, len(text), *cuts, *(edge for both in plain for edge in both)})
    for start, end in pairwise(edges):
        more, places = _encoded(tokenizer, text[start:end], plain=(start, end) in inside, first=start == 0)
        if (start, end) in inside and tokenizer.convert_tokens_to_ids(text[start:end]) in more:
            more, places = _halves(tokenizer, text[start:end])
        ids += more
        offsets += [(start + left, start + right) for left, right in places] if start else places
    return Tokens(ids, [left for left, _ in offsets], [right for _, right in offsets])


def _halves(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token's text as plain text, where the tokenizer knows no other way."""
    (one, here), (two, there) = (_encoded(tokenizer, half, plain=True, first=False) for half in (text[:1], text[1:]))
    return one + two, [*here, *((left + 1, right + 1) for left, right in there)]


def _encoded(tokenizer, text: str, *, plain: bool, first: bool = True):
    """Ids and ranges. A later piece is encoded after a newline, so that no blank is added in front as for a new text."""
    lead = "" if first else "\n"
    encoded = tokenizer(lead + text, add_special_tokens=False, split_special_tokens=plain)[0]
    if first:
        return encoded.ids, encoded.offsets
    if any(left < len(lead) < right for left, right in encoded.offsets[:3]):
        lead, encoded = "", tokenizer(text, add_special_tokens=False, split_special_tokens=plain)[0]
    skip = sum(right <= len(lead) for _, right in encoded.offsets) if lead else 0
    return encoded.ids[skip:], [(left - len(lead), right - len(lead)) for left, right in encoded.offsets[skip:]]


def _read_back(tokenizer, ids: list[int], meant: str) -> str:
    """The text of these tokens, if it is what was meant."""
    read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if read == meant:
        return read
    # The tokenizer's own normalisation (NFC, for instance), and blanks that its decoder adds or drops.
    if tokenizer.backend_tokenizer.normalizer:
        meant = tokenizer.backend_tokenizer.normalizer.normalize_str(meant).replace("▁", " ")
    if "".join(read.split()) != "".join(meant.split()):
        raise BadRow(
            f"the tokenizer cannot write the answer: {meant[:40]!r} is read back as {read[:40]!r}",
            reason="lost in tokens",
        )
    return read
