"""Ranks and nodes, read from the environment that torchrun and accelerate set. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Where this process stands among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def nnodes(self) -> int:
        return self.world_size // self.local_world_size


def from_environment(environ: Mapping[str, str] = os.environ) -> Topology:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process if there are none."""
    world_size = int(environ.get("WORLD_SIZE", 1))
    return Topology(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=world_size,
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
    )
