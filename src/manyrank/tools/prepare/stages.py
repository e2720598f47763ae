"""Filters in a row: what the config says becomes stages, and rows stream through them.

    rows ──> [1 correct] ──> [2 dedup] ──> [3 length] ──> ...     each counts: in, out, dropped by reason, broken

A filter is written as its name, or as one key with its options: `dedup`, `length: {field: answer, max: 2000}`,
`function: module:function`, `module:function: {option: value}`. No stage holds rows, but for the few that `command` has
in work at a time.
"""

from __future__ import annotations

import difflib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...chat_template.types import BadRow
from ...errors import UserError
from .filters import FILTERS, Check, Command, Function, Item

Refuse = Callable[[Item, str, BadRow], None]  # takes a broken row, with the stage's name; may raise
Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Any, *, where: str) -> Model:
    """The values as a model.

    Raises:
        UserError: an unknown key, with the nearest that there is, or a wrong value.
    """
    if not isinstance(values, dict):
        known = ", ".join(model.model_fields)
        raise UserError(f"{values!r} is no mapping of options", where=where, fix=f"give some of {known}")
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
    said = problem["msg"].removeprefix("Value error, ")
    given = f"{key}: {problem['input']!r} is not right: " if key else ""
    raise UserError(f"{given}{said[0].lower()}{said[1:]}", where=where, fix="see data/prepare/README.md")


def unknown(name: str, known: Iterable[str], *, where: str, what: str = "option") -> UserError:
    """The error for a name that does not exist, with the nearest that does."""
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(known), 1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return UserError(f"there is no {what} {name!r}", where=where, fix=fix)


@dataclass
class Stage:
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
        """The items that pass, in order; broken ones go to `refuse`."""
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
        """Its counts and options, as JSON values."""
        counts = {"in": self.seen, "out": self.kept, "dropped": dict(self.dropped.most_common()), "broken": self.broken}
        accuracy = {"accuracy": self.kept / self.seen if self.seen else None} if self.filter == "correct" else {}
        return {"filter": self.filter, "options": self.options, **counts, **accuracy}


def build(filters: list[Any], *, workers: int, where: str) -> list[Stage]:
    """The stages of a config's `filters`.

    Args:
        workers: programs that `command` runs at a time.
        where: the config, for errors.

    Raises:
        UserError: an unknown filter or option, a wrong value, or a function that cannot be imported.
    """
    stages = []
    for number, given in enumerate(filters, 1):
        name, options = _named(given, f"{where}, filter {number}")
        made = _filter(name, options, f"{where}, filter {number} ({name})")
        parallel = workers if isinstance(made, Command) else 1
        shown = made.model_dump(mode="json", exclude_unset=True)
        stages.append(Stage(f"{number} ({name})", name, shown, made.check(), parallel))
    return stages


def _named(given: Any, where: str) -> tuple[str, Any]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(f"{given!r} is no filter", where=where, fix="write a name, or one key with its options")
    name, options = next(iter(given.items()))
    return str(name), {} if options is None else options


def _filter(name: str, options: Any, where: str) -> BaseModel:
    if ":" in name:
        return validated(Function, {"function": name, "options": options}, where=where)
    if name == "function":
        if not isinstance(options, str):
            fix = "write function: module:function, or module:function: {option: value}"
            raise UserError(f"{options!r} is no function", where=where, fix=fix)
        return validated(Function, {"function": options}, where=where)
    if name not in FILTERS:
        raise unknown(name, FILTERS, where=where, what="filter")
    return validated(FILTERS[name], options, where=where)
