"""The first quarter of an hour on a GPU, what would hurt most first: `make gpu-check`.

    python benchmarks/gpu_check.py [--output FILE] [--only PART,...] [--toy]

Each part runs in a process of its own under its own limit, and its result is in the file (docs/gpu.json) when it ends. A
part that is done is not run again, so that the script can be stopped at any time, and leaves no process; --again runs all.
The limits of the first nine parts (FIRST) are 14 minutes and 50 s together, those of all 31 minutes. --toy tries it at small
sizes on the CPU. `python docs/make_gpu.py` writes docs/gpu.md from the file. Takes torch 2.11 and newer. NF4 and float8 come
before the losses, which a fault in them would explain; trl is at its best where flash-attn and liger-kernel are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gpu
import own_process
from own_process import each, print_result, train

from manyrank.tools.verify import difference
from manyrank.topology.allocator import EXPANDABLE
from manyrank.topology.gpus import probe

if TYPE_CHECKING:
    import torch

FILE = Path(__file__).parents[1] / "docs" / "gpu.json"
TOY_FILE = Path("output", "gpu-toy.json")
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
# Imported in the first part, since a cold disk takes long for them.
IMPORTED = ("transformers", "peft", "accelerate", "bitsandbytes")
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
NEAR = 0.05  # of the plan, and of what is allocated
ROUNDING = 0.02  # of a relative error in bf16, whose steps are 0.004
METHODS = ("lora", "fp8", "qlora", "int8", "full")
# Largest difference of losses: of GPU and CPU in float32 (fp8: in bf16 and in float32), of bf16 and fp8 from the others.
SAME_LOSS = {"lora": 1e-4, "fp8": 2e-2, "qlora": 2e-2, "int8": 2e-2, "full": 1e-4}
IN_BF16 = "--bf16=auto"
NO_FLOAT8 = {"left out": "these GPUs do not multiply float8"}
INTERRUPTED = 130


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
    import torch
    from torch.nn.attention.varlen import varlen_attn

    started = time.perf_counter()
    figures = {"torch": torch.__version__, "cuda": torch.version.cuda, "kernels": torch.cuda.get_arch_list()}
    figures["varlen_attn"] = list(inspect.signature(varlen_attn).parameters)
    for name in PACKAGES:
        try:
            figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            figures[name] = None
    for name in IMPORTED:
        importlib.import_module(name)
    figures["seconds of imports"] = time.perf_counter() - started
    if not toy:
        figures["gpu"], figures["memory"] = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        figures["compute capability"] = list(torch.cuda.get_device_capability())
        query = ["--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        if program := shutil.which("nvidia-smi"):  # containers may lack it
            figures["driver, clock, power"] = own_process.run([program, *query]).stdout.strip()
    return figures


def attention(toy: bool) -> dict:
    """Packed attention in bf16 against sdpa in float32, a document at a time: relative errors of values and gradients."""
    return each(
        {
            f"{heads} heads, {keys} of keys, {width} wide, window {window}": partial(
                _attention_error, heads, keys, width, window, "cpu" if toy else "cuda"
            )
            for heads, keys, width, window in (HEADS[:2] if toy else HEADS)
        }
    )


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
    errors = [_error(a, b) for a, b in zip(own, true)]
    return {"errors of out, dq, dk, dv": errors, "right": all(error < ROUNDING for error in errors)}


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of a result relative to an exact one in float32."""
    return ((result.float() - exact).norm() / exact.norm()).item()


