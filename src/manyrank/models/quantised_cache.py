"""A quantised base on disk, made once: the next start quantises nothing, and a rank reads its part alone.

    CACHE/NAME-KEY/                 config.json, model-WRITER-PIECE.safetensors, their index, manifest.json
    CACHE/NAME-KEY-START.partial/       a mark of each rank that reaches this disk
    CACHE/NAME-KEY-START-RANK.partial/  being written by the ranks whose marks are there

The folder is a model as bitsandbytes and transformers store it in 4 bits. While a start quantises (models/shards.py), the
ranks that share a disk, of one machine or of many, write every n-th tensor each; when all are there, the folder is sealed
like a checkpoint and gets its name. Machines with disks of their own have a cache each.
Before it is used, the ranks of a machine share the work of comparing its files with their hashes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig

from ..project_files import cache_folder
from ..runs import run_folder
from ..runs.artifact import base_fingerprint
from .adapters import Say
from .load import LoadPlan, base_model, is_stored_in_4_bits, load_config
from .shards import is_read

OFF, AUTO = "off", "auto"
PIECE = 64 << 20  # bytes of small tensors that a rank collects before it writes a file
SPARE = 0.05  # of the disk, that stays free
INDEX = "model.safetensors.index.json"
STALE = 24 * 3600  # seconds after which a folder that is being written belongs to a killed run


def cached_base(plan: LoadPlan, *, where: str, say: Say) -> torch.nn.Module:
    """Load a base that is quantised in shards, from the cache where it is there, and into it where it is not.

    Args:
        where: the cache's folder, "auto" for the project's, or "off". All ranks together.

    Raises:
        UserError: see `base_model`.
    """
    if where == OFF or not plan.in_4_bits:  # rules refuse the key for other methods
        return base_model(plan)
    config = load_config(plan.name, trust_remote_code=plan.trust_remote_code)
    if reason := _obstacle(plan, config):
        if where != AUTO:
            say(f"quantized_cache is not used: {reason}")
        return base_model(plan, config)
    commit = getattr(config, "_commit_hash", None)
    folder = (cache_folder() / "quantised" if where == AUTO else Path(where).expanduser()) / _name(plan, commit)
    place = {"every": int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "first": int(os.environ.get("LOCAL_RANK", 0))}
    problem = _damage(folder, **place)
    if not any(gather_object([problem is not None])):  # all ranks alike: quantising and writing need collectives
        say(f"the quantised base comes from {folder}")
        model = base_model(replace(plan, name=str(folder)))
        model.name_or_path, model.config._commit_hash = plan.name, commit
        return model
    if folder.exists() and problem and not run_folder.unsealed(folder):
        print(f"{problem}: the base is quantised again", flush=True)
    recorder = _Recorder(folder, token=broadcast_object_list([f"{os.getpid()}-{time.time_ns()}"])[0])
    with recorder.recording():
        model = base_model(plan, config)
    recorder.finish(model, say)
    return model


def _obstacle(plan: LoadPlan, config: PreTrainedConfig) -> str | None:
    """Say why a base is not cached."""
    if plan.share is None:
        return "the strategy does not shard the base"
    if plan.new.ids:
        return "its embeddings get rows for new tokens"
    if plan.trust_remote_code:
        return "the model has code of its own, which would have to come along"
    return "the base is stored in 4 bits" if is_stored_in_4_bits(config) else None


def _name(plan: LoadPlan, commit: str | None) -> str:
    """Named after all that decides the bytes and the names of the tensors."""
    facts = [base_fingerprint(plan.name, commit), str(plan.compute_dtype), torch.device(plan.device_map[""]).type]
    facts += [version(name) for name in ("bitsandbytes", "transformers")]
    facts += [] if (kind := (plan.quantization, plan.double_quant)) == ("nf4", True) else map(str, kind)
    if (base := Path(plan.name)).is_dir():  # the fingerprint looks at a piece of each file
        files = sorted(base.glob("*.safetensors"))
        facts += [str(base.resolve()), *(f"{file.name} {file.stat().st_mtime_ns}" for file in files)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return f"{Path(plan.name).name}-{key}"


def _damage(folder: Path, **part: int) -> str | None:
    try:
        return run_folder.damage(folder, needed=["config.json"], **part)
    except OSError as error:  # somebody has just removed it
        return f"{folder}: {error.strerror or error}"


class _Recorder:
    """Writes a rank's share of the tensors that transformers puts into a model, before they are cut.

    Attributes:
        writers: the ranks that write this copy. index: this rank's place among them.
    """

    def __init__(self, folder: Path, *, token: str) -> None:
        self.folder = folder
        self.problem: str | None = None
        rank = PartialState().process_index
        self.writers = self._writers(rank, folder.with_name(f"{folder.name}-{token}{run_folder.PARTIAL}"))
        self.index = self.writers.index(rank)
        self.partial = folder.with_name(f"{folder.name}-{token}-{self.writers[0]}{run_folder.PARTIAL}")
        self.parents: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.seen = 0
        self.piece: dict[str, torch.Tensor] = {}
        self.files: dict[str, str] = {}  # of each tensor

    def _writers(self, rank: int, marks: Path) -> list[int]:
        """The ranks that share this one's disk: they see the same marks. All ranks together."""
        names: list[str] = []
        with self._attempt():
            _clear_away(marks.parent)
            marks.mkdir(parents=True, exist_ok=True)
            (marks / str(rank)).touch()
        gather_object([None])  # every rank has left its mark
        with self._attempt():
            names = [] if self.problem else sorted(mark.name for mark in marks.iterdir())
        writers = [other for other, theirs in enumerate(gather_object([names])) if theirs == names]
        if rank == writers[0]:
            shutil.rmtree(marks, ignore_errors=True)
        return writers

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with self._attempt():
            self.partial.mkdir(exist_ok=True)
        hooks = [
            register_module_module_registration_hook(self._note),
            register_module_parameter_registration_hook(self._add),
        ]
        try:
            yield
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """A cache that cannot be written is no reason to end the run."""
        try:
            yield
        except (OSError, SafetensorError, ValueError) as error:  # ValueError: a config that transformers does not write
            place, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
            self.problem = self.problem or f"{place or self.folder}: {reason or error}"

    def _note(self, parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        if child is not None:
            self.parents[child] = weakref.ref(parent), name

    def _path(self, module: torch.nn.Module | None, name: str) -> str:
        """The whole name of a parameter; the model itself is not at hand while transformers fills it."""
        while module in self.parents:
            parent, own = self.parents[module]
            module, name = parent(), f"{own}.{name}"
        return name

    def _add(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if self.problem or not is_read(parameter):
            return
        self.seen += 1
        if self.seen % len(self.writers) != self.index:
            return
        path, state = self._path(module, name), getattr(parameter, "quant_state", None)
        constants = state.as_dict(packed=True) if state else {}
        self._collect({path: parameter.data, **{f"{path}.{key}": value for key, value in constants.items()}})

    def _collect(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write a large tensor by itself, and copies of small ones together: of these a rank holds no more than PIECE."""
        for name, tensor in tensors.items():
            if sum(other.nbytes for other in self.piece.values()) + tensor.nbytes > PIECE:
                self._flush()
            self.piece[name] = tensor.detach().to("cpu", copy=tensor.nbytes <= PIECE).contiguous()
            if tensor.nbytes > PIECE:
                self._flush()

    def _flush(self) -> None:
        """Write what is collected, if anything is."""
        piece, self.piece = self.piece, {}
        if not piece or self.problem:
            return
        with self._attempt():
            disk = shutil.disk_usage(self.partial)
            if disk.free - sum(tensor.nbytes for tensor in piece.values()) < SPARE * disk.total:
                raise OSError(errno.ENOSPC, f"less than {SPARE:.0%} of the disk would be left", str(self.partial))
            file = self.partial / f"model-{self.index:03d}-{len(set(self.files.values())):03d}.safetensors"
            save_file(piece, file, {"format": "pt"})
            self.files |= dict.fromkeys(piece, file.name)

    def finish(self, model: torch.nn.Module, say: Say) -> None:
        """Write the rest, and seal the folder once every writer is done. All ranks together."""
        rest = _not_cut(model)
        if new := sorted(
            name for name, tensor in rest.items() if isinstance(tensor, torch.nn.Parameter) and tensor.ndim
        ):
            self.problem = self.problem or f"its files have no {new[0]}"
        if self.index == 0 and not self.problem:
            self._collect(rest)
        self._flush()
        everywhere = gather_object([(self.problem, self.files)])
        gathered = [everywhere[rank] for rank in self.writers]
        self.problem = next((problem for problem, _ in gathered if problem), None)
        if self.index == 0:
            if not self.problem:
                with self._attempt():
                    self._seal(model, {name: file for _, files in gathered for name, file in files.items()})
            shutil.rmtree(self.partial, ignore_errors=True)
            say(
                f"the quantised base is {f'not cached: {self.problem}' if self.problem else f'cached in {self.folder}'}"
            )

    def _seal(self, model: torch.nn.Module, files: dict[str, str]) -> None:
        model.config.save_pretrained(self.partial)
        if model.can_generate():
            model.generation_config.save_pretrained(self.partial)
        index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
        run_folder.write(self.partial / INDEX, json.dumps(index, indent=1))
        run_folder.write_manifest(self.partial)
        if self.folder.exists():
            if _damage(self.folder) is None:  # of another run, or machine, that was faster
                return
            removed = self.folder.rename(f"{self.partial}{run_folder.REMOVED}")
            shutil.rmtree(removed, ignore_errors=True)
        self.partial.rename(self.folder)


def _not_cut(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every rank holds whole: buffers that belong to the weights, and parameters without a dimension or values."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if not hasattr(parameter, "part")}
    for path, module in model.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        tensors |= {
            f"{path}.{name}".lstrip("."): module._buffers[name] for name in kept if module._buffers[name] is not None
        }
    return tensors


def _clear_away(parent: Path) -> None:
    """Remove what killed runs have left."""
    for partial in parent.glob(f"*{run_folder.PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if time.time() - partial.stat().st_mtime > STALE:
                shutil.rmtree(partial, ignore_errors=True)
