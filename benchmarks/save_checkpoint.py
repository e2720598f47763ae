"""Measure what a checkpoint costs.

    python benchmarks/save_checkpoint.py [FOLDER]      FOLDER: on the disk to measure (default: a temporary one)

Table 1: the embedded model, LoRA r 16, one process: seconds of a step and of a save, and the share at save_steps 50.
Table 2: a LoRA of 7B (Llama-2-7B's shapes, r 16 on all linear layers) with AdamW's moments, against writing and fsyncing
         as many bytes of zeros. No model is there for it: what is timed is gathering aside the whole way to the disk.
Medians of interleaved rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from arguments import existing_folder

from manyrank.checkpoint.state import FullWriter
from manyrank.config.resolve import Setting, resolve
from manyrank.runs import run_folder
from manyrank.tasks.sft import SFT
from manyrank.topology import ranks
from manyrank.topology.precision import Precision
from manyrank.training.build import build_run
from manyrank.training.exits import exit_now

ROUNDS, STEPS = 5, 10
HIDDEN, FEED_FORWARD, LAYERS, RANK = 4096, 11008, 32, 16


def timed(work, *args) -> float:
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def embedded(folder: Path) -> None:
    entries = [Setting("max_steps", 1000, "bench"), Setting("strategy", "single", "bench")]
    config = resolve("verify", entries).config
    run = build_run(config, ranks.from_environment(), SFT, output_dir=folder / "run", precision=Precision.FLOAT32)
    trainer = run.trainer
    steps, saves = [], []
    for number in range(ROUNDS):
        for step in range(STEPS):
            steps.append(timed(trainer.train_step, trainer.loader.step(number * STEPS + step)))
            trainer.state.global_step += 1
        saves.append(timed(trainer._save))
    step, save = statistics.median(steps), statistics.median(saves)
    print(f"\n{'step, ms':>10} {'save, ms':>10} {'share at save_steps 50':>24}")
    print(f"{step * 1e3:>10.1f} {save * 1e3:>10.1f} {save / (50 * step + save):>24.1%}")


def seven_billion(folder: Path) -> None:
    linears = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, FEED_FORWARD)] * 2 + [(FEED_FORWARD, HIDDEN)]
    shapes = [shape for a, b in linears * LAYERS for shape in ((RANK, a), (b, RANK))]
    keys = ("value", "exp_avg", "exp_avg_sq")
    tensors = {f"{number:04d}|{key}": torch.randn(shape) for number, shape in enumerate(shapes) for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    ours, plain = [], []
    for number in range(ROUNDS):
        ours.append(timed(_save, folder / "seven", number, tensors))
        plain.append(timed(_write_zeros, folder / "zeros", total))
    ours, plain = statistics.median(ours), statistics.median(plain)
    print(f"\n{'bytes, MiB':>10} {'save, s':>10} {'zeros, s':>10} {'more, s':>10}")
    print(f"{total / 2**20:>10.0f} {ours:>10.2f} {plain:>10.2f} {ours - plain:>10.2f}")


def _save(folder: Path, number: int, tensors: dict) -> None:
    partial = run_folder.begin(folder, number)
    for prefix, are_weights in (("weights", True), ("optimizer", False)):
        writer = FullWriter(partial, prefix)
        for name, tensor in tensors.items():
            if name.endswith("value") == are_weights:
                writer.add(name, tensor)
        writer.flush()
    run_folder.seal(partial)


def _write_zeros(file: Path, total: int) -> None:
    with file.open("wb") as stream:
        for _ in range(total // 2**20):
            stream.write(bytes(2**20))
        stream.flush()
        os.fsync(stream.fileno())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=existing_folder, help="on the disk to measure; it must be there")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        embedded(Path(folder))
        seven_billion(Path(folder))
        exit_now(0)
