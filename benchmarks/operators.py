"""Count what a step asks of its device: operators, FLOP and bytes of them, tensors that live, and reads by the host.

Counted are the operators that torch dispatches in Python, whatever device runs them and in however many threads. Of fake
tensors (`torch._subclasses.FakeTensorMode`) nothing is computed, so that wide layers cost no more than narrow ones.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Methods that give Python a tensor's values, and operators whose result depends on them: on a GPU the host waits there.
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero"}
READ_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
INDEXING = {"index", "index_put", "index_put_"}  # which reads where the index is a mask
# What is no view by its schema, and neither computes nor copies.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# Products of two matrices, and where the first one stands among the arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "gemm_4bit": 0}
# torch 2.13 has formulas for CUDA's kernels alone; on a CPU attention does the same products, of whole squares.
FLASH = "_scaled_dot_product_flash_attention"
ATTENTION = {
    f"{FLASH}_for_cpu{part}": flop_registry[getattr(torch.ops.aten, f"{FLASH}{part}")] for part in ("", "_backward")
}


class Counter(TorchDispatchMode):
    """Counts of what runs while the mode is on.

    Attributes:
        launches: operators that compute or copy; views and allocations are none.
        flop: of products of matrices.
        traffic: bytes of the inputs and outputs of these operators, a lookup's whole table included.
        peak: most bytes of tensors at a time, beside those that were there before.
        reads: the method or operator of each read by the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flop = self.traffic = self.now = self.peak = 0
        self.reads: list[str] = []
        self.reading = False  # inside a method of READS, whose operators are the same read
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        given = _tensors((args, kwargs))
        self.seen.update(tensor.untyped_storage() for tensor in given)
        masks = name in INDEXING and any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
        if (masks or name in READ_OPERATORS) and not self.reading:
            self.reads.append(name)
        if name == "_local_scalar_dense":  # a fake tensor has no value; with 1 for all of them a step is taken
            return 1.0 if isinstance(args[0], FakeTensor) else function(*args, **kwargs)
        result = function(*args, **kwargs)
        made = _tensors(result)
        self._live(made)
        changes = made or (given and function._schema.is_mutable)
        if changes and not function.is_view and name not in ALLOCATIONS:
            self.launches += 1
            self.traffic += sum(map(_bytes, given + made))
            self.flop += _flop(name, args, kwargs, result)
        return result

    def _live(self, made: list[torch.Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


class _Reads(TorchFunctionMode):
    """Note the calls that give Python a tensor's values."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ not in READS or self.counter.reading:
            return func(*args, **(kwargs or {}))
        self.counter.reads.append(func.__name__)
        self.counter.reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.reading = False


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count what runs inside. Cycles of objects are not collected meanwhile: that would come at any moment."""
    counter, collects = Counter(), gc.isenabled()
    gc.disable()
    try:
        with _Reads(counter), counter:
            yield counter
    finally:
        if collects:
            gc.enable()


def _flop(name: str, args: tuple, kwargs: dict, result) -> int:
    if name in PRODUCTS:
        return 2 * prod(result.shape) * args[PRODUCTS[name]].shape[-1]
    return ATTENTION[name](*args, **kwargs, out_val=result) if name in ATTENTION else 0


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; an expanded one has fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
