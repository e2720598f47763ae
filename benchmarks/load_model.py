"""Time, memory and bytes of loading a base on two processes: whole, in shards, and from the cache of a quantised base.

    python benchmarks/load_model.py [--model llama-3.1-8b] [--layers 16] [--only CASE,...] [--folder FOLDER]

The model has the shape of Llama-3.1-8B, or of another name of the catalog, and random weights in bf16. Before each load
the files leave the page cache. Two processes load at the same time, with one thread each. The cache is always a new one.

    disk      read from it by both, the kernel's read-ahead among it
    mapped    files of weights: pages that the process has touched, and that the kernel has kept; processes share them
    read      into its own memory, with `read`: the hashes of a cache, which the ranks of a machine share out; small files
    peak      of the process's own memory, over what it held before
    held      at the end: its parts, or the whole model
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import existing_folder

from manyrank.models.catalog import known

if TYPE_CHECKING:
    import torch

RANKS = 2
FILE_BYTES = 5 * 10**9
WHICH = "MANYRANK_LOAD_CASES"  # of a process that measures
READ = {"disk": "read_bytes", "read": "rchar"}
BYTES = ("disk", "mapped", "read", "peak", "held")
SHARDED = ("lora fsdp", "lora zero3", "qlora fsdp uncached", "qlora fsdp", "qlora fsdp again", "qlora zero3 again")
CASES = ("lora whole", "qlora whole", *SHARDED)


def main() -> None:
    if WHICH in os.environ:
        return print(json.dumps({case: measure(case) for case in os.environ[WHICH].split(",")}))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=known(), default="llama-3.1-8b", metavar="NAME", help="a name of the catalog"
    )
    parser.add_argument("--layers", type=int, help="another number of them")
    parser.add_argument(
        "--folder", type=existing_folder, help="an existing folder, on the disk to measure, that keeps the model"
    )
    parser.add_argument("--only", default=",".join(CASES), metavar="CASE,...", help="%(default)s")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=args.folder) as cache:
        model = Path(args.folder or cache, f"{args.model}-{args.layers or 'all'}")
        make(model, known()[args.model] | ({"num_hidden_layers": args.layers} if args.layers else {}))
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"{size / 2**30:.2f} GiB of weights, {RANKS} processes; of the one that takes most:\n")
        print(f"| load | seconds | GiB {' | GiB '.join(BYTES)} |\n|---|---{'|---' * len(BYTES)}|")
        for case in args.only.split(","):
            for file in {*model.glob("*.safetensors"), *Path(cache).glob("*/*.safetensors")}:
                forget(file)
            results = load(model, cache, [case])[case]
            worst = {key: max(result[key] for result in results) for key in results[0]}
            worst["disk"] = sum(result["disk"] for result in results)
            sizes = " | ".join(f"{worst[key] / 2**30:.2f}" for key in BYTES)
            print(f"| {case} | {worst['seconds']:.1f} | {sizes} |", flush=True)


def load(model: Path, cache: str, cases: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Load a model on all ranks, case after case, and return what each rank took: seconds, and bytes."""
    port = free_port()
    ranks = [start(model, cache, cases, rank, port) for rank in range(RANKS)]
    results = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    return {case: [result[case] for result in results] for case in cases}


def start(model: Path, cache: str, cases: Sequence[str], rank: int, port: int) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1}
    place |= {WHICH: ",".join(cases), "MODEL": model, "CACHE": cache}
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


def make(folder: Path, shape: Mapping[str, object]) -> None:
    """Write a model of random weights, tensor by tensor: it need not fit into memory.

    Args:
        shape: keys of its config.json.
    """
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys}
    folder.mkdir(parents=True, exist_ok=True)
    files = in_files(tensors)
    for name, part in files.items():
        with (folder / name).open("wb") as file:
            file.write(header(part))
            for tensor in part.values():
                values = torch.empty_like(tensor, device="cpu").normal_(std=0.02)
                file.write(values.view(torch.uint8).numpy().data)
    index = {"metadata": {}, "weight_map": {key: name for name, part in files.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def in_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Divide tensors among files of at most FILE_BYTES, as published models are: one file is mapped as a whole."""
    files, size = [{}], 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][key] = tensor
        size += tensor.nbytes
    return {f"model-{at:05}-of-{len(files):05}.safetensors": part for at, part in enumerate(files, 1)}


def header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the beginning of a safetensors file of tensors in bf16, which follow it one by one."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def measure(case: str) -> dict[str, float]:
    """Load MODEL as a case says, on this rank, and return what it took."""
    import bitsandbytes  # noqa: F401  what a load imports is read before the count begins
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM

    from manyrank.models.load import LoadPlan, base_model
    from manyrank.models.quantised_cache import cached_base
    from manyrank.models.shards import Share, take_parts

    method, strategy, *more = case.split()
    PartialState(cpu=True)
    cpu, rank = torch.device("cpu"), int(os.environ["RANK"])
    share = Share(rank, RANKS, flat=strategy == "zero3", device=cpu, trained=False, storage=torch.bfloat16)
    quantised = {"quantization": "nf4", "device_map": {"": cpu}} if method == "qlora" else {}
    plan = LoadPlan(
        os.environ["MODEL"], torch.bfloat16, torch.bfloat16, **quantised, share=None if strategy == "whole" else share
    )
    where = "off" if "uncached" in more else os.environ["CACHE"]
    read = partial(cached_base, where=where, say=lambda line: None) if quantised else base_model
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.name))
    torch.distributed.barrier()
    began, before = time.perf_counter(), {key: read_so_far(field) for key, field in READ.items()}
    with Peak() as peak, mapped_when_read() as mapped:
        model = read(plan)
        held = take_parts(model).values() if plan.share else list(model.parameters())
        if strategy == "whole":  # a step reads every page
            for parameter in held:
                parameter.detach().view(torch.uint8).flatten().numpy()[::4096].sum()
            mapped.append(mapped_weights())
    took = {"seconds": time.perf_counter() - began, "mapped": max(mapped), "peak": peak.bytes}
    took |= {key: read_so_far(field) - before[key] for key, field in READ.items()}
    return took | {"held": sum(tensor.nbytes for tensor in held)}


def read_so_far(field: str) -> int:
    """Bytes that this process has read, by a name of Linux; pages of mapped files are among those of the disk alone."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())[field])


def mapped_weights() -> int:
    """Bytes of mapped files of weights that this process has touched."""
    mappings = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [re.search(r"\.safetensors\n.*?^Rss:\s*(\d+)", mapping, re.DOTALL | re.MULTILINE) for mapping in mappings]
    return sum(int(size[1]) * 1024 for size in sizes if size)


@contextmanager
def mapped_when_read() -> Iterator[list[int]]:
    """Note `mapped_weights` after each load, when transformers is about to close the files."""
    from transformers import modeling_utils

    notes, load_all = [], modeling_utils.convert_and_load_state_dict_in_model

    def noted(*args: object, **kwargs: object) -> object:
        result = load_all(*args, **kwargs)
        notes.append(mapped_weights())
        return result

    modeling_utils.convert_and_load_state_dict_in_model = noted
    try:
        yield notes
    finally:
        modeling_utils.convert_and_load_state_dict_in_model = load_all


class Peak:
    """Samples this process's own memory in a thread. `bytes`: the most of it, over what it held before."""

    def __enter__(self) -> Peak:
        self.bytes, self.before, self.over = 0, self.own(), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def own(self) -> int:
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")

    def sample(self) -> None:
        while not self.over.wait(0.002):
            self.bytes = max(self.bytes, self.own() - self.before)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


if __name__ == "__main__":
    main()
