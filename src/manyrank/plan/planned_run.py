"""One way to run a recipe, as the plan sees it: model, strategy, processes; what is trained and with how many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from ..config.patterns import matching
from ..config.peft_config import token_ids
from ..config.schema import TrainConfig
from ..models.spec import Layer, Linear, ModelSpec
from ..rules.adapters import EMBEDDINGS
from ..rules.context import RunContext
from ..rules.model import ADAPTED_EXPERTS, HEADS, adapts_experts
from ..topology.strategies import Strategy

ATTENTION = ("q_", "k_", "v_", "o_", "qkv_", "kv_")  # the beginnings of names of its matrices
SAVED = 4  # bytes of an element of a saved adapter


@dataclass(frozen=True)
class PlannedRun:
    """A recipe on a strategy and a machine, with the shape of its model."""

    context: RunContext
    base: ModelSpec

    @cached_property
    def shape(self) -> ModelSpec:
        """The model with the rows that new tokens add; where its tokenizer is not here, a row for each."""
        new, given = self._new_tokens, token_ids(self.config.trainable_token_indices)
        facts, rows = self.context.model, self.base.vocabulary
        known = facts.next_id if facts and facts.has_tokens else rows
        needed = max(known + new if new else 0, max(given, default=-1) + 1 if self._names_new_tokens else 0)
        return replace(self.base, vocabulary=max(rows, needed))

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
        has = self.gpu and self.half and self.context.hardware.has_bf16
        return has and self.config.attn_implementation != "eager"

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
        return self.full and self.half and not self.strategy.shards and not self.config.pure_bf16

    @property
    def kept(self) -> int:
        """Bytes of an element of what is trained, of its gradient and of its moments."""
        return self.compute if self.config.pure_bf16 else 4

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
        return bool(layer.experts) and adapts_experts(self.config, self.shape.model_type)

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
    def _names_new_tokens(self) -> bool:
        return bool(self.config.add_tokens or self.config.add_special_tokens)

    @property
    def _new_tokens(self) -> int:
        """Tokens that get rows; those of a saved adapter are among trainable_token_indices."""
        saved = self.config.start_model and not self.config.new_adapter
        return 0 if saved else len({*self.config.add_tokens, *self.config.add_special_tokens})

    @cached_property
    def rows(self) -> dict[str, int]:
        """Trained rows beside adapters of the embedding ("embed_tokens" or as it is called) and of lm_head."""
        given = self.config.trainable_token_indices
        by_module = given if isinstance(given, dict) else {"embed_tokens": given}
        rows = {name.rpartition(".")[2]: len(set(ids)) for name, ids in by_module.items()}
        for name in ("embed_tokens",) if self.shape.tied else ("embed_tokens", "lm_head"):
            if not self.full and name not in self.config.modules_to_save:
                rows[name] = rows.get(name, 0) + self._new_tokens
        return {name: count for name, count in rows.items() if count}

    @property
    def head_rows(self) -> int:
        """Trained rows of a frozen lm_head, which are put into a copy of it."""
        return 0 if self.full else sum(n for name, n in self.rows.items() if name in HEADS or self.shape.tied)

    @property
    def trains_head(self) -> bool:
        if self.full:
            return self.learns("model.embed_tokens" if self.shape.tied else "lm_head")
        return any(name.rpartition(".")[2] in HEADS for name in self.config.modules_to_save)

    @property
    def adapts_head(self) -> bool:
        targets = self.config.lora_target_modules
        return not self.full and targets != "all-linear" and any(name.rpartition(".")[2] in HEADS for name in targets)

    @property
    def _whole_matrices(self) -> int:
        """Matrices of the vocabulary that are trained whole beside adapters."""
        return sum(name.rpartition(".")[2] in EMBEDDINGS for name in self.config.modules_to_save)

    @cached_property
    def whole_outside(self) -> int:
        """Elements of what is trained outside of the layers that are no adapters: whole modules, and rows."""
        return self._whole_matrices * self.shape.embedding + sum(self.rows.values()) * self.shape.hidden

    @property
    def _beside(self) -> int:
        """Trained vectors of a matrix with adapters: magnitudes, and biases."""
        return self.config.use_dora + self.config.lora_bias

    def _numbered(self) -> Iterator[tuple[int, Layer, int | None]]:
        """Kinds of layers with their counts; where the recipe may tell layers apart, each of them with its number."""
        config, targets = self.config, self.config.lora_target_modules
        patterns = [*config.rank_pattern, *config.exclude_modules, *config.modules_to_save]
        patterns += [*config.frozen_parameters, *config.unfrozen_parameters]
        if patterns or config.layers_to_transform or targets != "all-linear":
            yield from ((1, layer, number) for number, layer in enumerate(self.shape.each()))
        else:
            yield from ((layer.count, layer, None) for layer in self.shape.layers)

    @cached_property
    def tensors(self) -> list[tuple[float, int]]:
        """Numbers of trained tensors, and the elements of each."""
        if self.full:
            return [(count, size) for _, count, size in self._whole() if count * size]
        inner = [(count, size) for count, layer, number in self._numbered() for size in self.adapters(layer, number)]
        rows = [(1, count * self.shape.hidden) for count in self.rows.values()]
        outside: list[tuple[float, int]] = [(self._whole_matrices, self.shape.embedding), *rows]
        return inner + [(count, size) for count, size in (*outside, *self._adapters_outside()) if count * size]

    def _whole(self) -> Iterator[tuple[int | None, float, int]]:
        """The tensors of the base that full fine-tuning trains, with the layer's number; norms together, and experts."""
        shape = self.shape
        for count, layer, number in self._numbered():
            for name, linear in layer.linears.items():
                if self.learns(_block(name), number):
                    yield from ((number, count, linear.weights), (number, count, linear.bias * linear.outputs))
            if layer.experts and self.learns("mlp.experts", number):
                yield number, count, layer.experts.parameters
            if self.learns("input_layernorm", number):
                yield number, count, layer.rest
        ends = {"model.embed_tokens": shape.embedding, "lm_head": shape.embedding, "model.norm": shape.final_norm}
        if shape.tied:
            del ends["lm_head"]
        yield from ((None, 1, size) for name, size in ends.items() if self.learns(name))

    def learns(self, name: str, number: int | None = None) -> bool:
        """Whether full fine-tuning trains what has this name in models like Llama.

        Args:
            number: of the layer that it is in.
        """
        frozen, unfrozen = self.config.frozen_parameters, self.config.unfrozen_parameters
        names = [name] if number is None else [f"model.layers.{number}.{name}", f"transformer.h.{number}.{name}"]
        names += ["lm_head"] if self.shape.tied and name == "model.embed_tokens" else []
        names = [f"{each}.weight" for each in names]
        if any(matching(each, frozen, below=True) for each in names):
            return False
        return not unfrozen or any(matching(each, unfrozen, below=True) for each in names)

    @cached_property
    def first_learned(self) -> int:
        """The number of the first layer that a gradient comes to."""
        if not self.full or self.learns("model.embed_tokens"):
            return 0
        return min((number for number, *_ in self._whole() if number is not None), default=self.shape.depth)

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
        return int(sum(count * size for count, size in self.tensors))


def _matched(name: str, patterns: Iterable[str], number: int | None, *, below: bool = False) -> str | None:
    """The first pattern that fits the end of a matrix's whole name.

    Args:
        below: whether what is below a module of that name counts, too.
    """
    whole = _block(name) if number is None else f"model.layers.{number}.{_block(name)}"
    return matching(whole, patterns, below=below)


def _block(name: str) -> str:
    """The name of a layer's matrix with the block that it is in."""
    return f"{'self_attn' if name.startswith(ATTENTION) else 'mlp'}.{name}"
