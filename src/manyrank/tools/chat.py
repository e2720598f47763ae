"""`manyrank chat`: talk to a model in the terminal, or through a pipe, a line a question.

Completions appear as they are made. With --compare the base and the tuned model complete side by side, from the same
weights; each goes on with its own completions.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..chat_template.types import BadRow, Message
from ..config.args import arg, read_options, word
from ..config.model_options import Count, ModelOptions, SamplingOptions
from ..errors import UserError
from ..runs import hub
from ..runs.artifact import find
from ..runs.run_folder import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..chat_template.render import RenderOptions
    from ..models.generation import Completion, Sampling

HELP = """\
/help          this list
/reset         forget the conversation
/system TEXT   set the system message; without TEXT, none
/save FILE     write the conversation as training data, to a .json or .jsonl file
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


class ChatOptions(ModelOptions, SamplingOptions):
    """Talk to a model."""

    name: str = word(..., "a run's folder, a checkpoint, an adapter, a model's folder or a hub name")
    compare: bool = arg(False, "the base and the tuned model answer side by side")
    system: str = arg("", "system message")
    max_new_tokens: Count = arg(512, "most tokens of a completion")


def main(argv: Sequence[str]) -> int:
    """Load the model, and talk until the input ends.

    Raises:
        UserError: an option or a name that cannot be.
    """
    options = read_options(argv, ChatOptions, prog="manyrank chat")
    model_source = find(options.name)
    if options.compare and not model_source.adapter:
        raise UserError("there is no adapter to compare with its base", where=options.name, fix="leave --compare out")
    hub.check_model(model_source.base)
    from ..models.generation import Sampling
    from ..models.inference import load_model, quiet, rendering_of

    sampling = Sampling(**options.sampling)
    quiet()
    model, tokenizer = load_model(model_source, **options.loading)
    views = {"base": model.disable_adapter, "tuned": nullcontext} if options.compare else {"": nullcontext}
    rendering = rendering_of(model_source)
    models = {
        title: ChatModel(model, tokenizer, rendering, sampling, view, options.system) for title, view in views.items()
    }
    if sys.stdin.isatty():
        adapter = f" with {model_source.adapter}" if model_source.adapter else ""
        print(f"{model_source.base}{adapter}; /help lists the commands, Ctrl-D ends")
    return Chat(models).run()


@dataclass
class ChatModel:
    """A model and its conversation: system? -> user -> assistant -> user ...; a question without a completion is not in it.

    Attributes:
        view: entered while it generates; peft's `disable_adapter` for the base of a tuned model.

    Raises:
        UserError: there is no chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rendering: RenderOptions
    sampling: Sampling
    view: Callable[[], AbstractContextManager] = nullcontext
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        from ..chat_template.render import stop_tokens

        self.stops = stop_tokens(self.tokenizer, self.rendering, where="the tokenizer")

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, question: str, *, show: Callable[[str], None], stopped: Callable[[], bool]) -> Completion:
        """Generate, and keep question and completion; an empty completion keeps neither.

        Args:
            show: gets the text in pieces. stopped: asked after each token; True ends the completion there.

        Raises:
            UserError: the template refuses the messages, or they leave no room in the model's context; the conversation
                stays as it was.
        """
        from ..models.generation import stream
        from ..models.text_stream import TextStream

        turn = {"role": "user", "content": question}
        prompt = self._prompt([*self.messages, turn])
        with self.view():
            answer = stream(
                self.model,
                prompt,
                sampling=self.sampling,
                stops=self.stops,
                pad_token=self.tokenizer.pad_token_id,
                streamer=TextStream(self.tokenizer, show, stops=self.stops),
                stopped=stopped,
                number=len(self.turns) // 2,  # with the seed, it decides the draws
            )
        if text := self.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip():
            self.turns += [turn, {"role": "assistant", "content": text}]
        return answer

    def _prompt(self, messages: list[Message]) -> list[int]:
        from ..chat_template.render import prompt_ids
        from ..models.generation import context_length

        try:
            prompt = prompt_ids(self.tokenizer, messages, options=self.rendering)
        except BadRow as error:
            raise UserError(str(error), where="the conversation", fix="/reset, or another /system") from None
        context = context_length(self.model.config)
        if context and len(prompt) >= context:
            what = f"the conversation has {len(prompt):,} tokens, and the model's context is {context:,}"
            raise UserError(what, where="the conversation", fix="/reset begins a new one; /save FILE keeps this one")
        return prompt


class Chat:
    """Reads questions and commands, and prints completions.

    Args:
        models: by title; the conversation of the last one is saved.
    """

    def __init__(self, models: dict[str, ChatModel]) -> None:
        self.models = models
        self.saved: set[Path] = set()  # files of this chat, which it may write anew

    def run(self) -> int:
        """Talk until /exit or the end of the input.

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
            for model in self.models.values():
                model.turns = []
            print("a new conversation")
        elif command == "/system":
            for model in self.models.values():
                model.system = rest.strip()
            print(f"system: {rest.strip() or 'none'}")
        elif command == "/save" and rest:
            file = Path(rest.strip()).expanduser()
            save(list(self.models.values())[-1].messages, file, replace=file in self.saved)
            self.saved.add(file)
            print(f"saved to {file}")
        else:
            print(HELP if line == "/help" else f"{command} is not known so\n{HELP}")
        sys.stdout.flush()

    def ask(self, question: str) -> None:
        """Print the completion, or the completions side by side; a turn that not every model has, none keeps."""
        models, texts = self.models.values(), {}
        before = min(len(model.turns) for model in models)
        with interruptible() as stopped:
            try:
                for title, model in self.models.items():
                    pieces: list[str] = []
                    show = pieces.append if len(self.models) > 1 else lambda text: print(text, end="", flush=True)
                    answer = model.ask(question, show=show, stopped=stopped)
                    texts[title] = "".join(pieces).strip() + _ending(answer.finish, stopped())
            finally:
                if any(len(model.turns) == before for model in models):
                    for model in models:
                        del model.turns[before:]
        width = shutil.get_terminal_size().columns
        print(side_by_side(texts, width=width) if len(texts) > 1 else texts[""], flush=True)


def _ending(finish: str, stopped: bool) -> str:
    """Return the note after a completion that did not end by itself."""
    return " [stopped]" if stopped else " [cut: --max-new-tokens, or the model's context]" if finish == "length" else ""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a wish to stop, which the yielded function reports; a second one is a KeyboardInterrupt."""
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
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN, expand=True, show_edge=False, pad_edge=False)
    for title in texts:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*map(Text, texts.values()))
    console = Console(file=io.StringIO(), width=max(width, 43), color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def save(messages: list[Message], file: Path, *, replace: bool = False) -> None:
    """Write a conversation as a data file of one row: JSON, or a line of JSONL.

    Args:
        replace: whether a file that is there may be written anew.

    Raises:
        UserError: there is nothing to save, or it cannot be written.
    """
    from ..data.formats import to_sample

    fix = "name another file, in a folder that is there"
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"{file} is not the name of a data file", where="/save", fix="end it with .json or .jsonl")
    row = {"messages": messages}
    try:
        to_sample(row, "messages")
    except BadRow as error:
        raise UserError(f"nothing to save yet: {error}", where="/save", fix="ask something first") from None
    if file.exists() and not replace:
        raise UserError(f"{file} is there already", where="/save", fix=fix)
    content, indent = ([row], 1) if file.suffix == ".json" else (row, None)
    try:
        write_atomically(file, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}", where="/save", fix=fix) from None
