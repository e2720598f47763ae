"""Rules about GRPO: its rewards, its batch of answers, and what answers them."""

from __future__ import annotations

import importlib.util

from ..data.rewards import read_rewards
from ..errors import UserError
from .context import RunContext
from .model import HEADS, head_target
from .rule import error, unless


def _rewards(s: RunContext) -> str | None:
    if not s.config.is_grpo:
        return None
    try:
        read_rewards(s.config.rewards)
    except UserError as error:
        return f"{error.what} ({error.where}): {error.fix}"
    return None


def _groups(s: RunContext) -> str | None:
    c = s.config
    if not c.is_grpo or c.per_device_train_batch_size == "auto":
        return None
    batch, part = c.batch(s.world_size), c.per_device_train_batch_size * s.world_size
    if batch % c.num_generations:
        return f"{batch} completions a step are not whole groups of {c.num_generations}"
    if batch % part:
        return (
            f"{batch} completions a step do not divide into {s.world_size} processes x {c.per_device_train_batch_size}"
        )
    return None


def _tokens_of_head(s: RunContext) -> str | None:
    ids = s.config.trainable_token_indices
    names = [name for name in ids if name.rpartition(".")[2] in HEADS] if isinstance(ids, dict) else []
    tied = ids and s.model is not None and s.model.ties_embeddings
    return "trainable_token_indices of lm_head" + ", which is tied" * bool(tied) if names or tied else None


def _vllm(s: RunContext) -> str | None:
    if not s.config.is_grpo or s.config.use_vllm == "off":
        return None
    if not s.gpus:
        return f"use_vllm {s.config.use_vllm} on a machine without GPUs"
    if importlib.util.find_spec("vllm") is None:
        return f"use_vllm {s.config.use_vllm}, and vllm is not installed"
    if s.config.use_vllm == "server" and not s.config.vllm_server_base_url:
        return "use_vllm server without vllm_server_base_url"
    return None


GRPO_RULES = (
    error(
        "grpo-without-trl",
        ("task",),
        unless(
            lambda s: s.config.is_grpo and importlib.util.find_spec("trl") is None,
            "task grpo, and trl is not installed",
        ),
        reason="trl's GRPOTrainer generates and computes the loss.",
        fix="pip install 'manyrank[rl]'",
    ),
    error(
        "rewards-of-grpo",
        ("rewards",),
        _rewards,
        reason="Rewards are all that GRPO learns from.",
        fix="see docs/grpo.md for the rewards and their options",
    ),
    error(
        "whole-groups",
        ("global_batch_size", "per_device_train_batch_size", "num_generations"),
        _groups,
        reason="Under grpo a batch counts completions; those of a prompt are compared with each other in one step.",
        fix="choose a multiple of num_generations and of per_device_train_batch_size x processes",
    ),
    error(
        "packed-completions",
        ("packing",),
        unless(lambda s: s.config.is_grpo and s.config.packing != "none", "packing: {c.packing} with grpo"),
        reason="Completions are computed padded, as trl does it.",
        fix="leave packing out",
    ),
    error(
        "adapters-on-head-of-grpo",
        ("lora_target_modules", "trainable_token_indices"),
        lambda s: (head_target(s) or _tokens_of_head(s)) if s.config.is_grpo else None,
        reason="trl computes log-probabilities with lm_head's own weight.",
        fix="leave lm_head and tied embeddings out",
    ),
    error(
        "adapter-of-full-grpo",
        ("sft_model", "method"),
        unless(
            lambda s: (
                s.config.is_grpo and s.config.method == "full" and bool(s.config.sft_model) and s.goes_on_from_adapter
            ),
            "method full, and {c.sft_model} is an adapter",
        ),
        reason="Full training has no place for an adapter.",
        fix="merge it first: manyrank merge; or use method lora",
    ),
    error(
        "reference-of-sharded-full",
        ("method", "beta", "strategy"),
        unless(
            lambda s: (
                s.config.is_grpo
                and s.config.method == "full"
                and s.config.beta > 0
                and "parameters" in s.strategy.shards
            ),
            "method full with beta {c.beta:g} on {s.strategy}",
        ),
        reason="The reference of the KL divergence would be a second whole model, which is not sharded here.",
        fix="use method lora, whose reference is an adapter; or beta: 0",
    ),
    error(
        "generation-by-vllm",
        ("use_vllm",),
        _vllm,
        reason="vLLM generates on GPUs, and is a package of its own.",
        fix="leave use_vllm out, or run where it can; a server is started with `trl vllm-serve`",
    ),
    error(
        "vllm-and-quantised",
        ("use_vllm", "method"),
        unless(
            lambda s: s.config.is_grpo and s.config.use_vllm != "off" and s.config.method in ("qlora", "int8"),
            "use_vllm {c.use_vllm} with method {c.method}",
        ),
        reason="vLLM is sent the merged weights, and merging into a quantised base rounds the adapter away.",
        fix="use method lora",
    ),
    error(
        "grpo-in-float8",
        ("method",),
        unless(lambda s: s.config.is_grpo and s.config.method == "fp8", "method fp8 with grpo"),
        reason="Most of GRPO's time is generation, whose products of few rows float8 does not speed up, and its losses in "
        "float8 have not been compared.",
        fix="use method lora or qlora",
    ),
    error(
        "generation-from-host-memory",
        ("strategy",),
        unless(lambda s: s.config.is_grpo and s.strategy.offload, "grpo on {s.strategy}"),
        reason="Every token of a completion would wait for weights from host memory.",
        fix="use fsdp or zero3",
    ),
    error(
        "sft-model-of-sft",
        ("sft_model", "task"),
        unless(lambda s: bool(s.config.sft_model and not s.config.is_grpo), "sft_model with task sft"),
        reason="It is the model that grpo starts from; SFT starts from a base.",
        fix="give --task grpo, or manyrank merge it and train the result",
    ),
    error(
        "compiled-generation",
        ("torch_compile",),
        unless(lambda s: s.config.is_grpo and s.config.torch_compile, "torch_compile with grpo"),
        reason="Completions grow by a token at a time, and every length would be compiled.",
        fix="leave torch_compile out",
    ),
)
