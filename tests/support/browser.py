"""A headless browser that looks at the project's pages, and a reader of what it makes of them."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")


def needs_chromium(test):
    """Marks a test that looks at a page."""
    return pytest.mark.hosts(pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed")(test))


class Page(HTMLParser):
    """What a browser made of the page: figures by section, supervised runs, elements."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.figures: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}
        self.learned: list[str] = []
        self.samples: list[str] = []
        self.tags: set[str] = set()
        self.title, self.section, self.open, self.depth = "", "", [], 0
        self.feed(dom)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "section":
            self.section = values["id"]
        if tag == "article":
            self.section = "sample"
        if tag == "pre":
            self.samples.append("")
        if tag == "data":
            self.figures.setdefault(self.section, []).append(values["value"])
        if tag == "span" and self.section == "sample" and (self.depth or values.get("class") == "learned"):
            self.learned += [] if self.depth else [""]
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "span" and self.depth > 0
        self.section = "" if tag in ("section", "article") else self.section
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if "pre" in self.open:
            self.samples[-1] += data
        if self.open[-1:] == ["title"] and "svg" not in self.open:
            self.title += data
        if self.depth:
            self.learned[-1] += data


def browse(path: Path, folder: Path, *more: str) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000", f"--user-data-dir={folder}"]
    done = subprocess.run([CHROMIUM, *flags, *more, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look_at(path: Path, folder: Path, *, width: int, scheme: int, height: int = 1400):
    """The page's pixels, height x width x RGB; `scheme` is 0 where the user prefers dark pages, else 1."""
    import numpy as np
    from PIL import Image

    file = folder / "page.png"
    size = (f"--screenshot={file}", f"--window-size={width},{height}")
    browse(path, folder / "profile", *size, f"--blink-settings=preferredColorScheme={scheme}")
    picture = np.asarray(Image.open(file).convert("RGB"), dtype=int)
    assert picture.shape == (height, width, 3)
    return picture
