"""Writes the small raw data of the stories beside itself: `python data/stories/make.py`. All of it is made up here."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
THINGS = ("apples", "pens", "stones", "eggs", "coins", "cards", "books", "shells")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
FUNCTIONS = (  # name, what it does, right body, wrong body, value for an argument
    ("add", "adds {k} to its argument", "x + {k}", "x - {k}", lambda x, k: x + k),
    ("times", "multiplies its argument by {k}", "x * {k}", "x + {k}", lambda x, k: x * k),
    ("at_most", "gives its argument, but at most {k}", "min(x, {k})", "max(x, {k})", lambda x, k: min(x, k)),
    ("is_above", "tells whether its argument is above {k}", "x > {k}", "x >= {k}", lambda x, k: x > k),
)


def traces(rows: int = 240) -> list[dict]:
    """Questions with a worked solution each, of which about a quarter has gone wrong, in the shape of GSM8K's."""
    draw, made = random.Random(0), []
    for _ in range(rows):
        a, b, name, thing = draw.randint(1, 9), draw.randint(1, 9), draw.choice(NAMES), draw.choice(THINGS)
        more = draw.random() < 0.5 or a <= b
        verb, sign, result = ("finds", "+", a + b) if more else ("loses", "-", a - b)
        right = draw.random() < 0.75
        said = result if right else result + draw.choice((-1, 1, 2))
        made.append(
            {
                "question": f"{name} has {a} {thing} and {verb} {b}. How many {thing} does {name} have now?",
                "ground_truth": f"{a} {sign} {b} = {result}\n#### {result}",
                "175b_verification": {
                    "is_correct": right,
                    "solution": f"{name} has {a} {sign} {b} = {said} {thing}.\n#### {said}",
                },
            }
        )
    return made


def code() -> list[dict]:
    """Functions with tests, of which every fourth fails its own."""
    made = []
    for number, (name, does, right, wrong, value) in enumerate(FUNCTIONS * 20):
        k = number // len(FUNCTIONS) + 2
        body = (wrong if number % 4 == number // len(FUNCTIONS) % 4 else right).format(k=k)
        tests = "\n".join(f"assert {name}_{k}({x}) == {value(x, k)!r}" for x in (0, k, 2 * k + 1))
        made.append(
            {
                "prompt": f"Write a Python function `{name}_{k}(x)` that {does.format(k=k)}.",
                "completion": f"def {name}_{k}(x):\n    return {body}\n",
                "tests": tests,
            }
        )
    return made


def alpaca(rows: int = 60) -> list[dict]:
    draw = random.Random(1)
    made = []
    for _ in range(rows):
        words = draw.sample(THINGS, 3)
        made.append(
            {"instruction": "Put these words in order.", "input": ", ".join(words), "output": ", ".join(sorted(words))}
        )
    return made


def sharegpt(rows: int = 60) -> list[dict]:
    draw, made = random.Random(2), []
    for _ in range(rows):
        name, thing, count = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 9)
        talk = [
            ("human", f"I am {name} and I have {count} {thing}."),
            ("gpt", f"Hello {name}, {count} {thing} are a good start."),
            ("human", "What do I have?"),
            ("gpt", f"You have {count} {thing}, {name}."),
        ]
        made.append({"conversations": [{"from": who, "value": text} for who, text in talk]})
    return made


def sums(mistakes: int = 0) -> list[dict]:
    """All additions of two digits; with `mistakes`, each beside so many wrong answers."""
    draw, made = random.Random(3), []
    for a, b in itertools.product(range(10), repeat=2):
        near = [c for c in range(max(0, a + b - 3), a + b + 4) if c != a + b]
        for c in (a + b, *draw.sample(near, mistakes)):
            made.append({"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {c}"})
    return made


def write() -> None:
    lines = {"traces": traces(), "code": code(), "sums": sums(), "sums_with_mistakes": sums(mistakes=2)}
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, rows in {"alpaca": alpaca(), "sharegpt": sharegpt()}.items():
        (HERE / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
