"""One way to run a recipe, as the plan sees it: model, strategy, processes; what is trained and with how many bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from ..config.schema import TrainConfig
from ..models.spec import Layer, Linear, ModelSpec
from ..rules.context import RunContext
from ..topology.strategies import Strategy

# Experts of these types get adapters under all-linear: peft 0.21 gives them for the names that transformers 4 had, and
# then leaves the dense matrices of those names without (peft/utils/transformers_weight_conversion.py).
ADAPTED_EXPERTS = {
    "mixtral": ("w1", "w2", "w3"),
    **dict.fromkeys(("qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"), ("gate_proj", "down_proj", "up_proj")),
}
OUTSIDE = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")  # modules of the vocabulary's size
SAVED = 4  # bytes of an element of a saved adapter


@dataclass(frozen=True)
class PlannedRun:
    """A recipe on a strategy and a machine, with the shape of its model."""

    context: RunContext
    shape: ModelSpec

    @property
    def config(self) -> TrainConfig:
        return self.context.config

    @property
    def strategy(self) -> Strategy:
        return self.context.strategy

    @property
    def nproc(self) -> int:
        return self.context.nproc

    @property
    def world(self) -> int:
        return self.context.world_size

    @property
    def shards(self) -> int:
        """Processes over which weights and states are spread; hsdp has several copies of them."""
        return self.context.shards

    @cached_property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.context.precision.half

    @property
    def gpu(self) -> bool:
        """Whether the processes compute on GPUs."""
        return bool(self.context.hardware.gpus)

    @property
    def flash(self) -> bool:
        """Whether the GPUs have flash attention: in 16 bits, from Ampere on."""
        return self.gpu and self.half and self.context.hardware.has_bf16

    @property
    def sharded(self) -> bool:
        """Whether no process holds all parameters."""
        return "parameters" in self.strategy.shards

    @property
    def compute(self) -> int:
        """Bytes of an element of what is computed."""
        return 2 if self.half else 4

    @property
    def full(self) -> bool:
        return self.config.method == "full"

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast for each use: full fine-tuning in 16 bits where no strategy casts them."""
        return self.full and self.half and not self.strategy.shards

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.config.micro_batch * self.config.max_length

    @property
    def checkpointed(self) -> int:
        """Layers whose activations are recomputed."""
        wanted = self.config.gradient_checkpointing
        return wanted if isinstance(wanted, int) else self.shape.depth if wanted == "full" else 0

    def with_options(self, **values) -> PlannedRun:
        """The same with other values in the recipe."""
        return replace(self, context=self.context.with_options(**values))

    def on(self, strategy: Strategy) -> PlannedRun:
        """The same on another strategy."""
        return replace(self, context=self.context.on(strategy))

    # What is trained

    def adapted(self, layer: Layer) -> dict[str, Linear]:
        """The matrices of a layer that have adapters."""
        targets = self.config.lora_target_modules
        if self.full:
            return {}
        taken = ADAPTED_EXPERTS.get(self.shape.model_type, ()) if self._sparse else ()
        return {
            name: linear
            for name, linear in layer.linears.items()
            if name not in taken
            and (targets == "all-linear" or _named(name, targets))
            and not _matched(name, self.config.exclude_modules)
        }

    def rank(self, name: str) -> int:
        """The rank of the adapters of a matrix; a pattern for some layers counts for all."""
        pattern = _matched(name, self.config.rank_pattern)
        return self.config.rank_pattern[pattern] if pattern else self.config.lora_r

    def adapted_experts(self, layer: Layer) -> bool:
        names = ADAPTED_EXPERTS.get(self.shape.model_type)
        if self.full or not layer.experts or not names:
            return False
        targets = self.config.lora_target_modules
        return targets == "all-linear" or any(name in targets for name in names)

    @cached_property
    def _sparse(self) -> bool:
        return any(layer.experts for layer in self.shape.layers)

    def expert_adapters(self, layer: Layer) -> list[int]:
        """Elements of each adapter tensor of a layer's experts and of its router."""
        rank, hidden, experts = self.config.lora_r, self.shape.hidden, layer.experts
        if experts is None or not self.adapted_experts(layer):
            return []
        all_of_them = experts.number * rank
        # Gate and up are one tensor, with adapters of twice the rank.
        sizes = [2 * all_of_them * hidden, 4 * all_of_them * experts.intermediate]
        sizes += [all_of_them * experts.intermediate, all_of_them * hidden]
        return sizes + (
            [rank * hidden, rank * experts.number] if self.config.lora_target_modules == "all-linear" else []
        )

    def matrices(self, layer: Layer) -> list[int]:
        """Elements of each matrix A and B of one layer."""
        adapted = self.adapted(layer).items()
        plain = [(self.rank(name) * linear.inputs, self.rank(name) * linear.outputs) for name, linear in adapted]
        return [*chain.from_iterable(plain), *self.expert_adapters(layer)]

    def adapters(self, layer: Layer) -> list[int]:
        """Elements of each trained tensor of one layer."""
        beside = self.config.use_dora + self.config.lora_bias  # magnitudes, and biases
        vectors = [linear.outputs for linear in self.adapted(layer).values()] * beside
        whole = [linear.weights for name, linear in layer.linears.items() if name in self.config.modules_to_save]
        return [*self.matrices(layer), *vectors, *whole]

    @cached_property
    def tensors(self) -> list[tuple[float, int]]:
        """Numbers of trained tensors beside a frozen base, and the elements of each."""
        chosen = len(self.config.layers_to_transform) / self.shape.depth if self.config.layers_to_transform else 1
        inner = [(chosen * layer.count, size) for layer in self.shape.layers for size in self.adapters(layer)]
        ids = self.config.trainable_token_indices
        rows = sum(map(len, ids.values())) if isinstance(ids, dict) else len(ids)
        whole = sum(name.rpartition(".")[2] in OUTSIDE for name in self.config.modules_to_save)
        outside = [(whole, self.shape.embedding), (1, rows * self.shape.hidden)]
        return inner + [(count, size) for count, size in outside if count * size]

    @cached_property
    def frozen_adapters(self) -> int:
        """Elements of a frozen adapter below the trained one, see `models.frozen_adapter`."""
        if self.config.new_adapter and self.config.adapter:
            return self.context.adapter_bytes // SAVED
        if self.full or not self.config.init_lora_weights.startswith(("pissa", "olora")):
            return 0
        return sum(layer.count * sum(self.matrices(layer)) for layer in self.shape.layers)

    @cached_property
    def active_adapters(self) -> int:
        """Elements of the adapters that multiply a token: of the experts only those that it takes."""
        idle = 0.0
        for layer in self.shape.layers:
            if layer.experts:
                part = 1 - layer.experts.per_token / layer.experts.number
                idle += layer.count * part * sum(self.expert_adapters(layer))
        return int(self.trainable - idle)

    @cached_property
    def trainable(self) -> int:
        """Elements that are learned."""
        if self.full:
            return self.shape.parameters
        return int(sum(count * size for count, size in self.tensors))


def _matched(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern whose last part fits the name of a matrix."""
    return next((pattern for pattern in patterns if re.fullmatch(pattern.rpartition(".")[2], name)), None)


def _named(name: str, targets: list[str]) -> bool:
    return any(name == target.rsplit(".", 1)[-1] for target in targets)
