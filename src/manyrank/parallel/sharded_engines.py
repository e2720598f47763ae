"""Engines of the strategies that shard: FSDP2, and DeepSpeed ZeRO. Each writes and reads full tensors as `engine` says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import NonFiniteGradientError
from ..models.adapters import trainable
from ..models.shards import take_parts
from ..topology.precision import Precision
from .engine import Check, Engine, OptimizerState, StrategyInfo, accept
from .fsdp_preparation import kept_in_bf16, name_layers, plain_embeddings
from .zero3_preparation import gather_by_layer, gathered_together, held_whole, partition


class FsdpEngine(Engine):
    """FSDP2: parameters and optimizer state are DTensors."""

    holds_adapters = False

    def _prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        name_layers(self.accelerator.state.fsdp_plugin, model)
        parts = take_parts(model)
        with plain_embeddings(model), kept_in_bf16(self.accelerator, model):
            wrapped, optimizer = super()._prepare(model, optimizer)
        self._put_in(model, parts)
        return wrapped, optimizer

    @torch.no_grad()
    def _put_in(self, model: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
        """Give the sharded parameters the parts that this rank has read."""
        frozen, shared = {}, {}
        home = next(iter(trainable(model).values())).device  # the host where a strategy offloads
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
            if name in parts and parameter.requires_grad:
                parameter.to_local().copy_(parts[name])
            elif name in parts:
                layout = {"shape": parameter.shape, "stride": parameter.stride()}
                mesh, placements = parameter.device_mesh, parameter.placements
                sharded = DTensor.from_local(parts[name], mesh, placements, run_check=False, **layout)
                frozen[name] = sharded.to(home)
        model.load_state_dict(frozen, strict=False, assign=True)
        for first, *others in shared.values():  # that gives each module a parameter of its own
            for name in others:
                path, _, own = name.rpartition(".")
                setattr(model.get_submodule(path), own, model.get_parameter(first))

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

    def full_parameters(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        if any(name not in self.trainable for name in names):
            self.reshard()
        yield from super().full_parameters(names)

    def reshard(self) -> None:
        if (
            self.accelerator.deepspeed_plugin.zero_stage == 3
        ):  # what a forward alone has fetched ahead cannot be gathered again
            self.wrapped.empty_partition_cache()

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

        taken = self.wrapped.global_steps - self.wrapped.skipped_steps  # an overflow is a step of DeepSpeed, too
        steps, keys = torch.tensor(float(taken)), self._moments()
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
        steps = next(iter(states.values())).get("step", torch.tensor(0.0))  # SGD of other engines counts none
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


def prepare_engine(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Wrap model and optimizer for the accelerator's strategy."""
    families = {DistributedType.FSDP: FsdpEngine, DistributedType.DEEPSPEED: DeepSpeedEngine}
    return families.get(accelerator.distributed_type, Engine)(accelerator, model, optimizer)
