"""Pages that need nothing else: no network, no script, the style inline. What they show is escaped by whoever makes the body."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from ...errors import UserError

# The browser itself refuses to fetch or run anything, should something ever get past the escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1d1b; --soft: #66655f; --line: #e2e1db;
  --bar: #2f74b5; --track: #eeede8; --learned: #d3f0dc; --learned-ink: #0a5227; --warn: #fdf0d5; --warn-ink: #6b4300; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #e9e8e2; --soft: #a3a29a;
  --line: #35342f; --bar: #6aa7de; --track: #2a2a27; --learned: #173f29; --learned-ink: #b4f0c8; --warn: #3d2f10;
  --warn-ink: #f5d48c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0 0 1.25rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h2::first-letter { text-transform: uppercase; }
h3 { margin: 0 0 .75rem; font-size: .95rem; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; margin: 0 0 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.25rem; align-items: end;
  margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; line-height: 1.3; }
.facts dd { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.facts data { font-size: 1.3rem; font-weight: 600; }
data { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { color: var(--soft); font-size: .8rem; font-weight: 500; text-align: left; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; min-width: 7.5rem; }
.figure { text-align: right; white-space: nowrap; min-width: 0; }
.figure:first-child { text-align: left; }
.figure:last-child { padding-right: 0; }
.note { margin: .75rem 0 0; color: var(--soft); font-size: .85rem; }
.warning { background: var(--warn); color: var(--warn-ink); border-color: transparent; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px .75rem; align-items: center;
  font-size: .82rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.bars .range { color: var(--soft); text-align: right; }
.bars .track { background: var(--track); border-radius: 2px; height: .95rem; }
.bars .bar { background: var(--bar); border-radius: 2px; height: 100%; }
.bars data { text-align: right; }
.legend { color: var(--soft); font-size: .85rem; margin: 0 0 1rem; }
.sample h3 { margin: 0; overflow-wrap: anywhere; }
.sample p { margin: .1rem 0 .75rem; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
pre { margin: 0; max-height: 34rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.6 ui-monospace, monospace; }
.learned { background: var(--learned); color: var(--learned-ink); border-radius: 2px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.special { opacity: .55; }
.stack { position: relative; display: flex; height: 1.1rem; background: var(--track); min-width: 14rem; }
.stack span { height: 100%; }
.stack i { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--ink); }
.weights { background: #2f74b5; } .trained { background: #7a4fb0; } .kept { background: #d08a2c; }
.gathered { background: #4a9a6c; } .around { background: #9a9992; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """The whole page.

    Args:
        title: plain text. body: HTML. style: CSS that comes after that of all pages.
    """
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}{style}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def check_page(path: Path, *, option: str = "--html") -> None:
    """See before the work that a page can be written.

    Raises:
        UserError: it cannot, or the name is not one of a page.
    """
    fix = "name a file like page.html in a folder that is there"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} is not named as a page", where=option, fix=fix)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"a page cannot be written to {path}", where=option, fix=fix)


def write_page(text: str, path: Path) -> None:
    """The page, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write it: {error.strerror}", where=str(path), fix="name another file") from None
