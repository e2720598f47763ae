"""Tables of a recipe's data, for its inspection and for the report of a run: what was read, and what is learned from.

They are made of `data.stats` as JSON: a run keeps less of it in logs/data.json than an inspection has at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...data.histogram import Bar
from .blocks import Cell, Table, count, decimal, share, word

EXAMPLES = {
    "examples": "examples",
    "rows": "rows they come from",
    "duplicates": "rows that repeat the text of another",
    "tokens": "tokens",
    "supervised": "supervised",
    "read": "rows read",
    "out_of": "of rows",
}
LENGTHS = {"shortest": "min", "median": "median", "mean": "mean", "p95": "p95", "longest": "max"}
SOURCES = ("source", "format", "weight", "rows", "examples", "an epoch", "tokens", "supervised")


def reading_tables(reading: dict, *, note: str = "") -> Iterator[Table]:
    """Sources, what became of their rows, and the bad ones; the last two only where there is something to say.

    Args:
        note: about the bad rows.
    """
    key = reading["name"]
    if sources := tuple(map(_source, reading["sources"])):
        yield Table(f"{key}-sources", f"Read: {key}", SOURCES, sources)
    if reading["counts"]:
        yield _counts(f"{key}-counts", f"What became of the rows of {key}", reading["counts"])
    yield from bad_tables(reading, note=note)


def bad_tables(reading: dict, *, note: str = "") -> Iterator[Table]:
    """Count the bad rows by reason, and show the first ones; nothing where there are none."""
    key = reading["name"]
    if reading["reasons"]:
        yield _counts(f"{key}-reasons", f"Bad rows of {key} by reason", reading["reasons"], note)
        bad = tuple((word(row["place"]), word(row["reason"]), word(row["detail"])) for row in reading["bad"])
        yield Table(f"{key}-bad", f"The first {len(bad)} bad rows", ("place", "reason", "what is wrong"), bad)


def _source(source: dict) -> tuple[Cell, ...]:
    in_epoch = source.get(
        "in_epoch", round(source["weight"] * source["examples"])
    )  # an earlier version did not write it
    numbers = map(count, (source["rows"], source["examples"], in_epoch, source["tokens"]))
    named = (word(source["path"]), word(source["format_type"]), decimal(source["weight"]))
    return (*named, *numbers, share(source["supervised"] / max(1, source["tokens"])))


def _counts(key: str, title: str, counts: dict[str, int], note: str = "") -> Table:
    return Table(key, title, (), tuple((word(name), count(number)) for name, number in counts.items()), note)


def split_tables(split: dict) -> Iterator[Table]:
    """Show the examples of training or validation, and their lengths."""
    name, lengths = split["name"], split["lengths"]
    values = split | {"supervised": split["supervised"] / split["tokens"]}
    examples = (
        (word(label), share(values[key]) if key == "supervised" else count(values[key]))
        for key, label in EXAMPLES.items()
        if key in values
    )
    yield Table(f"{name}-examples", f"{name.capitalize()} examples", (), tuple(examples))
    tokens = tuple((word(label), decimal(lengths[key])) for key, label in LENGTHS.items())
    bars = tuple(Bar(**bar) for bar in lengths["bars"])
    yield Table(f"{name}-lengths", "Tokens of an example", (), tokens, bars=bars)
