"""Checkpoints that any strategy can read: full tensors by name. How they become complete is in `runs.run_folder`.

    checkpoint-100/
    ├── adapter_config.json, adapter_model.safetensors    or the whole model, when all of it is trained
    ├── optimizer-00001.safetensors ...                   "<parameter>|<key>": the optimizer's state, unsharded
    ├── rng-00000.safetensors ...                         the generators of each rank
    ├── trainer_state.json                                step, best metric, history, callbacks
    ├── run.json                                          what must not change on a resume
    └── manifest.json                                     size and hash of every other file; written last

Nothing in it is pickled. The position in the data and the learning rate follow from the step alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import SaveError
from ..models.adapters import saved_names
from ..models.frozen_adapter import cut, frozen_names, joined
from ..models.reach import shape_of
from ..parallel.engine import Engine, OptimizerState
from ..runs import run_folder

FILE_BYTES = 2 * 1024**3  # host memory that rank 0 needs while it writes


class _Attempt:
    """Writes that may fail on one rank while all ranks go on to meet in the next collective."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.problem = engine, None

    def run(self, work: Callable, *args, only_main: bool = False):
        """Do it, unless something has failed here before."""
        if self.problem or (only_main and not self.engine.accelerator.is_main_process):
            return None
        try:
            return work(*args)
        except (OSError, SafetensorError) as error:
            self.problem = f"rank {self.engine.accelerator.process_index}: {error}"
        return None

    def agree(self) -> None:
        """Wait for all ranks.

        Raises:
            SaveError: something failed on one of them.
        """
        problems = [problem for problem in gather_object([self.problem]) if problem]
        if problems:
            raise SaveError("; ".join(problems))


class FullWriter:
    """Collects tensors and writes them to PREFIX-00001.safetensors, ... of about FILE_BYTES each."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.tensors: dict[str, torch.Tensor] = {}
        self.held: set[int] = set()  # their addresses
        self.bytes, self.files = 0, 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        own = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() not in self.held
        self.tensors[name] = tensor if own else tensor.clone()  # safetensors refuses tensors that share memory
        self.held.add(tensor.data_ptr())
        self.bytes += tensor.numel() * tensor.element_size()
        if self.bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            self.files += 1
            save_file(self.tensors, self.folder / f"{self.prefix}-{self.files:05d}.safetensors")
        self.tensors, self.held, self.bytes = {}, set(), 0


def save_weights(
    engine: Engine, folder: Path, *, dtype: torch.dtype | None = None, also: Callable[[], object] | None = None
) -> None:
    """Write what was trained, as a folder that peft or transformers load. All ranks together; rank 0 writes.

    Args:
        dtype: cast to this type; None keeps the optimizer's precision.
        also: writes more, on rank 0.

    Raises:
        SaveError: the disk is full, or something of the kind; on every rank.
        RuntimeError: tensors are missing in the written file; some wrappers of some versions lose them silently.
    """
    attempt = _Attempt(engine)
    _write_weights(engine, folder, attempt, dtype, portable=True)
    if also:
        attempt.run(also, only_main=True)
    attempt.agree()


def _write_weights(
    engine: Engine, folder: Path, attempt: _Attempt, dtype: torch.dtype | None = None, *, portable: bool = False
) -> None:
    """Write adapters, or a whole model.

    Args:
        portable: write a whole model under the names of the hub's files, which other software reads; else under those of
            the parameters. They differ where transformers stacks experts.
    """
    model, main = engine.model, engine.accelerator.is_main_process
    adapter = hasattr(model, "peft_config")
    # A whole model has also what is not trained: a vision tower under texts.
    names, state = list(engine.trainable if adapter else dict(model.named_parameters())), {}
    frozen = frozen_names(model) if adapter else []
    for name, tensor in engine.full_parameters([*names, *frozen]):
        if main:
            state[name] = tensor.to(dtype) if dtype else tensor.clone()
    if not main:
        return
    if not adapter:
        state |= _buffers(model)
    # A frozen second adapter, with which a task compares, is no part of the result.
    more = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    more = more if adapter else {"save_original_format": portable}
    own = model.peft_config["default"] if adapter else None
    if frozen:
        state, model.peft_config["default"] = joined(model, state)
    elements = sum(tensor.numel() for tensor in state.values())  # saving empties the dictionary
    attempt.run(lambda: model.save_pretrained(folder, state_dict=state, **more))
    if own:
        model.peft_config["default"] = own
    attempt.run((folder / "README.md").unlink, True)  # peft's card is empty
    if not attempt.problem:
        written = _elements(folder)
        if written != elements:
            raise RuntimeError(f"{folder} has weights of {written} elements, not {elements}")


def _elements(folder: Path) -> int:
    """Count the elements of the weights in a folder, from the headers of its files."""
    total = 0
    for path in folder.glob("*model*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to a model's weights, such as the biases that balance DeepSeek-V3's experts."""
    buffers, names = dict(model.named_buffers()), model.state_dict().keys()
    return {name: buffer.detach().cpu().clone() for name, buffer in buffers.items() if name in names}


