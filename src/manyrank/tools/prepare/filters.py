"""Filters of raw rows: a row goes in, the reason to drop it comes out. Pure but for `command`, which runs a program.

    rows ──> [1 correct] ──> [2 dedup] ──> [3 length] ──> ...     each counts: in, out, dropped by reason, broken

    correct   a yes/no field, two equal fields or numbers, a function      length    characters or words
    dedup     equal rows, or nearly equal ones                             regex     a pattern is there, or is not
    command   a program's exit code                                        quality   of code: parses, tests, comments
    function  a function of the user's

A filter is written as its name, or as one key with its options: `dedup`, `length: {field: answer, max: 2000}`,
`function: module:function`, `module:function: {option: value}`. Each class holds a filter's options; its `check` makes
the function from a row to the reason. Fields are paths into the raw row, with dots: "175b_verification.solution",
"messages.0.content". A row without the field that a filter reads is broken (BadRow), not dropped. No stage holds rows,
but for the few that `command` has in work at a time.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...chat_template.types import BadRow
from ...config.value_types import Float, Int, Pattern, Strings
from ...data.dedup import digest, same_text
from ...data.fields import Program, find, find_text
from ...data.formats import load_function
from ...data.numeric import number
from ...errors import UserError
from .python_code import comment_lines, has_tests, parse

STRICT = ConfigDict(extra="forbid", frozen=True)
PERMUTATIONS, SHINGLE = 128, 5  # hashes of a MinHash, and words of a shingle


@dataclass(frozen=True)
class Item:
    """A raw row, where it stands, and how it becomes a training row (output field to path; None: as it is)."""

    place: str
    row: dict[str, Any]
    fields: dict[str, str] | None = None
    source: int = 0

    @cached_property
    def training(self) -> dict[str, Any]:
        """The training row. Raises BadRow where a field is missing."""
        return self.row if self.fields is None else {name: find(self.row, path) for name, path in self.fields.items()}


Check = Callable[[Item], "str | None"]  # the reason to drop the row; None keeps it
Refuse = Callable[[Item, str, BadRow], None]  # takes a broken row, with the stage's name; may raise
Model = TypeVar("Model", bound=BaseModel)


# The filters: options, and the check that they make.


class Correct(BaseModel):
    """Keep rows whose answer is right: by a yes/no field, by two equal fields, or by a function."""

    model_config = STRICT
    field: str | None = None
    prediction: str | None = None
    reference: str | None = None
    numeric: bool = False
    function: str | None = None

    @model_validator(mode="after")
    def _one_way(self):
        pair = (self.prediction is not None) + (self.reference is not None)
        ways = (self.field is not None) + (self.function is not None) + (pair > 0)
        if ways != 1 or pair == 1:
            raise ValueError("give `field`, or `prediction` and `reference`, or `function`")
        if self.numeric and not pair:
            raise ValueError("numeric goes with `prediction` and `reference`")
        return self

    def check(self) -> Check:
        if self.function:
            return Function(function=self.function, reason="not correct").check()
        if self.field:
            return self._flag
        return self._numbers if self.numeric else self._equal

    def _flag(self, item: Item) -> str | None:
        value = find(item.row, self.field)
        if not isinstance(value, bool):
            raise BadRow(f"the field {self.field!r} is {value!r}, not true or false", reason="wrong type")
        return None if value else "not correct"

    def _equal(self, item: Item) -> str | None:
        same = find(item.row, self.prediction) == find(item.row, self.reference)
        return None if same else "not correct"

    def _numbers(self, item: Item) -> str | None:
        value = number(find_text(item.row, self.prediction))
        right = number(find_text(item.row, self.reference))
        if right is None:
            raise BadRow(f"the field {self.reference!r} has no number", reason="no number")
        return None if value == right else "not correct" if value is not None else "no number"


class Dedup(BaseModel):
    """Keep the first of equal rows, or with `near` the first of rows that share that part of their word 5-shingles."""

    model_config = STRICT
    fields: Strings | None = Field(None, min_length=1)
    near: Float | None = Field(None, gt=0, lt=1)

    def check(self) -> Check:
        seen: set[bytes] = set()
        is_near = NearDuplicates(self.near).seen if self.near else lambda text: False

        def first(item: Item) -> str | None:
            value = [find(item.row, path) for path in self.fields] if self.fields else item.training
            key = digest(value)
            if key in seen:
                return "duplicate"
            if is_near(" ".join(_texts(value))):
                return "near duplicate"
            seen.add(key)
            return None

        return first


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    else:
        yield str(value)


class NearDuplicates:
    """Finds texts with nearly the same word 5-shingles, by datasketch's MinHash (Broder 1997) and its index of bands.

    The bands are as long as they can be for a pair at the threshold to share one in 99 of 100 cases; texts that share
    one are compared.

    Args:
        threshold: Jaccard similarity from which two texts are near, estimated with an error of about 0.03.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        lengths = range(PERMUTATIONS, 0, -1)
        rows = next((r for r in lengths if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= 0.99), 1)
        self.threshold, self.empty, self.kept = threshold, MinHash(PERMUTATIONS), []
        self.index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))

    def seen(self, text: str) -> bool:
        """Tell whether an earlier text is near this one; if none is, this one is remembered."""
        words = same_text(text).split()
        ends = range(SHINGLE, max(SHINGLE, len(words)) + 1)
        signature = self.empty.copy()
        signature.update_batch([" ".join(words[end - SHINGLE : end]).encode("utf-8", "surrogatepass") for end in ends])
        if any(self.kept[number].jaccard(signature) >= self.threshold for number in self.index.query(signature)):
            return True
        self.index.insert(len(self.kept), signature)
        self.kept.append(signature)
        return False


