"""Compare speed, memory, start-up and losses of this project, trl and bare loops, in one run on this machine.

    python benchmarks/speed.py [--rounds N] [--steps N] [--only NAME,...] [--data FOLDER] [--output FOLDER]       make bench
    python benchmarks/speed.py --growth ...         what a step costs as rows, length and model grow

Every round is a process of its own, and the loops take turns, so that the noise of a shared machine meets all of
them. The table has medians over the rounds, without the first steps of each. A process has one thread of work, except
that this project reads the next step in another one, which CPU seconds count. GPUs are hidden; gpu.py is for them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import loops
import workload
from arguments import at_least
from loops import LOOPS, STARTED, Round

from manyrank.launch.command import CPU_VARIABLES

WARM_UP = 2  # steps
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
REFERENCE = "bare padded fp32"  # whose losses the others are compared with
OTHER_ROWS = ("dataset", "trl packing")  # loops whose steps have other rows
COLUMNS = (
    f"{'who':<24} {'tokens/CPU-s':>12} {'of step':>8} {'tokens/s':>9} {'start s':>8} {'peak GiB':>9} {'loss diff':>10}"
)


@dataclass(frozen=True)
class Setting:
    """One line of the table: a loop, its processes, and what else is in the environment."""

    name: str
    loop: str
    settings: tuple[str, ...] = ()  # KEY=VALUE of the recipe
    nproc: int = 1
    layers: int | None = None  # of the model; None: as usual
    malloc: bool = True  # freed memory is kept by the allocator

    def argv(self, folder: Path, out: str, steps: int) -> list[str]:
        head = [sys.executable]
        if self.nproc > 1:
            head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        argv = [*head, loops.__file__, self.loop, str(folder), out, f"--steps={steps}"]
        return argv + [f"--set={setting}" for setting in self.settings]

    def environment(self) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": CPU_VARIABLES["OMP_WAIT_POLICY"]}
        inherited = {key: value for key, value in os.environ.items() if key not in CPU_VARIABLES}
        variables |= (CPU_VARIABLES if self.malloc else {}) | {STARTED: str(time.time()), "CUDA_VISIBLE_DEVICES": ""}
        return inherited | variables


@dataclass(frozen=True)
class Line:
    """Medians over the rounds. per_cpu_second, per_second: real tokens; tokens and CPU seconds of a step; start_up: seconds;
    peak: bytes, largest process."""

    name: str
    per_cpu_second: float
    per_second: float
    tokens: float
    seconds: float
    start_up: float
    peak: int
    losses: list[float]


ENTRIES = [
    *(Setting(name, name) for name in LOOPS),
    Setting("step -malloc", "step", malloc=False),
    *(Setting(f"step {strategy} x2", "step", (f"strategy={strategy}",), nproc=2) for strategy in STRATEGIES),
    Setting("trl padding-free x2", "trl padding-free", nproc=2),
]

# What a step costs as it and the model grow: one thing at a time.
GROWTH = [
    *(Setting(f"{rows} rows to a step", "step", (f"global_batch_size={rows}",)) for rows in (4, 8, 16, 32)),
    *(
        Setting(f"32 rows, {size} at once", "step", ("global_batch_size=32", f"per_device_train_batch_size={size}"))
        for size in (2, 4, 8, 16)
    ),
    *(Setting(f"packs of {length}", "dataset", (f"max_length={length}",)) for length in (256, 512, 1024, 2048)),
    *(Setting(f"{layers} layers", "step", layers=layers) for layers in (3, 6, 12, 24)),
]


def one_round(entry: Setting, folder: Path, steps: int) -> list[Round]:
    """Run an entry once.

    Returns:
        The round of each process.

    Raises:
        RuntimeError: it failed; --only can leave it out.
    """
    with tempfile.TemporaryDirectory() as out:
        argv = entry.argv(folder, out, steps)
        done = subprocess.run(argv, capture_output=True, text=True, env=entry.environment())
        rounds = loops.read(Path(out))
    if done.returncode or len(rounds) != entry.nproc:
        raise RuntimeError(f"{entry.name} failed: {' '.join(argv)}\n{done.stdout}{done.stderr}")
    return rounds


def measured(name: str, rounds: Sequence[Sequence[Round]]) -> Line:
    """The line of an entry from all its rounds, each a list over processes."""

    def rate(processes: Sequence[Round], *, cpu: bool) -> float:
        tokens = sum(sum(one.tokens[WARM_UP:]) for one in processes)
        if cpu:
            return tokens / sum(sum(one.clock.cpu[WARM_UP:]) for one in processes)
        return tokens / max(sum(one.clock.wall[WARM_UP:]) for one in processes)

    return Line(
        name=name,
        per_cpu_second=statistics.median(rate(processes, cpu=True) for processes in rounds),
        per_second=statistics.median(rate(processes, cpu=False) for processes in rounds),
        tokens=statistics.median(sum(sum(one.tokens[WARM_UP:]) for one in ranks) / _steps(ranks) for ranks in rounds),
        seconds=statistics.median(
            sum(sum(one.clock.cpu[WARM_UP:]) for one in ranks) / _steps(ranks) for ranks in rounds
        ),
        start_up=statistics.median(max(one.clock.start_up for one in processes) for processes in rounds),
        peak=int(statistics.median(max(one.peak for one in processes) for processes in rounds)),
        losses=next(one.losses for one in rounds[0] if one.losses),
    )


def _steps(ranks: Sequence[Round]) -> int:
    return len(ranks[0].tokens) - WARM_UP


def growth(lines: Sequence[Line]) -> str:
    """CPU time of a step and of a token: straight lines where the last column stays."""
    rows = [
        f"{line.name:<24} {line.tokens:>12,.0f} {line.seconds:>12.3f} {line.seconds / line.tokens * 1e6:>12.0f}"
        for line in lines
    ]
    return "\n".join([f"{'one step':<24} {'tokens':>12} {'CPU-s':>12} {'us a token':>12}", *rows])


def table(lines: Sequence[Line]) -> str:
    found = {line.name: line for line in lines}
    base, reference = found.get("step"), found.get(REFERENCE)

    def row(line: Line) -> str:
        ratio = f"{line.per_cpu_second / base.per_cpu_second:>8.2f}" if base else f"{'':>8}"
        same = reference and not line.name.startswith(OTHER_ROWS)
        apart = max(abs(a - b) for a, b in zip(line.losses, reference.losses, strict=True)) if same else None
        return (
            f"{line.name:<24} {line.per_cpu_second:>12,.0f} {ratio} {line.per_second:>9,.0f} {line.start_up:>8.1f} "
            f"{line.peak / 2**30:>9.2f} " + (f"{apart:>10.1e}" if same else f"{'':>10}")
        ).rstrip()

    return "\n".join([COLUMNS, *map(row, lines)])


def run(entries: Sequence[Setting], folders: dict[int | None, Path], *, rounds: int, steps: int) -> list[Line]:
    """All rounds, in turns, with the workload of each number of layers; a sign of life goes to stderr."""
    found: dict[str, list[list[Round]]] = {entry.name: [] for entry in entries}
    for number in range(rounds):
        for entry in entries:
            print(f"round {number + 1} of {rounds}: {entry.name}", file=sys.stderr, flush=True)
            found[entry.name].append(one_round(entry, folders[entry.layers], steps))
    return [measured(entry.name, found[entry.name]) for entry in entries]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it and its figures into --output."""
    options = _options(argv)
    entries, name = (GROWTH, "growth") if options.growth else (options.only, "bench")
    with tempfile.TemporaryDirectory(prefix="manyrank-bench-") as temporary:
        folders = {entry.layers: Path(temporary) / str(entry.layers) for entry in entries}
        described = [workload.build(folder, data=options.data, layers=layers) for layers, folder in folders.items()]
        print(described[0], file=sys.stderr, flush=True)
        for entry in entries:
            one_round(entry, folders[entry.layers], options.steps)  # data is prepared before anything is measured
        lines = run(entries, folders, rounds=options.rounds, steps=options.steps)
    text = growth(lines) if options.growth else table(lines)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.txt").write_text(text + "\n")
        (options.output / f"{name}.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds of each loop (default: 3)")
    parser.add_argument(
        "--steps", type=at_least(WARM_UP + 1), default=10, help=f"steps of a round; {WARM_UP} warm up (default: 10)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=workload.DATA,
        help="folder of GSM8K and Alpaca (default: shared/data beside the checkout), else the sample",
    )
    parser.add_argument("--output", type=Path, help="folder for the table, as text, and its figures, as JSON")
    which = parser.add_mutually_exclusive_group()
    names = "; ".join(entry.name for entry in ENTRIES)
    which.add_argument("--only", type=_chosen, default=ENTRIES, metavar="NAME,...", help=f"of {names} (default: all)")
    which.add_argument("--growth", action="store_true", help="what a step costs as rows, length and model grow")
    return parser.parse_args(argv)


def _chosen(text: str) -> list[Setting]:
    known = {entry.name: entry for entry in ENTRIES}
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}")
    return [known[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
