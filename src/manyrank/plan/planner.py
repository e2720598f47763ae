"""Will it fit, where, and how fast: every strategy's memory and speed for a recipe, and the choice among them. Arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from ..config.schema import TrainConfig
from ..models.spec import ModelSpec
from ..rules.context import RunContext
from ..rules.strategy import FLOAT8_NATIVE, HSDP_RULES, ONE_PROCESS, SHARDING_RULES
from ..topology.strategies import STRATEGIES, EngineKind, Strategy, named_strategy
from . import memory, speed
from .memory import Memory
from .planned_run import PlannedRun
from .speed import Speed

ROOMY = 0.92  # of a GPU's memory: up to here a plan fits, up to all of it it is tight
MICRO_BATCH = "per_device_train_batch_size"
USUAL_MICRO_BATCH = TrainConfig.model_fields[MICRO_BATCH].default
AS_FAST = 0.97  # of the fastest counts as fastest
LONGEST, MOST_EXAMPLES = 2**20, 4096  # tokens, examples of a micro-batch; no more are looked for


class Verdict(StrEnum):
    FITS = "fits"
    TIGHT = "tight"
    TOO_BIG = "does not fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Option:
    """One strategy's plan.

    Attributes:
        largest_micro_batch, largest_max_length: that fit, all else unchanged; 0: none does; None: not known.
        refused: why the strategy cannot run this recipe; its figures are as if it could.
        plain: bytes of one GPU with whole logits and peft's own adapters, as most other software runs.
    """

    run: PlannedRun
    memory: Memory
    speed: Speed | None
    verdict: Verdict
    largest_micro_batch: int | None
    largest_max_length: int | None
    refused: str | None
    plain: int

    @property
    def strategy(self) -> Strategy:
        return self.run.strategy

    @property
    def tokens_per_second(self) -> float:
        """0 where no speeds are known."""
        return self.speed.tokens_per_second if self.speed else 0.0

    @property
    def usable(self) -> bool:
        return not self.refused and self.verdict in (Verdict.FITS, Verdict.TIGHT)


@dataclass(frozen=True)
class Plan:
    """All options, the chosen one and why. `context` has the strategy of none of them."""

    context: RunContext
    options: tuple[Option, ...]
    chosen: Option
    why: str


def make_plan(context: RunContext, shape: ModelSpec, *, searched: bool = True) -> Plan:
    """Plan a recipe; on the strategy that it names, or on all.

    Args:
        searched: whether to look for the largest micro-batches and lengths.
    """
    named = named_strategy(context.config.strategy)
    strategies = [named] if named else candidates(context)
    options = [_option(PlannedRun(context.on(strategy), shape), searched=searched) for strategy in strategies]
    chosen, why = _choose(options, context, named=bool(named))
    return Plan(context, tuple(options), chosen, why)


def candidates(context: RunContext) -> list[Strategy]:
    """Strategies that make sense for so many processes."""
    every = STRATEGIES.values()
    if context.config.hsdp_shard_size:
        return [strategy for strategy in every if strategy.replicas]
    if context.world_size == 1:
        return [strategy for strategy in every if strategy.engine is EngineKind.SINGLE or strategy.offload]
    several = [strategy for strategy in every if strategy.engine is not EngineKind.SINGLE]
    return [strategy for strategy in several if context.nnodes > 1 or not strategy.replicas]


def settled(run: PlannedRun, available: int | None) -> PlannedRun:
    """Decide `gradient_checkpointing: auto`: as few layers as fit into `available` bytes; none where that is not known."""
    if run.config.gradient_checkpointing != "auto":
        return run

    def fits(kept: int) -> bool:
        return (
            available is None
            or _needs(run.with_options(gradient_checkpointing=run.shape.depth - kept)) <= ROOMY * available
        )

    kept = _largest(fits, run.shape.depth)
    if kept == run.shape.depth:
        return run.with_options(gradient_checkpointing="off")
    return run.with_options(gradient_checkpointing=run.shape.depth - kept if kept else "full")


def verdict(needed: int, available: int | None) -> Verdict:
    if available is None:
        return Verdict.UNKNOWN
    return Verdict.FITS if needed <= ROOMY * available else Verdict.TIGHT if needed <= available else Verdict.TOO_BIG


def refusal(run: PlannedRun) -> str | None:
    """Say why a strategy cannot run a recipe, by the rules; one that nobody named is not chosen where it is doubtful."""
    table = (ONE_PROCESS, FLOAT8_NATIVE, *SHARDING_RULES, *HSDP_RULES)
    rules = [rule for rule in table if rule.severity == "error" or not run.config.strategy]
    return next((what for rule in rules if (what := rule.broken(run.context))), None)


def _needs(run: PlannedRun) -> int:
    return memory.estimate(run).needed


def _option(unsettled: PlannedRun, *, searched: bool) -> Option:
    context = unsettled.context
    run = settled(unsettled, context.memory)
    needs = memory.estimate(run)
    # Layers that auto keeps fill the memory; what fits at most, fits with all of them recomputed.
    automatic = unsettled.config.gradient_checkpointing == "auto"
    most = unsettled.with_options(gradient_checkpointing="full") if automatic and unsettled.gpu else run
    return Option(
        run=run,
        memory=needs,
        speed=speed.estimate(run, context.kind) if context.kind else None,
        verdict=Verdict.TOO_BIG if exceeds_host(needs, context) else verdict(needs.needed, context.memory),
        largest_micro_batch=_largest_fitting(most, MICRO_BATCH, MOST_EXAMPLES) if searched else None,
        largest_max_length=_largest_fitting(most, "max_length", LONGEST, unit=64) if searched else None,
        refused=refusal(run),
        plain=memory.estimate(run.with_options(disable_fused=["lm_head", "lora", "norm", "mlp"])).peak,
    )


def exceeds_host(needs: Memory, context: RunContext) -> bool:
    """Whether one machine's host memory does not suffice."""
    return context.host_memory is not None and max(needs.host, needs.host_loading) > context.host_memory


