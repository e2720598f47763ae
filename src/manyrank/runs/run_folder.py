"""A run's folder on disk: which checkpoints are complete, and how one becomes complete. No torch.

    checkpoint-100.partial/    being written; sealed by manifest.json, then renamed
    checkpoint-100/            complete: every file has the size and hash that manifest.json says
    checkpoint-50.removed/     being removed
    SAVE_NOW                   made by the user: save at the next step
    tokenizer/                 of a run whose tokenizer is not its base's, since a script passed it
    run.lock                   whose folder it is while a run works in it; see `run_lock`
    launch/                    the plan of the launch, the job's file, and the mark of a run that is to be removed
    logs/heartbeats/           signs of life; a folder with nothing but these three is a new run's

A killed save leaves only what the next start removes, or what it can finish: a sealed folder that is not renamed yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST, SAVE_NOW, TOKENIZER = "manifest.json", "SAVE_NOW", "tokenizer"
LAUNCH, LAUNCH_FOLDER = "launch.json", "launch"
LOCK, HEARTBEATS, TO_REMOVE = "run.lock", Path("logs", "heartbeats"), Path(LAUNCH_FOLDER, "remove-run")
PARTIAL, REMOVED = ".partial", ".removed"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
NEEDED = ("run.json", "trainer_state.json")
OWN = re.compile(  # entries of a run's folder
    rf"config\.yaml|launch\.json|{LAUNCH_FOLDER}|logs|report\.html|{TOKENIZER}|{SAVE_NOW}|{re.escape(LOCK)}.*|{'|'.join(map(re.escape, ADAPTER))}|"
    rf"({NAME.pattern}|final_model)({re.escape(PARTIAL)}|{re.escape(REMOVED)})?"
)
LEFTOVER = re.compile(rf"({NAME.pattern}|final_model)({re.escape(PARTIAL)}|{re.escape(REMOVED)})")


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, None for a run without one. `passed_over`: newer ones, and why."""

    folder: Path | None
    passed_over: tuple[str, ...] = ()


def find(output_dir: Path, wanted: str) -> Found:
    """The checkpoint to resume from.

    Args:
        wanted: "auto" for the newest complete one of the run, or a checkpoint's folder.

    Raises:
        UserError: a named checkpoint is not complete, or "auto" finds only damaged ones or a finished run.
    """
    if wanted != "auto":
        if problem := damage(Path(wanted)):
            fix = "name a complete checkpoint, or auto"
            raise UserError(problem, where=f"resume_from_checkpoint {wanted}", fix=fix)
        return Found(Path(wanted))
    problems = []
    for folder in reversed(checkpoints(output_dir)):
        problem = damage(folder)
        if not problem:
            return Found(folder, tuple(problems))
        problems.append(problem)
    if problems or (output_dir / "final_model").exists():
        raise UserError(
            problems[0] if problems else f"{output_dir} is a finished run without checkpoints",
            where="resume_from_checkpoint auto",
            fix="choose another --output_dir for a new run",
        )
    return Found(None)


def is_new(output_dir: Path) -> bool:
    """Return whether no run has begun in a folder: it holds nothing, or only what a start writes before its first step."""
    if not output_dir.exists():
        return True
    for path in output_dir.rglob("*"):
        name = path.relative_to(output_dir)
        starting = name.name.startswith(LOCK) or name.parts[0] == LAUNCH_FOLDER or HEARTBEATS in (name, *name.parents)
        if not starting and name != HEARTBEATS.parent:
            return False
    return True


def others(output_dir: Path) -> list[str]:
    """Name the entries of a folder that are not a run's."""
    entries = output_dir.iterdir() if output_dir.is_dir() else ()
    return sorted(path.name for path in entries if not OWN.fullmatch(path.name))


def is_removable(output_dir: Path) -> bool:
    """Return whether a folder's run may be removed: only a run writes launch.json, where other tools have checkpoints, too."""
    return (output_dir / LAUNCH).is_file()


def mark_for_removal(output_dir: Path) -> None:
    """Mark a folder whose run is to be removed when the next one starts; a restart until then must not resume from it."""
    (output_dir / TO_REMOVE).parent.mkdir(exist_ok=True)
    (output_dir / TO_REMOVE).touch()


