"""The engine: a step, and reading and writing full tensors, under each family of strategies.

The trainer speaks to an `Engine` and knows no backend. `Engine` itself is one process or DDP; `sharded_engines` has those of
FSDP2 and DeepSpeed. Full tensors go by the parameter names of the unwrapped model, so that what one strategy
writes another can read.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import GradientOverflow, NonFiniteGradientError
from ..models.adapters import trainable
from ..models.load import evaluation_mode
from ..models.lora import AdapterCasts
from ..models.reach import count_parameters, shape_of
from ..topology.precision import Precision
from . import first_look
from .loss_scale import LossScale

OptimizerState = dict[str, torch.Tensor]
Check = Callable[[list[float]], None]


def accept(sums: list[float]) -> None:
    """Take a step whatever its sums are."""


@dataclass(frozen=True)
class StrategyInfo:
    """The active strategy: written to the run folder, and asserted by `manyrank verify`."""

    distributed_type: str
    wrapper: str
    world_size: int
    precision: str
    base_bytes: int  # of the frozen and trained base weights, over the whole model
    base_bytes_here: tuple[int, ...]  # the part that each rank holds
    trainable_tensors: int
    parameters: int  # of the whole model, adapters included
    trained_parameters: int
    mesh: tuple[int, ...] = ()  # of FSDP: (shards,), or (copies, shards of each)

    def as_dict(self) -> dict:
        return asdict(self)


class Engine:
    """One prepared model and optimizer: run steps, read and write full state. Single process or DDP."""

    keeps_parameters = True  # the optimizer works on the model's own parameters
    holds_adapters = True  # whole and in float32, on each rank

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.model = accelerator, model  # every strategy changes the model in place or wraps it
        self.wrapped, self.prepared_optimizer = self._prepare(model, optimizer)
        self.wrapped.train()  # models load in evaluation mode, without dropout
        self.trainable = trainable(self.model)
        held = [p for group in self.prepared_optimizer.param_groups for p in group["params"]]
        if self.keeps_parameters and sorted(map(id, held)) != sorted(map(id, self.trainable.values())):
            raise RuntimeError("the optimizer does not hold each trained parameter once")
        self.gradients = first_look.Arrivals(self.trainable)  # in the first backward that exchanges them
        self.loss_scale = LossScale() if self.precision is Precision.FP16 else None
        casts = self.holds_adapters and self.precision.half
        self.adapter_casts = AdapterCasts(self.model, getattr(torch, self.precision.dtype)) if casts else None

    def _prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        return self.accelerator.prepare(model, optimizer)

    @property
    def precision(self) -> Precision:
        return Precision(self.accelerator.mixed_precision)

    # A step

    @contextlib.contextmanager
    def forward_backward(self, *, last: bool):
        """Around the forward and backward of one micro-batch; gradients are exchanged only in a step's last."""
        no_exchange = contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        casts = self.adapter_casts.used(last=last) if self.adapter_casts else contextlib.nullcontext()
        with no_exchange, self._first_look(last=last), casts:
            yield

    @contextlib.contextmanager
    def _first_look(self, *, last: bool):
        """Around the first backward that exchanges gradients: say what gets none; a UserError where ddp waits for it."""
        if not last or self.gradients is None:
            yield
            return
        arrivals, self.gradients = self.gradients, None
        with arrivals.noted():
            yield
        waits = isinstance(self.wrapped, DistributedDataParallel)
        note = first_look.look(self._without_gradient(arrivals.names), self.trainable, waits=waits)
        if note and self.accelerator.is_main_process:
            print(note, flush=True)

    def _without_gradient(self, arrived: set[str]) -> list[str]:
        """Names of the trained parameters to which that backward has brought no gradient on this rank."""
        return [name for name in self.trainable if name not in arrived]

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.accelerator.backward(loss * self.loss_scale.value if self.loss_scale else loss)

    def step(
        self, *, learning_rate: float, max_grad_norm: float, sums: torch.Tensor, check: Check = accept
    ) -> list[float]:
        """Clip, check and apply the gradients. The device is waited for once: to read the sums and the norm together.

        Args:
            sums: (n,), of the step over all ranks, still on the device.
            check: looks at their values before any parameter changes, and raises where the step is not to be taken.

        Returns:
            The values of the sums, and behind them the norm of the whole gradient before clipping.

        Raises:
            NonFiniteGradientError: the norm is not finite; no parameter has changed.
            GradientOverflow: the same, where a lower loss scale may help.
        """
        if self.loss_scale:
            torch._foreach_mul_(
                [p.grad for p in self.trainable.values() if p.grad is not None], 1 / self.loss_scale.value
            )
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), max_grad_norm or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        *values, norm = torch.cat([sums, norm.to(sums).reshape(1)]).tolist()
        check(values)
        if not math.isfinite(norm):
            self._lower_scale()
            raise NonFiniteGradientError(f"the gradient's norm is {norm}")
        self._set_learning_rate(learning_rate)
        self.prepared_optimizer.step()
        if self.loss_scale:
            self.loss_scale.count()
        self.prepared_optimizer.zero_grad()
        return [*values, norm]

    def _lower_scale(self) -> None:
        """After gradients that are not finite: under fp16 forget them and lower the scale, and raise a GradientOverflow."""
        if self.loss_scale and self.loss_scale.halve():
            self.prepared_optimizer.zero_grad()
            raise GradientOverflow

    def discard_gradients(self) -> None:
        self.prepared_optimizer.zero_grad()

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic, out of its wrappers."""
        return self.prepared_optimizer.optimizer

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks."""
        return self.accelerator.reduce(values, "sum")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around forwards without a backward, without dropout; afterwards no rank holds what they gathered."""
        with evaluation_mode(self.wrapped):
            yield
        self.reshard()

    def reshard(self) -> None:
        """After a forward without a backward: give back what it gathered."""

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Hold the whole model on each rank, which may then forward by itself. (Under ZeRO-3 trl sees to it.)"""
        yield

    @contextlib.contextmanager
    def generating(self) -> Iterator[bool]:
        """Hold the whole model while it generates, where each rank has room for it. All ranks together.

        Yields whether it is held; else each token gathers each layer.
        """
        crowded = float(self._whole_bytes() > _free_bytes(self.accelerator.device))
        held = self.sum(torch.tensor(crowded, device=self.accelerator.device)).item() == 0
        with self._held() if held else contextlib.nullcontext():
            yield held

    def _held(self) -> contextlib.AbstractContextManager[None]:
        return self.whole()

    def _whole_bytes(self) -> int:
        """Bytes that a rank holds more than now, at most, with the whole model."""
        return 0

    # Full state

    def full_parameters(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, full tensor on the CPU), all ranks together; trained ones in the precision of the optimizer."""
        parameters = dict(self.model.named_parameters())
        for name in names:
            yield name, self._full(name, parameters[name]).detach().cpu()

    def _full(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return parameter

    @torch.no_grad()
    def set_parameter(self, name: str, value: torch.Tensor) -> None:
        """Overwrite one trained parameter from its full value, all ranks together."""
        self.trainable[name].copy_(value)

    def optimizer_state(self) -> Iterator[tuple[str, OptimizerState]]:
        """Yield each trained parameter's (name, optimizer state in full, on the CPU), all ranks together."""
        for name, parameter in self.trainable.items():
            state = self.optimizer.state.get(parameter, {})
            yield name, {key: self._full_state(value) for key, value in state.items()}

    def _full_state(self, value) -> torch.Tensor:
        return torch.as_tensor(value).detach().cpu()

    def set_optimizer_state(self, states: dict[str, OptimizerState], dry_step: Callable[[], None]) -> None:
        """Overwrite the optimizer's state from what `optimizer_state` gave, on any strategy.

        Args:
            states: for each trained parameter its state in full.
            dry_step: forward and backward of a loss that is zero, for optimizers that make their state in a step.
        """
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {id(parameter): name for name, parameter in self.trainable.items()}
        state = {
            index: {key: self._local_state(parameter, value) for key, value in states[names[id(parameter)]].items()}
            for index, parameter in enumerate(order)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _local_state(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.to(parameter.device) if value.ndim else value

    # Facts

    def facts(self) -> StrategyInfo:
        base = [p for name, p in self.model.named_parameters() if ".lora_" not in name]
        here = torch.tensor([sum(self._bytes_here(p) for p in base)], device=self.accelerator.device)
        return StrategyInfo(
            distributed_type=self.accelerator.distributed_type.value,
            wrapper=type(self.wrapped).__name__,
            world_size=self.accelerator.num_processes,
            precision=self.precision.value,
            base_bytes=sum(self._bytes(p) for p in base),
            base_bytes_here=tuple(self.accelerator.gather(here).tolist()),
            trainable_tensors=len(self.trainable),
            parameters=count_parameters(self.model),
            trained_parameters=sum(math.prod(shape_of(p)) for p in self.trainable.values()),
        )

    def _bytes(self, parameter: torch.Tensor) -> int:
        return parameter.numel() * parameter.element_size()

    def _bytes_here(self, parameter: torch.Tensor) -> int:
        return self._bytes(parameter)


def _free_bytes(device: torch.device) -> float:
    """Bytes that this rank may still allocate, with a tenth left over."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.9 * (torch.cuda.mem_get_info(device)[0] + cached)
    import psutil

    return 0.9 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