def leaves_micro_batch_open(context: RunContext) -> bool:
    """Whether a recipe says neither a micro-batch nor what depends on it, on one machine whose GPUs' speeds are known.

    Padded rows would be padded more, and machines that decide each by itself may decide differently.
    """
    config, given = context.config, context.resolved.provenance
    return (
        MICRO_BATCH not in given
        and bool(config.global_batch_size and not config.gradient_accumulation_steps)
        and config.packing != "none"
        and context.kind is not None
        and context.nnodes == 1
    )


def with_micro_batch(context: RunContext, shape: ModelSpec, *, least: int | None = None) -> RunContext:
    """A micro-batch that fits: the fastest, where speeds are known, else the largest; and no larger
    than a process needs for a step.

    Args:
        least: stop at the first one from here on that keeps the GPU busy; None: of those that are as fast the largest.
    """
    batch = context.config.global_batch_size
    share = math.ceil(batch / context.world_size) if batch else MOST_EXAMPLES
    best, size = None, 1
    while True:
        tried = context.with_options(**{MICRO_BATCH: size})
        chosen = make_plan(tried, shape, searched=False).chosen
        if best is not None and chosen.verdict != Verdict.FITS:
            return best[1]
        rate = chosen.speed.tokens_per_second if chosen.speed else size
        if best is None or rate >= AS_FAST * best[0]:  # of two that are as fast the larger one has the larger products
            best = max(rate, best[0] if best else 0), tried
        enough = least is not None and size >= least and chosen.speed is not None and chosen.speed.busy
        if size == share or enough:
            return best[1]
        size = min(2 * size, share)


