"""Optimizers that torch has not as they are needed here. Their state has the keys of torch's: any engine reads and writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Groups = list[dict[str, Any]]


class Lion(torch.optim.Optimizer):
    """Lion, the sign of a momentum (Chen et al. 2023, arXiv 2302.06675): one float32 moment, on any shards."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self._average(parameter)
                    update = average.mul(beta1).add_(parameter.grad, alpha=1 - beta1).sign_()
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                    average.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)

    def _average(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
        state["step"] += 1
        return state["exp_avg"]


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices and its AdamW for the rest, as one optimizer with one state.

    Args:
        matrices, rest: groups of parameters with their weight decay.
        muon, adam: arguments of the two.
    """

    def __init__(self, matrices: Groups, rest: Groups, *, muon: dict[str, Any], adam: dict[str, Any]) -> None:
        parts = [(torch.optim.Muon, matrices, muon), (torch.optim.AdamW, rest, adam)]
        self.parts = [make(groups, **options) for make, groups, options in parts if groups]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        first = 0
        for part in self.parts:  # groups and state are others after a checkpoint was read
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.step()
            first = last
