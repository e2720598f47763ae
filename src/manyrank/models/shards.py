"""Load a base in shards: read one tensor, keep this rank's part, forget the rest.

    file -- one tensor; a 4-bit base is quantised here, as a whole --> part of this rank     kept, on `Share.device`
                                                                   \\-> stand-in              in the model

A stand-in has the tensor's shape and type and next to no memory. What comes before the sharding (adapters, checks) looks
at names, shapes and types alone. `parallel.engine` shards the stand-ins and puts the parts in. Beside its parts a rank
holds one tensor; a CPU quantises in float32 and needs 14 bytes for each element of a matrix meanwhile, and a rank that
writes the quantised base (models/quantised_cache.py) collects up to 64 MiB. Of 16-bit weights it reads only its part, since
the files are mapped into memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import modeling_utils

READ_ALONE = "HF_DEACTIVATE_ASYNC_LOAD"
# Elements. glibc keeps the pieces that quantising frees, between parts that stay: gigabytes in the end.
RETURNED_EACH = 8 * 2**20


@dataclass(frozen=True)
class Share:
    """This rank's share of the weights.

    Attributes:
        index, count: the rank's place among those that share one copy of the model, and their number.
        flat: cut the flattened tensor into equal parts, as ZeRO-3 does, and not its rows, as FSDP2 does.
        device: where parts are kept; host memory where they are offloaded, or copied into trained parameters later.
        trained: whether the base itself is trained.
        storage: the type to pack 4-bit weights in: that of the computation, which FSDP2 gathers as it is.
    """

    index: int
    count: int
    flat: bool
    device: torch.device
    trained: bool
    storage: torch.dtype

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy this rank's part of a tensor, in memory of its own."""
        if self.flat:
            size = math.ceil(tensor.numel() / self.count)
            part = tensor.reshape(-1)[self.index * size : (self.index + 1) * size]
        else:
            rows = math.ceil(tensor.shape[0] / self.count)
            part = tensor[self.index * rows : (self.index + 1) * rows]
        return part.to(self.device, copy=True)


@contextlib.contextmanager
def loading_in_shards(share: Share) -> Iterator[None]:
    """Replace each parameter that transformers loads by a stand-in with this rank's part as its `part`."""

    quantised = 0  # elements, on a CPU, since freed memory was returned

    def replace(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        nonlocal quantised
        if not is_read(parameter):
            return None
        stand_in = _stand_in(parameter, share)
        quantised += 2 * parameter.nbytes if _is_4bit(parameter) and parameter.device.type == "cpu" else 0
        if quantised > RETURNED_EACH:
            _return_freed_memory()
            quantised = 0
        return stand_in

    hook = register_module_parameter_registration_hook(replace)
    try:
        with _one_by_one():
            yield
    finally:
        hook.remove()


def is_read(parameter: torch.nn.Parameter | None) -> bool:
    """Return whether transformers has read a parameter that can be cut; one without values in the files is initialised."""
    marked = getattr(parameter, "_is_hf_initialized", False) and not hasattr(parameter, "part")
    return bool(marked and not parameter.is_meta and parameter.ndim)


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Let transformers hold one tensor at a time.

    It reads ahead in threads unless a variable says no, and transformers 5.23 at first reserves the memory of the whole
    model on the GPU; that patch can go when there is a switch for it.
    """
    warm_up, read_alone = modeling_utils.caching_allocator_warmup, os.environ.get(READ_ALONE)
    modeling_utils.caching_allocator_warmup = lambda *args: None
    os.environ[READ_ALONE] = "1"
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up
        del os.environ[READ_ALONE]
        os.environ |= {READ_ALONE: read_alone} if read_alone is not None else {}


def _stand_in(parameter: torch.nn.Parameter, share: Share) -> torch.nn.Parameter:
    data = parameter.data
    if _is_4bit(parameter) and data.dtype != share.storage:  # a checkpoint that is stored as bytes, say
        data = data.flatten().view(share.storage)[:, None]
    part = share.cut(data)
    _free(data)
    if share.trained and not share.flat:  # accelerate looks into it; untouched memory is not resident
        empty = torch.empty(data.shape, dtype=data.dtype)
    else:
        empty = torch.zeros((), dtype=data.dtype, device=share.device).expand(data.shape)
    if _is_4bit(parameter):
        kept = {key: value for key, value in vars(parameter).items() if key != "data"}
        stand_in = type(parameter)(empty, **kept)
    else:
        stand_in = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    stand_in._is_hf_initialized, stand_in.part = True, part
    return stand_in


def _return_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _free(tensor: torch.Tensor) -> None:
    """Free a tensor that is alone in its memory on a GPU: transformers 5.23 holds it until it has read the next one.

    In host memory it may be a tensor of the checkpoint, to which another name belongs, too.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" and storage.nbytes() == tensor.nbytes:
        storage.resize_(0)


def _is_4bit(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "quant_state")


def take_parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the parts from a model's stand-ins, by parameter name; frozen stand-ins become parameters on the meta device.

    A packed 4-bit weight becomes a plain parameter: its layer has the constants, and bitsandbytes takes them from there.
    """
    parts, replaced = {}, {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not hasattr(parameter, "part"):
                continue
            parts[f"{path}.{name}".lstrip(".")] = parameter.part
            if parameter.requires_grad:
                continue
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                replaced[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            setattr(module, name, replaced[id(parameter)])
    return parts
