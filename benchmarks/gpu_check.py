"""The first quarter of an hour on a GPU, what would hurt most first: `make gpu-check`.

    python benchmarks/gpu_check.py [--output FILE] [--only PART,...] [--toy]

Each part runs in a process of its own under its own limit, and its result is in the file (docs/gpu.json) when it ends. A
part that is done is not run again, so that the script can be stopped at any time; --again runs all. --toy tries it at
small sizes on the CPU. `python docs/make_gpu.py` writes docs/gpu.md from the file. Takes torch 2.11 and newer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu

from manyrank.runs.logs import read_metrics
from manyrank.topology.gpus import probe

FILE = Path(__file__).parents[1] / "docs" / "gpu.json"
MARK = "RESULT "
LLAMA = gpu.Case("Llama-3.1-8B", "lora", 2, 4096)
PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "trl",
    "liger-kernel",
    "flash-attn-3",
    "flash-attn-4",
    "datasets",
    "triton",
)
# Query heads, key heads, width of a head, window: of Llama 3, Qwen2.5, Phi 3, Gemma, Mistral, StableLM, wide heads.
HEADS = (
    (32, 8, 128, None),
    (14, 2, 64, None),
    (32, 32, 96, None),
    (8, 4, 256, None),
    (8, 4, 128, 64),
    (8, 8, 80, None),
    (16, 16, 192, None),
)
DOCUMENTS = (1, 700, 3, 64, 1280, 17)  # tokens of each
ROUNDING = 0.02  # of a relative error in bf16, whose steps are 0.004
METHODS = ("lora", "qlora", "int8", "full")
SAME_LOSS = {"lora": 1e-4, "qlora": 2e-2, "int8": 2e-2, "full": 1e-4}  # largest difference between CPU and GPU, float32


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        seconds: its limit. what: what is looked at, as docs/gpu.md says it.
        run: measures and returns a plain dictionary; `toy` as in main.
    """

    name: str
    seconds: int
    what: str
    run: Callable[[bool], dict]


def versions(toy: bool) -> dict:
    import importlib.metadata
    import inspect

    import torch
    from torch.nn.attention.varlen import varlen_attn

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "kernels": torch.cuda.get_arch_list()}
    found["varlen_attn"] = list(inspect.signature(varlen_attn).parameters)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if not toy:
        found["gpu"], found["memory"] = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def attention(toy: bool) -> dict:
    """Packed attention in bf16 against sdpa in float32, a document at a time: relative errors of values and gradients."""
    return {
        f"{heads} heads, {keys} of keys, {width} wide, window {window}": _attention_error(
            heads, keys, width, window, "cpu" if toy else "cuda"
        )
        for heads, keys, width, window in (HEADS[:2] if toy else HEADS)
    }


def _attention_error(heads: int, keys: int, width: int, window: int | None, device: str) -> dict:
    import torch
    import torch.nn.functional as F

    from manyrank.models.attention import packed_attention

    torch.manual_seed(0)
    bounds = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0)], dtype=torch.int32)
    sizes = ((heads, sum(DOCUMENTS), width), (keys, sum(DOCUMENTS), width), (keys, sum(DOCUMENTS), width))
    given = [torch.randn(1, *size, device=device, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    out, _ = packed_attention(
        torch.nn.Module(),
        *given,
        None,
        cu_seq_lens_q=bounds.to(device),
        max_length_q=max(DOCUMENTS),
        scaling=width**-0.5,
        sliding_window=window,
    )
    weights = torch.randn_like(out)
    own = [out, *torch.autograd.grad(out, given, weights)]
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        place = torch.arange(end - start, device=device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < (window or end))
        q, k, v = (tensor[:, :, start:end] for tensor in exact)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != keys))
    reference = torch.cat(parts, 2).transpose(1, 2)
    true = [reference, *torch.autograd.grad(reference, exact, weights.float())]
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(own, true)]
    return {"errors of out, dq, dk, dv": errors, "right": max(errors) < ROUNDING}