class Length(BaseModel):
    """Keep texts of `min` to `max` characters or words."""

    model_config = STRICT
    field: str
    min: Int | None = Field(None, ge=0)
    max: Int | None = Field(None, ge=0)
    unit: Literal["characters", "words"] = "characters"

    @model_validator(mode="after")
    def _bounds(self):
        if self.min is None and self.max is None:
            raise ValueError("give `min`, `max` or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("`min` is more than `max`")
        return self

    def check(self) -> Check:
        def fits(item: Item) -> str | None:
            text = find_text(item.row, self.field)
            length = len(text) if self.unit == "characters" else len(text.split())
            return outside(length, self.min, self.max, "too short", "too long")

        return fits


def outside(value: float, least: float | None, most: float | None, low: str, high: str) -> str | None:
    """`low` or `high` where a value is out of its bounds."""
    if least is not None and value < least:
        return low
    return high if most is not None and value > most else None


class Regex(BaseModel):
    """Keep texts in which the pattern `keep` is found, or drop those in which `drop` is."""

    model_config = STRICT
    field: str
    keep: Pattern | None = None
    drop: Pattern | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give `keep` or `drop`")
        return self

    def check(self) -> Check:
        wanted, pattern = self.keep is not None, re.compile(self.keep if self.keep is not None else self.drop)
        reason = "pattern not found" if wanted else "pattern found"
        return lambda item: None if bool(pattern.search(find_text(item.row, self.field))) == wanted else reason


class Command(Program):
    """Keep rows whose content a program accepts: exit code 0, under limits, in a new folder. See `sandbox`."""

    content: Strings = Field(min_length=1)  # one field, or several that follow each other on new lines

    def check(self) -> Check:
        return lambda item: self.refusal(item.row, self.content)


class Quality(BaseModel):
    """Keep code that parses and has tests, a number of lines (without blank ones) and a share of them with comments."""

    model_config = STRICT
    field: str
    language: Literal["python"] = "python"
    parses: bool = True
    has_tests: bool = False
    min_lines: Int | None = Field(None, ge=0)
    max_lines: Int | None = Field(None, ge=0)
    min_comment_ratio: Float | None = Field(None, ge=0, le=1)
    max_comment_ratio: Float | None = Field(None, ge=0, le=1)
    max_line_length: Int | None = Field(None, gt=0)  # characters

    def check(self) -> Check:
        return lambda item: self._problem(find_text(item.row, self.field))

    def _problem(self, code: str) -> str | None:
        lines = [line for line in code.splitlines() if line.strip()]
        longest = max((len(line) for line in lines), default=0)
        reason = outside(len(lines), self.min_lines, self.max_lines, "too few lines", "too many lines")
        reason = reason or outside(longest, None, self.max_line_length, "", "line too long")
        tree = parse(code) if not reason and (self.parses or self.has_tests) else None
        if reason or (tree is None and (self.parses or self.has_tests)):
            return reason or "does not parse"
        if self.has_tests and not has_tests(tree):
            return "no tests"
        if self.min_comment_ratio is None and self.max_comment_ratio is None:
            return None
        comments = comment_lines(code)
        if comments is None:
            return "does not tokenize"
        ratio = comments / max(1, len(lines))
        return outside(ratio, self.min_comment_ratio, self.max_comment_ratio, "too few comments", "too many comments")


class Function(BaseModel):
    """Keep rows for which a function of the user's, "module:function", returns True."""

    model_config = STRICT
    function: str
    options: dict[str, Any] = {}
    reason: str | None = None

    def check(self) -> Check:
        where = f"the filter {self.function}"
        try:
            function = load_function(self.function)
        except UserError as error:
            raise UserError(error.what, where=where, fix=error.fix) from None

        def kept(item: Item) -> str | None:
            try:
                answer = function(item.row, **self.options)
            except BadRow:
                raise
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{self.function} fails with {type(error).__name__}: {error}"
                raise UserError(
                    what, where=f"{item.place}; {last.filename}, line {last.lineno}", fix="fix the function"
                ) from error
            if not isinstance(answer, bool):
                what = f"{self.function} returned {answer!r}, not True or False"
                raise UserError(what, where=item.place, fix="let it return a bool: True keeps the row")
            return None if answer else self.reason or f"refused by {self.function}"

        return kept


FILTERS: dict[str, type[BaseModel]] = {
    "correct": Correct,
    "dedup": Dedup,
    "length": Length,
    "regex": Regex,
    "command": Command,
    "quality": Quality,
    "function": Function,
}


# The filters at work, one after the other.


def validated(model: type[Model], values: Any, *, where: str) -> Model:
    """Make a model of the values.

    Raises:
        UserError: an unknown key, with the nearest that there is, or a wrong value.
    """
    if not isinstance(values, dict):
        known = ", ".join(model.model_fields)
        raise UserError(f"{values!r} is not a mapping of options", where=where, fix=f"give some of {known}")
    try:
        return model(**{str(key): value for key, value in values.items()})
    except ValidationError as invalid:
        problems = invalid.errors()
        problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])  # a typo first
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    if problem["type"] == "extra_forbidden":
        raise unknown(key, model.model_fields, where=where)
    if problem["type"] == "missing":
        raise UserError(f"{key} must be given", where=where, fix=f"add {key}:")
    message = problem["msg"].removeprefix("Value error, ")
    prefix = f"{key}: {problem['input']!r} is invalid: " if key else ""
    raise UserError(f"{prefix}{message[0].lower()}{message[1:]}", where=where, fix="see data/prepare/README.md")