def _largest_fitting(run: PlannedRun, key: str, most: int, *, unit: int = 1) -> int | None:
    """The greatest value of an option that fits, in steps of `unit`."""
    available = run.context.memory
    if available is None:
        return None

    def fits(count: int) -> bool:
        return verdict(_needs(run.with_options(**{key: unit * count})), available) == Verdict.FITS

    return unit * _largest(fits, most // unit)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The greatest number up to `most` that holds, where smaller ones hold, too; 0 is not asked for."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _choose(options: list[Option], context: RunContext, *, named: bool) -> tuple[Option, str]:
    if named:
        against = options[0].refused
        return options[0], f"as the recipe says, but refused: {against}" if against else "as the recipe says"
    # From host memory weights come slowly, and by a rate that is hard to tell: only where nothing else fits.
    groups = (
        [
            option
            for option in options
            if option.usable and option.verdict == verdict and offloads == option.strategy.offload
        ]
        for offloads in (False, True)
        for verdict in (Verdict.FITS, Verdict.TIGHT)
    )
    usable = next(filter(None, groups), [])
    if not usable:
        possible = [option for option in options if not option.refused]
        if not possible:
            return options[0], f"refused, as all are: {options[0].refused}"
        if options[0].verdict == Verdict.UNKNOWN:
            return possible[0], "the memory of the GPUs is not known: the simplest"
        return min(
            possible, key=lambda option: option.memory.needed
        ), "none fits: the one that needs the least, loading included"
    if any(option.speed is None for option in usable):
        return usable[0], "the simplest that fits"
    best = max(option.tokens_per_second for option in usable)
    chosen = next(option for option in usable if option.tokens_per_second >= AS_FAST * best)
    tight = "" if chosen.verdict == Verdict.FITS else ", though tightly"
    first = options.index(chosen) == 0
    passed = [option for option in options[: options.index(chosen)] if not option.usable]
    because = "" if first or not passed else "; " + ", ".join(_passed(option, context) for option in passed)
    fastest = "the fastest that fits" if chosen.tokens_per_second == best else "the simplest of the fastest that fit"
    from_host = [option.tokens_per_second or 0 for option in options if option.usable and option.strategy.offload]
    if not chosen.strategy.offload and max(from_host, default=0) > best:
        fastest += " without host memory, whose rate is hard to tell"
    return chosen, f"{fastest}{tight}{because}"


class Shortage(NamedTuple):
    """Host memory or a GPU's for loading that does not suffice: the bytes that are needed, and that there are."""

    memory: str
    needed: int
    available: int

    def __str__(self) -> str:
        return f"{self.memory} {self.needed / memory.GiB:.1f} of {self.available / memory.GiB:.1f} GiB"


def shortage(option: Option, context: RunContext) -> Shortage | None:
    """Find what is too small where it is not a GPU's memory at the peak, which a plan shows in any case."""
    needs, available = option.memory, context.memory
    if option.verdict != Verdict.TOO_BIG or (available is not None and needs.peak > available):
        return None
    if context.host_memory is not None and exceeds_host(needs, context):
        return Shortage("host memory", max(needs.host, needs.host_loading), context.host_memory)
    return Shortage("loading", needs.loading, available) if available is not None else None


def _passed(option: Option, context: RunContext) -> str:
    if option.refused:
        return f"{option.strategy}: {option.refused}"
    if short := shortage(option, context):
        return f"{option.strategy}: {short}"
    return f"{option.strategy} needs {option.memory.needed / memory.GiB:.0f} GiB"


@dataclass(frozen=True)
class Scale:
    """A strategy on so many machines; `efficiency` is its rate per GPU against that on the fewest."""

    nnodes: int
    option: Option
    efficiency: float
    waits_for: str


def scaling(context: RunContext, shape: ModelSpec, nodes: list[int]) -> list[Scale]:
    """Each strategy on each number of machines; needs a kind of GPU."""
    rows: list[Scale] = []
    first: dict[str, float] = {}
    for count in nodes:
        plan = make_plan(replace(context, world_size=count * context.nproc), shape, searched=False)
        for option in plan.options:
            name, rate = option.strategy.name, option.tokens_per_second / option.run.world
            base = first.setdefault(name, rate) if option.usable else first.get(name, rate)
            reason = speed.why_slow(option.speed) if option.speed else ""
            rows.append(Scale(count, option, rate / base, reason))
    return rows
