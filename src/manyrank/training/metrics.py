"""Metrics beside loss and learning rate: rates, MFU, padding, memory, time left."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from ..data.loader import Step
from ..plan import speed
from ..plan.planned_run import PlannedRun
from ..runs.logs import peak_memory
from ..topology import gpus
from ..topology.gpus import GpuKind

FORMER_NAMES = {"slots": "computed_tokens", "squares": "sum_squared_lengths"}


@dataclass
class Window:
    """Sums since the last line of metrics. Counts are over all ranks, `seconds` of whole steps."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    computed_tokens: int = 0
    sum_squared_lengths: int = 0


class Meter:
    """Adds up steps, and makes a line of metrics of them.

    Args:
        planned: what the run comes to; None where it is not known.
        kind: of the GPUs that compute; None on a CPU, and for kinds that are not known: then there is no MFU.
    """

    def __init__(self, device_type: str, planned: PlannedRun | None = None, kind: GpuKind | None = None) -> None:
        self.device_type, self.planned, self.kind = device_type, planned, kind
        self.window = Window()

    def add(self, step: Step, loss: float, seconds: float) -> None:
        """Add a step with its mean loss and its seconds."""
        window = self.window
        window.losses.append(loss)
        window.seconds += seconds
        window.examples += step.examples
        window.tokens += step.tokens
        window.supervised += step.supervised
        window.computed_tokens += step.computed_tokens
        window.sum_squared_lengths += step.sum_squared_lengths

    @property
    def loss(self) -> float:
        """Mean loss of the steps since the last line."""
        return sum(self.window.losses) / len(self.window.losses)

    def rates(self, *, steps_left: int) -> dict[str, float]:
        """Return the rates since the last line, and begin a new window.

        Returns:
            Rates a second over all ranks; `mfu`, the share of the GPUs' rate that went into needed operations, where the
            kind of GPU is known; `padding`, the share of what was computed that is no token of the step; `memory_gib`,
            the most that this process has held since its model was loaded (on a CPU since its start); the seconds of a step, and of those that are left.
        """
        window, self.window = self.window, Window()
        each = window.seconds / len(window.losses)
        return {
            "tokens_per_second": round(window.tokens / window.seconds, 1),
            "supervised_tokens_per_second": round(window.supervised / window.seconds, 1),
            "samples_per_second": round(window.examples / window.seconds, 3),
            **self._mfu(window),
            "padding": round(1 - window.tokens / window.computed_tokens, 4),
            "memory_gib": round(peak_memory(self.device_type) / 2**30, 3),
            "step_seconds": round(each, 4),
            "eta_seconds": round(each * steps_left, 1),
        }

    def _mfu(self, window: Window) -> dict[str, float]:
        if self.planned is None or self.kind is None:
            return {}
        operations = window.tokens * speed.needed(
            self.planned,
            supervised=window.supervised / window.tokens,
            length=window.sum_squared_lengths / window.tokens,
        )
        rate = speed.rate(self.planned, self.kind) * self.planned.world
        return {"mfu": round(operations / window.seconds / rate, 4)}

    def state(self) -> dict:
        """Return the window as JSON values, for a checkpoint."""
        return asdict(self.window)

    def restore(self, state: dict) -> None:
        """Take back what `state` gave, also under the names of older checkpoints."""
        self.window = Window(**{FORMER_NAMES.get(key, key): value for key, value in state.items()})


def kind_of(device: torch.device) -> GpuKind | None:
    """The kind of GPU that a device is; None for a CPU, an unknown kind, or a part of a GPU."""
    if device.type != "cuda":
        return None
    device_facts = torch.cuda.get_device_properties(device)
    return gpus.find_kind(device_facts.name, device_facts.total_memory)
