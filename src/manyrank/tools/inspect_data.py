"""`manyrank data inspect`: what a recipe's data is, before anything is trained; in the terminal, and as a page.

rows      formats, counts, bad rows, an example                    at once: no model, no torch
tokens    lengths, packing, samples with what is learned           with the tokenizer and template of a model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.args import CommandLine, Options, arg, parse_with
from ..config.resolve import NOT_GIVEN, ResolvedConfig, Setting, canonical, presets, resolve
from ..config.value_types import Int
from ..data.files import SUFFIXES, kind_of
from ..data.survey import SourceRows, Survey, survey, texts
from ..errors import UserError
from ..project_files import EMBEDDED
from ..rules.check import check_sources
from ..runs import hub
from .report.blocks import (
    Block,
    Cell,
    Heading,
    Note,
    Run,
    Table,
    Texts,
    count,
    decimal,
    one_line,
    plain,
    share,
    visible,
    word,
)
from .report.data_tables import bad_tables, reading_tables, split_tables
from .report.pages import check_page, page, write_page
from .report.terminal import show

if TYPE_CHECKING:
    from ..data.stats import DataReport, SampleFacts, SplitReport

SHOWN = 500  # characters of a message of the example
ASSUMED = "default of data inspect"
PACKING = {
    "step": "each step's examples side by side, no padding",
    "dataset": "examples put together into packs before steps are made of them",
    "none": "padded rows",
}


class InspectOptions(Options):
    """Show what a recipe is to a training: sources, lengths, bad rows, packing, and what is learned.

    In place of RECIPE, a file or folder of data is enough. Rows are shown at once, tokens once the tokenizer is loaded.
    """

    first = (
        *("model_name_or_path", "data_path", "eval_data_path", "eval_split", "format_type", "columns", "on_bad_row"),
        *("duplicates", "max_length", "overlong", "packing", "chat_template", "thinking", "train_on_prompt"),
    )
    examples = (
        "manyrank data inspect my.jsonl --model Qwen/Qwen2.5-7B",
        "manyrank data inspect my.yaml --html data.html",
    )

    samples: Int = arg(3, "examples to show of each side", ge=0)
    html: Path | None = arg(None, "write the same as a page too")


def main(argv: Sequence[str]) -> int:
    """Look at a recipe's data: print its rows, then its tokens, and write a page too where --html says so.

    Raises:
        UserError: a wrong option, recipe, source or model, or a page that cannot be written there.
    """
    line, options = parse_with(argv, InspectOptions, prog="manyrank data inspect", launch=False)
    if options.html:
        check_page(options.html)
    line = _data_as_option(line)
    resolved = resolve(line.recipe, line.overrides)
    check_sources(resolved)
    recipe = Path(line.recipe).stem if line.recipe else "command line"
    surveys = survey(resolved.config)
    shown = list(row_blocks(surveys, on_bad_row=resolved.config.on_bad_row))
    show(_title(recipe), shown)
    report = _report(resolved, recipe=recipe, samples=options.samples)
    if report:
        print(flush=True)
        show(f"In tokens of {one_line(resolved.config.model_name_or_path)}", blocks(report, surveys))
    if options.html:
        write_page(page(_title(recipe), blocks(report) if report else shown), options.html)
        print(f"\nwritten to {options.html}")
    return 0


def _data_as_option(line: CommandLine) -> CommandLine:
    """Take a file or folder of data in place of a recipe as --data_path; without --model, the embedded model's template is used."""
    if line.recipe and not _is_data(line.recipe):
        return line
    overrides = [Setting("--data_path", line.recipe, "command line")] if line.recipe else []
    overrides += line.overrides
    if not any(canonical(entry.key) == "data_path" for entry in overrides):
        fix = "name a recipe or a file of data; as in: manyrank data inspect data/sample.jsonl"
        raise UserError("there is nothing to inspect", where="command line", fix=fix)
    if not any(canonical(entry.key) == "model_name_or_path" for entry in overrides):
        overrides.append(Setting("--model", EMBEDDED, ASSUMED))
    return replace(line, recipe=None, overrides=overrides)


def _is_data(name: str) -> bool:
    return kind_of(Path(name))[0] in SUFFIXES or (Path(name).is_dir() and name not in presets())


def _report(resolved: ResolvedConfig, *, recipe: str, samples: int) -> DataReport | None:
    """Tokenise the data; None, and a line that says so, where nobody names a model and the default is not at hand.

    Raises:
        UserError: the model that is named is not there, or what `gather` raises.
    """
    name, origin = resolved.config.model_name_or_path, resolved.provenance.get("model_name_or_path")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"there is no folder {name}", where=resolved.where("model_name_or_path"), fix="check the path")
    try:
        hub.check_model(name)
    except UserError as error:
        if origin != NOT_GIVEN:
            raise
        print(
            f"\nno model is given, so no tokens are shown: {error.what}; --model FOLDER, or --model {EMBEDDED}, shows them"
        )
        return None
    if origin in (NOT_GIVEN, ASSUMED):
        what = "the embedded one" if name == EMBEDDED else name
        print(
            f"\nno model is given: the template and tokenizer are those of {what}; --model NAME takes another",
            flush=True,
        )
    from ..data.stats import gather
    from ..models.tokenizer import load_tokenizer

    return gather(resolved.config, load_tokenizer(resolved.config), recipe=recipe, samples=samples)


# The rows


def row_blocks(surveys: Sequence[Survey], *, on_bad_row: str) -> Iterator[Block]:
    """List the blocks that need no model."""
    for rows in surveys:
        lines = tuple(map(_source, rows.sources))
        yield Table(f"{rows.name}-rows", f"Read: {rows.name}", ("source", "format", "weight", "rows", "usable"), lines)
        yield from bad_tables(asdict(rows))
    if any(rows.reasons for rows in surveys):
        yield _bad_rows_note(on_bad_row)
    yield from (_example(source) for rows in surveys for source in rows.sources if source.example)


def _source(source: SourceRows) -> tuple[Cell, ...]:
    rows = count(source.rows) if source.whole else Cell(f"the first {source.rows:,}", repr(source.rows))
    return word(source.path), word(source.format_type), decimal(source.weight), rows, count(source.usable)


def _bad_rows_note(on_bad_row: str) -> Note:
    stop = "Bad rows are quarantined here, but the training will stop at them (on_bad_row: error)."
    return Note("Bad rows are quarantined (on_bad_row: skip)." if on_bad_row == "skip" else stop, warning=True)


def _example(source: SourceRows) -> Texts:
    assert source.example
    shown = tuple((role, plain(_cut(text))) for role, text in texts(source.example))
    return Texts(f"The first example: {one_line(source.place)}", shown, sample=True)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"


# The tokens


def title(report: DataReport) -> str:
    return _title(report.recipe)


def _title(recipe: str) -> str:
    return f"Data of {one_line(recipe)}"


def blocks(report: DataReport, shown: Sequence[Survey] = ()) -> Iterator[Block]:
    """List the blocks of a report, less the bad rows that are already shown."""
    settings = tuple((word(key), word(value)) for key, value in report.settings.items())
    yield Table("settings", "Recipe", (), settings)
    yield Heading("What was read")
    before = {rows.name: rows.reasons for rows in shown}
    more = [reading for reading in report.readings if reading.reasons != before.get(reading.name, {})]
    for reading in report.readings:
        yield from reading_tables(asdict(reading) | ({} if reading in more else {"reasons": {}}))
    if more:
        yield _bad_rows_note(report.settings["on_bad_row"])
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
    from ..data.stats import STEPS

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
