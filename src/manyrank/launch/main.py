"""Launch a recipe: decide a strategy and a micro-batch of `auto` from the plan, then start the processes.

On GPUs `strategy: auto` is the fastest strategy that fits. On CPUs it is single or ddp. A micro-batch of
`auto` is the fastest that fits, or the largest where no speeds are known. One that nobody gave is the default's, or larger
where that would leave a GPU waiting, or smaller where it does not fit. Where it does not fit after all, half is tried.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.args import CommandLine
from ..config.resolve import ResolvedConfig, Setting, canonical, resolve
from ..config.schema import TrainConfig
from ..errors import EXIT_MEMORY, UserError
from ..models.spec import ModelSpec
from ..plan.command import read_model
from ..plan.planner import (
    MICRO_BATCH,
    USUAL_MICRO_BATCH,
    Plan,
    Verdict,
    leaves_micro_batch_open,
    make_plan,
    with_micro_batch,
)
from ..plan.view import summary
from ..project_files import EMBEDDED
from ..rules.check import check_output_dir, check_rules
from ..rules.context import RunContext
from ..rules.names import are_doubtful
from ..runs import hub, run_folder
from ..runs.heartbeats import HeartbeatWriter
from ..runs.watchdog import Watchdog
from ..topology import gpus
from ..topology.gpus import Hardware
from .command import LaunchPlan, choose_output_dir, choose_strategy, default_output_dir, plan_launch, run_launch


@dataclass(frozen=True)
class ResolvedLaunch:
    """A launch with nothing left open; `plan` is None where nothing was planned, `notes` say why."""

    line: CommandLine
    context: RunContext
    plan: Plan | None
    notes: tuple[str, ...]
    retries: bool  # with smaller micro-batches

    @property
    def config(self) -> TrainConfig:
        return self.context.config

    def with_half_micro_batch(self, *, saved: bool) -> ResolvedLaunch:
        """The same with half the micro-batch.

        Args:
            saved: whether the run has saved a checkpoint since its launch, to resume from; else it begins where it did.
        """
        half = self.config.micro_batch // 2
        line = _with(self.line, MICRO_BATCH, str(half))
        if self.config.overwrite_output_dir and saved:
            line = _with(line, "overwrite_output_dir", "false")
        if saved or not (self.config.resume_from_checkpoint or self.config.overwrite_output_dir):
            line = _with(line, "resume_from_checkpoint", "auto")
        context = replace(self.context, resolved=resolve(line.recipe, line.overrides))
        return replace(self, line=line, context=context)

    def summary(self) -> str:
        """Summarise what will run."""
        world = self.context.world_size
        batch, micro = self.config.batch(world), self.config.micro_batch
        accumulation = math.ceil(batch / (micro * world))
        most = "" if micro * accumulation * world == batch else "at most "
        lines = [
            f"strategy {self.context.strategy}, {world} process{'es' if world > 1 else ''}; a step: {batch} examples "
            f"({most}micro-batch {micro} x accumulation {accumulation} x world {world})"
        ]
        return "\n".join([*lines, *self.planned])

    @property
    def planned(self) -> list[str]:
        """The plan in a line, or why there is none."""
        return [*([summary(self.plan)] if self.plan else []), *self.notes]


def train(line: CommandLine) -> int:
    """Decide, check the rules, and launch; the plan is shown first.

    Returns:
        The exit code of the run.

    Raises:
        UserError: something is wrong that can be known here.
    """
    heartbeat = HeartbeatWriter(0)
    heartbeat.beat(0, "checking the recipe, the model's files and the data")
    with Watchdog(heartbeat, patience=math.inf, notices=True):
        resolved = resolve_launch(line, gpus.probe())
        folder = choose_output_dir(resolved.config, line)
        check_output_dir(resolved.config, Path(folder))
        launch = _checked(resolved, folder)
    if line.options.print:
        print(launch.text(), end="")
        return 0
    notes = [*resolved.context.resolved.assumed(), *_taken(resolved.config, line, folder)]
    shown = [resolved.summary()] if line.options.check else resolved.planned  # the run itself says the rest
    print("\n".join([*notes, *shown, str(launch)]), flush=True)
    if line.options.check:
        print("checked: no rule refuses it, and its data can be read; without --check it starts")
        return 0
    _check_model(resolved.config.model_name_or_path, line)
    began = time.time()
    code = run_launch(launch, stay=resolved.retries)
    while code == EXIT_MEMORY and resolved.retries and resolved.config.micro_batch > 1:
        saved = any(checkpoint.stat().st_mtime > began for checkpoint in run_folder.checkpoints(Path(folder)))
        resolved = resolved.with_half_micro_batch(saved=saved)
        print(f"trying again with micro-batch {resolved.config.micro_batch}", file=sys.stderr, flush=True)
        code = run_launch(_checked(resolved, folder), stay=True)
    return code


def _taken(config: TrainConfig, line: CommandLine, folder: str) -> list[str]:
    """Say that an earlier run has the usual folder, and what to type for that run instead."""
    if config.output_dir or config.resume_from_checkpoint or Path(folder) == default_output_dir(line):
        return []
    last, _ = run_folder.free_folder(default_output_dir(line))
    return [
        f"{last} is taken: this run goes to {folder} (--resume_from_checkpoint auto continues {last}, --output_dir names another)"
    ]


def _check_model(name: str, line: CommandLine) -> None:
    """Refuse a model that cannot be had, with the same command on the embedded one."""
    try:
        hub.check_model(name)
    except UserError as error:
        argv = _with(line, "model_name_or_path", EMBEDDED).argv
        fix = f"{error.fix}, as in: manyrank train {shlex.join(argv)}"
        raise UserError(error.what, where=error.where, fix=fix) from None


def _checked(resolved: ResolvedLaunch, folder: str) -> LaunchPlan:
    context = replace(resolved.context, output_dir=Path(folder))
    check_rules(context)
    if are_doubtful(context):
        _check_trained(context.resolved)
    return plan_launch(
        resolved.line,
        strategy=context.strategy,
        nproc=context.nproc,
        output_dir=folder,
        hardware=context.hardware,
        elastic=context.config.elastic,
        expandable=context.config.expandable_segments,
    )


def _check_trained(resolved: ResolvedConfig) -> None:
    """Try the adapters on the model's skeleton: torch takes seconds to import, and files may have other names than modules."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # whose import tells of kernels that nothing here needs
    from ..models.skeleton import check_trained

    try:
        check_trained(resolved.config)
    except UserError as error:
        raise UserError(error.what, where=resolved.where(error.where), fix=error.fix) from None


