"""`manyrank files`: the files that come with the project, shown and copied to be changed. No torch.

manyrank files                       the folders, and what is in each
manyrank files launch/recipes        print a file, or the names in a folder
manyrank files copy launch my/launch a folder or a file; nothing that exists is overwritten
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.args import Options, read_options, word
from ..config.resolve import presets
from ..errors import UserError
from ..project_files import asset

FOLDERS = ("launch", "accelerate_configs", "ds_configs", "data")


class FilesOptions(Options):
    """Show the recipes, launch scripts, strategy files and samples that come with the project, or copy them."""

    words: list[str] = word([], "a folder or a file; or copy NAME [TO], where TO is . by default")


def main(argv: Sequence[str]) -> int:
    """Show or copy files.

    Raises:
        UserError: there is no such file, or copying would overwrite one.
    """
    words = read_options(argv, FilesOptions, prog="manyrank files").words
    if not words:
        for folder in FOLDERS:
            print(f"{folder}/", *(f"  {path.name}{'/' * path.is_dir()}" for path in _inside(asset(folder))), sep="\n")
        return 0
    if words[0] != "copy":
        name, source = _named(words[0])
        if len(words) > 1:
            raise UserError(
                f"one word too many: {words[1]!r}", where="manyrank files", fix="manyrank files copy NAME TO"
            )
        if source.is_dir():
            print(*(f"{name}/{path.name}{'/' * path.is_dir()}" for path in _inside(source)), sep="\n")
        else:
            sys.stdout.write(source.read_text(encoding="utf-8"))
        return 0
    if len(words) not in (2, 3):
        raise UserError("what to copy?", where="manyrank files copy", fix="manyrank files copy launch .")
    name, source = _named(words[1])
    to = Path(words[2] if len(words) == 3 else ".").expanduser()
    print(f"copied to {_copy(source, to / Path(name).name if to.is_dir() else to)}")
    return 0


def _named(word: str) -> tuple[str, Path]:
    """A file or folder of the project by its name, which does not lead out of it."""
    name = word.strip("/")
    if name in presets():
        name = f"launch/recipes/{name}.yaml"
    path = asset(*Path(name).parts)
    if name.split("/")[0] not in FOLDERS or ".." in Path(name).parts or not path.exists():
        fix = f"`manyrank files` lists what there is, in {', '.join(FOLDERS)}"
        raise UserError(f"there is no file {word!r} in the project", where="manyrank files", fix=fix)
    return name, path


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "__pycache__")


def _copy(source: Path, to: Path) -> Path:
    if to.exists():
        raise UserError(f"{to} exists", where="manyrank files copy", fix="name another place, or remove it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to)
    except OSError as error:
        what = f"{to} cannot be written: {error.strerror}"
        raise UserError(what, where="manyrank files copy", fix="name another place") from None
    return to
