"""Ranks and nodes, read from the environment that torchrun and accelerate set. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Topology:
    """The place of this process among all processes of the run."""

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
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process if there are none.

    Raises:
        UserError: one of them is not a count.
    """
    world_size = _count(environ, "WORLD_SIZE", 1, least=1)
    return Topology(
        rank=_count(environ, "RANK", 0),
        local_rank=_count(environ, "LOCAL_RANK", 0),
        world_size=world_size,
        local_world_size=_count(environ, "LOCAL_WORLD_SIZE", world_size, least=1),
    )


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Count torchrun's restarts of the workers after failures."""
    return _count(environ, "TORCHELASTIC_RESTART_COUNT", 0)


def may_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun would restart the workers."""
    return _count(environ, "TORCHELASTIC_MAX_RESTARTS", 0) > 0


def _count(environ: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    value = environ.get(name, str(default))
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise UserError(
            f"{name} is {value!r}, not a count", where="the environment", fix="let a launcher set it, or unset it"
        )
    return int(value)
