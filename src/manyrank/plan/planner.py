"""Will it fit, where, and how fast: every strategy's memory and speed for a recipe, and the choice among them. Arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from ..config.resolve import Resolved
from ..config.schema import TrainConfig
from ..models.spec import Architecture
from ..rules.rule import Situation
from ..rules.strategy import HSDP_RULES, ONE_PROCESS, SHARDING_RULES
from ..topology.gpus import Gpu, GpuKind, Hardware
from . import memory, speed
from .memory import Memory
from .planned_run import OFFLOADED, Setup
from .speed import Speed

# From the simplest to the most involved: of two that are about as fast the first is taken.
STRATEGIES = ("single", "ddp", "zero2", "fsdp", "hsdp", "zero3", "fsdp_offload", "zero3_offload")
ROOMY = 0.92  # of a GPU's memory: up to here a plan fits, up to all of it it is tight
MICRO_BATCH = "per_device_train_batch_size"
AS_FAST = 0.97  # of the fastest counts as fastest
LONGEST, MOST_EXAMPLES = 2**20, 4096  # tokens, examples of a micro-batch; no more are looked for


class Verdict(StrEnum):
    FITS = "fits"
    TIGHT = "tight"
    TOO_BIG = "does not fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: `memory` in bytes of each, None where nobody said; without a `kind` no speeds are known.

    `host`: bytes of host memory of one machine; None: not looked at.
    """

    kind: GpuKind | None
    memory: int | None
    nproc: int = 1
    nnodes: int = 1
    host: int | None = None

    @property
    def world(self) -> int:
        return self.nproc * self.nnodes


@dataclass(frozen=True)
class Option:
    """One strategy's plan.

    Attributes:
        largest_micro_batch, largest_max_length: that fit, all else unchanged; 0: none does; None: not known.
        refused: why the strategy cannot run this recipe; its figures are as if it could.
        plain: bytes of one GPU with whole logits and peft's own adapters, as most other software runs.
    """

    setup: Setup
    memory: Memory
    speed: Speed | None
    verdict: Verdict
    largest_micro_batch: int | None
    largest_max_length: int | None
    refused: str | None = None
    plain: int | None = None

    @property
    def strategy(self) -> str:
        return self.setup.strategy

    @property
    def usable(self) -> bool:
        return not self.refused and self.verdict in (Verdict.FITS, Verdict.TIGHT)


@dataclass(frozen=True)
class Plan:
    """All options, the chosen one and why."""

    machine: Machine
    options: tuple[Option, ...]
    chosen: Option
    why: str


def make_plan(
    config: TrainConfig, shape: Architecture, machine: Machine, *, bf16: bool, gpu: bool = True, searched: bool = True
) -> Plan:
    """Plan a recipe; on the strategy that it names, or on all.

    Args:
        gpu: whether the processes compute on GPUs.
        searched: whether to look for the largest micro-batches and lengths.
    """
    names = [config.strategy] if config.strategy else candidates(machine, config)
    options = []
    for name in names:
        setup = Setup(config, shape, name, machine.nproc, machine.nnodes, bf16=bf16, gpu=gpu)
        options.append(_option(setup, machine, searched=searched))
    chosen, why = _choose(options, machine, given=bool(config.strategy))
    return Plan(machine, tuple(options), chosen, why)


def candidates(machine: Machine, config: TrainConfig) -> list[str]:
    """Strategies that make sense for so many processes."""
    if config.hsdp_shard_size:
        return ["hsdp"]
    if machine.world == 1:
        return ["single", "fsdp_offload", "zero3_offload"]
    return [name for name in STRATEGIES if name != "single" and (name != "hsdp" or machine.nnodes > 1)]


def settled(setup: Setup, available: int | None) -> Setup:
    """With `gradient_checkpointing: auto` decided: as few layers as fit into `available` bytes; none where nobody knows."""
    if setup.config.gradient_checkpointing != "auto":
        return setup

    def fits(kept: int) -> bool:
        return (
            available is None
            or _needs(setup.with_options(gradient_checkpointing=setup.shape.depth - kept)) <= ROOMY * available
        )

    kept = _largest(fits, setup.shape.depth)
    if kept == setup.shape.depth:
        return setup.with_options(gradient_checkpointing="off")
    return setup.with_options(gradient_checkpointing=setup.shape.depth - kept if kept else "full")


def verdict(needed: int, available: int | None) -> Verdict:
    if available is None:
        return Verdict.UNKNOWN
    return Verdict.FITS if needed <= ROOMY * available else Verdict.TIGHT if needed <= available else Verdict.TOO_BIG


def refusal(setup: Setup) -> str | None:
    """Why a strategy cannot run a recipe, as the rules have it; one that nobody named is not taken where it is doubtful."""
    gpus = (Gpu("planned", memory=0, compute_capability=(9, 0)),) * setup.nproc if setup.gpu else ()
    machine = Hardware(gpus=gpus, cpu_cores=setup.nproc, cpu_bf16=True)
    situation = Situation(Resolved(setup.config), setup.strategy, setup.nproc, setup.world, machine)
    table = (ONE_PROCESS, *SHARDING_RULES, *HSDP_RULES)
    rules = [rule for rule in table if rule.severity == "error" or not setup.config.strategy]
    return next((what for rule in rules if (what := rule.broken(situation))), None)


def _needs(setup: Setup) -> int:
    return memory.estimate(setup).needed