def resolve_launch(line: CommandLine, machine: Hardware) -> ResolvedLaunch:
    """Fill in what the recipe leaves open on a machine.

    Raises:
        UserError: an automatic micro-batch without a global batch, or nothing to plan it from.
    """
    resolved = resolve(line.recipe, line.overrides)
    config = resolved.config
    strategy, nproc = choose_strategy(config, line.options, machine)
    context = RunContext(resolved, strategy, nproc, nproc * line.options.nnodes, machine)
    automatic = config.per_device_train_batch_size == "auto"
    if automatic and not config.global_batch_size:
        what = "a micro-batch of auto, and no global batch that would stay the same"
        raise UserError(what, where=resolved.where(MICRO_BATCH), fix="give --global_batch_size")
    shape, notes = _shape(config, needed=automatic, wanted=bool(machine.gpus) or automatic)
    if shape is None:
        return ResolvedLaunch(line, context, None, notes, retries=False)
    decided = automatic or leaves_micro_batch_open(context)
    if decided:
        line, context = _with_micro_batch(line, context, shape, least=None if automatic else USUAL_MICRO_BATCH)
    retries = decided and line.options.nnodes == 1  # elsewhere the other machines end with other exit codes
    if not machine.gpus:
        return ResolvedLaunch(line, context, None, notes, retries)
    plan = make_plan(context, shape)
    if plan.chosen.verdict == Verdict.TOO_BIG and not config.strategy:
        fix = "`manyrank plan` shows what would fit; name a --strategy to try it all the same"
        raise UserError(f"it does not fit: {summary(plan)}", where="the plan", fix=fix)
    return ResolvedLaunch(line, context.on(plan.chosen.strategy), plan, notes, retries)


def _with_micro_batch(
    line: CommandLine, context: RunContext, shape: ModelSpec, *, least: int | None
) -> tuple[CommandLine, RunContext]:
    """The micro-batch that fits, on the strategy that will run, or on the best where the GPUs' kind is known."""
    named = context.config.strategy or (None if context.kind else context.strategy.name)
    sized = with_micro_batch(context.with_options(strategy=named), shape, least=least)
    line = _with(line, MICRO_BATCH, str(sized.config.micro_batch))
    return line, replace(context, resolved=resolve(line.recipe, line.overrides))


def _shape(config: TrainConfig, *, needed: bool, wanted: bool) -> tuple[ModelSpec | None, tuple[str, ...]]:
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
    others = [entry for entry in line.overrides if canonical(entry.key) != key]
    return replace(line, overrides=[*others, Setting(f"--{key}", value, "decided at the launch")])
