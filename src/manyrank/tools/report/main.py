"""`manyrank report`: a page about a run, made anew, or about several runs side by side. No torch.

manyrank report output/my                          writes output/my/report.html, as the end of a training does, and its summary
manyrank report output/a output/b --output ab.html
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...config.args import Options, arg, read_options, word
from ...errors import UserError, in_one_line
from . import terminal
from .blocks import one_line
from .pages import check_page, page, write_page
from .run_blocks import comparison_blocks, run_blocks
from .run_record import RunRecord, read_run
from .summary import summary_blocks

NAME, COMPARISON = "report.html", "comparison.html"


class ReportOptions(Options):
    """Write a page about a run, or about several runs side by side."""

    runs: list[Path] = word(..., "the output_dir of a training")
    output: Path | None = arg(None, f"the page (default: RUN/{NAME}; of several runs {COMPARISON})")
    output_dir: Path | None = arg(None, "the folder of the page")


def main(argv: Sequence[str]) -> int:
    """Write the page, print the summary of a single run, and where the page is.

    Raises:
        UserError: a folder is none of a run, a run is named twice, or the page cannot be written.
    """
    options = read_options(argv, ReportOptions, prog="manyrank report")
    if options.output and options.output_dir:
        raise UserError("--output and --output_dir name two pages", where="command line", fix="keep one of them")
    write, name = (write_report, NAME) if len(options.runs) == 1 else (write_comparison, COMPARISON)
    if options.output_dir:
        with _new_folder(options.output_dir):
            file = write(options.runs, options.output_dir / name)
    else:
        file = write(options.runs, options.output)
    if len(options.runs) == 1:
        run = read_run(options.runs[0])
        terminal.show(title(run), summary_blocks(run))
        print()
    print(f"written to {file}")
    return 0


def title(run: RunRecord) -> str:
    return f"Report of {one_line(run.name)}"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and remove it where nothing comes into it."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder {folder} cannot be made: {error.strerror}"
        raise UserError(what, where="--output_dir", fix="name another folder") from None
    try:
        yield
    except UserError:
        if is_new:
            folder.rmdir()
        raise


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, in its folder unless said otherwise.

    Raises:
        UserError: the folder is none of a run, or the page cannot be written.
    """
    (folder,) = folders
    run = read_run(folder)
    return _write(page(title(run), run_blocks(run)), output or folder / NAME)


def make_report(output_dir: Path) -> Path | None:
    """Write report.html. The training has ended and is saved: an error of its page is a warning, and costs nothing else."""
    try:
        return write_report([output_dir])
    except Exception as error:
        print(
            f"WARNING: the report could not be made: {in_one_line(error)}. `manyrank report {output_dir}` tries again",
            file=sys.stderr,
            flush=True,
        )
        return None


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of several runs, as comparison.html in the working folder unless said otherwise.

    Raises:
        UserError: a folder is none of a run or named twice, or the page cannot be written.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for number, folder in enumerate(folders) if resolved[number] in resolved[:number]]:
        raise UserError("a run is named twice", where=str(twice[0]), fix="name each run once")
    runs = [read_run(folder) for folder in folders]
    return _write(page(f"{len(runs)} runs", comparison_blocks(runs)), output or Path(COMPARISON))


def _write(text: str, file: Path) -> Path:
    check_page(file, option="--output")
    write_page(text, file)
    return file
