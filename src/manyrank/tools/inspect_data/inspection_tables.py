"""What a survey says, as titled tables of labelled values: the same words and figures in the terminal and in HTML."""

from __future__ import annotations

from collections.abc import Iterator

from ...data.stats import STEPS, Part, Reading, SampleFacts, Survey
from ..report.tables import Table, count, decimal, one_line, share, word

PACKING = {
    "step": "each step's examples side by side, no padding",
    "dataset": "examples put together into packs before steps are made of them",
    "none": "padded rows",
}


def settings(survey: Survey) -> Table:
    rows = tuple((word(key), word(value)) for key, value in survey.settings.items())
    return Table("settings", "Recipe", (), rows)


def reading_tables(reading: Reading) -> Iterator[Table]:
    """Sources, what became of their rows, and the bad ones; the last two only where there is something to say."""
    key = reading.name
    yield Table(
        f"{key}-sources",
        f"Read: {key}",
        ("source", "format", "weight", "rows", "examples", "tokens", "supervised"),
        tuple(
            (
                word(source.path),
                word(source.format_type),
                decimal(source.weight),
                count(source.rows),
                count(source.examples),
                count(source.tokens),
                share(source.supervised / max(1, source.tokens)),
            )
            for source in reading.sources
        ),
    )
    if reading.counts:
        fates = tuple((word(what), count(rows)) for what, rows in reading.counts.items())
        yield Table(f"{key}-counts", "What became of the rows", (), fates)
    if reading.reasons:
        reasons = tuple((word(reason), count(rows)) for reason, rows in reading.reasons.items())
        yield Table(f"{key}-reasons", "Bad rows by reason", (), reasons)
        bad = tuple((word(row.place), word(row.reason), word(row.detail)) for row in reading.bad)
        yield Table(f"{key}-bad", f"The first {len(bad)} bad rows", ("place", "reason", "what is wrong"), bad)


def bad_rows_note(survey: Survey) -> str:
    """What the training will do about bad rows, where there are some."""
    if not any(reading.reasons for reading in survey.readings):
        return ""
    if survey.settings["on_bad_row"] == "skip":
        return "Bad rows are put aside (on_bad_row: skip)."
    return "Bad rows are put aside here, but the training will stop at them (on_bad_row: error)."


def part_tables(part: Part) -> Iterator[Table]:
    """What the examples are, how long they are, and how they fill batches."""
    key, lengths = part.name, part.lengths
    yield Table(
        f"{key}-examples",
        "Examples",
        (),
        (
            (word("examples"), count(part.examples)),
            (word("rows they come from"), count(part.rows)),
            (word("rows that repeat the text of another"), count(part.duplicates)),
            (word("tokens"), count(part.tokens)),
            (word("supervised"), share(part.supervised / part.tokens)),
        ),
    )
    yield Table(
        f"{key}-lengths",
        "Tokens of an example",
        (),
        (
            (word("min"), count(lengths.shortest)),
            (word("median"), decimal(lengths.median)),
            (word("mean"), decimal(lengths.mean)),
            (word("p95"), decimal(lengths.p95)),
            (word("max"), count(lengths.longest)),
        ),
    )
    yield from _packing(part)


def _packing(part: Part) -> Iterator[Table]:
    packing = part.packing
    unit = "packs" if packing.method == "dataset" else "examples"
    yield Table(
        f"{part.name}-balance",
        f"Packing: {packing.method}",
        ("ranks", f"{unit} in a step", "longest rank over the mean"),
        tuple((count(row.ranks), count(row.batch), share(row.over)) for row in packing.balances),
        f"{PACKING[packing.method].capitalize()}. In tokens, over the first {STEPS} steps at most.",
    )
    ways = [(word("padding with none"), share(packing.padding))]
    if packing.packs is not None and packing.filled is not None:
        ways += [(word("packs with dataset"), count(packing.packs)), (word("filled"), share(packing.filled))]
    yield Table(f"{part.name}-fill", "How full batches are", (), tuple(ways))


def overlap(survey: Survey) -> Table | None:
    """How much of the validation data is also trained on."""
    if survey.overlap is None:
        return None
    what = word("validation examples that are in the training data")
    whole = survey.parts[-1].examples
    rows = ((what, count(survey.overlap)), (word("share of the validation data"), share(survey.overlap / whole)))
    return Table("overlap", "Overlap", (), rows)


def sample_line(sample: SampleFacts) -> str:
    return f"{sample.tokens:,} tokens, {sample.supervised:,} supervised, the last of them {one_line(sample.stop)}"