def is_marked(output_dir: Path) -> bool:
    """Return whether a folder's run is to be removed, see `mark_for_removal`."""
    return (output_dir / TO_REMOVE).exists()


def remove_run(output_dir: Path) -> list[str]:
    """Remove an earlier run from the folder of one that starts, and its mark, and return the names of what is gone.

    What the start has written stays (see `is_new`), and what is not a run's.
    """
    entries = [path for path in output_dir.iterdir() if OWN.fullmatch(path.name) and not path.name.startswith(LOCK)]
    logs = HEARTBEATS.parts[0]
    removed = [path for path in entries if path.name not in (LAUNCH_FOLDER, logs)]
    removed += [path for path in (output_dir / logs).glob("*") if path.name != HEARTBEATS.name]
    for path in sorted(removed, key=lambda path: path.name == LAUNCH):  # by which the rest is known as a run's
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (output_dir / TO_REMOVE).unlink(missing_ok=True)
    return sorted(path.relative_to(output_dir).as_posix() for path in removed)


def link_adapter(output_dir: Path) -> None:
    """Link final_model's adapter in the run's folder, for `PeftModel.from_pretrained(base, OUTPUT_DIR)`."""
    for name in ADAPTER:
        link, target = output_dir / name, Path("final_model", name)
        with contextlib.suppress(OSError):  # some file systems have no links
            link.unlink(missing_ok=True)  # in a copy of a run it may be a file, of an earlier final_model
            if (output_dir / target).is_file():
                link.symlink_to(target)


