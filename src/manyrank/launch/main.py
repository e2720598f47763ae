"""What a launch leaves open, decided from the plan: the strategy, and a micro-batch of `auto`; then launch.

On GPUs `strategy: auto` is the fastest strategy that fits. On CPUs it is single or ddp. A micro-batch of
`auto` is the fastest that fits, or the largest where no speeds are known; where it does not fit after all, half is tried.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.args import CommandLine
from ..config.resolve import ALIASES, Entry, Resolved, normal, resolve
from ..config.schema import TrainConfig
from ..errors import EXIT_MEMORY, UserError
from ..models.spec import Architecture
from ..plan.command import machine_of, read_model
from ..plan.planner import MICRO_BATCH, Plan, Verdict, make_plan, with_micro_batch
from ..plan.view import summary
from ..rules import check as rules
from ..topology import gpus as hardware
from ..topology.allocator import may_expand
from ..topology.gpus import Hardware
from ..training.watchdog import Heart, Watchdog
from . import command as launcher
from .command import LaunchPlan


@dataclass(frozen=True)
class Decision:
    """A launch with nothing left open; `plan` is None where nothing was planned, `notes` say why."""

    line: CommandLine
    resolved: Resolved
    strategy: str
    nproc: int
    machine: Hardware
    plan: Plan | None
    notes: tuple[str, ...]
    retries: bool  # with smaller micro-batches

    @property
    def config(self) -> TrainConfig:
        return self.resolved.config

    @property
    def world(self) -> int:
        return self.nproc * self.line.where.nnodes

    def smaller(self) -> Decision:
        """The same with half the micro-batch, resuming what there is."""
        half = self.config.per_device_train_batch_size // 2
        line = _with(_with(self.line, MICRO_BATCH, str(half)), "resume_from_checkpoint", "auto")
        return replace(self, line=line, resolved=resolve(line.recipe, line.overrides))

    def told(self) -> str:
        """What will run, in a few lines."""
        batch, micro = self.config.batch(self.world), self.config.per_device_train_batch_size
        accumulation = math.ceil(batch / (micro * self.world))
        most = "" if micro * accumulation * self.world == batch else "at most "
        lines = [
            f"strategy {self.strategy}, {self.world} process{'es' if self.world > 1 else ''}; a step: {batch} examples "
            f"({most}micro-batch {micro} x accumulation {accumulation} x world {self.world})"
        ]
        return "\n".join([*lines, *([summary(self.plan)] if self.plan else []), *self.notes])


def train(line: CommandLine) -> int:
    """Decide, check the rules, and launch; the plan is shown first.

    Returns:
        The exit code of the run.

    Raises:
        UserError: something is wrong that can be known here.
    """
    heart = Heart(0)
    heart.beat(0, "checking the recipe, the model's files and the data")
    with Watchdog(heart, patience=math.inf, notices=True):
        decision = decide(line, hardware.probe())
        folder = launcher.output_dir(decision.config, line)
        rules.check_output_dir(decision.config, Path(folder))
        launch = _checked(decision, folder)
    if line.where.print:
        print(launch.text(), end="")
        return 0
    print(f"{decision.told()}\n{launch}", flush=True)
    code = launcher.run(launch, stay=decision.retries)
    while code == EXIT_MEMORY and decision.retries and decision.config.per_device_train_batch_size > 1:
        decision = decision.smaller()
        print(
            f"trying again with micro-batch {decision.config.per_device_train_batch_size}", file=sys.stderr, flush=True
        )
        code = launcher.run(_checked(decision, folder), stay=True)
    return code


def _checked(decision: Decision, folder: str) -> LaunchPlan:
    rules.check(
        rules.Situation(
            decision.resolved,
            decision.strategy,
            decision.nproc,
            decision.world,
            decision.machine,
            output_dir=Path(folder),
        )
    )
    return launcher.plan(
        decision.line,
        strategy=decision.strategy,
        nproc=decision.nproc,
        output_dir=folder,
        hardware=decision.machine,
        elastic=decision.config.elastic,
        expandable=may_expand(decision.config),
    )


def decide(line: CommandLine, machine: Hardware) -> Decision:
    """Fill in what the recipe leaves open on a machine.

    Raises:
        UserError: an automatic micro-batch without a global batch, or nothing to plan it from.
    """
    resolved = resolve(line.recipe, line.overrides)
    config = resolved.config
    strategy, nproc = launcher.choose_strategy(config, line.where, machine)
    automatic = config.per_device_train_batch_size == "auto"
    if automatic and not config.global_batch_size:
        what = "a micro-batch of auto, and no global batch that would stay the same"
        raise UserError(what, where=resolved.where(MICRO_BATCH), fix="give --global_batch_size")
    shape, notes = _shape(config, needed=automatic, wanted=bool(machine.gpus) or automatic)
    if shape is None:
        return Decision(line, resolved, strategy, nproc, machine, None, notes, retries=False)
    where = machine_of(machine, nproc, line.where.nnodes)
    bf16 = hardware.computes_in_bf16(config.bf16, machine)
    if automatic:
        named = config.model_copy(update={"strategy": config.strategy or (None if where.kind else strategy)})
        size = with_micro_batch(named, shape, where, bf16=bf16, gpu=bool(machine.gpus)).per_device_train_batch_size
        line = _with(line, MICRO_BATCH, str(size))
        resolved = resolve(line.recipe, line.overrides)
    retries = automatic and line.where.nnodes == 1  # elsewhere the other machines end with other exit codes
    if not machine.gpus:
        return Decision(line, resolved, strategy, nproc, machine, None, notes, retries)
    plan = make_plan(resolved.config, shape, where, bf16=bf16)
    if plan.chosen.verdict == Verdict.TOO_BIG and not config.strategy:
        fix = "`manyrank plan` shows what would fit; name a --strategy to try it all the same"
        raise UserError(f"it does not fit: {summary(plan)}", where="the plan", fix=fix)
    return Decision(line, resolved, plan.chosen.strategy, nproc, machine, plan, notes, retries)


def _shape(config: TrainConfig, *, needed: bool, wanted: bool) -> tuple[Architecture | None, tuple[str, ...]]:
    """The model's shape, or None and why nothing is planned."""
    if not wanted:
        return None, ()
    try:
        return read_model(config.model_name_or_path), ()
    except UserError as error:
        if needed:
            raise
        return None, (f"nothing is planned: {error.what}",)


def _with(line: CommandLine, key: str, value: str) -> CommandLine:
    """The command line with another value, in place of what was given under any spelling."""
    others = [entry for entry in line.overrides if ALIASES.get(normal(entry.key), normal(entry.key)) != key]
    return replace(line, overrides=[*others, Entry(f"--{key}", value, "decided at the launch")])
