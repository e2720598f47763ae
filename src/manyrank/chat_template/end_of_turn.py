"""The end of an assistant's turn, found from what a template writes around a question and its answer. Pure.

    before [question] between [answer] after              alone: after a lone question
    before [question] between [answer] inner [question]   prompt: the same with a generation prompt

What `after` and `inner` begin with alike is written whatever follows: it ends the turn. What follows it in `inner` is the
header of the next, which is never learned. Some templates write a generation prompt that nobody asked for; then the two
also share the first token of the headers, and the end is cut there:

    before  <s><|start|><|system|>Be brief.<|stop|><|start|><|user|>
    after                                  <|done|><|stop|><|start|><|assistant|>
    inner                                  <|done|><|stop|><|start|><|user|>

`before` tells which token that is: it opens the first turn. The others in `before` may end the system's turn, as here
`<|stop|>` does. Where a token could be either, or would stand unlearned between the end and the header, the template is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .placeholders import NO_STOP
from .types import BadRow

WORD = r"[<\[({|][^\s<>\[\](){}]*[<>\[\](){}|]"  # an end of turn that is no token, such as </s> or [END]


@dataclass(frozen=True)
class Probe:
    """Text that a template writes; see the module."""

    before: str
    between: str
    after: str
    inner: str
    alone: str
    prompt: str


@dataclass(frozen=True)
class EndOfTurn:
    """Ends of turns, longest first, and what has to be added to a last turn that the template leaves open."""

    stops: tuple[str, ...]
    closing: str = ""


def find_endings(probe: Probe, tokens: re.Pattern, eos: str) -> EndOfTurn | None:
    """None where nothing ends a turn, or where it could as well be the header of the next.

    Args:
        tokens: matches every added token of the tokenizer.
        eos: its end of sequence.

    Raises:
        BadRow: a token that may belong to the end of the turn would not be learned.
    """
    shared = probe.inner[: _whole_tokens(probe.inner, common(probe.inner, probe.after), tokens)]
    rest = probe.after[len(shared) :].strip()
    opening = opening_tokens(probe, tokens, eos)
    if not probe.after.strip():
        return _of_open_turns(probe, tokens, opening)
    whole, headers = shared, ""
    if not shared.strip():  # the last turn ends in a way of its own
        whole, headers = probe.after, _header(probe)
        last = _ending(whole, tokens)
        last = "" if last in headers else last
    elif rest and rest != eos:  # a generation prompt that nobody asked for
        last = _before_header(probe, shared, opening, tokens, eos)
    else:
        last = _ending(shared, tokens)
    if not last:
        return None
    for token in tokens.finditer(whole.lstrip(), len(last)):
        if token[0] in opening or token[0] in headers:
            break
        refuse_unlearned(last, token[0])
    stops = {last} | _inner_stops(probe, tokens, eos)
    return EndOfTurn(tuple(sorted(stops, key=len, reverse=True)))


def ending_tokens(stops: Iterable[str], opening: tuple[str, ...], tokens: re.Pattern, eos: str) -> frozenset[str]:
    """The tokens that end a turn wherever they follow one, and open none."""
    return frozenset({eos, *(token[0] for stop in stops for token in tokens.finditer(stop))} - {*opening, ""})


def opening_tokens(probe: Probe, tokens: re.Pattern, eos: str) -> tuple[str, ...]:
    """Find the tokens, or words that look like tokens, that open the first turn, the beginning of the sequence included.

    A tokenizer may have one token for both ends of a sequence: where the template ends an answer with it, it opens nothing.
    """
    endings = []
    for token in adjacent(probe.before, re.compile(f"{tokens.pattern}|{WORD}"), blanks=False):
        if endings and token == eos:  # an empty system turn
            break
        endings.append(token)
    return tuple(token for token in dict.fromkeys(endings) if token != eos or eos not in probe.after)


def adjacent(text: str, tokens: re.Pattern, *, blanks: bool = True) -> list[str]:
    """The tokens at the start of a text, up to the first letter that is none; blanks may stand between them."""
    pieces, at = [], 0
    while token := tokens.match(text, len(text) - len(text[at:].lstrip()) if blanks else at):
        pieces.append(token[0])
        at = token.end()
    return pieces


def refuse_unlearned(ending: str, token: str) -> None:
    """Raise for a token that follows the end of a turn and may belong to it."""
    raise BadRow(
        f"the chat template writes {token} after {ending}, and it may end the turn too (stop_tokens can name what does)",
        reason=NO_STOP,
    )


def _of_open_turns(probe: Probe, tokens: re.Pattern, opening: tuple[str, ...]) -> EndOfTurn | None:
    """The last turn may be continued: an inner turn tells, less the header of the question after it."""
    start = len(probe.inner) - common(probe.inner[::-1], probe.before[::-1])
    start = next((t.end() for t in tokens.finditer(probe.inner) if t.start() < start < t.end()), start)
    own, header = probe.inner[:start], probe.inner[start:]
    last = _ending(own, tokens)
    if not last or last != own.strip() or not header.strip():
        return None
    first = adjacent(header, tokens)
    # What stands in front of the question, too, may end the system's turn and the assistant's.
    if len(first) > 1 and first[0] not in opening:
        refuse_unlearned(last, first[0])
    return EndOfTurn((last,), own.rstrip())


def _before_header(probe: Probe, shared: str, opening: tuple[str, ...], tokens: re.Pattern, eos: str) -> str:
    """The end of a turn, less the token that it shares with the header of any turn; empty where that cannot be told."""
    ending = _ending(shared, tokens)
    parts = list(tokens.finditer(ending)) or list(re.finditer(WORD, ending))
    visible = [part for part in parts if part[0] in opening]
    if visible:  # all in the order of the first header, else one of them may end an empty system turn
        first = min(visible, key=lambda part: opening.index(part[0]))
        return ending[: first.start()] if first is visible[0] else ""
    # A header has no other tokens than `before`.
    certain = bool(parts) and (parts[-1][0] == eos or parts[-1][0] not in probe.before)
    headers = [text.lstrip()[len(ending) :].lstrip() for text in (probe.inner, probe.after)]
    if len(parts) == 1 and shared.strip() == ending:  # one token, and then headers that share none
        certain |= all(tokens.match(header) for header in headers)
    return ending if certain or headers[0].startswith(opening) else ""


def _inner_stops(probe: Probe, tokens: re.Pattern, eos: str) -> set[str]:
    """Find ends of inner turns: what ends the question or the sequence, where the last turn ends otherwise."""
    endings = set()
    has_generation_prompt = probe.prompt != probe.alone  # else `alone` has a generation prompt in it
    if has_generation_prompt and probe.between.startswith(probe.alone) and len(probe.alone) < len(probe.between):
        endings.add(_ending(probe.alone, tokens))
    if eos and probe.inner.strip().startswith(eos) and eos not in probe.before:
        endings.add(eos)
    return endings - {""}


def _header(probe: Probe) -> str:
    """The header of an answer, as far as it can be told from the end of the question."""
    has_generation_prompt = probe.prompt != probe.alone and probe.prompt.startswith(probe.alone)
    return probe.prompt[len(probe.alone) :] if has_generation_prompt else probe.between


def _ending(text: str, tokens: re.Pattern) -> str:
    """The tokens at the start of what follows a turn, up to the first blank; or words that look like tokens."""
    run = (text.split() or [""])[0]
    inside = list(tokens.finditer(run))
    if inside:
        return run[: inside[-1].end()] if inside[0].start() == 0 else ""
    words = re.match(f"(?:{WORD})+", run)
    return words[0] if words else ""


def _whole_tokens(text: str, length: int, tokens: re.Pattern) -> int:
    return next((t.start() for t in tokens.finditer(text) if t.start() < length < t.end()), length)


def common(first: str, second: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first.startswith(second[:middle]) else (low, middle - 1)
    return low
