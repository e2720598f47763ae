"""A chat template's behaviour, found by rendering conversations.

Templates are programs: they strip, merge, rewrite and drop. So the conversation is rendered twice, once as it is and
once with a mark in place of every string that somebody wrote:

    marked  <|im_start|>user\\n[0]<|im_end|>\\n<|im_start|>assistant\\n[1]<|im_end|>\\n
    real    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    turn                                                      Hello<|im_end|>

What stands between the marks is the template's own. Putting the strings back must give the real text, character by
character: only then is the template's text independent of the content, and the places of the marks are the places of
the strings. A turn that is more than one string (thinking, tool calls) is what changes when one mark takes its place.
Every conversation is checked, and what fails is refused with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import product

from transformers import PreTrainedTokenizerBase

from .end_of_turn import EndOfTurn, Probe, adjacent, ending_tokens, find_endings, opening_tokens, refuse_unlearned
from .placeholders import (
    CHANGED,
    MARK,
    NO_STOP,
    REFUSED,
    THINK_TAGS,
    Form,
    Layout,
    Literals,
    Marked,
    Mismatch,
    Skeleton,
    Turn,
    any_of,
    check_contents,
    check_marks,
    check_tools,
    fill,
    mark,
    mark_text,
    refuse_printed_parts,
    written,
)
from .turns import MarkedText
from .types import BadRow, Message

CACHED_LAYOUTS = 2048
QUESTION, ANSWER = {"role": "user", "content": mark_text(0)}, {"role": "assistant", "content": mark_text(1)}
BYTE = re.compile("<0x[0-9A-F]{2}>")


class Template:
    """One template of one tokenizer, with everything that was learned about it.

    Args:
        source: the Jinja text.
        variables: more variables for the template (enable_thinking, ...).
        stops: what ends a turn; found out when not given.
        tools: for templates that render nothing without tools.

    Raises:
        BadRow: not even a question and its answer can be rendered so that the answer can be told apart.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        variables: dict,
        *,
        stops: Sequence[str] = (),
        tools: list[dict] | None = None,
    ) -> None:
        self.tokenizer, self.source, self.variables = tokenizer, source, variables
        self.special = frozenset(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.special |= set(tokenizer.all_special_tokens)
        added = {t.content for t in tokenizer.added_tokens_decoder.values()} | self.special
        self.tokens = any_of(added)
        self._layouts: dict[str, Skeleton] = {}
        self.no_tools = None
        try:
            self.forms = self._content_forms(tools)
        except BadRow:  # templates that go through the list of tools without asking whether there is one
            self.no_tools = []
            self.forms = self._content_forms(tools)
        probe = self._probes(tools)
        self.prompt, self.prompts = probe.prompt, probe.prompt != probe.alone
        self.eos = tokenizer.eos_token or ""
        endings = EndOfTurn(tuple(stops), stops[0]) if stops else find_endings(probe, self.tokens, self.eos)
        if not endings:
            raise BadRow(
                "the chat template ends the assistant's turn without an end-of-turn token (stop_tokens can name one)",
                reason=NO_STOP,
            )
        self.stops, self.closing = endings.stops, endings.closing
        self.opening = opening_tokens(probe, self.tokens, self.eos)
        self.ends = ending_tokens(self.stops, self.opening, self.tokens, self.eos)
        inner = probe.inner.lstrip()
        self._refuse_unlearned(inner, next((stop for stop in self.stops if inner.startswith(stop)), inner))
        own = "".join((probe.before, probe.between, probe.after, probe.inner, probe.prompt))
        self.controls: frozenset[str] = (
            self.special | {token[0] for token in self.tokens.finditer(own)} | set(self.stops)
        )
        # What no text may become. An unknown letter and a byte are text, whatever the tokenizer calls them.
        self.false_ids = frozenset(
            tokenizer.convert_tokens_to_ids(token) for token in self.controls - THINK_TAGS if not BYTE.fullmatch(token)
        ) - {tokenizer.unk_token_id}

    def text(self, messages: Sequence[Message], *, tools=None, documents=None, generate: bool = False) -> str:
        """Render; whatever the template raises becomes a BadRow."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or self.no_tools,
                documents=documents,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generate,
                **self.variables,
            )
        except Exception as error:  # a template raises what it likes: jinja2 errors, TypeError, ...
            raise BadRow(f"the chat template refuses the conversation: {error}", reason=REFUSED) from None

    def prompt_text(self, messages: Sequence[Message], *, tools=None, documents=None) -> str:
        """The messages and the opening of the assistant's turn, in the first form that the template takes.

        Raises:
            BadRow: it takes none.
        """
        first = None
        for form in self.forms:
            try:
                real = [written(message, form) for message in messages]
                return self.text(real, tools=tools, documents=documents, generate=True)
            except BadRow as problem:
                first = first or problem
        raise first

    def layout(self, messages: Sequence[Message], *, tools=None, documents=None) -> Layout:
        """Render a conversation and find its parts.

        Raises:
            BadRow: the template refuses, drops or changes something, or the turns cannot be told with certainty.
        """
        first = None
        calls = any(message.get("tool_calls") for message in messages)
        forms = self.forms if calls else [form for form in self.forms if not (form.json_arguments or form.no_content)]
        for form in forms:
            try:
                return self._layout(messages, form, tools, documents)
            except BadRow as problem:
                # What is missing in a text says more than that there is none.
                if first is None or (first.reason == REFUSED and problem.reason != REFUSED):
                    first = problem
        raise first

    def _layout(self, messages: Sequence[Message], form: Form, tools, documents) -> Layout:
        real = [written(message, form) for message in messages]
        text = self._text_naming(real, tools, documents)
        first = None
        # Many templates look for some string in the content. Where the plain marks fail, those strings stay.
        for literals in (None, self._literals):
            marked = mark(messages, form, literals)
            try:
                layout = self._fitted(text, marked, form, tools, documents)
                check_contents(layout, messages)
                return layout
            except BadRow as problem:
                # Where the marks did render, what they tell of the template is more exact than a mismatch.
                first = problem if first is None or isinstance(first, Mismatch) else first
        raise first

    def _fitted(self, text: str, marked: Marked, form: Form, tools, documents) -> Layout:
        key = json.dumps([marked.messages, tools, documents, form.parts])
        known = self._layouts.get(key)
        if known:
            try:
                return fill(text, known, marked)
            except Mismatch:  # a template that writes the time renders otherwise now
                pass
        built = self._skeleton(marked, form, tools, documents)
        filled = fill(text, built, marked)
        if len(self._layouts) >= CACHED_LAYOUTS:
            self._layouts.clear()
        self._layouts[key] = built
        return filled

    def _text_naming(self, messages: list[Message], tools, documents) -> str:
        """Render; an error names the message that the template does not take."""
        try:
            return self.text(messages, tools=tools, documents=documents)
        except BadRow as problem:
            whole = problem
        culprit = len(messages)
        for count in range(len(messages) - 1, 0, -1):
            try:
                self.text(messages[:count], tools=tools, documents=documents)
                break
            except BadRow:
                culprit = count
        role = messages[culprit - 1]["role"]
        raise BadRow(f"message {culprit} ({role}): {whole}", reason=whole.reason)

    # What the template writes

    def _skeleton(self, marked: Marked, form: Form, tools, documents) -> Skeleton:
        text = self.text(marked.messages, tools=tools, documents=documents)
        closing = self.closing_of(text, marked.messages)
        text += closing
        refuse_printed_parts(text, form)
        marks = list(MARK.finditer(text))
        check_marks(marked, [int(mark[1]) for mark in marks])
        check_tools(text, tools, documents)
        parts = MARK.split(text)[::2]
        whole = MarkedText(self, marked, form, tools, documents, text, marks, parts)
        assistants = [i for i, message in enumerate(marked.messages) if message["role"] == "assistant"]
        turns = {i: whole.turn(i) for i in assistants}
        for turn in turns.values():
            self._check_end(parts, turn)
        others = {i: turn for i in range(len(marked.messages)) if i not in turns and (turn := self._other(whole, i))}
        if list(turns.values()) != sorted(turns.values()):
            raise BadRow("the chat template changes the order of the turns", reason=CHANGED)
        order = [int(mark[1]) for mark in marks]
        return Skeleton(parts, order, turns, others, {i: whole.opening(i) for i in assistants}, closing)

    def _other(self, whole: MarkedText, index: int) -> Turn | None:
        """The range of a message of another role, where it is certain."""
        try:
            turn = whole.other(index)
            self._check_end(whole.parts, turn)
        except BadRow:
            return None
        return turn

    def _check_end(self, parts: list[str], turn: Turn) -> None:
        _, _, (k, end) = turn
        if k < len(parts) - 1 or parts[k][end:].strip() != self.eos:  # the sequence may end so, as Phi-3's does
            self._refuse_unlearned(parts[k], parts[k][:end])

    def _refuse_unlearned(self, text: str, learned: str) -> None:
        """Nothing that ends a turn stands between the end that is learned and the next header.

        Args:
            text: what the template writes after an answer.
            learned: its beginning, up to the end of the turn.
        """
        for token in adjacent(text[len(learned) :], self.tokens):
            if token in self.opening:
                return
            if token in self.ends:
                refuse_unlearned(learned.strip(), token)

    @cached_property
    def _literals(self) -> Literals:
        """Every string constant of the template that is more than blanks."""
        quoted = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", self.source)
        texts = {text.strip() for pair in quoted for text in pair if len(text.strip()) > 1} | THINK_TAGS
        return Literals(any_of(texts - self.controls | THINK_TAGS), any_of(self.controls - THINK_TAGS))

    # What ends a turn

    def _probes(self, tools: list | None) -> Probe:
        before, between, after = self._probe([QUESTION, ANSWER], tools)
        follow = self._probe_or_none([QUESTION, ANSWER, {**QUESTION, "content": mark_text(2)}], tools)
        alone = self._probe_or_none([QUESTION], tools)
        prompt = self._probe_or_none([QUESTION], tools, generate=True)
        return Probe(
            before=before,
            between=between,
            after=after,
            inner=follow[2] if follow else "",
            alone=alone[1] if alone else "",
            prompt=prompt[1] if prompt else "",
        )

    def _probe_or_none(
        self, messages: list[Message], tools: list | None, *, generate: bool = False
    ) -> list[str] | None:
        try:
            return self._probe(messages, tools, generate=generate)
        except BadRow:
            return None

    def closing_of(self, text: str, messages: Sequence[Message]) -> str:
        """Return what has to be added where the template leaves the last turn open; `text` has marks for strings."""
        is_open = self.closing and messages[-1]["role"] == "assistant"
        return self.closing if is_open and not text.rstrip().endswith(self.closing.strip()) else ""

    def _content_forms(self, tools: list | None) -> list[Form]:
        problem, known = None, []
        for parts in (False, True):
            try:
                self._probe([QUESTION, ANSWER], tools, Form(parts=parts))
                known.append(parts)
            except BadRow as error:
                problem = problem or error
        if not known:
            raise problem
        return [Form(*choice) for choice in product(known, (False, True), (False, True))]

    def _probe(self, messages: list[Message], tools, form: Form | None = None, *, generate: bool = False) -> list[str]:
        form = form or self.forms[0]
        text = self.text([written(message, form) for message in messages], tools=tools, generate=generate)
        if [int(number) for number in MARK.findall(text)] != list(range(len(messages))):
            raise BadRow("the chat template does not render a plain question and its answer", reason=REFUSED)
        refuse_printed_parts(text, form)
        return MARK.split(text)[::2]
