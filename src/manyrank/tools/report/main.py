"""`manyrank report`: a page about a run, made anew, or about several runs side by side. No torch.

manyrank report output/my                          writes output/my/report.html, as the end of a training does
manyrank report output/a output/b --output ab.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...config.args import Parser
from ...errors import UserError, in_one_line
from .pages import check_page, write_page
from .report_html import comparison_page, run_page
from .run_record import read_run

NAME, COMPARISON = "report.html", "comparison.html"


def main(argv: Sequence[str]) -> int:
    """Write the page and say where it is.

    Raises:
        UserError: a folder is none of a run, a run is named twice, or the page cannot be written.
    """
    parser = Parser(prog="manyrank report", allow_abbrev=False, description=__doc__.splitlines()[0].split(": ")[1])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output_dir of a training")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (default: RUN/{NAME}; of several runs {COMPARISON})"
    )
    given = parser.parse_args(argv)
    page = make(given.runs[0], given.output) if len(given.runs) == 1 else compare(given.runs, given.output)
    print(f"written to {page}")
    return 0


def make(folder: Path, output: Path | None = None) -> Path:
    """Write the page of one run, in its folder unless said otherwise.

    Raises:
        UserError: the folder is none of a run, or the page cannot be written.
    """
    return _write(run_page(read_run(folder)), output or folder / NAME)


def make_report(output_dir: Path) -> Path | None:
    """report.html. The training is over and saved: whatever is wrong with its page is told, and changes nothing of that."""
    try:
        return make(output_dir)
    except Exception as error:
        print(
            f"WARNING: the report could not be made: {in_one_line(error)}. `manyrank report {output_dir}` tries again",
            file=sys.stderr,
            flush=True,
        )
        return None


def compare(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of several runs, as comparison.html in the working folder unless said otherwise.

    Raises:
        UserError: a folder is none of a run or named twice, or the page cannot be written.
    """
    same = [
        folder for number, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:number]}
    ]
    if same:
        raise UserError("a run is named twice", where=str(same[0]), fix="name each run once")
    return _write(comparison_page([read_run(folder) for folder in folders]), output or Path(COMPARISON))


def _write(text: str, page: Path) -> Path:
    check_page(page, option="--output")
    write_page(text, page)
    return page
