"""`manyrank verify`: the same few steps on every strategy, compared with one process. Does this machine train right?

Each case is a real launch of the train module. Beside the losses it checks what came up: wrapper and distributed type,
that a sharded strategy holds 1/N of the base (also of a 4-bit base), and that the saved model has every tensor.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator
from safetensors import safe_open

from ..config.args import Options, arg, read_options, word
from ..config.resolve import TrainConfig, resolve
from ..config.value_types import Int, listed
from ..errors import EXIT_FAILED, UserError
from ..project_files import asset
from ..runs.logs import read_metrics
from ..signals import die_with_parent
from ..topology import gpus
from ..topology.precision import Precision
from ..topology.strategies import STRATEGIES, EngineKind, Strategy, default_strategy

COMPARED = [s.name for s in STRATEGIES.values() if s.engine is not EngineKind.SINGLE and not s.offload]
Compared = Literal[*COMPARED]
Method = Literal["lora", "qlora", "full"]
Launcher = Literal["accelerate", "torchrun"]
METHODS, LAUNCHERS = get_args(Method), get_args(Launcher)
WRAPPERS = {
    EngineKind.SINGLE: "",
    EngineKind.DDP: "DistributedDataParallel",
    EngineKind.FSDP: "FSDP",
    EngineKind.DEEPSPEED: "DeepSpeedEngine",
}
SHARD_SLACK = 1.05  # padding of uneven shards


@dataclass(frozen=True)
class Case:
    """One launch: a method on a strategy, by a launcher; `nproc` processes of verify's own --nproc."""

    strategy: Strategy
    method: str
    via: str
    nproc: int

    def __str__(self) -> str:
        return f"{self.method} {self.strategy} {self.via}"

    @property
    def shards(self) -> int:
        """Processes that share one copy of the base."""
        if "parameters" not in self.strategy.shards:
            return 1
        return self.nproc // 2 if self.strategy.replicas else self.nproc

    @property
    def mesh(self) -> list[int]:
        """The mesh on which FSDP's parameters are to lie."""
        if self.strategy.engine is not EngineKind.FSDP:
            return []
        return [2, self.shards] if self.strategy.replicas else [self.shards]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a launch: loss and gradient norm of each step, and the active strategy."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    facts: dict
    saved_tensors: int
    error: str = ""


def cases(methods: Sequence[str], strategies: Sequence[str], launchers: Sequence[str], nproc: int) -> Iterator[Case]:
    """List the cases: for each method one single-process run to compare with, then the others."""
    for method in methods:
        yield Case(default_strategy(1), method, "python", 1)
        for strategy in (STRATEGIES[name] for name in strategies):
            for via in launchers:
                yield Case(strategy, method, via, processes(strategy, nproc))


