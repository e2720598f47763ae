"""Runs to plan, for tests."""

from manyrank.config.resolve import ResolvedConfig
from manyrank.plan.planned_run import PlannedRun
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import GpuKind, planned_hardware
from manyrank.topology.strategies import STRATEGIES


def planned_context(
    config, strategy="single", nproc=1, nnodes=1, *, bf16=True, gpu: bool | GpuKind = True, host=None
) -> RunContext:
    """A recipe on `nproc` processes of each machine; `gpu` is a kind, or whether there are GPUs of unknown memory."""
    kind = gpu if isinstance(gpu, GpuKind) else None
    machine = planned_hardware(nproc if gpu else 0, kind, bf16=bf16, host=host)
    resolved = ResolvedConfig(config.model_copy(update={"bf16": bf16}))
    return RunContext(resolved, STRATEGIES[strategy], nproc, nproc * nnodes, machine)


def planned_run(config, shape, strategy="single", nproc=1, nnodes=1, **machine) -> PlannedRun:
    """The same with the shape of its model."""
    return PlannedRun(planned_context(config, strategy, nproc, nnodes, **machine), shape)
