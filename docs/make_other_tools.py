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
from manyrank.tools.importer import grpo
from manyrank.tools.importer.main import DIALECTS
from manyrank.tools.importer.translation import Translation, flow

FILE = Path(__file__).parent / "other_tools.md"
INTRO = """# Coming from TRL, Axolotl, LLaMA-Factory or Unsloth

A recipe's keys are transformers' `TrainingArguments`. Names that other tools have for the same thing are read, in recipes, on the command
line and in `SFTConfig`; sections (`lora: {r}`) are, too. The strategy is a word (`--strategy fsdp`), not a file.

## A whole recipe: `manyrank import`

```bash
manyrank import axolotl.yaml > my.yaml                       # whose recipe it is shows in its keys; --from NAME says it
manyrank import llamafactory.yaml --output my.yaml           # with its dataset_info.json, in dataset_dir or beside it
manyrank import train.sh --from trl --output my.yaml         # a script with `trl sft ...`, or its --config alone
manyrank import grpo.sh --rewards '{{numeric: 1}}'             # `trl grpo ...`: its reward functions are Python, ours have names
manyrank import training_args.json --model NAME --data FILE  # transformers' TrainingArguments, as JSON or YAML
```

- A line whose key has another name there says so in a comment. Defaults of the other tool that differ from ours are lines, too:

{defaults}

- A key that changes the loss and that nothing here does is an error, with its reason, and nothing is written. `--allow KEY` leaves it
  out, and the recipe says so; `--allow all` does so for each. Recipes of other tasks (preferences, reward models, pretraining) are refused.
- A key without an effect on the loss (kernels, logs, workers) is dropped. The end of the recipe and stderr list each with its reason.
- What is done otherwise here whatever a recipe says (the order of rows, the packs) stands at the end, too.
- DeepSpeed, FSDP and accelerate configs become `strategy`. The recipe is resolved and held against the [rules](rules.md) before it is written.

Tried on the recipes that the tools come with; of TRL, on commands and configs of its documentation, the alignment handbook, Open-R1 and users. Some of
each, with the embedded model, the bundled sample, all allowed and for GRPO a reward of ours, were trained for two steps on CPUs (`tf32: false`, no vLLM) and planned.

| tool | recipes | translated as they are | with `--allow` | refused | trained and planned |
|---|---|---|---|---|---|
| Axolotl 0.19 | 267 | 15 | 211 | 41 | 15 of 16 |
| LLaMA-Factory 0.9.5 | 50 | 12 | 29 | 9 | 14 of 14 |
| TRL 1.16, SFT | 21 | 1 | 18 | 2 | 20 of 20 |
| TRL 1.16, GRPO | 13 | 0 | 12, with `--rewards` | 1 | 13 of 13 |

What needs `--allow` most: `type: alpaca` of Axolotl, which writes a prompt of its own (100), a part of a split (`train[:20%]`, 65), optimizers
of torchao (42), images (36); of TRL, that the data is not here, as its rows decide what is learned. Refused are other tasks, recipes that
name no data, variables of the shell, and strategies with what they cannot shard, as 8-bit optimizers.

## One key at a time

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


def defaults() -> str:
    """What each tool does where its recipe is silent, and this project does something else."""
    rows = []
    for dialect in (*DIALECTS.values(), grpo.DIALECT):
        translation = Translation(dialect, "", {})
        translation.read()
        shown = ", ".join(f"`{flow({entry.key: entry.value})}`" for entry in translation.settings)
        rows.append(f"  | {dialect.title} | {shown} |")
    return "\n".join(["  | tool | defaults |", "  |---|---|", *rows])


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
    intro = INTRO.format(defaults=defaults(), r="{r: 8}")
    return intro + "\n".join(rows) + "\n" + VALUES_OF + "\n".join(values) + "\n" + ELSE + "\n".join(others) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
