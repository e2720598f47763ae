"""Rules about how numbers are computed: TF32, and algorithms that give the same bits."""

from __future__ import annotations

from .context import RunContext
from .rule import error, unless, warning


def _tf32(s: RunContext) -> str | None:
    if not s.config.tf32:
        return None
    if not s.gpus:
        return "tf32 on a machine without GPUs"
    old = next((gpu for gpu in s.hardware.gpus if not gpu.has_tf32), None)
    return f"tf32, and {old.name} has compute capability {'.'.join(map(str, old.compute_capability))}" if old else None


NUMERICS_RULES = (
    error(
        "tf32-without-units",
        ("tf32",),
        _tf32,
        reason="GPUs from Ampere on (compute capability 8.0) multiply in TF32, and nothing else does.",
        fix="leave tf32 out: products in float32 are exact then",
    ),
    warning(
        "tf32-in-16-bits",
        ("tf32",),
        unless(
            lambda s: bool(s.config.tf32 and s.gpus and s.precision.half),
            "tf32 in a run that computes in {s.precision.label}",
        ),
        reason="All products of the model are in 16 bits: none is left for TF32.",
        fix="leave tf32 out, or write bf16: false",
    ),
    error(
        "generation-that-differs",
        ("full_determinism", "use_vllm"),
        unless(
            lambda s: s.config.full_determinism and s.config.is_grpo and s.config.use_vllm != "off",
            "full_determinism with use_vllm {c.use_vllm}",
        ),
        reason="vLLM batches what it generates by the time at which requests come, and rounds by the batch.",
        fix="leave one of them out",
    ),
)
