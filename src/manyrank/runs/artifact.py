"""Models by name: a base model, a run's folder, a checkpoint, an adapter or a merged model. No torch.

output/run/               final_model/ of a run, or its newest complete checkpoint
output/run/checkpoint-50  an adapter or a whole model
adapter/, org/adapter     adapter_config.json, which names the base; of the hub, once it is in the local cache
model/, org/name          config.json and weights, on disk or on the hub
embedded                  the small model of the examples
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import hub, run_folder
from .mapping_files import read_yaml


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
        name: as it was asked for.
        base: a folder or a hub name.
        adapter: the folder of the adapter on it, or None.
        run: the folder of the run that it comes from, or None.
    """

    name: str
    base: str
    adapter: Path | None = None
    run: Path | None = None

    @property
    def own_tokenizer(self) -> str | None:
        """Folder of a tokenizer that is not the base's: with the model or adapter, or in its run; None: the base's is used."""
        places = [self.adapter or Path(self.base), *([self.run / run_folder.TOKENIZER] if self.run else [])]
        return next((str(place) for place in places if (place / "tokenizer_config.json").is_file()), None)

    @property
    def tokenizer(self) -> str:
        """Folder or name of the tokenizer."""
        return self.own_tokenizer or self.base


def find(name: str, *, base: str | None = None) -> ModelSource:
    """Find the model that a name stands for.

    Args:
        base: for an adapter, another base than the one that it names.

    Raises:
        UserError: a folder that is none of these, a run that has saved nothing, or a base for what is no adapter.
    """
    folder = hub.cached_adapter(name) or Path(name).expanduser()
    source = _in_folder(name, folder, base) if folder.is_dir() else ModelSource(name, name)
    if base and not source.adapter:
        raise UserError(f"a base for {name}, which is no adapter", where="--base", fix="leave it out")
    return source


def _in_folder(name: str, folder: Path, base: str | None) -> ModelSource:
    source = _of_run(name, folder)
    run = source.parent if source != folder or run_folder.NAME.fullmatch(folder.name) else None
    run = folder.parent if folder.name == "final_model" else run
    if (source / "adapter_config.json").is_file():
        return ModelSource(name, base or _base(source, run), source, run)
    if (source / "config.json").is_file():
        return ModelSource(name, str(source), None, run)
    raise UserError(
        "neither a model, an adapter nor a run",
        where=name,
        fix="give a folder with config.json or adapter_config.json, a run's folder, or a hub name",
    )


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run that has begun."""
    begun = ((folder / name).exists() for name in ("final_model", run_folder.LAUNCH))
    return any(begun) or bool(run_folder.checkpoints(folder))


def _of_run(name: str, folder: Path) -> Path:
    """The folder itself; of a run what it has saved last."""
    if (folder / "final_model").is_dir():
        return folder / "final_model"
    if saved := run_folder.checkpoints(folder):
        complete = next((checkpoint for checkpoint in reversed(saved) if not run_folder.damage(checkpoint)), None)
        if complete is None:
            raise UserError("no checkpoint of this run is complete", where=name, fix="train it again, or name another")
        return complete
    if (folder / run_folder.LAUNCH).is_file():
        raise UserError("this run has saved nothing yet", where=name, fix="wait for its first checkpoint")
    return folder


def _base(adapter: Path, run: Path | None) -> str:
    file = adapter / "adapter_config.json"
    try:
        name_of_base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), fix="give a whole adapter") from None
    if not name_of_base:
        fix = "write it there as base_model_name_or_path; `manyrank merge` also takes --base NAME"
        raise UserError("names no base model", where=str(file), fix=fix)
    return _from_anywhere(str(name_of_base), run, file)


def _from_anywhere(base: str, run: Path | None, file: Path) -> str:
    """The base that an adapter names, where it may be a path that was relative to the folder of the training.

    Raises:
        UserError: it can be no hub name, and the folder is not there.
    """
    path = Path(base).expanduser()
    if path.is_absolute():
        return str(path)
    for folder in [*_working_folders(run), Path.cwd()]:
        if (folder / path / "config.json").is_file():
            return str((folder / path).absolute())
    if base.count("/") > 1 or base.startswith("."):
        fix = "go to the folder in which it was trained, or write the base's whole path there"
        raise UserError(f"names its base {base}, and there is no such folder here", where=str(file), fix=fix)
    return base


def _working_folders(run: Path | None) -> list[Path]:
    """Yield the folders in which a run may have been started, by the relative output_dir in its config."""
    if not run or not (run / "config.yaml").is_file():
        return []
    config, folder = read_yaml(run / "config.yaml"), run.absolute()
    path = Path(str((config.get("output_dir") if isinstance(config, dict) else None) or f"output/{folder.name}"))
    inside = not path.is_absolute() and folder.parts[-len(path.parts) :] == path.parts
    return [folder.parents[len(path.parts) - 1]] if inside and path.parts else []


def adapter_fingerprint(folder: Path) -> str:
    """Fingerprint the weights of an adapter."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()[:32]


def base_fingerprint(name: str, commit: str | None) -> str:
    """Fingerprint a base model, wherever it lies: its config, and a piece of each file of weights.

    Args:
        name: a folder, or a name on the hub.
        commit: of the hub.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        with file.open("rb") as stream:
            stream.seek(size // 2)
            digest.update(b"%d" % size + stream.read(1 << 16))
    return digest.hexdigest()[:32]
