"""Filters of raw rows: a row goes in, the reason to drop it comes out. Pure but for `command`, which runs a program.

    correct   a yes/no field, two equal fields or numbers, a function      length    characters or words
    dedup     equal rows, or nearly equal ones                             regex     a pattern is there, or is not
    command   a program's exit code                                        quality   of code: parses, tests, comments
    function  a function of the user's

Each class holds a filter's options; its `check` makes the function from a row to the reason. Fields are paths into the
raw row, with dots: "175b_verification.solution", "messages.0.content". A row without the field that a filter reads is
broken (BadRow), not dropped.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...chat_template.types import BadRow
from ...config.schema import Float, Int, Pattern, Strings
from ...data.dedup import MinHash, digest, texts
from ...data.fields import find, find_text, refusal
from ...data.formats import load_function
from ...data.numeric import number
from ...errors import UserError
from ...sandbox import Limits

STRICT = ConfigDict(extra="forbid", frozen=True)


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
        found = number(find_text(item.row, self.prediction))
        right = number(find_text(item.row, self.reference))
        if right is None:
            raise BadRow(f"the field {self.reference!r} has no number", reason="no number")
        return None if found == right else "not correct" if found is not None else "no number"


class Dedup(BaseModel):
    """Keep the first of equal rows, or with `near` the first of rows that share that part of their word 5-shingles."""

    model_config = STRICT
    fields: Strings | None = Field(None, min_length=1)
    near: Float | None = Field(None, gt=0, lt=1)

    def check(self) -> Check:
        seen: set[bytes] = set()
        similar = MinHash(self.near) if self.near else None

        def first(item: Item) -> str | None:
            value = [find(item.row, path) for path in self.fields] if self.fields else item.training
            key = digest(value)
            if key in seen:
                return "duplicate"
            if similar and similar.seen(" ".join(texts(value))):
                return "near duplicate"
            seen.add(key)
            return None

        return first


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


class Command(BaseModel):
    """Keep rows whose content a program accepts: exit code 0, under limits, in a new folder. See `sandbox`."""

    model_config = STRICT
    run: list[str] = Field(min_length=1)  # "{file}" stands for the file's name
    file: str = Field(pattern=r"^[\w-][\w.-]*$")
    content: Strings = Field(min_length=1)  # one field, or several that follow each other on new lines
    timeout: Float = Field(10.0, gt=0)  # seconds
    memory_mb: Int = Field(512, gt=0)  # of each process
    network: bool = False

    def check(self) -> Check:
        limits = Limits(seconds=self.timeout, memory_mb=self.memory_mb, network=self.network)
        return lambda item: refusal(item.row, self.content, run=self.run, file=self.file, limits=limits)


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
        tree = parsed(code) if not reason and (self.parses or self.has_tests) else None
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


def parsed(code: str) -> ast.Module | None:
    """The code's tree; None where it is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes, which are the row's own business
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def has_tests(tree: ast.Module) -> bool:
    """Whether there is an assert, a function test..., or an import of unittest or pytest."""
    return any(map(_is_test, ast.walk(tree)))


def _is_test(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name.startswith("test_")
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return any(module.split(".")[0] in ("unittest", "pytest") for module in modules)
    return isinstance(node, ast.Assert)


def comment_lines(code: str) -> int | None:
    """Lines with a comment; None where Python cannot tell."""
    try:
        found = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    return sum(token.type == tokenize.COMMENT for token in found)


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
                    what, where=f"{item.place}; {last.filename}, line {last.lineno}", fix="mend it"
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
