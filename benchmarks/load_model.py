"""Time, memory and bytes of loading a base on two processes: whole, in shards, and from the cache of a quantised base.

    python benchmarks/load_model.py [--layers 16] [--folder FOLDER]

The model has the widths of Llama-3.2-1B and random weights in bf16. Before each load the files leave the page cache. Two processes load at the same time, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

RANKS = 2
CASES = ("lora whole", "lora fsdp", "lora zero3", "qlora whole", "qlora fsdp", "qlora fsdp again", "qlora zero3 again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="keep the model and the cache here")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return measure(args.folder)
    with tempfile.TemporaryDirectory() as own:
        folder = args.folder or Path(own)
        make(folder / "model", args.layers)
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"{size / 2**30:.2f} GiB of weights, {RANKS} processes; of each process:\n")
        print(
            "| load | seconds | GiB of files touched | peak GiB of its own memory | GiB held |\n|---|---|---|---|---|"
        )
        for case in CASES:
            for file in folder.glob("*/*.safetensors"):
                forget(file)
            ranks = [start(folder, case, rank) for rank in range(RANKS)]
            found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
            worst = {key: max(rank[key] for rank in found) for key in found[0]}
            print("| {} | {seconds:.1f} | {files:.2f} | {own:.2f} | {held:.2f} |".format(case, **worst), flush=True)


def start(folder: Path, case: str, rank: int) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511, "OMP_NUM_THREADS": 1, "CASE": case, "TQDM_DISABLE": 1}
    environment = os.environ | {key: str(value) for key, value in place.items()}
    return subprocess.Popen([sys.executable, __file__, "--folder", folder], stdout=subprocess.PIPE, env=environment)


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(folder: Path, layers: int) -> None:
    """Write a model of random weights, tensor by tensor alike."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def measure(folder: Path) -> None:
    """Load as CASE says, on this rank, and print what it took as JSON."""
    import torch
    from accelerate import PartialState

    from manyrank.models.load import LoadPlan, base_model
    from manyrank.models.quantised_cache import cached_base
    from manyrank.models.shards import Share, take_parts

    method, strategy, *_ = os.environ["CASE"].split()
    PartialState(cpu=True)
    cpu, rank = torch.device("cpu"), int(os.environ["RANK"])
    share = Share(rank, RANKS, flat=strategy == "zero3", device=cpu, trained=False, storage=torch.bfloat16)
    quantised = {"quantization": "nf4", "device_map": {"": cpu}} if method == "qlora" else {}
    plan = LoadPlan(
        str(folder / "model"), torch.bfloat16, torch.bfloat16, **quantised, share=None if strategy == "whole" else share
    )
    read = partial(cached_base, where=str(folder), say=lambda line: None) if quantised else base_model
    torch.distributed.barrier()
    before, began = resident(), time.perf_counter()
    with Peak() as peak:
        model = read(plan)
        held = take_parts(model).values() if plan.share else list(model.parameters())
        if strategy == "whole":  # a step reads every page
            for parameter in held:
                parameter.detach().view(torch.uint8).flatten().numpy()[::4096].sum()
    found = {"seconds": time.perf_counter() - began, "held": sum(tensor.nbytes for tensor in held) / 2**30}
    print(json.dumps(found | {key: (peak.bytes[key] - before[key]) / 2**30 for key in before}))


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
