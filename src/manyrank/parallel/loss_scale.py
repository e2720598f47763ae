"""The loss scale of fp16: gradients below 6e-8 would be zero there, those above 65504 infinite.

The loss is multiplied before the backward and gradients are divided after it, in powers of two, which round nothing. A
step whose gradients overflow is taken again with half the scale; after WINDOW steps without one it doubles
(Micikevicius et al. 2018, arXiv 1710.03740). torch's GradScaler skips such a step, whose examples would not be learned.
"""

from __future__ import annotations

FIRST, LEAST, WINDOW = 2.0**16, 1.0, 2000


class LossScale:
    """The scale of the next backward, alike on all ranks."""

    def __init__(self, value: float = FIRST, steps: int = 0) -> None:
        self.value, self.steps = value, steps  # steps since the scale changed

    def halve(self) -> bool:
        """Lower the scale after an overflow; return whether there was room to."""
        if self.value <= LEAST:
            return False
        self.value, self.steps = self.value / 2, 0
        return True

    def count(self) -> None:
        """Note a step without an overflow."""
        self.steps += 1
        if self.steps == WINDOW:
            self.value, self.steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "steps": self.steps}
