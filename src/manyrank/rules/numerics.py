"""Rules about how numbers are computed: TF32, algorithms that give the same bits, and kernels of the attention."""

from __future__ import annotations

import importlib.metadata

from .context import RunContext
from .rule import error, unless, warning

WIDEST_HEAD = 256  # of flash attention


def _tf32(s: RunContext) -> str | None:
    if not s.config.tf32:
        return None
    if not s.gpus:
        return "tf32 on a machine without GPUs"
    old = next((gpu for gpu in s.hardware.gpus if not gpu.has_tf32), None)
    return f"tf32, and {old.name} has compute capability {'.'.join(map(str, old.compute_capability))}" if old else None


def _flash(s: RunContext) -> str | None:
    choice, gpus = str(s.config.attn_implementation), s.hardware.gpus
    if not choice.startswith("flash_attention"):
        return None
    hopper = choice == "flash_attention_3"
    reasons = {
        "packing: none": s.config.packing == "none",
        "no GPU": not gpus,
        s.precision.label: not s.precision.half,
        "a GPU before Ampere": any(gpu.compute_capability < (8, 0) for gpu in gpus),
        "a GPU that is no Hopper": hopper and any(gpu.compute_capability[0] != 9 for gpu in gpus),
        "no package flash-attn-3": hopper and not any(gpu.planned for gpu in gpus) and not _has("flash-attn-3"),
        "full_determinism": hopper and s.config.full_determinism,
    }
    text = ", ".join(reason for reason, holds in reasons.items() if holds)
    return f"{choice} with {text}" if text else None


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _of_the_model(s: RunContext) -> str | None:
    choice = str(s.config.attn_implementation)
    if s.model is None or not (choice == "sdpa" or choice.startswith("flash_attention")):
        return None
    more = ["attention sinks"] if s.model.model_type == "gpt_oss" else []
    more += ["soft-caps"] if s.model.config.get("attn_logit_softcapping") else []
    if choice != "sdpa":
        widths = s.model.head_widths
        more += ["dropout"] if s.model.config.get("attention_dropout") or s.model.config.get("attn_pdrop") else []
        more += [f"heads of {width}" for width in sorted(set(widths)) if width % 8 or width > WIDEST_HEAD]
        more += ["values as wide as no query"] if len(set(widths[:2])) > 1 else []
    return f"{choice} with {', '.join(more)} of {s.model.name}" if more else None


NUMERICS_RULES = (
    error(
        "flash-attention-here",
        ("attn_implementation", "packing"),
        _flash,
        reason="Flash attention takes packed documents in 16 bits, on GPUs from Ampere on; the third is of Hopper and a package of its own, "
        "and adds gradients in no fixed order. Padded rows attend by sdpa.",
        fix="leave attn_implementation out, or write sdpa",
    ),
    error(
        "attention-of-the-model",
        ("attn_implementation", "model:config.json"),
        _of_the_model,
        reason="That kernel computes another attention than this model has.",
        fix="leave attn_implementation out, or write eager",
    ),
    error(
        "flex-attention",
        ("attn_implementation",),
        unless(lambda s: s.config.attn_implementation == "flex_attention", "attn_implementation flex_attention"),
        reason="It is compiled for each length, and packs differ in theirs; flash attention holds documents apart without that.",
        fix="leave attn_implementation out",
    ),
    error(
        "two-attentions",
        ("attn_implementation", "disable_fused"),
        unless(
            lambda s: bool(s.config.attn_implementation) and "attention" in s.config.disable_fused,
            "attn_implementation {c.attn_implementation} with attention in disable_fused",
        ),
        reason="Both choose a kernel of the attention.",
        fix="leave one of them out",
    ),
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