def flash(toy: bool) -> dict:
    """FlashAttention 3 or 4, where its package is installed: the heads it takes, and its time beside torch's own kernel's."""
    import torch

    from manyrank.models.flash import Heads, chosen_here, restore, try_out

    figures = {"torch's own": {"ms": _milliseconds(toy)}}
    if name := chosen_here():
        figures[name] = {}
        for heads, keys, width, window in HEADS:
            why = try_out(name, [Heads(heads // keys, width, width, window)], torch.device("cuda"))
            figures[name][f"heads of {width}, window {window}"] = why or "right"
            if not why and (heads, width) == (32, 128):
                figures[name]["ms"] = _milliseconds(toy)
            restore()
    return figures


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
    """Four steps of each method in float32, here and on the CPU of the same machine; here in bf16 and float8, too."""
    here: dict[str, list[float]] = {}

    def beside_cpu(method: str) -> dict:
        here[method] = train(f"--method={method}", *([IN_BF16] if method == "fp8" else []), hidden=toy)
        there = train(f"--method={method}", hidden=True)
        return {"gpu": here[method], "cpu": there} | _apart(here[method], there, SAME_LOSS[method])

    def in_bf16() -> dict:
        bf16 = train("--method=lora", IN_BF16, hidden=toy)
        others = {
            f"from {method}": _apart(bf16, here[method], SAME_LOSS["fp8"])
            for method in ("lora", "fp8")
            if method in here
        }
        return {"gpu": bf16} | others

    methods = [method for method in METHODS if method != "fp8" or _has_float8()]
    return each({method: partial(beside_cpu, method) for method in methods} | {"lora in bf16": in_bf16})


def _apart(ones: Sequence[float], others: Sequence[float], limit: float) -> dict:
    worst = difference(ones, others)
    return {"difference": worst, "right": worst < limit}


def _has_float8() -> bool:
    """Whether the GPUs multiply float8; a CPU emulates it."""
    return all(gpu.has_float8 for gpu in probe().gpus)


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
    error = _error(matmul_4bit(x, here.t(), quant_state=state), exact)
    return {"equal bytes": same, "error of a product": error, "right": same > 0.999 and error < ROUNDING}


def float8(toy: bool) -> dict:
    """A layer in float8: its bytes against the CPU's, its products against exact ones of the same bytes and of bf16."""
    import torch

    from manyrank.models.float8 import E4M3, Float8Linear, rows_to_float8

    if not _has_float8():
        return NO_FLOAT8

    def decoded(matrix: torch.Tensor) -> torch.Tensor:
        rows, scale = rows_to_float8(matrix)
        return rows.float() * scale

    device, size = ("cpu", 256) if toy else ("cuda", 4096)
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    here, there = (Float8Linear(linear, torch.device(place)) for place in (device, "cpu"))
    x, dy = (torch.randn(64, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    y = here(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, dy)
    x, weight = x.detach(), linear.weight.detach().to(device).float()
    rows, scale = here.weight.view(E4M3).float(), here.scale
    exact = (decoded(x) @ (rows * scale).T, decoded(dy * scale.T.to(dy.dtype)) @ rows)
    errors = [_error(y, exact[0]), _error(dx, exact[1])]
    same = (here.weight.cpu() == there.weight).float().mean().item()
    return {
        "equal bytes": same,
        "errors of y, dx": errors,
        "from bf16": [_error(y, x.float() @ weight.T), _error(dx, dy.float() @ weight)],
        "right": same > 0.999 and all(error < ROUNDING for error in errors),
    }


def speed(toy: bool) -> dict:
    return _near_plan(_bench(LLAMA, toy), toy)


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


def _near_plan(figures: dict, toy: bool) -> dict:
    """Add whether the peak is that of the plan, which is for GPUs."""
    return figures if toy else figures | {"right": abs(figures["peak GiB"] / figures["planned GiB"] - 1) < NEAR}


def fp8(toy: bool) -> dict:
    """The same on a base in float8, and the losses of both, of the same weights and documents."""
    if not _has_float8():
        return NO_FLOAT8
    in_float8 = replace(LLAMA, method="fp8")
    figures = each({case.method: partial(_bench, case, toy) for case in (LLAMA, in_float8)})
    ones, others = (figures[method].get("losses", []) for method in ("lora", "fp8"))
    return figures | {"losses": _apart(others, ones, SAME_LOSS["fp8"])}


def without_parts(toy: bool) -> dict:
    """The same with peft's own LoRA, with whole logits, with transformers' own MLPs and
    rotary embedding, and with all layers recomputed."""
    changed = [replace(LLAMA, plain=(part,)) for part in ("lora", "lm_head", "mlp", "rope")]
    return each({case.name: partial(_bench, case, toy) for case in (*changed, replace(LLAMA, checkpointing="full"))})


def qlora(toy: bool) -> dict:
    return _near_plan(_bench(gpu.Case("Qwen2.5-7B", "qlora", 4, 1024), toy), toy)


def fragments(toy: bool) -> dict:
    """Memory that torch holds for what is allocated, over micro-batches of other lengths, by the allocator's setting."""
    argv = _argv("varying_lengths", toy=toy)

    def with_setting(setting: str) -> dict:
        return own_process.result(own_process.run(argv, env=os.environ | {"PYTORCH_ALLOC_CONF": setting}))

    figures = each({setting or "default": partial(with_setting, setting) for setting in (EXPANDABLE, "")})
    ours = figures[EXPANDABLE]
    if "held GiB" in ours:
        ours["right"] = ours["held GiB"] < (1 + NEAR) * ours["allocated GiB"]
    return figures


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
    figures = _bench(replace(LLAMA, compiled=True), toy)
    return figures | {"seconds in all": time.perf_counter() - started}


def sharded(toy: bool) -> dict:
    """FSDP2 and ZeRO-3 with one rank, by torchrun: that they run at all, and the losses of one process."""
    single = train(hidden=toy)

    def beside_single(strategy: str) -> dict:
        options = (f"--strategy={strategy}", "--ignore_warnings=shards-of-one")
        ran = train(*options, hidden=toy, launcher=own_process.TORCHRUN)
        return {"losses": ran} | _apart(ran, single, SAME_LOSS["lora"])

    return each({strategy: partial(beside_single, strategy) for strategy in ("fsdp", "zero3")})


def trl(toy: bool) -> dict:
    """trl's SFTTrainer at its best: flash attention over packed rows, Liger's kernels."""
    return _bench(replace(LLAMA, by="trl"), toy) | gpu.kernels_of_trl()


FIRST = (
    Part("versions", 90, "versions", versions),
    Part("attention", 60, "attention against float32: values and gradients", attention),
    Part("nf4", 40, "NF4", nf4),
    Part("float8", 40, "float8", float8),
    Part("losses", 260, "losses of every method against the CPU's in float32, of bf16 and fp8", losses),
    Part("speed", 80, "Llama-3.1-8B, LoRA r 16, 2 x 4,096 tokens", speed),
    Part("fp8", 100, "the same on a base in float8", fp8),
    Part("qlora", 80, "Qwen2.5-7B, QLoRA, 4 x 1,024 tokens", qlora),
    Part("sharded", 140, "FSDP2 and ZeRO-3 with one rank", sharded),
)
PARTS = (
    *FIRST,
    Part("fragments", 160, "memory held for what is allocated, lengths that vary", fragments),
    Part("flash", 120, "FlashAttention 3 or 4, where installed: heads that it takes, time of a layer", flash),
    Part("compiled", 200, "compiled layers", compiled),
    Part(
        "trl",
        180,
        "trl, the same model and documents; at its best where flash-attn and liger-kernel are installed",
        trl,
    ),
    Part("without_parts", 310, "without one of manyrank's own parts each", without_parts),
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
        _write(file, json.dumps(known, indent=1) + "\n")
        print(json.dumps(known[part.name], indent=1), flush=True)
    return int(any(_is_wrong(known[part.name]) for part in parts))


def _write(file: Path, text: str) -> None:
    """Replace a file at once: the script may be stopped here, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(text)
    partial_file.replace(file)


def _one(part: Part, *, toy: bool) -> dict:
    try:
        done = own_process.run(_argv(part.name, toy=toy), seconds=part.seconds)
    except subprocess.TimeoutExpired as error:
        return {
            "state": "out of time",
            "result": own_process.last_result((error.stdout or b"").decode(errors="replace")),
        }
    try:
        figures = own_process.result(done)
    except RuntimeError as error:
        return {"state": "failed", "error": str(error), "result": own_process.last_result(done.stdout)}
    failed = any("error" in case for case in figures.values() if isinstance(case, dict))
    return {"state": "failed" if failed else "done", "result": figures}


def _argv(part: str, *, toy: bool) -> list[str]:
    return [sys.executable, "-X", "faulthandler", __file__, f"--part={part}", *(["--toy"] if toy else [])]


def _is_wrong(figures: dict) -> bool:
    """Whether a result says that something is not right, at any depth, or is none."""
    if "state" in figures and figures["state"] != "done":
        return True
    inner = [value for value in figures.values() if isinstance(value, dict)]
    return figures.get("right") is False or any(map(_is_wrong, inner))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    runs = {part.name: part.run for part in PARTS} | {"varying_lengths": varying_lengths}
    parser.add_argument("--output", type=Path, help=f"the file of results (default: docs/gpu.json; --toy: {TOY_FILE})")
    parser.add_argument("--only", help="names of parts, separated by commas")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--toy", action="store_true", help="small sizes on the CPU, to try the script")
    parser.add_argument("--part", choices=runs, help="run this one here, and print JSON")
    options = parser.parse_args(argv)
    if options.part:
        print_result(runs[options.part](options.toy))
        return 0
    if not options.toy and not probe().gpus:
        parser.error("there is no GPU here; add --toy to try it on the CPU")
    chosen = options.only.split(",") if options.only else [part.name for part in PARTS]
    if unknown := set(chosen) - {part.name for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(part.name for part in PARTS)}")
    parts = tuple(part for part in PARTS if part.name in chosen)
    file = options.output or (TOY_FILE if options.toy else FILE)
    try:
        return check(file, parts, toy=options.toy, again=options.again)
    except KeyboardInterrupt:
        print("stopped; parts that are done are not run again", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