def free_folder(base: Path) -> tuple[Path, Path]:
    """Find the last of BASE, BASE-2, BASE-3, ... that is there (BASE if none is), and the next, which is not."""
    last, folder, number = base, base, 1
    while folder.exists():
        last, number = folder, number + 1
        folder = base.with_name(f"{base.name}-{number}")
    return last, folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def unsealed(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, by its manifest alone; None if it has one."""
    return None if (folder / MANIFEST).is_file() else f"{folder} is not a complete checkpoint: it has no {MANIFEST}"


def damage(folder: Path, *, needed: Iterable[str] = NEEDED, every: int = 1, first: int = 0) -> str | None:
    """Why a checkpoint cannot be used; None if it is complete, by the size and hash of every file.

    Args:
        needed: files that it must have.
        every, first: look into each so many files only, from that one on, the largest first: processes share a big folder.
    """
    if problem := unsealed(folder):
        return problem
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        if not set(needed) <= sizes.keys():
            return f"{folder / MANIFEST} is damaged"
        largest_first = sorted(sizes.items(), key=lambda item: -item[1][0])
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / MANIFEST} is damaged"
    for name, (size, digest) in largest_first[first::every]:
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size or _hash(file) != digest:
            return f"{file} is damaged"
    return None


def changes(folder: Path, run: dict, *, allowed: Iterable[str] = ()) -> list[str]:
    """List what a resume would change, as 'key: before -> now', without what is allowed."""
    before = json.loads((folder / "run.json").read_text())
    differing = [key for key, value in run.items() if before.get(key) != value and key not in set(allowed)]
    return [f"{key}: {before.get(key)} -> {run[key]}" for key in differing]


# Writing


def begin(output_dir: Path, step: int) -> Path:
    """An empty folder for a new checkpoint."""
    partial = output_dir / f"checkpoint-{step}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def seal(partial: Path) -> Path:
    """Make a folder that is written complete: manifest, fsync, rename.

    Returns:
        Its final name.
    """
    write_manifest(partial)
    return _rename_to_final(partial)


def write_manifest(partial: Path) -> None:
    """Have a folder's files on the disk, with the usual modes, and the size and hash of each beside them."""
    give_usual_modes(partial)
    manifest = {}
    for file in sorted(path for path in partial.iterdir() if path.name != MANIFEST):
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
        sync(file)
    write(partial / MANIFEST, json.dumps(manifest, indent=1))
    sync(partial)


def _rename_to_final(partial: Path) -> Path:
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    if final.exists():  # a damaged one that was passed over; the new one is sealed already, so nothing can get lost
        _remove(final)
    partial.rename(final)
    sync(final.parent)
    return final


@contextlib.contextmanager
def writable(output_dir: Path) -> Iterator[None]:
    """Turn a disk that is full or read-only before the first step into a UserError.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot write {error.filename or 'the files of the run'}: {error.strerror or error}"
        fix = "make room there, or choose another --output_dir"
        raise UserError(what, where=f"output_dir {output_dir}", fix=fix) from None


def write(file: Path, text: str) -> None:
    """Write a small file, to the disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(file: Path, content: str) -> None:
    """Write a text file, complete or not at all.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    partial = file.with_name(file.name + ".whole")
    try:
        partial.write_bytes(content.encode())
        sync(partial)
        partial.replace(file)
    finally:
        with contextlib.suppress(OSError):  # a name that is too long
            partial.unlink(missing_ok=True)


# Removing


def retain(output_dir: Path, limit: int | None, *, keep: Iterable[Path]) -> None:
    """Remove checkpoints over `limit`: first those without a manifest, then the oldest; never one of `keep`."""
    names = {path.name for path in keep}
    folders = checkpoints(output_dir)
    removable = [path for path in folders if path.name not in names]
    removable.sort(key=lambda path: ((path / MANIFEST).is_file(), step_of(path)))
    for path in removable[: max(0, len(folders) - limit) if limit else 0]:
        _remove(path)


def tidy(output_dir: Path) -> list[str]:
    """Clear away what a killed run left: finish a sealed checkpoint, remove the rest.

    Returns:
        What was done, in words.
    """
    done = []
    for path in list(_leftovers(output_dir)):
        if NAME.fullmatch(path.name.removesuffix(PARTIAL)) and damage(path) is None:
            done.append(f"finished {_rename_to_final(path)}, which was written but not yet renamed")
        else:
            shutil.rmtree(path, ignore_errors=True)
            done.append(f"removed {path}, which a killed run left")
    return done


def _leftovers(output_dir: Path) -> Iterator[Path]:
    if output_dir.is_dir():
        yield from sorted(path for path in output_dir.iterdir() if path.is_dir() and LEFTOVER.fullmatch(path.name))


def _remove(folder: Path) -> None:
    """Under another name first: a removal that is killed half way leaves no damaged checkpoint."""
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def give_usual_modes(folder: Path) -> None:
    """Give a folder and its files the modes that the user's umask says; safetensors and `mkdtemp` keep others out."""
    probe = folder / ".mode"
    probe.touch()  # to read the umask one would have to change it, under other threads
    usual = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(PermissionError):  # of a file system without modes
            path.chmod(usual | (usual & 0o444) >> 2 if path.is_dir() else usual | (path.stat().st_mode & 0o111))


@contextmanager
def atomic_directory(
    output: Path, *, overwrite: bool, mark: str | None = None, option: str = "--output_dir"
) -> Iterator[Path]:
    """A new folder that takes the place of `output` at the end, or vanishes on any error.

    Args:
        mark: a file that is in every folder which the command has written, so that it never replaces another one;
            None replaces nothing.
        option: what names the folder.

    Raises:
        UserError: `output` has files, and may not be overwritten or was not written by this command.
    """
    check_output(output, overwrite=overwrite, mark=mark, option=option)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))  # a name that nobody has
    try:
        yield partial
        give_usual_modes(partial)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: Path, *, where: str, fix: str) -> None:
    """Refuse a place where nothing can be written, before any work; root has rights that a file system does not follow.

    Raises:
        UserError: no file can be made in the folder, or the nearest one above that is there.
    """
    try:
        above = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", where=where, fix=fix) from None


def check_output(output: Path, *, overwrite: bool, mark: str | None, option: str = "--output_dir") -> None:
    """Refuse a folder that would lose something."""
    where = option.lstrip("-")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        check_writable(output, where=where, fix=f"choose another {option}")
        return
    if not output.is_dir() or mark is None or not (output / mark).is_file():
        what = f"there is something else at {output}" if output.is_dir() else f"{output} is a file"
        raise UserError(what, where=where, fix=f"choose another {option}")
    if not overwrite:
        raise UserError(f"{output} is there already", where=where, fix=f"choose another {option}, or add --overwrite")
