"""What a chat template does with a conversation, found out by asking it.

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

from .formats import BadRow, Message
from .marks import (
    CHANGED,
    MARK,
    NO_STOP,
    REFUSED,
    THINK_END,
    Form,
    Layout,
    Marked,
    Mismatch,
    Skeleton,
    check_contents,
    check_marks,
    check_tools,
    fill,
    mark,
    mark_text,
    refuse_printed_parts,
    written,
)
from .spans import MarkedText, common

CACHED_LAYOUTS = 2048
WORD = re.compile(r"[<\[({|][^\s<>\[\](){}]*[>\])}|]")  # an end of turn that is no token, such as </s> or [END]


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
        self.special = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | set(tokenizer.all_special_tokens)
        )
        added = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(self.special)
        self.tokens = re.compile(
            "|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or r"(?!)"
        )
        self._layouts: dict[str, Skeleton] = {}
        self.closing, self.no_tools = "", None
        try:
            self.forms = self._content_forms(tools)
        except BadRow:  # templates that go through the list of tools without asking whether there is one
            self.no_tools = []
            self.forms = self._content_forms(tools)
        self.stops, self.closing = (list(stops), stops[0]) if stops else self._find_stops(tools)

    def text(self, messages: Sequence[Message], *, tools=None, documents=None, generate: bool = False) -> str:
        """Render; whatever the template raises becomes a BadRow."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools or self.no_tools, documents=documents, chat_template=self.source, tokenize=False,
                add_generation_prompt=generate, **self.variables,
            )  # fmt: skip
        except Exception as error:  # a template raises what it likes: jinja2 errors, TypeError, ...
            raise BadRow(f"the chat template refuses the conversation: {error}", reason=REFUSED) from None
        open_end = self.closing and messages[-1]["role"] == "assistant" and not text.endswith(self.closing)
        return text + self.closing if open_end else text

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
                found = self._layout(messages, form, tools, documents)
            except BadRow as problem:
                # What is missing in a text says more than that there is none.
                if first is None or (first.reason == REFUSED and problem.reason != REFUSED):
                    first = problem
                continue
            if form != self.forms[0] and calls:  # the next conversation of this kind is tried this way first
                self.forms.remove(form)
                self.forms.insert(0, form)
            return found
        raise first

    def _layout(self, messages: Sequence[Message], form: Form, tools, documents) -> Layout:
        real = [written(message, form) for message in messages]
        text = self._text_naming(real, tools, documents)
        first = None
        # Many templates look for some string in the content. Where the plain marks fail, those strings stay.
        for literals in (None, self._literals):
            marked = mark(messages, form, literals)
            try:
                found = self._fitted(text, marked, form, tools, documents)
                check_contents(found, messages)
                return found
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
        found = fill(text, built, marked)
        if len(self._layouts) >= CACHED_LAYOUTS:
            self._layouts.clear()
        self._layouts[key] = built
        return found

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
        refuse_printed_parts(text, form)
        found = list(MARK.finditer(text))
        check_marks(marked, [int(mark[1]) for mark in found])
        check_tools(text, tools, documents)
        parts = MARK.split(text)[::2]
        whole = MarkedText(self, marked, form, tools, documents, text, found, parts)
        assistants = [i for i, message in enumerate(marked.messages) if message["role"] == "assistant"]
        turns = {i: whole.turn(i) for i in assistants}
        if list(turns.values()) != sorted(turns.values()):
            raise BadRow("the chat template changes the order of the turns", reason=CHANGED)
        return Skeleton(parts, [int(mark[1]) for mark in found], turns, {i: whole.opening(i) for i in assistants})

    @cached_property
    def _literals(self) -> re.Pattern:
        """Every string constant of the template that is more than blanks."""
        quoted = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", self.source)
        texts = {text.strip() for pair in quoted for text in pair if len(text.strip()) > 1} | {"<think>", THINK_END}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    # What ends a turn

    def _find_stops(self, tools: list | None) -> tuple[list[str], str]:
        """What ends an assistant's turn, longest first, and what has to be added where the last turn is left open.

        Raises:
            BadRow: the template ends turns with nothing, or with what could be the header of the next.
        """
        question, answer = {"role": "user", "content": mark_text(0)}, {"role": "assistant", "content": mark_text(1)}
        before, between, after = self._probe([question, answer], tools)
        inner = self._probe_or_none([question, answer, {**question, "content": mark_text(2)}], tools)
        inner = inner[2] if inner else ""
        closing, last = "", self._stop_at(after)
        if last and between.strip() and between.strip() in after:  # a generation prompt, wanted or not
            last = last if last == self._stop_at(inner) and not self.tokens.sub("", before, 1).startswith(last) else ""
        elif not after.strip():  # left open, to be continued: then an inner turn tells, less the header of the next
            end = len(inner) - common(inner[::-1], before[::-1])
            across = next(
                (token.end() for token in self.tokens.finditer(inner) if token.start() < end < token.end()), end
            )
            own = inner[:across]
            last = self._stop_at(own)
            closing = own[: own.index(last) + len(last)] if last else ""
        if not last:
            raise BadRow("the chat template ends the assistant's turn without an end-of-turn token", reason=NO_STOP)
        stops = {last, self.tokenizer.eos_token or last}
        if token := self.tokens.match(last):
            stops.add(token[0])
        # What ends the turns of others may end the assistant's inner turns too.
        alone = (self._probe_or_none([question], tools) or ["", ""])[1]
        if alone.strip() != between.strip():
            stops.add(self._stop_at(alone) or last)
        return sorted(stops, key=len, reverse=True), closing

    def _probe_or_none(self, messages: list[Message], tools: list | None) -> list[str] | None:
        try:
            return self._probe(messages, tools)
        except BadRow:
            return None

    def _stop_at(self, text: str) -> str:
        """The token at the start of what follows a turn, with those after it up to the end of sequence; or one mark."""
        rest = text.strip()
        tokens = []
        while token := self.tokens.match(rest, sum(map(len, tokens))):
            tokens.append(token[0])
        if self.tokenizer.eos_token in tokens:
            return "".join(tokens[: tokens.index(self.tokenizer.eos_token) + 1])
        word = WORD.match(rest)
        return tokens[0] if tokens else word[0] if word else ""

    def stop_length(self, text: str) -> int:
        """Characters of the blanks and the end-of-turn token at the start of `text`; 0 if there is none."""
        blanks = len(text) - len(text.lstrip())
        return next((blanks + len(stop) for stop in self.stops if text.startswith(stop, blanks)), 0)

    def _content_forms(self, tools: list | None) -> list[Form]:
        question, answer = {"role": "user", "content": mark_text(0)}, {"role": "assistant", "content": mark_text(1)}
        problem, known = None, []
        for parts in (False, True):
            try:
                self._probe([question, answer], tools, Form(parts=parts))
                known.append(parts)
            except BadRow as error:
                problem = problem or error
        if not known:
            raise problem
        return [Form(*choice) for choice in product(known, (False, True), (False, True))]

    def _probe(self, messages: list[Message], tools: list | None, form: Form | None = None) -> list[str]:
        form = form or self.forms[0]
        text = self.text([written(message, form) for message in messages], tools=tools)
        if [int(number) for number in MARK.findall(text)] != list(range(len(messages))):
            raise BadRow("the chat template does not render a plain question and its answer", reason=REFUSED)
        refuse_printed_parts(text, form)
        return MARK.split(text)[::2]
