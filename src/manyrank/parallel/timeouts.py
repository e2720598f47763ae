"""How long a rank waits for the others in a collective: hours while something is read or written, minutes in training.

Rank 0 reads, hashes and writes while the others wait for it; a training step has nothing to wait for so long. The limit
is that of each collective which begins under it, in every process group: also those of device meshes and of DeepSpeed.
torch 2.13 has no public list of a process's groups (`torch.distributed.breakpoint` takes the same private one).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

UNHURRIED = timedelta(hours=2)  # NCCL's default of 10 minutes would end big runs while they load or save


class _Limit:
    now = UNHURRIED


@contextlib.contextmanager
def within(limit: timedelta) -> Iterator[None]:
    """Limit the collectives that begin while this lasts; the limit before holds afterwards. On all ranks alike."""
    before = _Limit.now
    _set(limit)
    try:
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def training(seconds: int) -> Iterator[None]:
    """Limit the collectives of the training, and say whose limit it was that ended it.

    Raises:
        RuntimeError: a rank did not come within the limit. (NCCL's own thread ends the process, and says as much.)
    """
    try:
        with within(timedelta(seconds=seconds)):
            yield
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        what = f"another rank did not come to a collective within ddp_timeout ({seconds} s): it hangs, or needs longer"
        raise RuntimeError(what) from error


def _set(limit: timedelta) -> None:
    _Limit.now = limit
    if dist.is_available() and dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            group.set_timeout(limit)
