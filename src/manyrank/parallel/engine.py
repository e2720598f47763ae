"""Engines: a step, and reading and writing full tensors, under each family of strategies.

The trainer speaks to an `Engine` and knows no backend. `Engine` itself is one process or DDP, `FsdpEngine` FSDP2 and
`DeepSpeedEngine` DeepSpeed. Full tensors go by the parameter names of the unwrapped model, so that what one strategy
writes another can read.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import GradientOverflow, NonFiniteGradientError
from ..models.adapters import trainable
from ..models.load import evaluation_mode
from ..models.lora import AdapterCasts
from ..models.reach import count_parameters, shape_of
from ..models.shards import take_parts
from ..topology.precision import Precision
from . import first_look
from .fsdp_preparation import name_layers
from .loss_scale import LossScale
from .zero3_preparation import gather_by_layer, gathered_together, held_whole, partition

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
            group["lr"] = learning_rate

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


class FsdpEngine(Engine):
    """FSDP2: parameters and optimizer state are DTensors."""

    holds_adapters = False

    def _prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        name_layers(self.accelerator.state.fsdp_plugin, model)
        parts = take_parts(model)
        wrapped, optimizer = super()._prepare(model, optimizer)
        self._put_in(model, parts)
        return wrapped, optimizer

    @torch.no_grad()
    def _put_in(self, model: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
        """Give the sharded parameters the parts that this rank has read."""
        frozen = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in parts and parameter.requires_grad:
                parameter.to_local().copy_(parts[name])
            elif name in parts:
                layout = {"shape": parameter.shape, "stride": parameter.stride()}
                mesh, placements = parameter.device_mesh, parameter.placements
                sharded = DTensor.from_local(parts[name], mesh, placements, run_check=False, **layout)
                frozen[name] = sharded.to(parts[name].device)  # which an offloading strategy keeps on the host
        model.load_state_dict(frozen, strict=False, assign=True)
        getattr(model, "get_base_model", lambda: model)().tie_weights()

    @contextlib.contextmanager
    def forward_backward(self, *, last: bool):
        # Between micro-batches FSDP2 would hold whole gradients on every rank: small for adapters, too big for the model.
        # Its gradients are summed in shards, and the shards over copies of the model only in a step's last.
        self.wrapped.set_requires_all_reduce(last)
        with super().forward_backward(last=last or not hasattr(self.model, "peft_config")):
            yield

    def _without_gradient(self, arrived: set[str]) -> list[str]:
        # Gradients are put into the shards past autograd.
        return [name for name, parameter in self.trainable.items() if parameter.grad is None]

    def _full(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def _full_state(self, value) -> torch.Tensor:
        return super()._full_state(value.full_tensor() if isinstance(value, DTensor) else value)

    def reshard(self) -> None:
        for unit in self._units:  # the root, and what it forwards last, keep theirs until a backward
            unit.reshard()
            for group in self._groups(unit):  # by this record FSDP2 gathers ahead in a backward, which has not come
                group._post_forward_indices.clear()
                group.comm_ctx.post_forward_order.clear()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        before = [(unit, self._reshards(unit)) for unit in self._units]
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit, reshards in before:
                unit.set_reshard_after_forward(reshards, recurse=False)
            self.reshard()

    def _reshards(self, unit: FSDPModule) -> bool:
        """Whether a unit gives back after a forward what it gathered: not the root, nor lm_head, which come next again."""
        return unit is not self.wrapped and any(group.post_forward_mesh_info for group in self._groups(unit))

    def _groups(self, unit: FSDPModule) -> list:
        """The parameters of a unit that are gathered together. torch 2.13 has no public getter."""
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        return [group for group in groups if group]

    def full_parameters(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        self.reshard()  # a unit that holds its parameters whole shows them in the type of the computation
        yield from super().full_parameters(names)

    def _whole_bytes(self) -> int:
        element = 2 if self.precision.half else 4
        return sum(p.numel() * min(element, p.element_size()) for p in self.model.parameters())

    @cached_property
    def _units(self) -> list[FSDPModule]:
        return [module for module in self.wrapped.modules() if isinstance(module, FSDPModule)]

    @torch.no_grad()
    def set_parameter(self, name: str, value: torch.Tensor) -> None:
        self.reshard()  # else the next forward would take what was gathered before
        parameter = self.trainable[name]
        parameter.to_local().copy_(self._shard(parameter, value).to_local())

    def _local_state(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._shard(parameter, value) if value.shape == parameter.shape else value

    def _shard(self, parameter: DTensor, value: torch.Tensor) -> DTensor:
        # Every rank has read the same full value, so nothing need be sent.
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def facts(self) -> StrategyInfo:
        (mesh,) = {p.device_mesh for p in self.model.parameters() if isinstance(p, DTensor)}
        return replace(super().facts(), mesh=tuple(mesh.shape))

    def _bytes_here(self, parameter: torch.Tensor) -> int:
        return self._bytes(parameter.to_local() if isinstance(parameter, DTensor) else parameter)


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO: the engine clips, checks and steps; full state goes through its own safe_* functions."""

    keeps_parameters = holds_adapters = False

    def _prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        plugin = self.accelerator.deepspeed_plugin
        if plugin.zero_stage == 3:
            gather_by_layer(plugin, model)
            partition(plugin, model)
        return super()._prepare(model, optimizer)

    def _held(self) -> contextlib.AbstractContextManager[None]:
        return held_whole(self.model)

    def _whole_bytes(self) -> int:
        return sum(self._bytes(p) for p in self.model.parameters() if hasattr(p, "ds_status"))

    @contextlib.contextmanager
    def forward_backward(self, *, last: bool):
        self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        with self._first_look(last=last):
            yield

    @property
    def precision(self) -> Precision:
        if self.wrapped.fp16_enabled():
            return Precision.FP16
        return Precision.BF16 if self.wrapped.bfloat16_enabled() else Precision.FLOAT32

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self.loss_scale:
            self.wrapped.optimizer.loss_scale = self.loss_scale.value  # by which DeepSpeed multiplies, and divides
        self.wrapped.backward(loss)

    def step(
        self, *, learning_rate: float, max_grad_norm: float, sums: torch.Tensor, check: Check = accept
    ) -> list[float]:
        # max_grad_norm is in the DeepSpeed config already; see accelerator._deepspeed_plugin.
        values = sums.tolist()  # before the step, which clips and applies in one
        check(values)
        self._set_learning_rate(learning_rate)
        with gathered_together(self.wrapped.optimizer):
            self.wrapped.step()
        if not self.wrapped.was_step_applied():
            self._lower_scale()
            raise NonFiniteGradientError("the gradient's norm is not finite")
        if self.loss_scale:
            self.loss_scale.count()
        return [*values, float(self.wrapped.get_global_grad_norm())]

    def discard_gradients(self) -> None:
        # The engine has no other door to drop accumulated gradients than a step; at rate 0 it changes no parameter.
        self._set_learning_rate(0.0)
        self.wrapped.step()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.wrapped.optimizer.optimizer

    def _full(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if name in self.trainable:
            return safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.cpu().clone()

    @torch.no_grad()
    def set_parameter(self, name: str, value: torch.Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self.trainable[name]
        value = value.to(self.accelerator.device)
        safe_set_full_fp32_param(parameter, value.float())
        # That sets the master copy only; the next forward reads the working copy.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def optimizer_state(self) -> Iterator[tuple[str, OptimizerState]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps, keys = torch.tensor(float(self.wrapped.global_steps)), self._moments()
        for name, parameter in self.trainable.items():
            moments = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in keys}
            yield name, {"step": steps, **moments}

    def _moments(self) -> list[str]:
        """Names of what the optimizer keeps of each parameter.

        DeepSpeed 0.19.8 links it to the parameters of stages 1 and 2 after the step of the first group, when the others
        have none yet (stage_1_and_2.py, _lazy_init_hp_params_optimizer_state). That can go when all groups are linked.
        """
        if hasattr(self.wrapped.optimizer, "_hp_optimizer_states_linked"):
            self.wrapped.optimizer._hp_optimizer_states_linked = False
            self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()
        state = next(iter(self.optimizer.state.values()), {})
        return [key for key in ("exp_avg", "exp_avg_sq", "momentum_buffer") if state.get(key) is not None]

    def set_optimizer_state(self, states: dict[str, OptimizerState], dry_step: Callable[[], None]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        dry_step()  # DeepSpeed's optimizer makes its state in its first step (KeyError before)
        self.discard_gradients()
        keys = self._moments()
        for name, parameter in self.trainable.items():
            for key in keys:
                value = states[name][key].to(device=self.accelerator.device, dtype=torch.float32)
                safe_set_full_optimizer_state(parameter, value, key)
        steps = next(iter(states.values()))["step"]
        self.wrapped.global_steps = int(steps)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].copy_(steps)
            elif "step" in state:
                state["step"] = int(steps)

    def _bytes(self, parameter: torch.Tensor) -> int:
        return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()

    def _bytes_here(self, parameter: torch.Tensor) -> int:
        shard = getattr(parameter, "ds_tensor", parameter)
        return shard.numel() * shard.element_size()


def _free_bytes(device: torch.device) -> float:
    """Bytes that this rank may still allocate, with a tenth left over."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.9 * (torch.cuda.mem_get_info(device)[0] + cached)
    import psutil

    return 0.9 * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def prepare_engine(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Wrap model and optimizer for the accelerator's strategy."""
    families = {DistributedType.FSDP: FsdpEngine, DistributedType.DEEPSPEED: DeepSpeedEngine}
    return families.get(accelerator.distributed_type, Engine)(accelerator, model, optimizer)
