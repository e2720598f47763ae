"""`manyrank data inspect`: what a recipe's data is, before anything is trained; in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from ..config.args import CommandLine, Options, arg, parse_with
from ..config.resolve import Setting, canonical, resolve
from ..config.schema import Int
from ..data.files import SUFFIXES, kind_of
from ..data.stats import STEPS, DataReport, SampleFacts, SplitReport, gather
from ..errors import UserError
from ..models.load import load_tokenizer
from ..project_files import EMBEDDED
from ..rules.check import check_sources
from .report.blocks import Block, Heading, Note, Run, Table, Texts, count, one_line, share, visible, word
from .report.data_tables import reading_tables, split_tables
from .report.pages import check_page, page, write_page
from .report.terminal import show

PACKING = {
    "step": "each step's examples side by side, no padding",
    "dataset": "examples put together into packs before steps are made of them",
    "none": "padded rows",
}


class InspectOptions(Options):
    """Show what a recipe is to a training: sources, lengths, bad rows, packing, and what is learned.

    In place of RECIPE, a file of data is enough.
    """

    samples: Int = arg(3, "examples to show of each side", ge=0)
    html: Path | None = arg(None, "write the same as a page too")


def main(argv: Sequence[str]) -> int:
    """Look at a recipe's data: print it, and write it as a page too where --html says so.

    Raises:
        UserError: a wrong option, recipe or source, or a page that cannot be written there.
    """
    line, options = parse_with(argv, InspectOptions, prog="manyrank data inspect", launch=False)
    if options.html:
        check_page(options.html)
    line = _data_as_option(line)
    resolved = resolve(line.recipe, line.overrides)
    check_sources(resolved)
    config = resolved.config
    recipe = Path(line.recipe).stem if line.recipe else "command line"
    report = gather(config, load_tokenizer(config), recipe=recipe, samples=options.samples)
    show(title(report), blocks(report))
    if options.html:
        write_page(page(title(report), blocks(report)), options.html)
        print(f"\nwritten to {options.html}")
    return 0


def _data_as_option(line: CommandLine) -> CommandLine:
    """Take a data file in place of a recipe as --data_path; without --model, the embedded model's template is used."""
    if line.recipe and kind_of(Path(line.recipe))[0] not in SUFFIXES:
        return line
    overrides = [Setting("--data_path", line.recipe, "command line")] if line.recipe else []
    overrides += line.overrides
    if not any(canonical(entry.key) == "data_path" for entry in overrides):
        fix = "name a recipe or a file of data; as in: manyrank data inspect data/sample.jsonl"
        raise UserError("there is nothing to inspect", where="command line", fix=fix)
    if not any(canonical(entry.key) == "model_name_or_path" for entry in overrides):
        print(
            "no model is given: the template and tokenizer are those of the embedded one; --model NAME takes another\n"
        )
        overrides.append(Setting("--model", EMBEDDED, "default of data inspect"))
    return replace(line, recipe=None, overrides=overrides)


# The blocks of both views


def title(report: DataReport) -> str:
    return f"Data of {one_line(report.recipe)}"


def blocks(report: DataReport) -> Iterator[Block]:
    """List the blocks of a report."""
    settings = tuple((word(key), word(value)) for key, value in report.settings.items())
    yield Table("settings", "Recipe", (), settings)
    yield Heading("What was read")
    for reading in report.readings:
        yield from reading_tables(asdict(reading))
    if any(reading.reasons for reading in report.readings):
        skipped = report.settings["on_bad_row"] == "skip"
        stop = "Bad rows are quarantined here, but the training will stop at them (on_bad_row: error)."
        yield Note("Bad rows are quarantined (on_bad_row: skip)." if skipped else stop, warning=True)
    for part in report.parts:
        yield Heading(f"{part.name} data")
        yield from split_tables(asdict(part))
        yield from _packing(part)
    if report.overlap is not None:
        yield _overlap(report.overlap, of=report.parts[-1].examples)
    for part in report.parts:
        if part.samples:
            yield Heading(f"{part.name} samples", legend=True)
            yield from map(_sample, part.samples)


def _packing(part: SplitReport) -> Iterator[Table]:
    """Show how examples fill batches."""
    packing = part.packing
    unit = "packs" if packing.method == "dataset" else "examples"
    yield Table(
        f"{part.name}-balance",
        f"Packing: {packing.method}",
        ("ranks", f"{unit} in a step", "longest rank over the mean"),
        tuple((count(row.ranks), count(row.batch), share(row.over)) for row in packing.balances),
        f"{PACKING[packing.method].capitalize()}. In tokens, over the first {STEPS} steps at most.",
    )
    rows = [(word("padding with none"), share(packing.padding))]
    if packing.packs is not None and packing.filled is not None:
        rows += [(word("packs with dataset"), count(packing.packs)), (word("filled"), share(packing.filled))]
    yield Table(f"{part.name}-fill", "How full batches are", (), tuple(rows))


def _overlap(overlap: int, *, of: int) -> Table:
    """Show how much of the validation data is also trained on."""
    what = word("validation examples that are in the training data")
    rows = ((what, count(overlap)), (word("share of the validation data"), share(overlap / of)))
    return Table("overlap", "Overlap", (), rows)


def _sample(sample: SampleFacts) -> Texts:
    runs = tuple(
        Run(tuple((visible(piece.text), piece.special) for piece in pieces), supervised)
        for supervised, pieces in groupby(sample.pieces, key=lambda piece: piece.supervised)
    )
    label = f"{sample.tokens:,} tokens, {sample.supervised:,} supervised, the last of them {one_line(sample.stop)}"
    return Texts(f"{one_line(sample.source)}, row {sample.row:,}", ((label, runs),), sample=True)
