"""Scores of an answer: pure functions of the answer and the reference, from 0 (wrong) to 1 (right).

exact        the same text, but for blanks around it
normalised   the same but for case, punctuation, articles and blanks
numeric      the same number: the one after "####", else the last one; "$1,218.0" is 1218
choice       the same letter chosen: "B", "(b)", "The answer is B."
f1           words in common: the harmonic mean of precision and recall (SQuAD)
module:function    your own (answer, reference, row) -> float
"""

from __future__ import annotations

import difflib
import math
import re
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..chat_template.placeholders import THINK_END
from ..errors import UserError
from .formats import load_function
from .numeric import number

Score = Callable[[str, str], float]
RowScore = Callable[[str, str, Mapping[str, Any]], float]

ARTICLES = re.compile(r"\b(a|an|the)\b")
# A letter that is said to be the answer; that is the answer; in brackets; by itself.
SAID = re.compile(
    r"(?i:\b(?:answer|choice|option)(?: is| would be| must be)?\W{0,4}?)\b(?P<letter>[A-HJ]|I(?=\W*$|\s*[).:\]])|(?<=\()[a-j](?=\)))\b(?!['’])"
)
WHOLE = re.compile(r"^\W*(?P<letter>[A-HJa-hj]|[Ii](?!\s*,))(?:\W*$|\s*[).:,\]*]|\s*\n)")
BRACKETED = re.compile(r"[(\[{](?P<letter>[A-Ja-j])[)\]}]")
ALONE = re.compile(r"\b(?P<letter>[B-HJ]|A(?=\W*$))\b(?!['’])")


def exact(answer: str, reference: str) -> float:
    """1 for the same text, but for blanks around it."""
    return float(answer.strip() == reference.strip())


def normalised(answer: str, reference: str) -> float:
    """1 for the same text after `normal_text`."""
    return float(normal_text(answer) == normal_text(reference))


def normal_text(text: str) -> str:
    """Lower case, without punctuation and articles, one blank between words.

    As SQuAD does it (Rajpurkar et al. 2016, arXiv 1606.05250), but a number keeps its sign and what stands between its
    digits, except for commas: "1/3" is not "13", and "1,000" is "1000".
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    letters = (letter if _is_kept(text, at) else "" for at, letter in enumerate(text))
    return " ".join(ARTICLES.sub(" ", "".join(letters)).split())


def _is_kept(text: str, at: int) -> bool:
    letter, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    if unicodedata.category(letter)[0] not in "PS":
        return True
    if letter == "-" and after.isdigit() and not (before.isalnum() or before == "-"):
        return True
    return letter != "," and before.isdigit() and after.isdigit()


def numeric(answer: str, reference: str) -> float:
    """1 for the same number, see `numeric.number`.

    Raises:
        ValueError: the reference has no number.
    """
    right = number(reference)
    if right is None:
        raise ValueError("the reference has no number")
    return float(number(answer) == right)


def choice(answer: str, reference: str) -> float:
    """1 for the same letter chosen, see `letter`.

    Raises:
        ValueError: the reference names no letter.
    """
    right = letter(reference)
    if right is None:
        raise ValueError("the reference names no letter from A to J")
    return float(letter(answer) == right)


def letter(text: str) -> str | None:
    """The letter from A to J that an answer to a multiple choice names; None where it names none.

    What is said to be the answer last ("the answer is (B)"), else how the text begins ("B", "b) Paris"), else the last
    letter in brackets, else the last capital by itself. "A" and "I" as words of a sentence are no choice.
    """
    whole = WHOLE.search(text)
    first = [whole["letter"]] if whole else []
    readings = (SAID.findall(text), first, BRACKETED.findall(text), ALONE.findall(text))
    return next((letters[-1].upper() for letters in readings if letters), None)


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the words after `normal_text`, as SQuAD counts them."""
    words, right = normal_text(answer).split(), normal_text(reference).split()
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))


SCORES: dict[str, Score] = {
    "exact": exact,
    "normalised": normalised,
    "numeric": numeric,
    "choice": choice,
    "f1": f1,
}


def spoken(text: str) -> str:
    """Cut off the thinking."""
    return text.rpartition(THINK_END)[2].strip()


def row_scores(names: Sequence[str], *, where: str = "--metrics") -> dict[str, RowScore]:
    """The scores of these names, each as a function of (answer, reference, row).

    Raises:
        UserError: there is no such score or function.
    """
    return {name: _row_score(name, where) for name in names}


def _row_score(name: str, where: str) -> RowScore:
    if ":" in name:
        try:
            return load_function(name)
        except UserError as error:
            raise UserError(error.what, where=where, fix=error.fix) from None
    if name not in SCORES:
        close = difflib.get_close_matches(name, SCORES, 1)
        fix = (f"did you mean {close[0]}? " if close else "") + f"one of {', '.join(SCORES)}, or module:function"
        raise UserError(f"there is no metric {name!r}", where=where, fix=fix)
    return lambda answer, reference, row: SCORES[name](answer, reference)


def scored(name: str, score: RowScore, answer: str, reference: str, row: Mapping[str, Any], *, place: str) -> float:
    """The score of one row.

    Args:
        place: of the row, for the error.

    Raises:
        UserError: the row cannot be scored so, or the user's function fails or gives no finite number.
    """
    try:
        value = score(answer, reference, row)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{place}; {last.filename}, line {last.lineno}" if ":" in name else place
        what = f"{name} fails with {type(error).__name__}: {error}" if ":" in name else f"{name}: {error}"
        fix = "fix the function" if ":" in name else "choose another metric, or fix the row"
        raise UserError(what, where=at, fix=fix) from error
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise UserError(f"{name} returned {value!r}, not a number", where=place, fix="let it return a float")
    return float(value)
