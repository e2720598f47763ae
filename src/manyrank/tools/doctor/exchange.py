"""What the doctor's ranks send each other: all-reduces, checked and timed, and the time of day. With torch."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...topology.ranks import Topology

SMALL, LARGE, LARGE_GPU = 4 << 10, 64 << 20, 256 << 20  # bytes of an all-reduce
REPEATS = {SMALL: 20, LARGE: 5, LARGE_GPU: 5}
EXCHANGE_SECONDS = 4.0  # that one size may take, on a slow network
ROUND_TRIPS = 20  # of a message, to compare clocks


def meet(place: Topology, device: torch.device, *, timeout: float) -> str:
    """Start the process group, as the training would.

    Args:
        timeout: seconds that a rank waits for the others.

    Returns:
        What carries the gradients: nccl or gloo.
    """
    gpu = device.type == "cuda"
    # With GPUs gloo, too: FSDP and offload send from host memory, and facts and clocks need no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    dist.barrier(device_ids=[place.local_rank] if gpu else None)
    return "nccl" if gpu else "gloo"


def gathered(mine: Any) -> list[Any]:
    """What every rank gives, by rank."""
    if not dist.is_initialized():
        return [mine]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


# All-reduce


def exchanges(ranks: Sequence[int], rank: int, device: torch.device, group=None) -> list[dict[str, Any]]:
    """All-reduce of two sizes among `ranks`: checked once, then timed; the least time of the slowest rank counts.

    Returns:
        For each size: bytes, ranks, wrong (ranks with a wrong sum), seconds, and bytes a second: of the message
        (algorithm_bandwidth), and what each rank sends and receives for it in a ring (bus_bandwidth).
    """
    large = LARGE_GPU if device.type == "cuda" else LARGE
    return [_exchange(size, ranks, rank, device, group) for size in (SMALL, large)]


def within_machines(leaders: list[int], place: Topology, device: torch.device) -> list[dict[str, Any]] | None:
    """The same among the ranks of each machine, on all machines at once, as the slowest machine does it.

    None where each machine has one rank.

    Args:
        leaders: the first rank of each machine.
    """
    ends = [*leaders[1:], place.world_size]
    members = [list(range(first, end)) for first, end in zip(leaders, ends)]
    if max(map(len, members)) == 1:
        return None
    groups = [dist.new_group(ranks) for ranks in members]  # every rank makes every group
    own = next(index for index, ranks in enumerate(members) if place.rank in ranks)
    told = gathered(exchanges(members[own], place.rank, device, groups[own]))
    return min(told, key=lambda sizes: sizes[-1]["bus_bandwidth"])


def _exchange(size: int, ranks: Sequence[int], rank: int, device: torch.device, group) -> dict[str, Any]:
    count = len(ranks)
    pattern = torch.arange(size // 4, device=device, dtype=torch.float32) % 251
    values = pattern + ranks.index(rank)
    dist.all_reduce(values, group=group)
    wrong = torch.tensor(float(not torch.equal(values, count * pattern + count * (count - 1) / 2)), device=device)
    dist.all_reduce(wrong, group=group)
    values.zero_()
    least, spent = math.inf, 0.0
    for _ in range(REPEATS[size]):
        took = torch.tensor(_timed(values, device, group), device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX, group=group)
        least, spent = min(least, took.item()), spent + took.item()
        if spent > EXCHANGE_SECONDS:  # on all ranks alike
            break
    rate = size / least
    return {
        "bytes": size,
        "ranks": count,
        "wrong": int(wrong.item()),
        "seconds": least,
        "algorithm_bandwidth": rate,
        "bus_bandwidth": rate * 2 * (count - 1) / count,
    }


def _timed(values: torch.Tensor, device: torch.device, group) -> float:
    dist.barrier(group=group, device_ids=[device.index] if device.type == "cuda" else None)
    started = time.perf_counter()
    dist.all_reduce(values, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# Clocks


def compare_clocks(leaders: list[int], rank: int) -> list[dict[str, Any]]:
    """How far the clock of each other machine is from machine 0's, by the quickest of some round trips.

    Returns:
        For each: host, and offset and error in seconds; a clock that is ahead has a positive offset.
    """
    mine = None
    for leader in leaders[1:]:
        if rank == 0:
            _answer_with_the_time(leader)
        elif rank == leader:
            offset, error = min((_ask_for_the_time() for _ in range(ROUND_TRIPS)), key=lambda measured: measured[1])
            mine = {"host": socket.gethostname(), "offset": offset, "error": error}
    return [measured for measured in gathered(mine) if measured]


def _answer_with_the_time(leader: int) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUND_TRIPS):
        dist.recv(message, leader)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), leader)


def _ask_for_the_time() -> tuple[float, float]:
    message = torch.zeros(1, dtype=torch.float64)
    sent = time.time()
    dist.send(message, 0)
    dist.recv(message, 0)
    came = time.time()
    return (sent + came) / 2 - message.item(), (came - sent) / 2
