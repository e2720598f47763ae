"""Writes docs/first_hour.md from tests/first_hour/rows.yaml: `python docs/make_first_hour.py`. A test compares the two."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

FILE = Path(__file__).with_name("first_hour.md")
sys.path.insert(0, str(FILE.parents[1] / "tests" / "support"))
from first_hour import OUTCOMES, Row, rows, tally  # noqa: E402

INTRO = """# The first hour

What people type first, and what is true then: {total} rows, of which {works} work as typed, {named} work under a name that another tool has for the same
thing, {answered} are answered with what to type instead, and {elsewhere} need a GPU, the hub, SLURM or the like; these name the test that
tries them as far as it can be done without. `make first-hour` types all of them anew (`ARGS=--nightly` those that take long, too) and counts; rows are
in `tests/first_hour/rows.yaml`, and `python docs/make_first_hour.py` writes this page. [first_hour.txt](first_hour.txt) is a recorded session.

`my.yaml` is a recipe with a small model, `my.jsonl` twelve questions and answers, and `formats/` the samples of `data/formats`.

"""


def page() -> str:
    """The page."""
    table = list(rows().values())
    counts = tally(table)
    works, named, answered, elsewhere = (counts[outcome] for outcome in OUTCOMES)
    intro = INTRO.format(total=len(table), works=works, named=named, answered=answered, elsewhere=elsewhere)
    areas = [(title, list(of_area)) for title, of_area in groupby(table, key=lambda row: row.area)]
    head = f"| | {' | '.join(OUTCOMES)} |\n{'|---' * (len(OUTCOMES) + 1)}|\n"
    lines = [
        f"| {title} | {' | '.join(str(tally(of)[outcome] or '') for outcome in OUTCOMES)} |" for title, of in areas
    ]
    return intro + head + "\n".join(lines) + "\n" + "".join(_section(title, of) for title, of in areas)


def _section(title: str, of_area: list[Row]) -> str:
    lines = [f"| {_code(row)} | {_truth(row)} |" for row in of_area]
    return f"\n## {title}\n\n| typed | then |\n|---|---|\n" + "\n".join(lines) + "\n"


def _code(row: Row) -> str:
    if row.docs:
        return f"[{row.docs}]({row.docs})"
    text = row.run or f"Python, {row.id.partition('-')[2].replace('-', ' ')}"
    return f"`{text}`".replace("|", "\\|") if row.run else text


def _truth(row: Row) -> str:
    """What is true of a row, in a line."""
    if row.needs:
        return f"needs {row.needs}; {row.tested}"
    if row.docs:
        return row.prints[0]
    values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in row.config.items())
    said = " ... ".join(row.prints)
    parts = [f"`{values}`" if values else "", f"{'answered' if row.exit else 'says'}: {said}" if said else ""]
    parts += [f"there is {', '.join(row.files)}" if row.files else "", f"then `{row.then}` works" if row.then else ""]
    return "; ".join(filter(None, parts)).replace("|", "\\|") or "works"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
