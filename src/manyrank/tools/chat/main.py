"""`manyrank chat`: talk to a model in the terminal, or through a pipe, a line a question.

Answers appear as they are made. With --compare the base and the tuned model answer side by side, from the same weights;
each goes on with its own answers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.args import Parser
from ...errors import UserError
from ...runs.artifact import find

if TYPE_CHECKING:
    from .conversation import Conversation

HELP = """\
/help          this list
/reset         forget the conversation
/system TEXT   set the system message; without TEXT, none
/save FILE     write the conversation as training data, to a .json or .jsonl file
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""
GAP = " | "


def main(argv: Sequence[str]) -> int:
    """Load the model, and talk until the input ends.

    Raises:
        UserError: an option or a name that cannot be.
    """
    asked = _options().parse_args(argv)
    found = find(asked.name)
    if asked.compare and not found.adapter:
        raise UserError("there is no adapter to compare with its base", where=asked.name, fix="leave --compare out")
    from ...models.generation import Sampling
    from ...models.inference import load_model, quiet, rendering_of

    sampling = Sampling(
        max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed
    )
    quiet()
    model, tokenizer = load_model(
        found,
        quantization=asked.quantization,
        dtype=asked.dtype,
        chat_template=asked.chat_template,
        trust_remote_code=asked.trust_remote_code,
    )
    from .conversation import Conversation, Speaker

    views = {"base": {"view": model.disable_adapter}, "tuned": {}} if asked.compare else {"": {}}
    speakers = {
        title: Speaker(model, tokenizer, rendering_of(found), sampling, **view) for title, view in views.items()
    }
    chat = Chat({title: Conversation(speaker, asked.system) for title, speaker in speakers.items()})
    if sys.stdin.isatty():
        adapter = f" with {found.adapter}" if found.adapter else ""
        print(f"{found.base}{adapter}; /help lists the commands, Ctrl-D ends")
    return chat.run()


def _options() -> argparse.ArgumentParser:
    made = Parser(prog="manyrank chat", allow_abbrev=False, description="Talk to a model.")
    add = made.add_argument
    add("name", metavar="NAME", help="a run's folder, a checkpoint, an adapter, a model's folder or a hub name")
    add("--compare", action="store_true", help="the base and the tuned model answer side by side")
    add("--system", default="", metavar="TEXT", help="system message")
    add("--quantization", choices=("4bit", "8bit"), help="of the base")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the computation")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="most tokens of an answer (default: 512)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the most likely token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the tokens that have this much probability")
    add("--seed", type=int, default=0, help="of the draws")
    add("--chat-template", metavar="X", help="a Jinja file, or a name such as chatml (default: the model's own)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return made


class Chat:
    """Reads questions and commands, and prints answers.

    Args:
        conversations: by title; the last one is saved.
    """

    def __init__(self, conversations: dict[str, Conversation]) -> None:
        self.conversations = conversations
        self.saved: set[Path] = set()  # files of this chat, which it may write anew

    def run(self) -> int:
        """Until /exit or the end of the input.

        Returns:
            The exit code.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  it gives input() its editing and history
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
                if line == "/exit":
                    return 0
                self.take(line)
            except EOFError:
                print(end="\n" if sys.stdin.isatty() else "")
                return 0
            except KeyboardInterrupt:
                print("\n/exit or Ctrl-D ends", flush=True)
            except UserError as error:
                print(error, flush=True)

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            UserError: it cannot be done; the conversation stays as it was.
        """
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif command == "/reset" and not rest:
            for conversation in self.conversations.values():
                conversation.turns = []
            print("a new conversation")
        elif command == "/system":
            for conversation in self.conversations.values():
                conversation.system = rest.strip()
            print(f"system: {rest.strip() or 'none'}")
        elif command == "/save" and rest:
            self.save(Path(rest.strip()).expanduser())
        else:
            print(HELP if line == "/help" else f"{command} is not known so\n{HELP}")
        sys.stdout.flush()

    def save(self, file: Path) -> None:
        from .conversation import save

        save(list(self.conversations.values())[-1].messages, file, replace=file in self.saved)
        self.saved.add(file)
        print(f"saved to {file}")

    def ask(self, question: str) -> None:
        """Print the answer, or the answers side by side."""
        if len(self.conversations) == 1:
            (conversation,) = self.conversations.values()
            with interruptible() as stopped:
                said = conversation.ask(question, show=lambda text: print(text, end="", flush=True), stopped=stopped)
                print(_ending(said.finish, stopped()), flush=True)
            return
        texts = {}
        with interruptible() as stopped, in_step(list(self.conversations.values())):
            for title, conversation in self.conversations.items():
                pieces: list[str] = []
                said = conversation.ask(question, show=pieces.append, stopped=stopped)
                texts[title] = "".join(pieces).strip() + _ending(said.finish, stopped())
        print(side_by_side(texts, width=shutil.get_terminal_size().columns), flush=True)


@contextlib.contextmanager
def in_step(conversations: list[Conversation]) -> Iterator[None]:
    """A turn that not every conversation has, none keeps."""
    before = [len(conversation.turns) for conversation in conversations]
    try:
        yield
    finally:
        if any(len(one.turns) == turns for one, turns in zip(conversations, before)):
            for one, turns in zip(conversations, before):
                del one.turns[turns:]


def _ending(finish: str, stopped: bool) -> str:
    """What to say of an answer that did not end by itself."""
    return " [stopped]" if stopped else " [cut: --max-new-tokens, or the model's context]" if finish == "length" else ""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is a wish to stop the answer, which the yielded function tells; a second one is a KeyboardInterrupt."""
    wished: list[int] = []

    def wish(number: int, frame: object) -> None:
        if wished:
            raise KeyboardInterrupt
        wished.append(number)

    before = signal.signal(signal.SIGINT, wish)
    try:
        yield lambda: bool(wished)
    finally:
        signal.signal(signal.SIGINT, before)


def side_by_side(texts: dict[str, str], *, width: int) -> str:
    """Texts in columns under their titles, as wide as `width` allows."""
    each = max(20, (width - len(GAP) * (len(texts) - 1)) // len(texts))
    columns = [[title, "-" * each, *_wrapped(text, each)] for title, text in texts.items()]
    return "\n".join(GAP.join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue=""))


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
