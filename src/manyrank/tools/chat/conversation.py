"""A conversation with a model: its messages, as data files have them, and the answers to them.

system? ──> user ──> assistant ──> user ──> ...     a question without an answer is never in it
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ...chat_template.render import RenderOptions, prompt_ids, stop_ids
from ...chat_template.types import BadRow, Message
from ...data.formats import to_sample
from ...errors import UserError
from ...models.generation import Answer, Sampling, stream


class Printer(TextStreamer):
    """Hands text over in whole words as it comes, without the prompt and the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops, self.show = stops, show

    def put(self, value) -> None:
        if self.next_tokens_are_prompt or value.flatten()[0].item() not in self.stops:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


@dataclass
class Speaker:
    """A model that answers.

    Attributes:
        view: entered while it answers; peft's `disable_adapter` for the base of a tuned model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rendering: RenderOptions
    sampling: Sampling
    view: Callable[[], AbstractContextManager] = nullcontext
    stops: set[int] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.stops = stop_ids(self.tokenizer, self.rendering) - {None}
        except BadRow as error:
            fix = "give one: --chat-template chatml, or a Jinja file"
            raise UserError(str(error), where="the tokenizer", fix=fix) from None

    def answer(
        self, messages: list[Message], *, number: int, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[str, Answer]:
        """The answer to the last message.

        Args:
            number: of the turn; with the seed, it decides the draws.
            show: gets the text in pieces.

        Raises:
            UserError: the template refuses the messages, or they leave no room in the model's context.
        """
        try:
            prompt = prompt_ids(self.tokenizer, messages, options=self.rendering)
        except BadRow as error:
            raise UserError(str(error), where="the conversation", fix="/reset, or another /system") from None
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(prompt) >= context:
            what = f"the conversation has {len(prompt):,} tokens, and the model's context is {context:,}"
            raise UserError(what, where="the conversation", fix="/reset begins a new one; /save FILE keeps this one")
        with self.view():
            said = stream(
                self.model,
                prompt,
                sampling=self.sampling,
                stops=self.stops,
                pad_token=self.tokenizer.pad_token_id,
                streamer=Printer(self.tokenizer, self.stops, show),
                stopped=stopped,
                number=number,
            )
        return self.tokenizer.decode(said.tokens, skip_special_tokens=True).strip(), said


class Conversation:
    """The messages of one speaker."""

    def __init__(self, speaker: Speaker, system: str = "") -> None:
        self.speaker, self.system = speaker, system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, question: str, *, show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        """Answer, and keep question and answer; an empty answer keeps neither.

        Raises:
            UserError: it cannot be answered; the conversation stays as it was.
        """
        asked = {"role": "user", "content": question}
        number = len(self.turns) // 2
        text, answer = self.speaker.answer([*self.messages, asked], number=number, show=show, stopped=stopped)
        if text:
            self.turns += [asked, {"role": "assistant", "content": text}]
        return answer


def save(messages: list[Message], file: Path, *, replace: bool = False) -> None:
    """Write a conversation as a data file of one row: JSON, or a line of JSONL.

    Args:
        replace: whether a file that is there may be written anew.

    Raises:
        UserError: there is nothing to save, or it cannot be written.
    """
    fix = "name another file, in a folder that is there"
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"{file} is no name of a data file", where="/save", fix="end it with .json or .jsonl")
    row = {"messages": messages}
    try:
        to_sample(row, "messages")
    except BadRow as error:
        raise UserError(f"nothing to save yet: {error}", where="/save", fix="ask something first") from None
    partial = file.with_name(file.name + ".partial")
    content, indent = ([row], 1) if file.suffix == ".json" else (row, None)
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    try:
        if file.exists() and not replace:
            raise UserError(f"{file} is there already", where="/save", fix=fix)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {file}: {error.strerror}", where="/save", fix=fix) from None