def flash(toy: bool) -> dict:
    """FlashAttention 3 or 4, where its package is installed: the heads it takes, and its time beside torch's own kernel's."""
    import torch

    from manyrank.models.flash import Heads, chosen_here, restore, try_out

    found = {"torch's own": {"ms": _milliseconds(toy)}}
    if name := chosen_here():
        found[name] = {}
        for heads, keys, width, window in HEADS:
            why = try_out(name, [Heads(heads // keys, width, width, window)], torch.device("cuda"))
            found[name][f"heads of {width}, window {window}"] = why or "right"
            if not why and (heads, width) == (32, 128):
                found[name]["ms"] = _milliseconds(toy)
            restore()
    return found


def _milliseconds(toy: bool) -> float:
    """Of a layer of Llama 3 forward and backward, over four documents of 2,048 tokens."""
    import torch

    from manyrank.models.attention import packed_attention

    device, length = ("cpu", 64) if toy else ("cuda", 2048)
    bounds = torch.arange(0, 4 * length + 1, length, dtype=torch.int32, device=device)
    given = [torch.randn(1, heads, 4 * length, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8)]
    query, key, value = (tensor.requires_grad_() for tensor in given)
    documents = {"cu_seq_lens_q": bounds, "max_length_q": length}
    synchronize = (lambda: None) if toy else torch.cuda.synchronize
    for repeats in (2, 2 if toy else 20):  # the first ones compile
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            out, _ = packed_attention(torch.nn.Module(), query, key, value, None, **documents)
            torch.autograd.grad(out, given, out.detach())
        synchronize()
    return 1000 * (time.perf_counter() - started) / repeats


def losses(toy: bool) -> dict:
    """Four steps of each method in float32, here and on the CPU of the same machine."""
    found = {}
    for method in METHODS:
        here = _train(f"--method={method}", hidden=toy)
        there = _train(f"--method={method}", hidden=True)
        worst = max(abs(a - b) for a, b in zip(here, there, strict=True))
        found[method] = {"gpu": here, "cpu": there, "difference": worst, "right": worst < SAME_LOSS[method]}
    return found


def _train(*more: str, hidden: bool = False, recipe: str = "verify", launcher: tuple[str, ...] = ()) -> list[float]:
    """The losses of a short training in a process of its own.

    Args:
        hidden: whether it sees no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", *launcher, "manyrank.train", recipe, f"--output_dir={folder}/run"]
        argv += ["--max_steps=4", "--logging_steps=1", "--report_to=none", *more]
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
        return [line["loss"] for line in read_metrics(Path(folder, "run")) if "loss" in line]


def nf4(toy: bool) -> dict:
    """NF4 of this device against that of the CPU, and a product with it against the weights written out."""
    import torch
    from bitsandbytes import functional, matmul_4bit

    device, size = ("cpu", 256) if toy else ("cuda", 4096)
    torch.manual_seed(0)
    weight = torch.randn(size, size, dtype=torch.bfloat16)
    options = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16}
    there, _ = functional.quantize_4bit(weight, **options)
    here, state = functional.quantize_4bit(weight.to(device), **options)
    same = (here.cpu().view(torch.uint8) == there.view(torch.uint8)).float().mean().item()
    x = torch.randn(64, size, dtype=torch.bfloat16, device=device)
    exact = x.float() @ functional.dequantize_4bit(here, state).float().T
    error = ((matmul_4bit(x, here.t(), quant_state=state).float() - exact).norm() / exact.norm()).item()
    return {"equal bytes": same, "error of a product": error, "right": same > 0.999 and error < ROUNDING}


def speed(toy: bool) -> dict:
    return _bench(LLAMA, toy)


def _bench(case: gpu.Case, toy: bool) -> dict:
    """Speed, MFU and peak of a case, in this process."""
    figures = gpu.Bench(case, toy).measure()
    return {
        "case": case.name,
        "tokens a second": figures.tokens_per_second,
        "TFLOP/s": figures.flops_per_second / 1e12,
        "MFU": figures.flops_per_second / figures.product,
        "peak GiB": figures.peak / 2**30,
        "planned GiB": figures.planned / 2**30,
        "losses": figures.losses,
    }


def without_parts(toy: bool) -> dict:
    """The same with peft's own LoRA, with whole logits, with transformers' own MLPs, and with all layers recomputed."""
    changed = ({"plain": ("lora",)}, {"plain": ("lm_head",)}, {"plain": ("mlp",)}, {"checkpointing": "full"})
    return {str(change): _bench(gpu.Case(**asdict(LLAMA) | change), toy) for change in changed}


def qlora(toy: bool) -> dict:
    return _bench(gpu.Case("Qwen2.5-7B", "qlora", 4, 1024), toy)


def fragments(toy: bool) -> dict:
    """Memory that torch holds for what is allocated, over micro-batches of other lengths, by the allocator's setting."""
    found = {}
    for setting in ("expandable_segments:True", ""):
        env = os.environ | {"PYTORCH_ALLOC_CONF": setting}
        argv = [sys.executable, __file__, "--part=varying_lengths", *(["--toy"] if toy else [])]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        found[setting or "default"] = _result(done)
    return found


def varying_lengths(toy: bool) -> dict:
    """Fourteen micro-batches of 5,000 to 8,192 tokens; of `fragments`."""
    import numpy as np
    import torch

    from manyrank.data.loader import side_by_side

    bench, random, seconds, tokens = gpu.Bench(LLAMA, toy), np.random.default_rng(0), [], []
    engine, token_loss = bench.prepared(bench._base())
    for _ in range(2 if toy else 14):
        rows, left = [], int(random.integers(100, 256) if toy else random.integers(5000, 8192))
        tokens.append(left)
        while left > 0:
            length = min(left, int(random.integers(300, 3500)))
            ids = random.integers(1, 500, length)
            labels = np.where(np.arange(length) < 9, -100, ids)
            rows.append({"input_ids": ids, "labels": labels, "source": "random", "row": len(rows)})
            left -= length
        started = bench._now()
        bench.step(engine, token_loss, side_by_side(rows).to(bench.device))
        seconds.append(bench._now() - started)
    memory = (
        {}
        if toy
        else {
            "allocated GiB": torch.cuda.max_memory_allocated() / 2**30,
            "held GiB": torch.cuda.max_memory_reserved() / 2**30,
            "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        }
    )
    return {"tokens a second": sum(tokens[1:]) / sum(seconds[1:]), **memory}


def compiled(toy: bool) -> dict:
    """The same step with compiled layers: its start-up, and its speed afterwards."""
    started = time.perf_counter()
    found = _bench(gpu.Case(**asdict(LLAMA) | {"compiled": True}), toy)
    return found | {"seconds in all": time.perf_counter() - started}


def sharded(toy: bool) -> dict:
    """FSDP2 and ZeRO-3 with one rank, by torchrun: that they run at all, and the losses of one process."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m")
    single, found = _train(hidden=toy), {}
    for strategy in ("fsdp", "zero3"):
        ran = _train(f"--strategy={strategy}", "--ignore_warnings=shards-of-one", hidden=toy, launcher=launcher)
        worst = max(abs(a - b) for a, b in zip(ran, single, strict=True))
        found[strategy] = {"losses": ran, "difference": worst, "right": worst < SAME_LOSS["lora"]}
    return found


def trl(toy: bool) -> dict:
    """trl's SFTTrainer at its best: flash attention over packed rows, Liger's kernels."""
    return _bench(gpu.Case(**asdict(LLAMA) | {"by": "trl"}), toy) | gpu.kernels_of_trl()


PARTS = (
    Part("versions", 60, "versions", versions),
    Part("attention", 90, "attention against float32: values and gradients", attention),
    Part("flash", 120, "FlashAttention 3 or 4, where installed: heads that it takes, time of a layer", flash),
    Part("losses", 300, "losses of every method against the CPU's, in float32", losses),
    Part("nf4", 60, "NF4", nf4),
    Part("speed", 120, "Llama-3.1-8B, LoRA r 16, 2 x 4,096 tokens", speed),
    Part("fragments", 240, "memory held for what is allocated, lengths that vary", fragments),
    Part("compiled", 240, "compiled layers", compiled),
    Part("sharded", 180, "FSDP2 and ZeRO-3 with one rank", sharded),
    Part("qlora", 120, "Qwen2.5-7B, QLoRA, 4 x 1,024 tokens", qlora),
    Part("trl", 180, "trl at its best, the same model and documents", trl),
    Part("without_parts", 400, "without one of manyrank's own parts each", without_parts),
)


def check(file: Path, parts: tuple[Part, ...], *, toy: bool, again: bool) -> int:
    """Run the parts that are not done yet, and write each result at once.

    Returns:
        The exit code: 1 where a part failed, ran out of time or found something wrong.
    """
    known = json.loads(file.read_text()) if file.exists() and not again else {}
    for part in parts:
        if known.get(part.name, {}).get("state") == "done":
            continue
        started = time.monotonic()
        print(f"{part.name} (at most {part.seconds} s): {part.what}", flush=True)
        known[part.name] = _one(part, toy=toy) | {"seconds": round(time.monotonic() - started, 1)}
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(known[part.name], indent=1), flush=True)
    return int(any(_is_wrong(known[part.name]) for part in parts))


def _one(part: Part, *, toy: bool) -> dict:
    argv = [sys.executable, __file__, f"--part={part.name}", *(["--toy"] if toy else [])]
    try:
        return {
            "state": "done",
            "result": _result(subprocess.run(argv, capture_output=True, text=True, timeout=part.seconds)),
        }
    except subprocess.TimeoutExpired:
        return {"state": "out of time"}
    except RuntimeError as error:
        return {"state": "failed", "error": str(error)}


def _result(done: subprocess.CompletedProcess) -> dict:
    printed = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not printed:
        raise RuntimeError("\n".join((done.stderr.strip() or "no message").splitlines()[-6:]))
    return json.loads(printed[-1].removeprefix(MARK))


def _is_wrong(found: dict) -> bool:
    """Whether a result says that something is not right, at any depth, or is none."""
    if "state" in found and found["state"] != "done":
        return True
    inner = [value for value in found.values() if isinstance(value, dict)]
    return found.get("right") is False or any(map(_is_wrong, inner))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    runs = {part.name: part.run for part in PARTS} | {"varying_lengths": varying_lengths}
    parser.add_argument("--output", type=Path, default=FILE, help="the file of results")
    parser.add_argument("--only", help="names of parts, separated by commas")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--toy", action="store_true", help="small sizes on the CPU, to try the script")
    parser.add_argument("--part", choices=runs, help="run this one here, and print JSON")
    options = parser.parse_args(argv)
    if options.part:
        print(MARK + json.dumps(runs[options.part](options.toy)), flush=True)
        return 0
    if not options.toy and not probe().gpus:
        parser.error("there is no GPU here; add --toy to try it on the CPU")
    chosen = options.only.split(",") if options.only else [part.name for part in PARTS]
    if unknown := set(chosen) - {part.name for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(part.name for part in PARTS)}")
    parts = tuple(part for part in PARTS if part.name in chosen)
    return check(options.output, parts, toy=options.toy, again=options.again)


if __name__ == "__main__":
    sys.exit(main())