def processes(strategy: Strategy, nproc: int) -> int:
    """Processes of a case: hsdp has two copies of the model on this machine, each in shards."""
    return max(4, nproc // 2 * 2) if strategy.replicas else nproc


def fitting(nproc: int, gpu_count: int) -> tuple[str, ...]:
    """The strategies that a machine can run; on CPUs all."""
    return tuple(
        name for name in COMPARED if not gpu_count or processes(STRATEGIES[name], nproc) <= max(nproc, gpu_count)
    )


def batch_arguments(config: TrainConfig, nproc: int) -> list[str]:
    """Return the options that give any number of processes the global batch of `nproc`."""
    return [f"--global_batch_size={config.batch(nproc)}", "--gradient_accumulation_steps=none"]


def run(case: Case, recipe: str, folder: Path, *, steps: int, more: Sequence[str] = ()) -> Outcome:
    """Launch one case in `folder` with `more` arguments and read what it wrote."""
    output = folder / str(case).replace(" ", "-")
    each = [f"--hsdp_shard_size={case.shards}"] if case.strategy.replicas else []
    argv = [
        sys.executable,
        "-m",
        "manyrank.cli",
        "train",
        recipe,
        f"--method={case.method}",
        f"--strategy={case.strategy}",
        f"--via={case.via}",
        f"--nproc={case.nproc}",
        f"--max_steps={steps}",
        "--logging_steps=1",
        "--lora_dropout=0",
        f"--output_dir={output}",
        "--sample_questions=[]",
        "--report_to=none",
        *([] if any("save_steps" in argument for argument in more) else ["--save_steps=off"]),
        *each,
        *more,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=die_with_parent)
    if done.returncode:
        return Outcome((), (), {}, 0, error=f"exit code {done.returncode}: {_last_words(done.stderr)}")
    lines = [line for line in read_metrics(output) if "loss" in line]
    return Outcome(
        losses=tuple(line["loss"] for line in lines),
        grad_norms=tuple(line["grad_norm"] for line in lines),
        facts=json.loads((output / "logs" / "strategy.json").read_text()),
        saved_tensors=sum(len(safe_open(f, "pt").keys()) for f in (output / "final_model").glob("*.safetensors")),
    )


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two series of the same steps, relative where the value is above 1.

    Infinite if they have not the same length or hold something that is not finite.
    """
    if len(one) != len(other) or not one or not all(map(math.isfinite, (*one, *other))):
        return math.inf
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(one, other))


def problems(case: Case, outcome: Outcome, single: Outcome) -> list[str]:
    """List what is wrong with a case; none: it is right."""
    if outcome.error:
        return [outcome.error]
    facts, problems = outcome.facts, []
    if not facts["wrapper"].startswith(WRAPPERS[case.strategy.engine]):
        problems.append(f"wrapped as {facts['wrapper']}")
    if facts["distributed_type"].replace("MULTI_CPU", EngineKind.DDP) != case.strategy.engine:
        problems.append(f"started as {facts['distributed_type']}")
    if facts["world_size"] != case.nproc:
        problems.append(f"{facts['world_size']} processes")
    if facts["mesh"] != case.mesh:
        problems.append(f"parameters on a mesh of {facts['mesh']}")
    if max(facts["base_bytes_here"]) > SHARD_SLACK * facts["base_bytes"] / case.shards:
        problems.append(f"a rank holds {share(facts):.0%} of the base")
    if outcome.saved_tensors != facts["trainable_tensors"]:
        problems.append(f"saved {outcome.saved_tensors} of {facts['trainable_tensors']} tensors")
    tolerance = Precision(facts["precision"]).tolerance
    for name, one, other in (
        ("loss", outcome.losses, single.losses),
        ("grad norm", outcome.grad_norms, single.grad_norms),
    ):
        if not difference(one, other) <= tolerance:
            problems.append(f"{name} differs by {difference(one, other):.1e}, more than {tolerance:.0e}")
    return problems


def share(facts: dict) -> float:
    """The largest part of the base that a rank holds."""
    return max(facts["base_bytes_here"]) / facts["base_bytes"]


class VerifyOptions(Options):
    """Train the same few steps on every strategy, and compare the losses with those of one process."""

    recipe: str = word(str(asset("launch", "recipes", "verify.yaml")), "your own recipe (default: verify)")
    nproc: Int | None = arg(None, "processes (default: GPUs, or 2); hsdp: at least 4", gt=0)
    steps: Int = arg(4, "steps of each run", gt=0)
    methods: Annotated[list[Method], BeforeValidator(listed)] = arg(
        METHODS, f"methods to compare (default: {','.join(METHODS)})", min_length=1
    )
    strategies: Annotated[list[Compared], BeforeValidator(listed)] = arg(
        [], f"strategies (default: those that fit of {','.join(COMPARED)})", min_length=1
    )
    via: Annotated[list[Launcher], BeforeValidator(listed)] = arg(
        LAUNCHERS, f"launchers (default: {','.join(LAUNCHERS)})", min_length=1
    )
    keep: Path | None = arg(None, "keep the runs there", also=["output_dir"])


def main(argv: Sequence[str]) -> int:
    """Run the matrix and print a row as each case ends.

    Returns:
        0 if every case is right, else 1.
    """
    options = read_options(argv, VerifyOptions, prog="manyrank verify")
    gpu_count = len(gpus.probe().gpus)
    nproc = options.nproc or gpu_count or 2
    if nproc < 2:
        what = "verify compares several processes with one"
        raise UserError(what, where="--nproc", fix="needs at least 2 GPUs, or CPUs")
    strategies = options.strategies or fitting(nproc, gpu_count)
    for name in set(COMPARED) - set(strategies) if not options.strategies else ():
        print(f"left out: {name}, which needs {processes(STRATEGIES[name], nproc)} GPUs")
    print(
        f"{'method':<7} {'strategy':<8} {'launcher':<10} {'wrapper':<26} {'base/rank':>9} {'loss diff':>10} {'norm diff':>10}"
    )
    wrong, single = 0, Outcome((), (), {}, 0)
    recipe = resolve(options.recipe).config
    with tempfile.TemporaryDirectory(prefix="manyrank-verify-") as temporary:
        folder = options.keep or Path(temporary)
        for case in cases(options.methods, strategies, options.via, nproc):
            batch = batch_arguments(recipe, nproc)
            outcome = run(case, options.recipe, folder, steps=options.steps, more=batch)
            single = outcome if case.strategy.engine is EngineKind.SINGLE else single
            bad = problems(case, outcome, single)
            wrong += bool(bad)
            print(_row(case, outcome, single, bad), flush=True)
    print("all the same" if not wrong else f"{wrong} cases are wrong")
    return EXIT_FAILED if wrong else 0


def _row(case: Case, outcome: Outcome, single: Outcome, bad: list[str]) -> str:
    head = f"{case.method:<7} {case.strategy.name:<8} {case.via:<10} "
    if outcome.error:
        return head + f"WRONG: {outcome.error}"
    return (
        head + f"{outcome.facts['wrapper'][:26]:<26} {share(outcome.facts):>9.0%} "
        f"{difference(outcome.losses, single.losses):>10.1e} {difference(outcome.grad_norms, single.grad_norms):>10.1e}  "
        + (f"WRONG: {'; '.join(bad)}" if bad else "ok")
    )


def _last_words(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (telling or lines or ["no message"])[-1].strip()
