"""Time, memory and bytes of loading a base on two processes: whole, in shards, and from the cache of a quantised base.

    python benchmarks/load_model.py [--model llama-3.1-8b] [--layers 16] [--only CASE,...] [--folder FOLDER]

The model has the shape of Llama-3.2-1B, or of another name of the catalog, and random weights in bf16. Before each load
the files leave the page cache. Two processes load at the same time, with one thread each. The cache is always a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from manyrank.models.catalog import known

if TYPE_CHECKING:
    import torch

RANKS = 2
CASE = "MANYRANK_LOAD_CASE"  # of a process that measures
CASES = ("lora whole", "lora fsdp", "lora zero3", "qlora whole", "qlora fsdp", "qlora fsdp again", "qlora zero3 again")


def main() -> None:
    if CASE in os.environ:
        return measure(os.environ[CASE])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=known(), default="llama-3.2-1b", metavar="NAME", help="a name of the catalog"
    )
    parser.add_argument("--layers", type=int, help="another number of them")
    parser.add_argument("--folder", type=Path, help="an existing folder, on the disk to measure, that keeps the model")
    parser.add_argument("--only", default=",".join(CASES), metavar="CASE,...", help="%(default)s")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=args.folder) as cache:
        model = Path(args.folder or cache, f"{args.model}-{args.layers or 'all'}")
        make(model, args.model, args.layers)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"{size / 2**30:.2f} GiB of weights, {RANKS} processes; of each process:\n")
        print(
            "| load | seconds | GiB of files touched | peak GiB of its own memory | GiB held |\n|---|---|---|---|---|"
        )
        for case in args.only.split(","):
            for file in {*model.glob("*.safetensors"), *Path(cache).glob("*/*.safetensors")}:
                forget(file)
            port = free_port()
            ranks = [start(model, cache, case, rank, port) for rank in range(RANKS)]
            results = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
            worst = {key: max(result[key] for result in results) for key in results[0]}
            print("| {} | {seconds:.1f} | {files:.2f} | {own:.2f} | {held:.2f} |".format(case, **worst), flush=True)


def start(model: Path, cache: str, case: str, rank: int, port: int) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1}
    place |= {CASE: case, "MODEL": model, "CACHE": cache}
    environment = os.environ | {key: str(value) for key, value in place.items()}
    return subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, env=environment)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(folder: Path, name: str, layers: int | None) -> None:
    """Write a model of random weights, tensor by tensor: it need not fit into memory."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = known()[name] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(**shape, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(tensors))
        for tensor in tensors.values():
            values = torch.empty_like(tensor, device="cpu").normal_(std=0.02)
            file.write(values.view(torch.uint8).numpy().data)
    config.save_pretrained(folder)


def header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the beginning of a safetensors file of tensors in bf16, which follow it one by one."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def measure(case: str) -> None:
    """Load MODEL as a case says, on this rank, and print what it took as JSON."""
    import torch
    from accelerate import PartialState

    from manyrank.models.load import LoadPlan, base_model
    from manyrank.models.quantised_cache import cached_base
    from manyrank.models.shards import Share, take_parts

    method, strategy, *_ = case.split()
    PartialState(cpu=True)
    cpu, rank = torch.device("cpu"), int(os.environ["RANK"])
    share = Share(rank, RANKS, flat=strategy == "zero3", device=cpu, trained=False, storage=torch.bfloat16)
    quantised = {"quantization": "nf4", "device_map": {"": cpu}} if method == "qlora" else {}
    plan = LoadPlan(
        os.environ["MODEL"], torch.bfloat16, torch.bfloat16, **quantised, share=None if strategy == "whole" else share
    )
    read = partial(cached_base, where=os.environ["CACHE"], say=lambda line: None) if quantised else base_model
    torch.distributed.barrier()
    before, began = resident(), time.perf_counter()
    with Peak() as peak:
        model = read(plan)
        held = take_parts(model).values() if plan.share else list(model.parameters())
        if strategy == "whole":  # a step reads every page
            for parameter in held:
                parameter.detach().view(torch.uint8).flatten().numpy()[::4096].sum()
    result = {"seconds": time.perf_counter() - began, "held": sum(tensor.nbytes for tensor in held) / 2**30}
    print(json.dumps(result | {key: (peak.bytes[key] - before[key]) / 2**30 for key in before}))


def resident() -> dict[str, int]:
    """Bytes of this process's memory: its own, and of mapped files what it has touched."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[name].split()[0]) * 1024 for key, name in (("own", "RssAnon"), ("files", "RssFile"))}


class Peak:
    """Samples `resident` in a thread, and keeps the largest values."""

    def __enter__(self) -> Peak:
        self.bytes, self.over = resident(), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.over.wait(0.01):
            self.bytes = {key: max(value, self.bytes[key]) for key, value in resident().items()}

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


if __name__ == "__main__":
    main()
