"""The text of a completion while it is generated, in pieces that are final.

tokens   It | is | 0 | . | 2 | 1 | . | \\n | User | :         with the stop string "\\nUser:"
pieces   It | is | 0 | . | 2 | 1 | . |     |      |           joined: "It is 0.21."
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

PART = "\ufffd"  # what tokens decode to that end inside of a character


class TextStream(BaseStreamer):
    """Decodes tokens as they come. The joined pieces of valid UTF-8 are what `tokenizer.decode(tokens).strip()` gives.

    No piece ends inside of a character, in blanks that may be the last, or in what may become a stop string.
    (TextStreamer of transformers 5.23 decodes each line alone, where tokenizers such as Llama 2's drop a blank.)

    Args:
        show: gets each piece.
        stops: tokens that end the completion, which are not part of the text.
        stop_strings: the text ends before the first of them.

    Attributes:
        stopped: one of the stop strings has come.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str], None],
        *,
        stops: Collection[int],
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.show, self.stops, self.stop_strings = tokenizer, show, stops, stop_strings
        self.stopped = False
        self._tokens: list[int] | None = None  # None: the prompt has not come yet
        # A token's text depends on the one before it (blanks, characters of several tokens), but not on earlier ones.
        self._first = self._read = 0  # where decoding begins; tokens whose text is read
        self._text, self._shown = "", 0  # all text; characters of it that are shown

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        if self._tokens is None:
            self._tokens = []
        elif not self.stopped and (token := int(value.flatten()[0])) not in self.stops:
            self._tokens.append(token)
            self._decode()
            self._show(self._safe())

    def end(self) -> None:
        """Show what was held back."""
        if not self.stopped:
            self._decode(last=True)
        self._show(len(self._text))

    def _decode(self, *, last: bool = False) -> None:
        """Read the text of new tokens, up to a stop string."""
        tokens = self._tokens or []
        before, after = (
            self.tokenizer.decode(tokens[self._first : end], skip_special_tokens=True)
            for end in (self._read, len(tokens))
        )
        if after.endswith(PART) and not last:
            return
        self._first, self._read = self._read, len(tokens)
        start = len(self._text)
        self._text += after[len(before) :]
        places = [self._text.find(stop, max(0, start - len(stop) + 1)) for stop in self.stop_strings]
        if places := [place for place in places if place >= 0]:
            self.stopped, self._text = True, self._text[: min(places)]

    def _safe(self) -> int:
        """Count the characters that no stop string begins in."""
        text = self._text
        begun = [k for stop in self.stop_strings for k in range(1, len(stop)) if text.endswith(stop[:k])]
        return len(text) - (0 if self.stopped else max(begun, default=0))

    def _show(self, end: int) -> None:
        """Show the text up to a character, without the blanks around it."""
        start = self._shown or len(self._text) - len(self._text.lstrip())
        end = len(self._text[:end].rstrip())
        if end > start:
            self._shown = end
            self.show(self._text[start:end])
