"""Pages that need nothing else: no network, no script, the style inline. The template escapes all that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...errors import UserError
from ...runs.run_folder import check_writable, write_atomically
from .blocks import Block


def page(title: str, blocks: Iterable[Block]) -> str:
    """The whole document.

    Args:
        title: plain text, as in all blocks.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(title=title, blocks=blocks)


def check_page(path: Path, *, option: str = "--html") -> None:
    """Check before the work that a page can be written.

    Raises:
        UserError: it cannot, or the name is not one of a page.
    """
    fix = "name a file like page.html in a folder that is there"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} is not named as a page", where=option, fix=fix)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"a page cannot be written to {path}", where=option, fix=fix)
    check_writable(path, where=option, fix=fix)


def write_page(text: str, path: Path) -> None:
    """Write the page, complete or not at all."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write it: {error.strerror}", where=str(path), fix="name another file") from None
