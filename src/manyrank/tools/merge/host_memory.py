"""Host memory that is no longer needed, given back at once. Hints alone: where they are not understood nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

PAGE_OUT = 21  # MADV_PAGEOUT, Linux 5.4: the pages may go; those of a file are read again when somebody looks


def page_out(tensor: torch.Tensor) -> None:
    """Let go of the pages under a tensor. Those of a weights file would otherwise stay beside the copy of them."""
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if tensor.device.type == "cpu" and last > first:
        _call("madvise", ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(PAGE_OUT))


def trim() -> None:
    """Have glibc give freed memory back to the system, also the holes between what is in use."""
    _call("malloc_trim", ctypes.c_size_t(0))


def _call(function: str, *arguments) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such function here
        getattr(ctypes.CDLL(None), function)(*arguments)
