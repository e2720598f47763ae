"""Checkpoints that any strategy can read: full tensors by name, and complete or absent.

    checkpoint-100/
    ├── adapter_config.json, adapter_model.safetensors    or the whole model, when all of it is trained
    ├── optimizer-00001.safetensors ...                   "<parameter>|<key>": the optimizer's state, unsharded
    ├── rng-00000.safetensors ...                         the generators of each rank
    ├── trainer_state.json                                step, best metric, history, callbacks
    ├── run.json                                          what must not change on a resume
    └── manifest.json                                     size and hash of every other file; written last

The folder is filled under a name that ends in ".partial", then renamed. Nothing in it is pickled. The position in the
data and the learning rate follow from the step alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .errors import UserError
from .runtime import OptimizerState, Runtime

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
FILE_BYTES = 2 * 1024**3  # host memory that rank 0 needs while it writes


class FullWriter:
    """Collects tensors and writes them to PREFIX-00001.safetensors, ... of about FILE_BYTES each."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.tensors: dict[str, torch.Tensor] = {}
        self.bytes, self.files = 0, 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.contiguous().clone()  # safetensors refuses tensors that share memory
        self.bytes += tensor.numel() * tensor.element_size()
        if self.bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            self.files += 1
            save_file(self.tensors, self.folder / f"{self.prefix}-{self.files:05d}.safetensors")
        self.tensors, self.bytes = {}, 0


def save_weights(runtime: Runtime, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write what was trained, as a folder that peft or transformers load. All ranks together; rank 0 writes.

    Args:
        dtype: cast to this type; None keeps the optimizer's precision.

    Raises:
        RuntimeError: tensors are missing in the written file; some wrappers of some versions lose them silently.
    """
    model, main = runtime.model, runtime.accelerator.is_main_process
    names = list(runtime.trainable)
    state = {}
    for name, tensor in runtime.full_parameters(names):
        if main:
            state[name] = tensor.to(dtype) if dtype else tensor.clone()
    if not main:
        return
    adapter = hasattr(model, "peft_config")
    model.save_pretrained(folder, state_dict=state, **({"save_embedding_layers": False} if adapter else {}))
    written = sum(len(safe_open(file, "pt").keys()) for file in folder.glob("*model*.safetensors"))
    if written != len(names):
        raise RuntimeError(f"{folder} has {written} tensors, not {len(names)}")


def load_weights(runtime: Runtime, folder: Path) -> None:
    """Read what `save_weights` wrote into the running model. All ranks together; each reads the files."""
    adapter = hasattr(runtime.model, "peft_config")
    tensors = {name: file for file in folder.glob("*model*.safetensors") for name in safe_open(file, "pt").keys()}
    for name in runtime.trainable:
        key = name.replace(".default.", ".") if adapter else name
        with safe_open(tensors[key], "pt") as file:
            runtime.set_parameter(name, file.get_tensor(key))


def save(runtime: Runtime, output_dir: Path, step: int, *, state: dict, run: dict) -> Path:
    """Write checkpoint-STEP, complete or not at all. All ranks together.

    Args:
        state: what the trainer wants back, as JSON values.
        run: what must be the same when the run is resumed.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"{final.name}.partial"
    main = runtime.accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    runtime.accelerator.wait_for_everyone()
    save_weights(runtime, partial)
    writer = FullWriter(partial, "optimizer")
    for name, moments in runtime.optimizer_state():
        if main:
            for key, tensor in moments.items():
                writer.add(f"{name}|{key}", tensor)
    writer.flush()
    save_file(_generators(), partial / f"rng-{runtime.accelerator.process_index:05d}.safetensors")
    runtime.accelerator.wait_for_everyone()
    if main:
        (partial / "trainer_state.json").write_text(json.dumps(state, indent=1))
        (partial / "run.json").write_text(json.dumps(run, indent=1))
        _seal(partial, final)
    runtime.accelerator.wait_for_everyone()
    return final


def load(runtime: Runtime, folder: Path, dry_step) -> dict:
    """Read a checkpoint into the running model and optimizer. All ranks together.

    Returns:
        The trainer's state.
    """
    load_weights(runtime, folder)
    states: dict[str, OptimizerState] = {name: {} for name in runtime.trainable}
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        for key, tensor in load_file(file).items():
            name, _, moment = key.rpartition("|")
            states[name][moment] = tensor
    runtime.set_optimizer_state(states, dry_step)
    mine = folder / f"rng-{runtime.accelerator.process_index:05d}.safetensors"
    if mine.exists():  # more processes than before: the new ones keep their fresh generators
        _set_generators(load_file(mine))
    return json.loads((folder / "trainer_state.json").read_text())


def find(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        wanted: "auto" for the newest complete one of the run, or a checkpoint's folder.

    Returns:
        Its folder; None if "auto" finds a run that has not saved yet.

    Raises:
        UserError: a named checkpoint is not complete, or "auto" finds only damaged ones or a finished run.
    """
    if wanted != "auto":
        problem = damage(Path(wanted))
        if problem:
            raise UserError(
                problem, where=f"resume_from_checkpoint {wanted}", fix="name a complete checkpoint, or auto"
            )
        return Path(wanted)
    found = checkpoints(output_dir)
    newest = next((folder for folder in reversed(found) if not damage(folder)), None)
    if newest is None and (found or (output_dir / "final_model").exists()):
        raise UserError(
            damage(found[-1]) if found else f"{output_dir} is a finished run without checkpoints",
            where="resume_from_checkpoint auto",
            fix="choose another --output_dir for a new run",
        )
    return newest


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is complete, by the size and hash of every file."""
    if not (folder / MANIFEST).is_file():
        return f"{folder} is not a complete checkpoint: it has no {MANIFEST}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{folder / MANIFEST} is damaged"
    for name, entry in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"] or _hash(file) != entry["sha256"]:
            return f"{file} is damaged"
    return None


def changes(folder: Path, run: dict) -> list[str]:
    """What a resume would change, as 'key: before -> now'."""
    before = json.loads((folder / "run.json").read_text())
    return [f"{key}: {before.get(key)} -> {value}" for key, value in run.items() if before.get(key) != value]


def retain(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints over `limit`; never the newest, never the best."""
    if limit is None:
        return
    removable = [path for path in checkpoints(output_dir)[:-1] if str(path) != best]
    for path in removable[: max(0, len(checkpoints(output_dir)) - limit)]:
        shutil.rmtree(path)


def _seal(partial: Path, final: Path) -> None:
    manifest = {}
    for file in _files(partial):
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
        _sync(file)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(partial / MANIFEST)
    _sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
