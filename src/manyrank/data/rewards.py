"""Rewards of GRPO: how good an answer is, as pure functions that a recipe puts together with weights.

rewards:
  numeric: 1.0                                   a metric of `scores`: numeric, exact, normalised, f1, choice
  format: {weight: 0.2, tags: [think, answer]}   the answer's form
  brief: {reward: length, weight: 0.1, max: 80}  any name, and which reward it is
  my_module:my_function: 0.5                     your own (answer, reference, row) -> float

Each is a function of (answer, reference, row). Those that ask whether an answer is right see what comes after the
thinking, the others all of it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config.value_types import Int, Pattern, Strings
from ..errors import UserError
from .fields import Program
from .numeric import NUMBER
from .scores import SCORES, RowScore, row_scores, scored, spoken

STRICT = ConfigDict(extra="forbid", frozen=True)
FENCED = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)
FINAL = re.compile(rf"####\s*[$€£¥]?{NUMBER.pattern}")
WHERE = "rewards"


class Metric(BaseModel):
    """A metric of `scores`, or a user's function: no options."""

    model_config = STRICT


class Format(BaseModel):
    """1 for an answer of a form: a pattern found in it, tags that open and close once each in this order, or a line "#### number"."""

    model_config = STRICT
    pattern: Pattern | None = None
    tags: Strings | None = Field(None, min_length=1)
    final: bool = False

    @model_validator(mode="after")
    def _one(self):
        if bool(self.pattern) + bool(self.tags) + self.final != 1:
            raise ValueError("give one of `pattern`, `tags` and `final: true`")
        return self

    def score(self, answer: str) -> float:
        if self.tags:
            return float(_has_tags(answer, self.tags))
        return float(bool(FINAL.search(answer) if self.final else re.search(self.pattern, answer, re.DOTALL)))


class Length(BaseModel):
    """1 for `min` to `max` words; below, words / min; above, less by what is too much, to 0 at twice `max`."""

    model_config = STRICT
    min: Int = Field(0, ge=0)
    max: Int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _bounds(self):
        if not self.min and self.max is None:
            raise ValueError("give `min`, `max` or both")
        if self.max is not None and self.min > self.max:
            raise ValueError("`min` is more than `max`")
        return self

    def score(self, answer: str) -> float:
        words = len(answer.split())
        if words < self.min:
            return words / self.min
        return 1.0 if self.max is None or words <= self.max else max(0.0, 2 - words / self.max)


class Repetition(BaseModel):
    """Score repetition from 0 (none) to -1: minus the share of groups of `words` words that occurred before."""

    model_config = STRICT
    words: Int = Field(4, gt=0)

    def score(self, answer: str) -> float:
        words = answer.lower().split()
        groups = Counter(tuple(words[at : at + self.words]) for at in range(len(words) - self.words + 1))
        return (len(groups) - groups.total()) / groups.total() if groups else 0.0


class Command(Program):
    """1 where a program accepts the answer: exit code 0, under the limits of `data prepare`'s filter `command`.

    The file has the answer's code (its last fenced block, else all of it), then what the row has in `tests`.
    """

    tests: Strings = []

    def scorer(self) -> RowScore:
        content = ["answer", *(f"row.{path}" for path in self.tests)]

        def score(answer: str, reference: str, row: Mapping[str, Any]) -> float:
            fenced = FENCED.findall(answer)
            code = fenced[-1] if fenced else answer
            return float(self.refusal({"answer": code, "row": dict(row)}, content) is None)

        return score


class Model(BaseModel):
    """The score of a reward model: a sequence classifier with one label, by its folder or hub name."""

    model_config = STRICT
    model: str = Field(min_length=1)


OPTIONS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(SCORES, Metric),
    "format": Format,
    "length": Length,
    "repetition": Repetition,
    "command": Command,
    "model": Model,
}


@dataclass(frozen=True)
class Reward:
    """One reward of a recipe.

    Attributes:
        name: as the metrics call it. kind: which it is, or module:function.
        options: a checked value of its class in OPTIONS.
    """

    name: str
    kind: str
    weight: float
    options: BaseModel

    @property
    def model(self) -> str | None:
        """The reward model that computes it, if one does."""
        return self.options.model if isinstance(self.options, Model) else None