def unknown(name: str, known: Iterable[str], *, where: str, what: str = "option") -> UserError:
    """Make the error for a name that does not exist, with the nearest that does."""
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(known), 1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return UserError(f"there is no {what} {name!r}", where=where, fix=fix)


@dataclass
class FilterStage:
    """One filter at work.

    Attributes:
        name: its number and what it is called, for people.
        filter: what it is called in the config.
        options: what the config says of it.
        workers: rows in work at a time.
        seen, kept, broken: rows that came in, went on, and could not be judged.
        dropped: rows by the reason they were dropped for.
    """

    name: str
    filter: str
    options: dict[str, Any]
    check: Check
    workers: int = 1
    seen: int = 0
    kept: int = 0
    broken: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def run(self, items: Iterable[Item], refuse: Refuse) -> Generator[Item, None, None]:
        """Yield the items that pass, in order; broken ones go to `refuse`."""
        for item, verdict in self._judged(items):
            self.seen += 1
            if isinstance(verdict, BadRow):
                self.broken += 1
                refuse(item, f"filter {self.name}", verdict)
            elif verdict is None:
                self.kept += 1
                yield item
            else:
                self.dropped[verdict] += 1

    def _judged(self, items: Iterable[Item]) -> Generator[tuple[Item, str | BadRow | None], None, None]:
        if self.workers == 1:
            yield from ((item, self._verdict(item)) for item in items)
            return
        waiting: deque = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for item in items:
                    waiting.append((item, pool.submit(self._verdict, item)))
                    if len(waiting) > 2 * self.workers:
                        yield waiting[0][0], waiting[0][1].result()
                        waiting.popleft()
                while waiting:
                    yield waiting[0][0], waiting[0][1].result()
                    waiting.popleft()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _verdict(self, item: Item) -> str | BadRow | None:
        try:
            return self.check(item)
        except BadRow as error:
            return error

    def summary(self) -> dict[str, Any]:
        """Report its counts and options, as JSON values."""
        counts = {"in": self.seen, "out": self.kept, "dropped": dict(self.dropped.most_common()), "broken": self.broken}
        accuracy = {"accuracy": self.kept / self.seen if self.seen else None} if self.filter == "correct" else {}
        return {"filter": self.filter, "options": self.options, **counts, **accuracy}


def build_stages(filters: list[Any], *, workers: int, where: str) -> list[FilterStage]:
    """Build the stages of a config's `filters`.

    Args:
        workers: programs that `command` runs at a time.
        where: the config, for errors.

    Raises:
        UserError: an unknown filter or option, a wrong value, or a function that cannot be imported.
    """
    stages = []
    for place, filter_entry in enumerate(filters, 1):
        name, options = _named(filter_entry, f"{where}, filter {place}")
        chosen = _filter(name, options, f"{where}, filter {place} ({name})")
        parallel = workers if isinstance(chosen, Command) else 1
        shown = chosen.model_dump(mode="json", exclude_unset=True)
        stages.append(FilterStage(f"{place} ({name})", name, shown, chosen.check(), parallel))
    return stages


def _named(filter_entry: Any, where: str) -> tuple[str, Any]:
    if isinstance(filter_entry, str):
        return filter_entry, {}
    if not isinstance(filter_entry, dict) or len(filter_entry) != 1:
        raise UserError(
            f"{filter_entry!r} is not a filter", where=where, fix="write a name, or one key with its options"
        )
    name, options = next(iter(filter_entry.items()))
    return str(name), {} if options is None else options


def _filter(name: str, options: Any, where: str) -> BaseModel:
    if ":" in name:
        return validated(Function, {"function": name, "options": options}, where=where)
    if name == "function":
        if not isinstance(options, str):
            fix = "write function: module:function, or module:function: {option: value}"
            raise UserError(f"{options!r} is not a function", where=where, fix=fix)
        return validated(Function, {"function": options}, where=where)
    if name not in FILTERS:
        raise unknown(name, FILTERS, where=where, what="filter")
    return validated(FILTERS[name], options, where=where)
