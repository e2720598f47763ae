"""Writes docs/other_tools.md from the table of other tools' names: `python docs/make_other_tools.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from manyrank.config.resolve import METHOD_PREFERENCE
from manyrank.config.spellings import (
    ALIASES,
    INSTEAD,
    METHOD_FLAGS,
    METHOD_VALUES,
    OPPOSITES,
    OTHER_TOOLS,
    VALUES,
    WHEN,
)

FILE = Path(__file__).parent / "other_tools.md"
INTRO = """# Coming from TRL, Axolotl, LLaMA-Factory or Unsloth

A recipe's keys are transformers' `TrainingArguments`. Names that other tools have for the same thing are read, in recipes, on the command
line and in `SFTConfig`; sections (`lora: {r: 8}`) are, too. The strategy is a word (`--strategy fsdp`), not a file.

| you write | it is |
|---|---|
"""
VALUES_OF = """
Values that are read; of several methods, `load_in_4bit`, `load_in_8bit` or `fp8` choose:

| key | you write | it is |
|---|---|---|
"""
ELSE = """
What other tools have alone is an error that says what to write:

| you write | write instead |
|---|---|
"""


def page() -> str:
    """The page."""
    names: dict[str, list[str]] = {}
    for name, key in (ALIASES | OTHER_TOOLS).items():
        opposite = name in OPPOSITES
        names.setdefault(f"{key}: false" if opposite else key, []).append(f"{name}: true" if opposite else name)
    methods = {"method: qlora": "qlora", "method: int8": "int8", "method: full": "full"}
    rows = [f"| {', '.join(f'`{name}`' for name in also)} | `{key}` |" for key, also in names.items()]
    for written, method in methods.items():
        flags = [f"`{flag}`" for flag, allowed in METHOD_FLAGS.items() if allowed == {method}]
        rows.append(f"| {', '.join(flags)} | `{written}` |")
    values = [f"| `{key}` | `{theirs}` | `{ours}` |" for key, pairs in VALUES.items() for theirs, ours in pairs.items()]
    for key, words in METHOD_VALUES.items():
        for theirs, allowed in words.items():
            ours = " or ".join(f"`{method}`" for method in METHOD_PREFERENCE if method in allowed)
            values.append(f"| `{key}` | `{theirs}` | `method`: {ours} |")
    for key, words in WHEN.items():
        values += [
            f"| `{key}` | `{word}` | `{OTHER_TOOLS[key]}`: `{ {'no': 'off'}.get(word, word) }` |" for word in words
        ]
        values.append(f"| `{key}` | `steps` | `{OTHER_TOOLS[key]}`: the number beside it |")
    instead: dict[str, list[str]] = {}
    for name, what in INSTEAD.items():
        instead.setdefault(what, []).append(f"`{name}`")
    others = [f"| {', '.join(names)} | {what} |" for what, names in instead.items()]
    return INTRO + "\n".join(rows) + "\n" + VALUES_OF + "\n".join(values) + "\n" + ELSE + "\n".join(others) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
