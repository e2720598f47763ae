"""One way to run a recipe, as the plan sees it: model, strategy, processes; what is trained and with how many bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from ..config.peft_config import token_ids
from ..config.schema import TrainConfig
from ..models.spec import Layer, Linear, ModelSpec
from ..rules.adapters import EMBEDDINGS
from ..rules.context import RunContext
from ..rules.model import ADAPTED_EXPERTS
from ..topology.strategies import Strategy

ATTENTION = ("q_", "k_", "v_", "o_", "qkv_", "kv_")  # the beginnings of names of its matrices
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

    def adapted(self, layer: Layer, number: int | None = None) -> dict[str, Linear]:
        """The matrices of a layer that have adapters.

        Args:
            number: of the layer; None: patterns that name layers by number do not count.
        """
        config, targets = self.config, self.config.lora_target_modules
        chosen = number is None or not config.layers_to_transform or number in config.layers_to_transform
        if self.full or not chosen:
            return {}
        taken = ADAPTED_EXPERTS.get(self.shape.model_type, ()) if self._sparse else ()
        return {
            name: linear
            for name, linear in layer.linears.items()
            if name not in taken
            and (targets == "all-linear" or _matched(name, targets, number))
            and not _matched(name, [*config.exclude_modules, *config.modules_to_save], number, below=True)
        }

    def rank(self, name: str, number: int | None = None) -> int:
        """The rank of the adapters of a matrix."""
        pattern = _matched(name, self.config.rank_pattern, number)
        return self.config.rank_pattern[pattern] if pattern else self.config.lora_r

    def adapted_experts(self, layer: Layer) -> bool:
        names = ADAPTED_EXPERTS.get(self.shape.model_type)
        if self.full or not layer.experts or not names:
            return False
        targets = self.config.lora_target_modules
        if targets == "all-linear":  # which is a list of linear layers where layers are chosen
            return not self.config.layers_to_transform
        return any(name in targets for name in names)

    @cached_property
    def _sparse(self) -> bool:
        return any(layer.experts for layer in self.shape.layers)

    def expert_adapters(self, layer: Layer) -> list[int]:
        """Elements of each adapter tensor of a layer's experts and of its router."""
        rank, hidden, experts = self.config.lora_r, self.shape.hidden, layer.experts
        if experts is None or self.full:
            return []
        all_of_them = experts.number * rank
        named = {name.rpartition(".")[2] for name in self.config.target_parameters}
        both = self.adapted_experts(layer)
        gate_up = [all_of_them * hidden, 2 * all_of_them * experts.intermediate]
        # Gate and up are one tensor; by the names of both, its adapters have twice the rank.
        sizes = [2 * size for size in gate_up] if both else gate_up if "gate_up_proj" in named else []
        sizes += [all_of_them * experts.intermediate, all_of_them * hidden] if both or "down_proj" in named else []
        return sizes + (
            [rank * hidden, rank * experts.number] if both and self.config.lora_target_modules == "all-linear" else []
        )

    def matrices(self, layer: Layer, number: int | None = None) -> list[int]:
        """Elements of each matrix A and B of one layer; see `adapted`."""
        ranks = {name: self.rank(name, number) for name in layer.linears}
        adapted = self.adapted(layer, number).items()
        plain = [(ranks[name] * linear.inputs, ranks[name] * linear.outputs) for name, linear in adapted]
        return [*chain.from_iterable(plain), *self.expert_adapters(layer)]

    def adapters(self, layer: Layer, number: int | None = None) -> list[int]:
        """Elements of each trained tensor of one layer, norms left out; see `adapted`."""
        vectors = [linear.outputs for linear in self.adapted(layer, number).values()] * self._beside
        saved = self.config.modules_to_save
        whole = [linear.parameters for name, linear in layer.linears.items() if _matched(name, saved, number)]
        return [*self.matrices(layer, number), *vectors, *whole]

    @property
    def _beside(self) -> int:
        """Trained vectors of a matrix with adapters: magnitudes, and biases."""
        return self.config.use_dora + self.config.lora_bias

    def _numbered(self) -> Iterator[tuple[int, Layer, int | None]]:
        """Kinds of layers with their counts; where the recipe may tell layers apart, each of them with its number."""
        config, targets = self.config, self.config.lora_target_modules
        patterns = [*config.rank_pattern, *config.exclude_modules, *config.modules_to_save]
        if patterns or config.layers_to_transform or targets != "all-linear":
            yield from ((1, layer, number) for number, layer in enumerate(self.shape.each()))
        else:
            yield from ((layer.count, layer, None) for layer in self.shape.layers)

    @cached_property
    def tensors(self) -> list[tuple[float, int]]:
        """Numbers of trained tensors beside a frozen base, and the elements of each."""
        inner = [(count, size) for count, layer, number in self._numbered() for size in self.adapters(layer, number)]
        rows = len(token_ids(self.config.trainable_token_indices))
        whole = sum(name.rpartition(".")[2] in EMBEDDINGS for name in self.config.modules_to_save)
        outside: list[tuple[float, int]] = [(whole, self.shape.embedding), (1, rows * self.shape.hidden)]
        return inner + [(count, size) for count, size in (*outside, *self._adapters_outside()) if count * size]

    def _adapters_outside(self) -> list[tuple[int, int]]:
        """Numbers and elements of the trained tensors on embeddings and lm_head."""
        targets = self.config.lora_target_modules
        names = [] if targets == "all-linear" else [name for name in targets if name.rpartition(".")[2] in EMBEDDINGS]
        sizes = [self.rank(name) * width for name in names for width in (self.shape.hidden, self.shape.vocabulary)]
        return [(1, size) for size in sizes] + [(self._beside * len(names), self.shape.vocabulary)]

    @cached_property
    def frozen_adapters(self) -> int:
        """Elements of a frozen adapter below the trained one, see `models.frozen_adapter`."""
        if self.config.new_adapter and self.config.adapter:
            return self.context.adapter_bytes // SAVED
        if self.full or not self.config.subtracts_start:
            return 0
        inner = sum(count * sum(self.matrices(layer, number)) for count, layer, number in self._numbered())
        return inner + sum(count * size for count, size in self._adapters_outside())

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


def _matched(name: str, patterns: Iterable[str], number: int | None, *, below: bool = False) -> str | None:
    """The first pattern that fits the end of a matrix's whole name.

    Args:
        below: whether what is below a module of that name counts, too.
    """
    block = "self_attn" if name.startswith(ATTENTION) else "mlp"
    whole = f"{block}.{name}" if number is None else f"model.layers.{number}.{block}.{name}"
    more = r"(?:\..*)?" if below else ""
    return next((pattern for pattern in patterns if re.fullmatch(rf"(?:.*\.)?(?:{pattern}){more}", whole)), None)
