"""`manyrank bench`: speed, memory, start-up and losses of this project, trl and bare loops, in one run on this machine.

Every round is a process of its own, and the contenders take turns, so that the noise of a shared machine meets all of
them. Medians over the rounds are shown; the first steps of a round are left out. One thread of work for each process, but
that this project reads the next step in another one, which CPU seconds count. GPUs are hidden; `--gpu` is for them.
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
from html import escape
from pathlib import Path

from ...config.args import Parser
from ...errors import UserError
from ...launch.command import CPU_VARIABLES
from ...topology import gpus as hardware
from ...training import workload
from .contenders import CONTENDERS, STARTED, Round, read

WARM_UP = 2  # steps
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
REFERENCE = "bare padded fp32"  # whose losses the others are compared with
OTHER_ROWS = ("dataset", "trl packing")  # contenders whose steps have other rows
COLUMNS = (
    f"{'who':<24} {'tokens/CPU-s':>12} {'of step':>8} {'tokens/s':>9} {'start s':>8} {'peak GiB':>9} {'loss diff':>10}"
)


@dataclass(frozen=True)
class Entry:
    """One line of the table: who, on how many processes, and what else is in the environment."""

    name: str
    contender: str
    settings: tuple[str, ...] = ()  # KEY=VALUE of the recipe
    nproc: int = 1
    layers: int | None = None  # of the model; None: as usual
    malloc: bool = True  # freed memory is kept by the allocator

    def argv(self, folder: Path, out: str, steps: int) -> list[str]:
        head = [sys.executable]
        if self.nproc > 1:
            head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        argv = [*head, "-m", "manyrank.tools.bench.contenders", self.contender, str(folder), out, f"--steps={steps}"]
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
    *(Entry(name, name) for name in CONTENDERS),
    Entry("step -malloc", "step", malloc=False),
    *(Entry(f"step {strategy} x2", "step", (f"strategy={strategy}",), nproc=2) for strategy in STRATEGIES),
    Entry("trl padding-free x2", "trl padding-free", nproc=2),
]

# What a step costs as it and the model grow: one thing at a time.
GROWTH = [
    *(Entry(f"{rows} rows to a step", "step", (f"global_batch_size={rows}",)) for rows in (4, 8, 16, 32)),
    *(Entry(f"packs of {length}", "dataset", (f"max_length={length}",)) for length in (256, 512, 1024, 2048)),
    *(Entry(f"{layers} layers", "step", layers=layers) for layers in (3, 6, 12, 24)),
]


def one_round(entry: Entry, folder: Path, steps: int) -> list[Round]:
    """Run an entry once; the rounds of its processes.

    Raises:
        UserError: it failed.
    """
    with tempfile.TemporaryDirectory() as out:
        argv = entry.argv(folder, out, steps)
        done = subprocess.run(argv, capture_output=True, text=True, env=entry.environment())
        rounds = read(Path(out))
    if done.returncode or len(rounds) != entry.nproc:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise UserError(f"{entry.name} failed: {said[-1]}", where=" ".join(argv), fix="leave it out: --only")
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


def plot(lines: Sequence[Line]) -> str:
    """Tokens per CPU-second as bars, an SVG picture."""
    longest, height = max(line.per_cpu_second for line in lines), 22
    bars = "".join(
        f'<text x="190" y="{y + 15}" text-anchor="end">{escape(line.name)}</text>'
        f'<rect x="198" y="{y + 3}" width="{line.per_cpu_second / longest * 400:.0f}" height="{height - 6}" fill="#2f74b5"/>'
        f'<text x="{204 + line.per_cpu_second / longest * 400:.0f}" y="{y + 15}">{line.per_cpu_second:,.0f}</text>'
        for y, line in ((30 + index * height, line) for index, line in enumerate(lines))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{40 + len(lines) * height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/><text x="198" y="20">real tokens per CPU-second</text>'
        f"{bars}</svg>\n"
    )


def run(entries: Sequence[Entry], folders: dict[int | None, Path], *, rounds: int, steps: int) -> list[Line]:
    """All rounds, in turns, with the workload of each number of layers; a sign of life goes to stderr."""
    found: dict[str, list[list[Round]]] = {entry.name: [] for entry in entries}
    for number in range(rounds):
        for entry in entries:
            print(f"round {number + 1} of {rounds}: {entry.name}", file=sys.stderr, flush=True)
            found[entry.name].append(one_round(entry, folders[entry.layers], steps))
    return [measured(entry.name, found[entry.name]) for entry in entries]


def main(argv: Sequence[str]) -> int:
    """Print the table; write it, the figures as JSON and a picture into --output."""
    options = _options(argv)
    if options.gpu:
        from . import gpu_bench

        return gpu_bench.run(toy=options.toy)
    entries, name = (GROWTH, "growth") if options.growth else (options.only, "bench")
    with tempfile.TemporaryDirectory(prefix="manyrank-bench-") as temporary:
        folders = {entry.layers: Path(temporary) / str(entry.layers) for entry in entries}
        said = [workload.build(folder, data=options.data, layers=layers) for layers, folder in folders.items()]
        print(said[0], file=sys.stderr, flush=True)
        for entry in entries:
            one_round(entry, folders[entry.layers], options.steps)  # data is prepared before anything is measured
        lines = run(entries, folders, rounds=options.rounds, steps=options.steps)
    text = growth(lines) if options.growth else table(lines)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.txt").write_text(text + "\n")
        (options.output / f"{name}.svg").write_text(plot(lines))
        (options.output / f"{name}.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    names = [entry.name for entry in ENTRIES]
    parser = Parser(prog="manyrank bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contender (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=10, help=f"steps of a round; the first {WARM_UP} warm up (default: 10)"
    )
    parser.add_argument("--only", type=_chosen, default=ENTRIES, metavar="NAME,...", help="; ".join(names))
    parser.add_argument(
        "--data", type=Path, default=workload.DATA, help="folder with GSM8K and Alpaca (default: beside the checkout)"
    )
    parser.add_argument("--output", type=Path, help="folder for bench.txt, bench.json and bench.svg")
    parser.add_argument(
        "--growth", action="store_true", help="instead: what a step costs as rows, length and model grow"
    )
    parser.add_argument("--gpu", action="store_true", help="instead: real architectures with random weights on a GPU")
    parser.add_argument("--toy", action="store_true", help="with --gpu: tiny, on the CPU, to try it")
    options = parser.parse_args(argv)
    if options.gpu and not options.toy and not hardware.probe().gpus:
        raise UserError("there is no GPU here", where="--gpu", fix="add --toy to try it on the CPU")
    given = {
        "--" + key
        for key in ("rounds", "steps", "only", "data", "output")
        if getattr(options, key) != parser.get_default(key)
    }
    wrong = given - {"--output"} if options.gpu and not options.output else given if options.gpu else set()
    wrong |= {"--toy"} if options.toy and not options.gpu else set()
    wrong |= {"--only"} & given if options.growth else set()
    wrong |= {"--growth"} if options.growth and options.gpu else set()
    if wrong:
        raise UserError(
            f"{', '.join(sorted(wrong))} does not go with the other options", where="command line", fix="leave it out"
        )
    if options.steps <= WARM_UP or options.rounds < 1:
        raise UserError("nothing to measure", where="--rounds, --steps", fix=f"1 round, {WARM_UP + 1} steps, or more")
    return options


def _chosen(text: str) -> list[Entry]:
    known = {entry.name: entry for entry in ENTRIES}
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}")
    return [known[name] for name in names]
