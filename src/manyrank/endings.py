"""What ends an assistant's turn, told from what a template writes around a question and its answer. Pure.

    before [question] between [answer] after              alone: after a lone question
    before [question] between [answer] inner [question]   prompt: the same with a generation prompt

What `after` and `inner` begin with alike is written whatever follows: it ends the turn. What follows it in `inner` is the
header of the next, which is never learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WORD = r"[<\[({|][^\s<>\[\](){}]*[<>\[\](){}|]"  # an end of turn that is no token, such as </s> or [END]


@dataclass(frozen=True)
class Probe:
    """What a template writes; see the module."""

    before: str
    between: str
    after: str
    inner: str
    alone: str
    prompt: str


@dataclass(frozen=True)
class Endings:
    """What ends turns, longest first, and what has to be added to a last turn that the template leaves open."""

    stops: tuple[str, ...]
    closing: str = ""


def find_endings(probe: Probe, tokens: re.Pattern, eos: str) -> Endings | None:
    """None where nothing ends a turn, or where it could as well be the header of the next.

    Args:
        tokens: matches every added token of the tokenizer.
        eos: its end of sequence.
    """
    shared = probe.inner[: _whole_tokens(probe.inner, common(probe.inner, probe.after), tokens)]
    rest = probe.after[len(shared) :].strip()
    if not probe.after.strip():
        return _of_open_turns(probe, tokens)
    if not shared.strip():  # the last turn ends in a way of its own
        last = _ending(probe.after, tokens)
        last = "" if last in _header(probe) else last
    elif rest and rest != eos:  # a generation prompt that nobody asked for
        last = _without(probe.before, _ending(shared, tokens), tokens)
    else:
        last = _ending(shared, tokens)
    if not last:
        return None
    return Endings(tuple(sorted({last} | _inner_stops(probe, tokens, eos), key=len, reverse=True)))


def _of_open_turns(probe: Probe, tokens: re.Pattern) -> Endings | None:
    """The last turn may be continued: an inner turn tells, less the header of the question after it."""
    start = len(probe.inner) - common(probe.inner[::-1], probe.before[::-1])
    start = next((t.end() for t in tokens.finditer(probe.inner) if t.start() < start < t.end()), start)
    own, header = probe.inner[:start], probe.inner[start:]
    last = _ending(own, tokens)
    return Endings((last,), own.rstrip()) if last and last == own.strip() and header.strip() else None


def _inner_stops(probe: Probe, tokens: re.Pattern, eos: str) -> set[str]:
    """What ends the question too, or the sequence, may end an inner turn where the last one ends otherwise."""
    found = set()
    asked = probe.prompt != probe.alone  # else `alone` has a generation prompt in it
    if asked and probe.between.startswith(probe.alone) and len(probe.alone) < len(probe.between):
        found.add(_ending(probe.alone, tokens))
    if eos and probe.inner.strip().startswith(eos) and eos not in probe.before:
        found.add(eos)
    return found - {""}


def _header(probe: Probe) -> str:
    """The header of an answer, as far as it can be told from the end of the question."""
    asked = probe.prompt != probe.alone and probe.prompt.startswith(probe.alone)
    return probe.prompt[len(probe.alone) :] if asked else probe.between


def _ending(text: str, tokens: re.Pattern) -> str:
    """The tokens at the start of what follows a turn, up to the first blank; or words that look like tokens."""
    run = (text.split() or [""])[0]
    inside = list(tokens.finditer(run))
    if inside:
        return run[: inside[-1].end()] if inside[0].start() == 0 else ""
    words = re.match(f"(?:{WORD})+", run)
    return words[0] if words else ""


def _without(other: str, ending: str, tokens: re.Pattern) -> str:
    """The ending up to the first token that `other` has."""
    parts = list(tokens.finditer(ending)) or list(re.finditer(WORD, ending))
    return ending[: next((part.start() for part in parts if part[0] in other), len(ending))]


def _whole_tokens(text: str, length: int, tokens: re.Pattern) -> int:
    return next((t.start() for t in tokens.finditer(text) if t.start() < length < t.end()), length)


def common(one: str, two: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(two[:middle]) else (low, middle - 1)
    return low
