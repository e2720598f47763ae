"""Counts of a step of real models on the stand-in GPUs of tests/fake_cuda, against those of benchmarks/baselines/cuda.json.

    tests/fake_cuda/run.sh .venv-cuda .venv-cuda/fake_cuda python benchmarks/cuda_counters.py             stored | now | change
    tests/fake_cuda/run.sh .venv-cuda .venv-cuda/fake_cuda python benchmarks/cuda_counters.py --update    stores those of now

Tests of `make cuda-dry` compare them, too, and count with `reset`, `read` and `waits`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys

import counts
import gpu
import own_process

from manyrank.errors import EXIT_FAILED
from manyrank.topology.allocator import EXPANDABLE, NAME

GROUP = "cuda"
UPDATE = "tests/fake_cuda/run.sh .venv-cuda .venv-cuda/fake_cuda python benchmarks/cuda_counters.py --update"
LORA, RECOMPUTED, QLORA = "8B lora", "8B lora recomputed", "7B qlora"
RUNTIME = (
    "launches",
    "stream_syncs",
    "event_syncs",
    "device_syncs",
    "to_device",
    "to_host",
    "in_device",
    "to_device_bytes",
    "to_host_bytes",
    "in_device_bytes",
    "mallocs",
    "memsets",
    "refused_launches",
)  # libraries/cudart.cc, Counters
CASES = {LORA: gpu.CASES[0], RECOMPUTED: gpu.CASES[4], QLORA: gpu.CASES[5]}


def reset() -> None:
    """Count from 0."""
    ctypes.CDLL("libcudart.so.13").fakecuda_reset()
    ctypes.CDLL("libcublas.so.13").fakecublas_reset()


def read() -> dict[str, float]:
    """Launches, waits, copies and their bytes; products of matrices and their FLOP."""
    runtime, products = ctypes.CDLL("libcudart.so.13"), ctypes.CDLL("libcublas.so.13")
    values = (ctypes.c_uint64 * len(RUNTIME))()
    runtime.fakecuda_counters(values)
    products.fakecublas_flops.restype = ctypes.c_double
    products.fakecublas_products.restype = ctypes.c_uint64
    counted = dict(zip(RUNTIME, values)) | {"products": products.fakecublas_products()}
    return counted | {"flop": products.fakecublas_flops()}


def waits(counted: dict[str, float]) -> float:
    """How often the host has waited for the device."""
    return sum(counted[key] for key in ("stream_syncs", "event_syncs", "device_syncs"))


def count_step(case: gpu.Case) -> counts.Counts:
    """Count a case's third step, of one micro-batch, with the FLOP it needs, its peak bytes and the planned bytes."""
    import torch

    from manyrank.data.loader import side_by_side

    bench = gpu.Bench(case, toy=False)
    rows = bench._rows()
    engine, token_loss = bench.prepared(bench._base())
    micro = side_by_side(rows)
    for _ in range(2):
        bench.step(engine, token_loss, micro.to(bench.device))
    torch.cuda.reset_peak_memory_stats()
    reset()
    bench.step(engine, token_loss, micro.to(bench.device))
    counted = read()
    result = {key: counted[key] for key in ("launches", "products", "flop", "to_device_bytes", "refused_launches")}
    result |= {"waits": waits(counted), "needed": bench._flops(rows), "planned": bench._planned()}
    return result | {"allocated": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}


def count_all() -> dict[str, counts.Counts]:
    """Count each case in a process of its own, with the allocator that the launch sets."""
    env = os.environ | {NAME: EXPANDABLE}
    argv = [sys.executable, __file__, "--case"]
    return {name: own_process.result(own_process.run([*argv, name], env=env)) for name in CASES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="store the counts of now")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # of a process that counts
    options = parser.parse_args()
    if options.case:
        own_process.print_result(count_step(CASES[options.case]))
        return 0
    now = count_all()
    changes = counts.compare(GROUP, counts.read(GROUP)["counts"], now)
    print(counts.COLUMNS, *changes, sep="\n")
    if options.update:
        counts.write(GROUP, now)
        return 0
    return EXIT_FAILED if any(change.moved for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
