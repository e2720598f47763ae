"""The table of strategies. No torch.

A strategy is one row here and one file of its name in accelerate_configs/. Nothing else compares names of strategies:
plan, rules, launch and engines ask the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

State = Literal["optimizer", "gradients", "parameters"]


class EngineKind(StrEnum):
    """The kind of wrapper; the values are accelerate's distributed types."""

    SINGLE = "NO"
    DDP = "MULTI_GPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"


@dataclass(frozen=True)
class Strategy:
    """A strategy: how the processes of a run share a model.

    Attributes:
        shards: what no process holds as a whole.
        offload: whether shards stay in host memory.
        replicas: whether there are several sharded copies of the model.
    """

    name: str
    engine: EngineKind
    shards: frozenset[State] = frozenset()
    offload: bool = False
    replicas: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's number for the shards; 0 under other engines."""
        return len(self.shards) if self.engine is EngineKind.DEEPSPEED else 0


_OPTIMIZER: frozenset[State] = frozenset({"optimizer"})
_GRADIENTS: frozenset[State] = frozenset({"optimizer", "gradients"})
_ALL: frozenset[State] = frozenset({"optimizer", "gradients", "parameters"})

# From the simplest to the most involved: of two that are about as fast, the plan takes the first.
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("single", EngineKind.SINGLE),
        Strategy("ddp", EngineKind.DDP),
        Strategy("zero2", EngineKind.DEEPSPEED, _GRADIENTS),
        Strategy("fsdp", EngineKind.FSDP, _ALL),
        Strategy("hsdp", EngineKind.FSDP, _ALL, replicas=True),
        Strategy("zero3", EngineKind.DEEPSPEED, _ALL),
        Strategy("fsdp_offload", EngineKind.FSDP, _ALL, offload=True),
        Strategy("zero3_offload", EngineKind.DEEPSPEED, _ALL, offload=True),
    )
}


def named_strategy(name: str | None) -> Strategy | None:
    """The strategy of a name; None where a recipe gives none."""
    return STRATEGIES[name] if name else None


def default_strategy(world_size: int) -> Strategy:
    """Choose the strategy of a recipe without one."""
    engine = EngineKind.SINGLE if world_size == 1 else EngineKind.DDP
    return next(strategy for strategy in STRATEGIES.values() if strategy.engine is engine)


def find_strategy(
    engine: EngineKind, *, zero_stage: int = 0, offload: bool = False, replicas: bool = False
) -> Strategy:
    """The strategy that such an engine belongs to; one without a row where a user's own config asks for it (ZeRO-1)."""
    for strategy in STRATEGIES.values():
        traits = (strategy.engine, strategy.zero_stage, strategy.offload, strategy.replicas)
        if traits == (engine, zero_stage, offload, replicas):
            return strategy
    shards = {EngineKind.FSDP: _ALL, EngineKind.DEEPSPEED: (frozenset(), _OPTIMIZER, _GRADIENTS, _ALL)[zero_stage]}
    name = f"zero{zero_stage}" if engine is EngineKind.DEEPSPEED else engine.value.lower()
    name += "_offload" if offload else ""
    return Strategy(name, engine, shards.get(engine, frozenset()), offload, replicas)
