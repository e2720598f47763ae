"""A step of Llama-3.1-8B (LoRA r 16, 8,192 tokens) and of Qwen2.5-7B (QLoRA) on a stand-in GPU of 80 GB: what can be counted."""

import os
import sys

import counts
import cuda_counters
import pytest

pytestmark = pytest.mark.cuda
CASES = pytest.mark.parametrize("case", cuda_counters.CASES)


@pytest.fixture(scope="module")
def steps() -> dict[str, counts.Counts]:
    """Counts of a step of each case, with the needed FLOP and the planned bytes."""
    return cuda_counters.count_all()


@CASES
def test_the_host_waits_once(case, steps):
    assert steps[case]["waits"] == 1 and steps[case]["refused_launches"] == 0


@pytest.mark.parametrize("case", [cuda_counters.LORA, cuda_counters.QLORA])
def test_products_are_those_that_lora_needs(case, steps):
    """Attention is not among them: its kernel is torch's own."""
    assert 0.85 * steps[case]["needed"] < steps[case]["flop"] < 1.03 * steps[case]["needed"]


@CASES
def test_memory_is_what_was_planned(case, steps):
    step = steps[case]
    assert 0.95 * step["planned"] < step["allocated"] < 1.05 * step["planned"]
    assert step["held"] < 1.05 * step["allocated"]


def test_no_count_moves_by_more_than_5_percent(steps):
    stored = counts.read(cuda_counters.GROUP)["counts"]
    changes = counts.compare(cuda_counters.GROUP, stored, steps)
    print(counts.COLUMNS, *changes, sep="\n")
    moved = [str(change) for change in changes if change.moved]
    assert not moved, "\n".join([counts.COLUMNS, *moved, f"if it should: {cuda_counters.UPDATE}"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_swiglu_is_a_launch_forward_and_one_backward(dtype):
    """NVRTC compiles them here as on a GPU."""
    import torch

    from manyrank.models import fused_mlp

    assert fused_mlp.kernels("cuda") is not fused_mlp.OPERATIONS
    gate, up = (torch.ones(8, 256, device="cuda", dtype=getattr(torch, dtype), requires_grad=True) for _ in range(2))
    dy = torch.ones_like(up)
    cuda_counters.reset()
    y = fused_mlp.silu_mul(gate, up)
    torch.autograd.grad(y, (gate, up), dy)
    assert y.dtype == gate.dtype and cuda_counters.read()["launches"] == 2


@pytest.mark.parametrize("dtype, rotary, launches", [("bfloat16", 64, 2), ("bfloat16", 32, 4), ("float32", 64, 6)])
def test_the_rotary_embedding_is_a_launch_for_queries_and_one_for_keys(dtype, rotary, launches):
    """Of heads that are rotated in part the rest is joined; other types take torch's operations."""
    import torch
    from transformers.models.phi3.modeling_phi3 import Phi3Attention

    from manyrank.models import fused_rope

    assert fused_rope.compiled("cuda")
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    query, key = (
        torch.ones(1, 9, n * 64, **options).view(1, 9, n, 64).transpose(1, 2).requires_grad_() for n in (4, 2)
    )
    angles = torch.ones(1, 9, rotary, **options)
    rotate = fused_rope._fused(Phi3Attention).forward.__globals__[fused_rope.NAME]
    cuda_counters.reset()
    rotated = rotate(query, key, angles, angles)
    assert cuda_counters.read()["launches"] == launches
    torch.autograd.grad(rotated, (query, key), [y.detach() for y in rotated])
    assert cuda_counters.read()["launches"] == 2 * launches
    assert [(y.dtype, y.shape) for y in rotated] == [(x.dtype, x.shape) for x in (query, key)]


def test_lengths_that_vary_do_not_fragment():
    """With torch's default allocator 50.1 GiB held 79.1."""
    import gpu_check
    import own_process

    env = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    argv = [sys.executable, gpu_check.__file__, "--part=varying_lengths"]
    figures = own_process.result(own_process.run(argv, env=env))
    print(figures)
    assert 0 < figures["allocated GiB"] <= figures["held GiB"] < 1.05 * figures["allocated GiB"]