def read_rewards(rewards: Mapping[str, Any], *, where: str = WHERE) -> list[Reward]:
    """The rewards of a recipe, checked.

    Raises:
        UserError: none, or an unknown one, or a wrong option; a function that cannot be imported is found by `scorers`.
    """
    if not rewards:
        fix = f"give some with a weight, as rewards: {{numeric: 1}}; there are {', '.join(OPTIONS)} and module:function"
        raise UserError("grpo without rewards", where=where, fix=fix)
    return [_reward(str(name), value, where) for name, value in rewards.items()]


def _reward(name: str, value: Any, where: str) -> Reward:
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    kind, raw_weight = str(options.pop("reward", name)), options.pop("weight", 1.0)
    if ":" not in kind and kind not in OPTIONS:
        close = difflib.get_close_matches(kind, OPTIONS, 1)
        fix = (f"did you mean {close[0]}? " if close else "") + f"one of {', '.join(OPTIONS)}, or module:function"
        raise UserError(f"there is no reward {kind!r}", where=f"{where}, {name}", fix=fix)
    try:
        weight = math.nan if isinstance(raw_weight, bool) else float(raw_weight)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        fix = "give a number; 0 logs the reward and learns nothing from it"
        raise UserError(f"the weight {raw_weight!r} is not a number", where=f"{where}, {name}", fix=fix)
    wanted = OPTIONS.get(kind, Metric)
    try:
        return Reward(name, kind, weight, wanted.model_validate(options))
    except ValidationError as invalid:
        problem = invalid.errors()[0]
        at = ".".join(str(part) for part in problem["loc"])
        what = f"{kind}: {at + ': ' if at else ''}{problem['msg'].removeprefix('Value error, ').lower()}"
        has = ", ".join(wanted.model_fields) or "none"
        raise UserError(
            what, where=f"{where}, {name}", fix=f"its options are: {has}; beside weight and reward"
        ) from None


def scorers(rewards: Sequence[Reward], *, where: str = WHERE) -> dict[str, RowScore]:
    """A function for each reward that no model computes, by its name.

    Raises:
        UserError: a user's function cannot be imported.
    """
    return {reward.name: _scorer(reward, where) for reward in rewards if not reward.model}


def _scorer(reward: Reward, where: str) -> RowScore:
    if isinstance(reward.options, Command):
        return _of_spoken(reward.options.scorer())
    if isinstance(reward.options, Metric):
        score = row_scores([reward.kind], where=f"{where}, {reward.name}")[reward.kind]
        return score if ":" in reward.kind else _of_spoken(score)
    return partial(_of_answer, reward.options.score)


def _of_answer(score: Callable[[str], float], answer: str, reference: str, row: Mapping[str, Any]) -> float:
    return score(answer)


def _of_spoken(score: RowScore) -> RowScore:
    return lambda answer, reference, row: score(spoken(answer), spoken(reference), row)


def rewarded(
    reward: Reward,
    score: RowScore,
    answer: str,
    reference: str,
    row: Mapping[str, Any],
    *,
    place: str,
    on_error: Literal["error"] | float,
) -> float:
    """The score of one answer.

    Args:
        place: of the row, for the error.
        on_error: what an answer gets whose score fails or is no number.

    Raises:
        UserError: it fails, and `on_error` is "error"; names the row.
    """
    try:
        return scored(reward.kind, score, answer, reference, row, place=place)
    except UserError as error:
        if on_error != "error":
            return on_error
        fix = f"{error.fix}; or score such answers: --on_reward_error 0"
        raise UserError(error.what, where=f"{error.where}; the answer {_short(answer)!r}", fix=fix) from None


def _has_tags(answer: str, tags: Sequence[str]) -> bool:
    """Tell whether each tag opens and closes once, with something between, one after the other."""
    parts = [rf"<{re.escape(tag)}>(?=.*?\S.*?</{re.escape(tag)}>).*?</{re.escape(tag)}>" for tag in tags]
    once = all(answer.count(f"<{tag}>") == 1 == answer.count(f"</{tag}>") for tag in tags)
    return once and bool(re.fullmatch(r"\s*" + r"\s*".join(parts) + r"\s*", answer, re.DOTALL))


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