def _option(given: Setup, machine: Machine, *, searched: bool) -> Option:
    setup = settled(given, machine.memory)
    found = memory.estimate(setup)
    # Layers that auto keeps fill the memory; what fits at most, fits with all of them computed again.
    automatic = given.config.gradient_checkpointing == "auto"
    most = given.with_options(gradient_checkpointing="full") if automatic and given.gpu else setup
    return Option(
        setup=setup,
        memory=found,
        speed=speed.estimate(setup, machine.kind) if machine.kind else None,
        verdict=Verdict.TOO_BIG if exceeds_host(found, machine) else verdict(found.needed, machine.memory),
        largest_micro_batch=_largest_fitting(most, machine, MICRO_BATCH, MOST_EXAMPLES) if searched else None,
        largest_max_length=_largest_fitting(most, machine, "max_length", LONGEST, unit=64) if searched else None,
        refused=refusal(setup),
        plain=memory.estimate(setup.with_options(plain_parts=["head", "lora"])).peak,
    )


def exceeds_host(found: Memory, machine: Machine) -> bool:
    """Whether one machine's host memory does not suffice."""
    return machine.host is not None and max(found.host, found.host_loading) > machine.host


def with_micro_batch(
    config: TrainConfig, shape: Architecture, machine: Machine, *, bf16: bool, gpu: bool = True
) -> TrainConfig:
    """A micro-batch that fits in place of `auto`: the fastest, where speeds are known, else the largest; and no larger
    than a process needs for a step."""
    share = math.ceil(config.global_batch_size / machine.world) if config.global_batch_size else MOST_EXAMPLES
    best, size = None, 1
    while True:
        made = config.model_copy(update={MICRO_BATCH: size})
        chosen = make_plan(made, shape, machine, bf16=bf16, gpu=gpu, searched=False).chosen
        if best is not None and chosen.verdict != Verdict.FITS:
            return best[1]
        rate = chosen.speed.tokens_per_second if chosen.speed else size
        if best is None or rate >= AS_FAST * best[0]:  # of two that are as fast the larger one has the larger products
            best = max(rate, best[0] if best else 0), made
        if size == share:
            return best[1]
        size = min(2 * size, share)


def _largest_fitting(setup: Setup, machine: Machine, key: str, most: int, *, unit: int = 1) -> int | None:
    """The greatest value of an option that fits, in steps of `unit`."""
    if machine.memory is None:
        return None

    def fits(count: int) -> bool:
        return verdict(_needs(setup.with_options(**{key: unit * count})), machine.memory) == Verdict.FITS

    return unit * _largest(fits, most // unit)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The greatest number up to `most` that holds, where smaller ones hold, too; 0 is not asked for."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _choose(options: list[Option], machine: Machine, *, given: bool) -> tuple[Option, str]:
    if given:
        against = options[0].refused
        return options[0], f"as the recipe says, but refused: {against}" if against else "as the recipe says"
    # From host memory weights come slowly, and by a rate that is hard to tell: only where nothing else fits.
    groups = (
        [
            option
            for option in options
            if option.usable and option.verdict == verdict and offloads == (option.strategy in OFFLOADED)
        ]
        for offloads in (False, True)
        for verdict in (Verdict.FITS, Verdict.TIGHT)
    )
    usable = next(filter(None, groups), [])
    if not usable:
        possible = [option for option in options if not option.refused] or options
        if options[0].verdict == Verdict.UNKNOWN:
            return possible[0], "the memory of the GPUs is not known: the simplest"
        return min(
            possible, key=lambda option: option.memory.needed
        ), "none fits: the one that needs the least, loading included"
    if any(option.speed is None for option in usable):
        return usable[0], "the simplest that fits"
    best = max(option.speed.tokens_per_second for option in usable)
    chosen = next(option for option in usable if option.speed.tokens_per_second >= AS_FAST * best)
    tight = "" if chosen.verdict == Verdict.FITS else ", though tightly"
    first = options.index(chosen) == 0
    passed = [option for option in options[: options.index(chosen)] if not option.usable]
    because = "" if first or not passed else "; " + ", ".join(_passed(option, machine) for option in passed)
    fastest = (
        "the fastest that fits" if chosen.speed.tokens_per_second == best else "the simplest of the fastest that fit"
    )
    return chosen, f"{fastest}{tight}{because}"


def short_of(option: Option, machine: Machine) -> str | None:
    """What there is too little of, where it is not what the peak takes."""
    if option.verdict != Verdict.TOO_BIG or machine.memory is None or option.memory.peak > machine.memory:
        return None
    return "host memory" if exceeds_host(option.memory, machine) else "loading"


def _passed(option: Option, machine: Machine) -> str:
    if option.refused:
        return f"{option.strategy}: {option.refused}"
    if exceeds_host(option.memory, machine):
        needed = max(option.memory.host, option.memory.host_loading)
        return f"{option.strategy} needs {needed / memory.GiB:.0f} GiB of host memory"
    return f"{option.strategy} needs {option.memory.needed / memory.GiB:.0f} GiB"


@dataclass(frozen=True)
class Scale:
    """A strategy on so many machines; `efficiency` is its rate per GPU against that on the fewest."""

    nnodes: int
    option: Option
    efficiency: float
    waits_for: str


def scaling(config: TrainConfig, shape: Architecture, machine: Machine, nodes: list[int], *, bf16: bool) -> list[Scale]:
    """Each strategy on each number of machines; needs a kind of GPU."""
    rows: list[Scale] = []
    first: dict[str, float] = {}
    for count in nodes:
        plan = make_plan(config, shape, replace(machine, nnodes=count), bf16=bf16, searched=False)
        for option in plan.options:
            rate = option.speed.tokens_per_second / option.setup.world
            base = first.setdefault(option.strategy, rate) if option.usable else first.get(option.strategy, rate)
            rows.append(Scale(count, option, rate / base, speed.why_slow(option.speed)))
    return rows
