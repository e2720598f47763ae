"""The type in which a run computes. No torch."""

from __future__ import annotations

from enum import StrEnum

from .gpus import Hardware

# What cuBLAS and FlashAttention read when they start, for full_determinism.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


class Precision(StrEnum):
    """The type of activations and products; the values are accelerate's names of mixed_precision."""

    BF16 = "bf16"
    FP16 = "fp16"  # with a loss scale
    FLOAT32 = "no"

    @property
    def dtype(self) -> str:
        """torch's name of the type."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.value, "float32")

    @property
    def label(self) -> str:
        """The name for people."""
        return "float32" if self is Precision.FLOAT32 else self.value

    @property
    def half(self) -> bool:
        """Whether it has 16 bits."""
        return self is not Precision.FLOAT32

    @property
    def tolerance(self) -> float:
        """The largest difference of losses and gradient norms that differ by rounding alone; bf16 rounds at 4e-3."""
        return 2e-2 if self.half else 1e-5


def find_precision(bf16: bool | str, fp16: bool, machine: Hardware) -> Precision:
    """Decide the recipe's `bf16` (true, false, auto) and `fp16` on this machine."""
    if fp16:
        return Precision.FP16
    return Precision.BF16 if bf16 is True or (bf16 == "auto" and machine.has_bf16) else Precision.FLOAT32