def load_weights(engine: Engine, folder: Path) -> None:
    """Read what `save_weights` wrote into the running model. All ranks together; each reads the files."""
    names = saved_names(engine.model) if hasattr(engine.model, "peft_config") else {}
    tensors = {name: file for file in folder.glob("*model*.safetensors") for name in safe_open(file, "pt").keys()}
    for name, parameter in engine.trainable.items():
        key = names.get(name, name)
        with safe_open(tensors[key], "pt") as file:
            value = file.get_tensor(key)
        engine.set_parameter(name, cut(value, shape_of(parameter)) if ".lora_" in name else value)


def save_checkpoint(engine: Engine, output_dir: Path, step: int, *, state: dict, run: dict) -> Path:
    """Write checkpoint-STEP, complete or not at all. All ranks together.

    Args:
        state: what the trainer wants back, as JSON values.
        run: what must be the same when the run is resumed.

    Raises:
        SaveError: it could not be written; on every rank.
    """
    attempt = _Attempt(engine)
    partial = output_dir / f"checkpoint-{step}{run_folder.PARTIAL}"
    try:
        attempt.run(run_folder.begin, output_dir, step, only_main=True)
        attempt.agree()
        _write_weights(engine, partial, attempt)
        _write_optimizer(engine, partial, attempt)
        own = partial / f"rng-{engine.accelerator.process_index:05d}.safetensors"
        attempt.run(save_file, _generators(), own)
        attempt.run(run_folder.sync, own)  # by the rank that wrote it: the machine of rank 0 may be another one
        for name, content in {"trainer_state.json": state, "run.json": run}.items():
            attempt.run(run_folder.write, partial / name, json.dumps(content, indent=1), only_main=True)
        attempt.agree()
        attempt.run(_seal, partial, engine.accelerator.num_processes, only_main=True)
        attempt.agree()
    except SaveError:
        if engine.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return output_dir / f"checkpoint-{step}"


def _seal(partial: Path, ranks: int) -> None:
    files = len(list(partial.glob("rng-*.safetensors")))
    if files != ranks:  # of another machine, and not seen here
        raise OSError(f"{files} of the files of {ranks} ranks can be seen in {partial}")
    run_folder.seal(partial)


def _write_optimizer(engine: Engine, partial: Path, attempt: _Attempt) -> None:
    writer = FullWriter(partial, "optimizer")
    for name, moments in engine.optimizer_state():
        for key, tensor in moments.items():
            attempt.run(writer.add, f"{name}|{key}", tensor, only_main=True)
    attempt.run(writer.flush, only_main=True)


def load_checkpoint(engine: Engine, folder: Path, dry_step) -> dict:
    """Read a checkpoint into the running model and optimizer. All ranks together.

    Returns:
        The trainer's state.
    """
    load_weights(engine, folder)
    states: dict[str, OptimizerState] = {name: {} for name in engine.trainable}
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        for key, tensor in load_file(file).items():
            name, _, moment = key.rpartition("|")
            states[name][moment] = tensor
    engine.set_optimizer_state(states, dry_step)
    rng_file = folder / f"rng-{engine.accelerator.process_index:05d}.safetensors"
    if rng_file.exists():  # more processes than before: the new ones keep their fresh generators
        _set_generators(load_file(rng_file))
    return json.loads((folder / "trainer_state.json").read_text())


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
