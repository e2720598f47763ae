"""What a person types in the first hour, and what must be true: runs the rows of tests/first_hour/rows.yaml and counts them.

    python tests/support/first_hour.py                 the rows of the default tier, as a table; exits with 1 if one is broken
    python tests/support/first_hour.py --nightly       all rows
    python tests/support/first_hour.py WORD ...        those whose id or area has one of the words

A row that needs no training runs in this process, by `manyrank.cli.main`; others run in a process of their own (`warm`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import warm
import yaml
from launches import ROOT

from manyrank import cli
from manyrank.config.args import as_grpo, parse
from manyrank.config.resolve import resolve
from manyrank.project_files import asset

FILE = ROOT / "tests" / "first_hour" / "rows.yaml"
SNIPPET = Path(__file__).with_name("snippet.py")
MODULES = {"manyrank": "manyrank.cli", "accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
WORKS, NAMED, ANSWERED, ELSEWHERE = "works", "works under another name", "answered", "needs more than this machine"
OUTCOMES = (WORKS, NAMED, ANSWERED, ELSEWHERE)


class Broken(Exception):
    """A row whose promise is not kept."""


@dataclass(frozen=True)
class Row:
    """A row of the table; rows.yaml describes the keys."""

    id: str
    area: str
    outcome: str
    run: str = ""
    python: str = ""
    docs: str = ""
    needs: str = ""
    tested: str = ""
    given: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    exit: int = 0
    prints: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    then: str = ""
    process: bool = False
    nightly: bool = False

    @property
    def typed(self) -> str:
        """What stands in the first column of a table."""
        return self.run or (f"docs/{self.docs}: {self.prints[0]}" if self.docs else self.python.strip())

    @property
    def command(self) -> str:
        """What is run of it: a training in this process is checked alone."""
        name = " ".join(shlex.split(self.run)[1:2])
        trains = name in ("train", "grpo") or name not in ("", *cli.COMMANDS)
        checked = (
            trains and not self.process and not {"--check", "--print", "--help", "--version"} & set(self.run.split())
        )
        return f"{self.run} --check" if checked else self.run


@cache
def content() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


@cache
def rows() -> dict[str, Row]:
    """The rows by id, in their order.

    Raises:
        ValueError: an id stands twice.
    """
    made: dict[str, Row] = {}
    for area in content()["areas"]:
        for name, entry in area["rows"].items():
            if name in made:
                raise ValueError(f"{name} stands twice in {FILE.name}")
            made[name] = _row(name, area["title"], dict(entry), area.get("is"))
    return made


def _row(name: str, title: str, entry: dict[str, Any], named: str | None) -> Row:
    for key in ("prints", "files", "absent", "after"):
        value = entry.get(key, [])
        entry[key] = tuple(value if isinstance(value, list) else [value])
    works = NAMED if named else WORKS
    outcome = ELSEWHERE if entry.get("needs") else ANSWERED if entry.get("exit") else works
    return Row(name, title, outcome, **entry)


# A folder, and what is typed in it


def make_folder(folder: Path) -> Path:
    """Write the files that all rows share."""
    for name, text in content()["files"].items():
        (folder / name).write_text(text, encoding="utf-8")
    sample = asset("data", "sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "my.jsonl").write_text("".join(sample[:12]), encoding="utf-8")
    shutil.copytree(asset("data", "formats"), folder / "formats")
    return folder


class Session:
    """A folder in which rows are typed; a command that several rows share is run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self.done: dict[str, tuple[int, str]] = {}

    def check(self, row: Row) -> None:
        """Type a row, and hold its answer against what must be true.

        Raises:
            Broken: something is not.
        """
        if row.needs:
            return _demand((ROOT / row.tested).is_file(), f"there is no {row.tested}")
        if row.docs:
            titles = [
                line for line in (ROOT / "docs" / row.docs).read_text("utf-8").splitlines() if line.startswith("#")
            ]
            return _demand(any(row.prints[0] in title for title in titles), f"no title has {row.prints[0]!r}")
        for name in row.after:
            self.check(rows()[name])
        with self._files(row.given):
            code, said = self.type(row)
            _demand(code == row.exit, f"exit code {code}\n{said}")
            self._compare(row, said)
            if row.then:
                code, said = self._inside(lambda: cli.main(shlex.split(row.then)[1:]))
                _demand(code == 0, f"what it says to type does not work: {row.then}\n{said}")

    @contextlib.contextmanager
    def _files(self, given: dict[str, str]) -> Iterator[None]:
        for name, text in given.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")
        yield
        for name in given:
            (self.folder / name).unlink()

    def _compare(self, row: Row, said: str) -> None:
        missing = [text for text in row.prints if text not in said]
        _demand(not missing, f"it does not print {missing}\n{said}")
        if row.exit == 2:
            error = said[said.find("error: ") :].splitlines()  # warnings come first
            heads = [line.split(" ")[0] for line in error if line[:1].isalpha() and not line.startswith("why:")]
            several = len(heads) // 3 or 1  # of a recipe with several faults
            _demand(heads == ["error:", "where:", "fix:"] * several, f"not three lines\n{said}")
        _demand(all((self.folder / name).exists() for name in row.files), f"not all there: {row.files}\n{said}")
        _demand(not any((self.folder / name).exists() for name in row.absent), f"there: {row.absent}\n{said}")
        values = self._resolved(row) if row.config else {}
        wrong = {key: values.get(key) for key, value in row.config.items() if values.get(key) != value}
        _demand(not wrong, f"the recipe has {wrong}, not {row.config}")

    def type(self, row: Row) -> tuple[int, str]:
        """Run what a row types.

        Returns:
            The exit code, and all that was printed.
        """
        key = row.command or row.python
        if key not in self.done:
            if row.process:
                self.done[key] = self._process(row)
            elif row.python:
                self.done[key] = self._inside(lambda: exec(compile(row.python, row.id, "exec"), {}) or 0)
            else:
                self.done[key] = self._inside(lambda: cli.main(shlex.split(row.command)[1:]))
        return self.done[key]

    def _process(self, row: Row) -> tuple[int, str]:
        if row.python:
            snippet = self.folder / f"{row.id}.py"
            snippet.write_text(row.python, encoding="utf-8")
            argv = [sys.executable, str(SNIPPET), str(snippet)]
        else:
            program, *words = shlex.split(row.command)
            if program == "accelerate":
                words = words[1:]
            start = words[:2] if program == "python" else ["-m", MODULES[program]]
            argv = [sys.executable, *start, *(words[2:] if program == "python" else words)]
        done = warm.run(argv, cwd=self.folder, env={**os.environ, "WANDB_MODE": "offline"})
        return done.returncode, done.stdout + done.stderr

    def _inside(self, call: Any) -> tuple[int, str]:
        """Call something in this process, in the folder; its environment is given back."""
        environment, said = dict(os.environ), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = call()
            except SystemExit as end:  # a help text
                code = int(end.code or 0)
            except Exception:
                code = 1
                said.write(traceback.format_exc())
        os.environ.clear()
        os.environ.update(environment)
        return code, said.getvalue()

    def _resolved(self, row: Row) -> dict[str, Any]:
        with contextlib.chdir(self.folder):
            _, command, *words = shlex.split(row.run)
            if command not in cli.COMMANDS:
                words = [command, *words]
            line = parse(words, prog="manyrank", launch=True)
            line = as_grpo(line) if command == "grpo" else line
            values = resolve(line.recipe, line.overrides).config.plain()
        own = str(asset("data")).removesuffix("data")
        return {key: value.removeprefix(own) if isinstance(value, str) else value for key, value in values.items()}


def _demand(is_true: bool, otherwise: str) -> None:
    if not is_true:
        raise Broken(otherwise)


# The table


def tally(found: Iterator[Row] | list[Row]) -> Counter[str]:
    return Counter(row.outcome for row in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--nightly", action="store_true")
    given = parser.parse_args()
    chosen = [row for row in rows().values() if given.nightly or not row.nightly]
    if given.words:
        chosen = [row for row in chosen if any(word in row.id or word in row.area for word in given.words)]
    kept, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        for row in chosen:
            began = time.monotonic()
            try:
                session.check(row)
                kept.append(row)
                print(f"{row.outcome:<28}  {row.id:<34} {time.monotonic() - began:5.1f} s", flush=True)
            except Broken as error:
                broken.append(row)
                print(f"{'BROKEN':<28}  {row.id:<34} {row.typed}\n{error}", flush=True)
    counts = tally(kept)
    print("\n" + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES) + f", {len(broken)} broken")
    return int(bool(broken))


if __name__ == "__main__":
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}  # as the tests have it
    sys.exit(main())
