"""Each rule is broken by a command line and repaired by its fix; all that is wrong is reported together; good recipes are quiet."""

import importlib.util
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from launches import ROOT
from safetensors.numpy import save_file

from manyrank import cli
from manyrank.config.resolve import FIELDS, NOT_GIVEN, ResolvedConfig, Setting, presets, resolve
from manyrank.errors import UserError, UserErrors
from manyrank.project_files import asset
from manyrank.rules import recipe as recipe_rules
from manyrank.rules.check import (
    RULES,
    check_data,
    check_output_dir,
    check_rules,
    find_violations,
    rules_as_markdown,
    warnings_of_length,
)
from manyrank.rules.context import RunContext
from manyrank.rules.recipe import filesystem
from manyrank.topology import gpus, strategy_files
from manyrank.topology.gpus import Gpu, Hardware
from manyrank.topology.precision import Precision
from manyrank.topology.strategies import STRATEGIES

CPU = Hardware(gpus=(), cpu_cores=4, cpu_bf16=False)
CPU_WITH_BF16 = Hardware(gpus=(), cpu_cores=4, cpu_bf16=True)
GPUS = Hardware(gpus=(Gpu("H100", 80 << 30, (9, 0)),) * 2, cpu_cores=4, cpu_bf16=False)
AMPERE = Hardware(gpus=(Gpu("A100", 80 << 30, (8, 0)),) * 2, cpu_cores=4, cpu_bf16=False)
OLD_GPUS = Hardware(gpus=(Gpu("V100", 32 << 30, (7, 0)),) * 2, cpu_cores=4, cpu_bf16=True)
DATA, OTHER = str(asset("data", "sample.jsonl")), str(asset("data", "validation.jsonl"))
BY_NAME = {rule.name: rule for rule in RULES}


def resolved(recipe=None, **values) -> ResolvedConfig:
    values = {"model_name_or_path": "embedded", "data_path": DATA} | values
    return resolve(recipe, [Setting(key, value, f"command line, --{key}") for key, value in values.items()])


def situation(*, strategy="ddp", nproc=2, world_size=None, hardware=CPU, output_dir=None, **values) -> RunContext:
    return RunContext(
        resolved(**values), STRATEGIES[strategy], nproc, world_size or nproc, hardware, output_dir=output_dir
    )


TWO = {"data_path": [DATA, OTHER]}
PART = {"data_path": [DATA, {"path": OTHER, "weight": 0.5}]}
BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
IN_TWO_HOURS = "in two hours"  # of when the test runs
HSDP = {"strategy": "hsdp", "nproc": 4}
EVAL = {"eval_data_path": OTHER, "eval_steps": 5}
NODES = {"world_size": 4, "save_steps": 5}
ELASTIC = {"elastic": True, "resume_from_checkpoint": "auto", "global_batch_size": 8, **NODES}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 512,
}
WEIGHTS = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}
ENDS = {"eos_token": "<end>", "chat_template": "{{ messages }}<end>"}
TOKENS = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<end>", "id": 7}, {"content": "<turn>", "id": 8}]}
PARTLY = {"method": "full", "learning_rate": 1e-5}
PURE = {"method": "full", "pure_bf16": True, "hardware": CPU_WITH_BF16}
RUN = {"learning_rate": 2e-4, "batch_per_process": 4, "bf16": False}


def llama(**values) -> dict:
    return {"config.json": LLAMA | values}


def quantised(**values) -> dict:
    return llama(quantization_config=BNB | values)


GRPO = {"task": "grpo", "rewards": "{f1: 1}", "global_batch_size": 8, "per_device_train_batch_size": 4}

# name of the rule, a situation that breaks it, what repairs it. Besides options of the recipe: where it runs, and
# `model`: files of a base model, `yaml` and `json`: keys of the strategy's files, `env`: variables, `run`: a checkpoint.
CASES = [
    ("shard-size-without-hsdp", {"strategy": "fsdp", "hsdp_shard_size": 2}, {"hsdp_shard_size": "none"}),
    ("shard-size-without-hsdp", {"strategy": "fsdp", "hsdp_shard_size": 2}, {"strategy": "hsdp", "nproc": 4}),
    ("hsdp-without-shards", {"strategy": "hsdp", "nproc": 1, "world_size": 2}, {"nproc": 2, "world_size": 4}),
    ("hsdp-without-shards", {"strategy": "hsdp", "nproc": 1, "world_size": 2}, {"strategy": "ddp"}),
    ("hsdp-copies-in-machines", {**HSDP, "hsdp_shard_size": 3}, {"hsdp_shard_size": 2}),
    ("hsdp-copies-in-machines", {**HSDP, "nproc": 2, "world_size": 4, "hsdp_shard_size": 4}, {"hsdp_shard_size": 2}),
    ("hsdp-of-one-copy", HSDP, {"strategy": "fsdp"}),
    ("hsdp-of-one-copy", HSDP, {"world_size": 8}),
    ("hsdp-of-one-copy", {**HSDP, "hsdp_shard_size": 4}, {"hsdp_shard_size": 2}),
    ("elastic-hsdp", {**HSDP, **ELASTIC, "world_size": 8}, {"strategy": "fsdp"}),
    ("elastic-hsdp", {**HSDP, **ELASTIC, "world_size": 8}, {"elastic": False}),
    ("elastic-hsdp", {**HSDP, **ELASTIC, "world_size": 8}, {"hsdp_shard_size": 2}),
    ("int8-in-shards", {**HSDP, "world_size": 8, "method": "int8"}, {"method": "full"}),
    ("optimizer-in-shards", {**HSDP, "world_size": 8, "optim": "adamw_8bit"}, {"optim": "adamw_torch"}),
    ("grpo-without-trl", {**GRPO, "missing": "trl"}, {"task": "sft"}),
    ("rewards-of-grpo", {**GRPO, "rewards": "{f2: 1}"}, {"rewards": "{f1: 1}"}),
    ("rewards-of-grpo", {**GRPO, "rewards": "{}"}, {"task": "sft"}),
    ("whole-groups", {**GRPO, "num_generations": 3}, {"num_generations": 2}),
    ("whole-groups", {**GRPO, "global_batch_size": 12}, {"per_device_train_batch_size": 2}),
    ("packed-completions", {**GRPO, "packing": "step"}, {"packing": "none"}),
    ("adapter-of-full-grpo", {**GRPO, "method": "full", "sft_model": "ADAPTER"}, {"method": "lora"}),
    ("reference-of-sharded-full", {**GRPO, "method": "full", "strategy": "fsdp"}, {"beta": 0}),
    ("reference-of-sharded-full", {**GRPO, "method": "full", "strategy": "zero3"}, {"method": "lora"}),
    (
        "unknown-best-metric",
        {**GRPO, **EVAL, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "eval_reward"},
    ),
    (
        "adapters-on-head-of-grpo",
        {**GRPO, "model": llama(), "lora_target_modules": "q_proj,lm_head"},
        {"lora_target_modules": "q_proj"},
    ),
    (
        "adapters-on-head-of-grpo",
        {**GRPO, "trainable_token_indices": "{embed_tokens: [1], lm_head: [1]}"},
        {"trainable_token_indices": "1"},
    ),
    (
        "adapters-on-head-of-grpo",
        {**GRPO, "model": llama(tie_word_embeddings=True), "trainable_token_indices": "1"},
        {"model": llama()},
    ),
    ("generation-by-vllm", {**GRPO, "use_vllm": "colocate"}, {"use_vllm": "off"}),
    ("generation-by-vllm", {**GRPO, "use_vllm": "server", "hardware": GPUS}, {"task": "sft"}),
    ("tf32-without-units", {"tf32": True}, {"tf32": False}),
    ("tf32-without-units", {"tf32": True, "hardware": OLD_GPUS}, {"hardware": AMPERE, "bf16": False}),
    ("flash-attention-here", {"attn_implementation": "flash_attention_2"}, {"attn_implementation": "sdpa"}),
    ("flash-attention-here", {"flash_attn": "fa2", "hardware": GPUS, "bf16": False}, {"bf16": True}),
    (
        "flash-attention-here",
        {"flash_attn": "fa2", "hardware": OLD_GPUS, "fp16": True},
        {"hardware": AMPERE, "fp16": False},
    ),
    ("flash-attention-here", {"flash_attn": "fa2", "hardware": GPUS, "packing": "none"}, {"packing": "step"}),
    ("flash-attention-here", {"flash_attn": "fa3", "hardware": GPUS}, {"flash_attn": "auto"}),
    ("flash-attention-here", {"flash_attn": "fa3", "hardware": AMPERE}, {"flash_attn": "fa2"}),
    (
        "attention-of-the-model",
        {"attn_implementation": "sdpa", "model": llama(model_type="gpt_oss")},
        {"attn_implementation": "eager"},
    ),
    (
        "attention-of-the-model",
        {"attn_implementation": "sdpa", "model": llama(attn_logit_softcapping=30.0)},
        {"model": llama()},
    ),
    (
        "attention-of-the-model",
        {"flash_attention": True, "model": llama(head_dim=12), "hardware": GPUS},
        {"model": llama(head_dim=16)},
    ),
    ("flex-attention", {"attn_implementation": "flex_attention"}, {"attn_implementation": "none"}),
    ("two-attentions", {"attn_implementation": "sdpa", "disable_fused": "attention"}, {"disable_fused": "lora"}),
    ("tf32-in-16-bits", {"tf32": True, "hardware": GPUS}, {"bf16": False}),
    (
        "generation-that-differs",
        {**GRPO, "full_determinism": True, "use_vllm": "colocate", "hardware": GPUS},
        {"use_vllm": "off"},
    ),
    ("vllm-and-quantised", {**GRPO, "use_vllm": "colocate", "method": "qlora"}, {"use_vllm": "off"}),
    ("grpo-in-float8", {**GRPO, "method": "fp8"}, {"method": "qlora"}),
    ("generation-from-host-memory", {**GRPO, "strategy": "zero3_offload"}, {"strategy": "zero3"}),
    ("sft-model-of-sft", {"sft_model": "ADAPTER"}, {"sft_model": None}),
    ("parts-of-everything", {"train_on_prompt": True, "roles_to_train": "user"}, {"train_on_prompt": False}),
    ("parts-of-everything", {"train_on_prompt": True, "mask_history": True}, {"train_on_prompt": False}),
    ("parts-of-everything", {"train_on_inputs": True, "train_on_eos": "all"}, {"train_on_eos": "turn"}),
    ("packs-of-parts", {**TWO, "packing": "dataset", "sampling_temperature": 2}, {"packing": "step"}),
    ("weights-and-temperature", {**PART, "sampling_temperature": 2}, {"sampling_temperature": 1}),
    *(
        ("new-tokens-in-frozen-rows", {**PARTLY, "add_tokens": ["zorp"], **part}, fix)
        for part, fix in (
            ({"frozen_parameters": ["embed_tokens"]}, {"frozen_parameters": ["layers.0"]}),
            ({"unfrozen_parameters": ["layers.1"]}, {"unfrozen_parameters": ["layers.1", "embed_tokens", "lm_head"]}),
            ({"unfrozen_parameters": ["layers.1"]}, {"add_tokens": []}),
        )
    ),
    ("streaming-without-end", {"streaming": True}, {"max_rows": 10}),
    ("streaming-without-end", {"streaming": True}, {"max_steps": 10}),
    ("streaming-without-end", {**TWO, "streaming": True, "max_steps": 10}, {"max_rows": 10}),
    ("streaming-without-end", {"eval_split": 0.2, "streaming": True, "max_steps": 10}, {"eval_split": 0}),
    ("unused-options", {"sampling_temperature": 2}, TWO),
    ("unused-options", {**TWO, "max_repeats": 2}, {"sampling_temperature": 2}),
    ("last-turn-of-roles", {"train_on_last_turn": True, "roles_to_train": "user"}, {"roles_to_train": "assistant"}),
    ("unused-options", {**GRPO, "train_on_eos": "last"}, {"train_on_eos": "turn"}),
    ("two-starts", {**GRPO, "sft_model": "ADAPTER", "adapter": "ADAPTER"}, {"sft_model": None}),
    ("adapter-of-full", {"adapter": "ADAPTER", "method": "full"}, {"method": "qlora"}),
    ("tokens-that-are-there", {"add_tokens": ["<|im_end|>"]}, {"add_tokens": ["<tool>"]}),
    ("new-tokens-in-grpo", {**GRPO, "add_tokens": ["<tool>"]}, {"add_tokens": []}),
    (
        "template-tokens-in-pieces",
        {"chat_template": "llama3"},
        {"add_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]},
    ),
    ("new-adapter-on-none", {"new_adapter": True}, {"adapter": "ADAPTER"}),
    ("new-adapter-on-more", {"adapter": "ADAPTER", "new_adapter": True, "more": True}, {"new_adapter": False}),
    ("another-base", {"adapter": "ADAPTER", "model_name_or_path": "org/other"}, {"allow_base_change": True}),
    ("another-base", {"adapter": "ADAPTER", "model_name_or_path": "org/other"}, {"model_name_or_path": "embedded"}),
    ("adapter-does-not-fit", {"adapter": "ADAPTER", "allow_base_change": True, "model": llama()}, {"adapter": None}),
    ("new-tokens-of-saved-adapter", {"adapter": "ADAPTER", "add_tokens": ["zorp"]}, {"new_adapter": True}),
    ("new-tokens-of-saved-adapter", {"adapter": "ADAPTER", "add_tokens": ["zorp"]}, {"add_tokens": []}),
    ("start-of-saved-adapter", {"adapter": "ADAPTER", "init_lora_weights": "olora"}, {"new_adapter": True}),
    ("start-of-saved-adapter", {"adapter": "ADAPTER", "init_lora_weights": "olora"}, {"init_lora_weights": "true"}),
    ("adapter-options-together", {"use_dora": True, "init_lora_weights": "pissa"}, {"init_lora_weights": "gaussian"}),
    ("adapter-options-together", {"use_dora": True, "lora_target_modules": "embed_tokens"}, {"use_dora": False}),
    ("adapter-options-together", {"use_dora": True, "lora_bias": True}, {"lora_bias": False}),
    ("dora-on-8-bits", {"use_dora": True, "method": "int8"}, {"method": "lora"}),
    ("adapter-options-together", {"target_parameters": ["down_proj.weight"], "lora_dropout": 0.1}, {"lora_dropout": 0}),
    ("dora-on-4-bits-in-shards", {"use_dora": True, "method": "qlora", "strategy": "fsdp"}, {"strategy": "ddp"}),
    ("dora-on-4-bits-in-shards", {"use_dora": True, "method": "qlora", "strategy": "zero3"}, {"method": "lora"}),
    ("loftq-without-4-bits", {"init_lora_weights": "loftq"}, {"method": "qlora"}),
    ("orthogonal-with-odd-rank", {"init_lora_weights": "orthogonal", "lora_r": 5}, {"lora_r": 6}),
    ("eva-in-grpo", {**GRPO, "init_lora_weights": "eva"}, {"init_lora_weights": "gaussian"}),
    ("frozen-adapter-in-grpo", {**GRPO, "init_lora_weights": "pissa"}, {"init_lora_weights": "gaussian"}),
    (
        "whole-tied-embeddings",
        {"model": llama(tie_word_embeddings=True), "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
    ),
    (
        "tokens-of-tied-modules",
        {"model": llama(tie_word_embeddings=True), "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
        {"trainable_token_indices": [1]},
    ),
    (
        "tokens-beyond-model",
        {"model": llama(vocab_size=8), "trainable_token_indices": [8]},
        {"trainable_token_indices": [7]},
    ),
    (
        "unmergeable-for-vllm",
        {**GRPO, "use_vllm": "server", "vllm_server_base_url": "http://a:1", "lora_bias": True},
        {"use_vllm": "off", "vllm_server_base_url": "none"},
    ),
    ("compiled-generation", {**GRPO, "torch_compile": True}, {"torch_compile": False}),
    ("processes-of-single", {"strategy": "single"}, {"nproc": 1}),
    ("processes-of-single", {"strategy": "single", "nproc": 1, "world_size": 2, "save_steps": 5}, {"strategy": "ddp"}),
    ("processes-beyond-gpus", {"hardware": GPUS, "nproc": 3}, {"nproc": 2}),
    ("processes-beyond-gpus", {"hardware": GPUS, "nproc": 3}, {"hardware": CPU}),
    ("processes-beyond-gpus", {"hardware": GPUS, "nproc": 4}, NODES | {"nproc": 2}),
    ("bf16-not-native", {"bf16": True}, {"bf16": "auto"}),
    ("bf16-not-native", {"bf16": True}, {"hardware": CPU_WITH_BF16}),
    ("bf16-not-native", {"bf16": True, "hardware": OLD_GPUS}, {"hardware": GPUS}),
    ("pure-bf16-elsewhere", {"method": "full", "pure_bf16": True}, {"hardware": GPUS}),
    ("pure-bf16-elsewhere", {"method": "full", "pure_bf16": True, "hardware": OLD_GPUS}, {"pure_bf16": False}),
    ("pure-bf16-rounds", {**PURE, "learning_rate": 1e-5}, {"learning_rate": 1e-4}),
    ("pure-bf16-rounds", {**PURE, "learning_rate": 1e-5}, {"optim": "sgd"}),
    (
        "pure-bf16-offloaded",
        {**PURE, "hardware": GPUS, "strategy": "zero3_offload"},
        {"strategy": "fsdp_offload"},
    ),
    ("unused-options", {**PURE, "method": "lora"}, {"method": "full", "learning_rate": 1e-4}),
    ("unused-options", {"unfrozen_parameters": ["layers.1"]}, {"method": "full", "learning_rate": 1e-4}),
    ("float8-not-native", {"hardware": AMPERE, "method": "fp8"}, {"method": "int8"}),
    ("float8-not-native", {"hardware": AMPERE, "method": "fp8"}, {"hardware": GPUS}),
    ("float8-on-rocm", {"torch": {"cuda": None, "hip": "6.4"}, "method": "fp8"}, {"method": "lora"}),
    ("float8-on-rocm", {"torch": {"cuda": None, "hip": "6.4"}, "method": "fp8"}, {"hardware": GPUS}),
    ("float8-in-float32", {"hardware": GPUS, "method": "fp8", "bf16": False}, {"bf16": "auto"}),
    ("float8-in-float32", {"hardware": GPUS, "method": "fp8", "bf16": False}, {"method": "lora"}),
    ("float32-on-gpus", {"hardware": OLD_GPUS}, {"hardware": GPUS}),
    ("float32-on-gpus", {"hardware": OLD_GPUS}, {"fp16": True}),
    ("fp16", {"fp16": True}, {"hardware": OLD_GPUS}),
    ("fp16", {"fp16": True, "bf16": False, "hardware": GPUS}, {"hardware": OLD_GPUS}),
    ("fp16-where-bf16-is", {"fp16": True, "hardware": GPUS}, {"hardware": OLD_GPUS}),
    ("fp16-where-bf16-is", {"fp16": True, "hardware": GPUS}, {"bf16": False}),
    ("fp16", {"fp16": True, "hardware": OLD_GPUS, "model": llama(dtype="bfloat16")}, {"model": llama(dtype="float16")}),
    ("float32-on-gpus", {"hardware": GPUS, "bf16": False}, {"bf16": "auto"}),
    (
        "accumulation-in-environment",
        {"env": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}},
        {"env": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}},
    ),
    # Sharding
    ("offload-without-gpu", {"strategy": "fsdp_offload"}, {"strategy": "fsdp"}),
    ("offload-without-gpu", {"strategy": "fsdp_offload"}, {"hardware": GPUS}),
    ("shards-of-one", {"strategy": "fsdp", "nproc": 1}, {"nproc": 2}),
    ("shards-of-one", {"strategy": "zero3", "nproc": 1}, {"strategy": "zero2"}),
    ("int8-in-shards", {"method": "int8", "strategy": "fsdp"}, {"method": "qlora"}),
    ("int8-in-shards", {"method": "int8", "strategy": "zero3"}, {"strategy": "zero2"}),
    (
        "qlora-with-quantised-weights",
        {"method": "qlora", "strategy": "zero3", "json": {"zero_optimization.zero_quantized_weights": True}},
        {"method": "lora"},
    ),
    (
        "qlora-with-quantised-weights",
        {
            "method": "qlora",
            "strategy": "zero3",
            "json": {"zero_optimization.zero_quantized_nontrainable_weights": True},
        },
        {"json": {}},
    ),
    ("float8-in-shards", {"method": "fp8", "strategy": "fsdp"}, {"method": "qlora"}),
    ("float8-in-shards", {"method": "fp8", "strategy": "zero3"}, {"strategy": "zero2"}),
    ("optimizer-in-shards", {"optim": "adamw_8bit", "strategy": "fsdp"}, {"strategy": "ddp"}),
    ("optimizer-in-shards", {"optim": "paged_adamw_8bit", "strategy": "zero2"}, {"optim": "sgd"}),
    ("optimizer-in-shards", {"optim": "paged_adamw_32bit", "strategy": "zero3"}, {"optim": "adamw_torch"}),
    ("sgd-under-offload", {"optim": "sgd", "strategy": "zero3_offload"}, {"optim": "adamw_torch"}),
    ("sgd-under-offload", {"optim": "sgd", "strategy": "zero3_offload"}, {"strategy": "zero3"}),
    ("sgd-under-offload", {"optim": "lion", "strategy": "zero3_offload"}, {"strategy": "zero3"}),
    ("optimizer-in-shards", {"optim": "lion_8bit", "strategy": "fsdp"}, {"optim": "lion_32bit"}),
    ("matrices-in-shards", {"optim": "adafactor", "strategy": "fsdp"}, {"strategy": "ddp"}),
    ("matrices-in-shards", {"optim": "muon", "strategy": "zero2"}, {"strategy": "fsdp"}),
    ("matrices-in-shards", {"optim": "muon", "strategy": "fsdp_offload", "hardware": GPUS}, {"strategy": "fsdp"}),
    ("qlora-under-zero-offload", {"method": "qlora", "strategy": "zero3_offload"}, {"strategy": "zero3"}),
    ("qlora-under-zero-offload", {"method": "qlora", "strategy": "zero3_offload"}, {"method": "lora"}),
    (
        "overwritten-input",
        {"overwrite_output_dir": True, "resume_from_checkpoint": "auto"},
        {"overwrite_output_dir": False},
    ),
    ("overwritten-input", {"overwrite_output_dir": True, "resume_from_checkpoint": "auto"}, {"dry_run": True}),
    (
        "overwritten-input",
        {"overwrite_output_dir": True, "env": {"SLURM_RESTART_COUNT": "1"}},
        {"env": {"SLURM_RESTART_COUNT": "0"}},
    ),
    # Files of strategies
    ("precision-against-recipe", {"yaml": {"mixed_precision": "fp16"}}, {"fp16": True}),
    (
        "precision-against-recipe",
        {"strategy": "zero2", "json": {"fp16": {"enabled": True}}},
        {"json": {"fp16": {"enabled": False}}},
    ),
    ("precision-against-recipe", {"yaml": {"mixed_precision": "bf16"}}, {"hardware": CPU_WITH_BF16}),
    ("precision-against-recipe", {"strategy": "zero3", "json": {"bf16": {"enabled": True}}}, {"json": {}}),
    (
        "precision-against-recipe",
        {"strategy": "zero3", "hardware": GPUS, "json": {"bf16": {"enabled": False}}},
        {"bf16": False},
    ),
    (
        "fsdp-checkpointing",
        {"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_activation_checkpointing": True}, "gradient_checkpointing": 2},
        {"yaml": {}},
    ),
    (
        "fsdp-checkpointing",
        {"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_activation_checkpointing": True}},
        {"yaml": {}},
    ),
    ("fsdp-version", {"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_version": 1}}, {"yaml": {}}),
    ("fsdp-version", {"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_version": None}}, {"yaml": {}}),
    ("one-fsdp-unit", {"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_auto_wrap_policy": "NO_WRAP"}}, {"yaml": {}}),
    ("processes-of-multi-cpu", {"yaml": {"distributed_type": "MULTI_CPU"}}, {"yaml": {}}),
    ("cpu-beside-gpus", {"yaml": {"use_cpu": True}, "hardware": GPUS}, {"hardware": CPU}),
    ("node-facts-in-config", {"yaml": {"num_processes": 8, "machine_rank": 0}}, {"yaml": {}}),
    (
        "compiled-twice",
        {"yaml": {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "torch_compile": True, "hardware": GPUS},
        {"torch_compile": False},
    ),
    (
        "keys-beside-deepspeed-json",
        {"strategy": "zero2", "yaml": {"mixed_precision": "bf16"}, "hardware": GPUS},
        {"yaml": {}},
    ),
    ("keys-beside-deepspeed-json", {"strategy": "zero3", "yaml": {"deepspeed_config.zero_stage": 3}}, {"yaml": {}}),
    ("batch-in-deepspeed-json", {"strategy": "zero2", "json": {"train_batch_size": 8}}, {"json": {}}),
    ("batch-in-deepspeed-json", {"strategy": "zero2", "json": {"gradient_clipping": 0.5}}, {"json": {}}),
    ("optimizer-in-deepspeed-json", {"strategy": "zero3", "json": {"optimizer": {"type": "AdamW"}}}, {"json": {}}),
    ("optimizer-in-deepspeed-json", {"strategy": "zero3", "json": {"scheduler": {"type": "WarmupLR"}}}, {"json": {}}),
    ("files-of-another-name", {"strategy": "fsdp", "yaml": {"distributed_type": "MULTI_GPU"}}, {"yaml": {}}),
    ("files-of-another-name", {"strategy": "zero2", "json": {"zero_optimization.stage": 1}}, {"json": {}}),
    # The batch
    ("batch-product", {**BATCH, "global_batch_size": 4}, {"global_batch_size": 8}),
    ("batch-product", {**BATCH, "global_batch_size": 4}, {"nproc": 1}),
    ("batch-product", {**BATCH, "global_batch_size": 4}, {"gradient_accumulation_steps": None}),
    ("batch-division", {"global_batch_size": 6, "packing": "none"}, {"global_batch_size": 8}),
    ("batch-division", {"global_batch_size": 6, "packing": "none"}, {"packing": "step"}),
    ("idle-ranks", {"global_batch_size": 1}, {"nproc": 1}),
    ("idle-ranks", {"global_batch_size": 1}, {"global_batch_size": 2}),
    (
        "changed-since-checkpoint",
        {"run": RUN | {"learning_rate": 1e-4}, "resume_from_checkpoint": "auto"},
        {"resume_changes": ["learning_rate"]},
    ),
    (
        "changed-since-checkpoint",
        {"run": RUN, "resume_from_checkpoint": "auto", "per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4},
    ),
    (
        "changed-since-checkpoint",
        {"run": RUN | {"global_batch_size": 8}, "resume_from_checkpoint": "auto", "global_batch_size": 16},
        {"global_batch_size": 8},
    ),
    (
        "changed-since-checkpoint",
        {"run": RUN | {"bf16": True}, "resume_from_checkpoint": "auto"},
        {"hardware": CPU_WITH_BF16},
    ),
    # Steps
    ("validation-without-data", {"eval_steps": 5}, {"eval_data_path": OTHER}),
    ("validation-without-data", {"eval_steps": 5}, {"eval_split": 0.1}),
    ("one-validation-set", {**EVAL, "eval_split": 0.1}, {"eval_split": 0}),
    ("weighted-validation", {"eval_data_path": f"{{path: {OTHER}, weight: 2}}", "eval_steps": 5}, EVAL),
    ("packs-of-parts", {"packing": "dataset", "data_path": f"[{{path: {DATA}, weight: 1.5}}]"}, {"packing": "step"}),
    ("packs-of-parts", {"packing": "dataset", "data_path": f"{{path: {DATA}, weight: 0.5}}"}, {"data_path": DATA}),
    ("best-without-validation", {"load_best_model_at_end": True}, {**EVAL, "save_steps": 5}),
    ("best-without-validation", {"early_stopping_patience": 2}, EVAL),
    ("unknown-best-metric", {**EVAL, "metric_for_best_model": "accuracy"}, {"metric_for_best_model": "loss"}),
    ("validated-with-training-rows", {"eval_data_path": DATA, "eval_steps": 5}, EVAL),
    ("never-saved", {"save_steps": 10, "max_steps": 4}, {"save_steps": 2}),
    (
        "save-interval-beyond-limit",
        {"env": {"SLURM_JOB_END_TIME": IN_TWO_HOURS}, "save_steps": "off"},
        {"save_steps": "auto"},
    ),
    (
        "save-interval-beyond-limit",
        {"env": {"SLURM_JOB_END_TIME": IN_TWO_HOURS}, "run": RUN, "resume_from_checkpoint": "auto", "save_steps": 99},
        {"save_steps": 9},
    ),
    ("machines-without-saves", {"world_size": 4, "save_steps": "off"}, {"save_steps": "auto"}),
    ("machine-local-output", {**NODES, "mounts": "ext4"}, {"mounts": "nfs4"}),
    ("elastic-without-resume", ELASTIC | {"resume_from_checkpoint": None}, {"resume_from_checkpoint": "auto"}),
    ("elastic-batch", ELASTIC | {"global_batch_size": None}, {"global_batch_size": 8}),
    # Optimisation and reports
    ("warmup-beyond-end", {"warmup_steps": 20, "max_steps": 10}, {"max_steps": 100}),
    ("warmup-beyond-end", {"warmup_steps": 20, "max_steps": 10}, {"warmup_steps": 0.9}),
    ("schedule-arguments", {"lr_scheduler_kwargs": {"min_lr": 1e-5}}, {"lr_scheduler_type": "cosine_with_min_lr"}),
    (
        "schedule-arguments",
        {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "linear"},
        {"lr_scheduler_kwargs": {}},
    ),
    (
        "schedule-arguments",
        {"lr_scheduler_type": "warmup_stable_decay"},
        {"lr_scheduler_kwargs": {"num_decay_steps": 10}},
    ),
    ("unused-options", {"early_stopping_threshold": 0.1}, {**EVAL, "early_stopping_patience": 2}),
    ("unused-options", {"eval_on_start": True}, EVAL),
    ("unusual-learning-rate", {"method": "full", "learning_rate": 2e-3}, {"learning_rate": 2e-5}),
    ("unusual-learning-rate", {"learning_rate": 2e-7}, {"method": "full"}),
    ("unused-options", {"method": "full", "lora_r": 64, "learning_rate": 1e-5}, {"method": "lora"}),
    ("unused-options", {"resume_changes": ["learning_rate"]}, {"resume_changes": []}),
    ("unused-options", {"quantized_cache": "off"}, {"method": "qlora"}),
    ("unused-options", {"use_nested_quant": False, "bnb_4bit_quant_type": "fp4"}, {"method": "qlora"}),
    ("unused-options", {"optim": "lion_32bit", "adam_epsilon": 1e-6}, {"optim": "muon"}),
    ("unused-options", {"optim": "adafactor", "adam_beta1": 0.8}, {"optim": "lion_32bit"}),
    ("optimizer-arguments", {"optim": "sgd", "optim_args": "momentum=0.9,beta1=0.1"}, {"optim_args": "momentum=0.9"}),
    ("two-losses", {"dft_loss": True, "label_smoothing_factor": 0.1}, {"dft_loss": False}),
    ("two-losses", {"loss_type": "dft", "label_smoothing_factor": 0.1}, {"label_smoothing_factor": 0}),
    ("optimizer-arguments", {"optim": "sgd", "optim_args": "momentum=much"}, {"optim_args": "momentum=9e-1"}),
    ("optimizer-arguments", {"optim": "muon", "optim_args": "ns_steps=few"}, {"optim_args": "adjust_lr_fn=original"}),
    ("optimizer-arguments", {"optim_args": {"momentum": 0.9}}, {"optim": "sgd"}),
    ("type-of-4-bits", {"method": "qlora", "bnb_4bit_compute_dtype": "bf16"}, {"hardware": CPU_WITH_BF16}),
    ("type-of-4-bits", {"method": "qlora", "bnb_4bit_quant_storage": "uint8"}, {"bnb_4bit_quant_storage": "float32"}),
    ("unused-options", {"optim": "sgd", "adam_beta1": 0.8}, {"optim": "adamw_torch"}),
    ("unknown-tracker", {"report_to": "wandbb"}, {"report_to": "none"}),
    ("unknown-tracker", {"report_to": "wandb,nonsense"}, {"report_to": "wandb"}),
    (
        "wandb-without-login",
        {"report_to": "wandb", "env": {"WANDB_MODE": "online"}},
        {"env": {"WANDB_MODE": "offline"}},
    ),
    (
        "wandb-without-login",
        {"report_to": "wandb", "env": {"WANDB_MODE": "online"}},
        {"env": {"WANDB_MODE": "online", "WANDB_API_KEY": "x"}},
    ),
    (
        "hub-without-login",
        {"push_to_hub": True, "env": {"HF_TOKEN": ""}},
        {"push_to_hub": True, "env": {"HF_TOKEN": "x"}},
    ),
    ("unused-options", {"hub_model_id": "me/my"}, {"push_to_hub": True, "env": {"HF_TOKEN": "x"}}),
    ("unknown-callback", {"callbacks": "no_such_module:Class"}, {"callbacks": "json.decoder:JSONDecoder"}),
    ("unknown-callback", {"callbacks": "json"}, {"callbacks": "json:JSONDecoder"}),
    # The model
    ("adapter-as-base", {"model": {"adapter_config.json": {}}}, {"model": llama()}),
    ("base-not-causal", {"model": llama(is_encoder_decoder=True)}, {"model": llama()}),
    ("base-not-causal", {"model": llama(architectures=["BertForMaskedLM"])}, {"model": llama()}),
    ("quantised-base", {"model": quantised(), "method": "full", "learning_rate": 1e-5}, {"method": "qlora"}),
    ("quantised-base", {"model": quantised(), "method": "lora"}, {"method": "qlora"}),
    (
        "quantised-base",
        {"model": quantised(), "method": "int8"},
        {"model": quantised(load_in_4bit=False, load_in_8bit=True)},
    ),
    (
        "stored-quantisation",
        {"model": quantised(bnb_4bit_quant_type="nf4"), "method": "qlora", "use_nested_quant": True},
        {"use_nested_quant": None},
    ),
    (
        "stored-quantisation",
        {"model": quantised(bnb_4bit_quant_type="nf4"), "method": "qlora", "bnb_4bit_quant_type": "fp4"},
        {"model": llama()},
    ),
    ("experts-not-quantised", {"model": llama(num_local_experts=8), "method": "qlora"}, {"method": "lora"}),
    ("experts-not-in-float8", {"model": llama(num_local_experts=8), "method": "fp8"}, {"method": "lora"}),
    ("packing-unknown-layers", {"model": llama(layer_types=["conv", "full_attention"])}, {"packing": "none"}),
    ("packing-unknown-layers", {"model": llama(model_type="bloom")}, {"model": llama()}),
    ("attention-by-documents", {"model": llama(attention_dropout=0.1), "hardware": GPUS}, {"model": llama()}),
    ("attention-by-documents", {"model": llama(attn_logit_softcapping=50.0), "hardware": GPUS}, {"hardware": CPU}),
    ("attention-by-documents", {"model": llama(head_dim=60), "hardware": GPUS}, {"model": llama(head_dim=256)}),
    ("attention-by-documents", {"model": llama(head_dim=64, v_head_dim=32), "hardware": GPUS}, {"packing": "none"}),
    ("attention-by-documents", {"model": llama(global_head_dim=512), "hardware": GPUS}, {"model": llama()}),
    ("length-beyond-positions", {"model": llama(), "max_length": 1024}, {"max_length": 512}),
    (
        "length-beyond-positions",
        {"model": llama(), "max_length": 2048},
        {"model": llama(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})},
    ),
    ("layers-beyond-model", {"model": llama(), "gradient_checkpointing": 3}, {"gradient_checkpointing": 2}),
    ("layers-beyond-model", {"model": llama(), "gradient_checkpointing": 3}, {"gradient_checkpointing": "full"}),
    (
        "tokens-beyond-vocabulary",
        {
            "model": llama()
            | {"tokenizer_config.json": {"eos_token": "<turn>", "chat_template": "x"}, "tokenizer.json": TOKENS}
        },
        {
            "model": llama(vocab_size=9)
            | {"tokenizer_config.json": {"eos_token": "<turn>", "chat_template": "<turn>"}, "tokenizer.json": TOKENS}
        },
    ),
    (
        "tokens-beyond-vocabulary",
        {
            "model": llama()
            | {"tokenizer_config.json": {**ENDS, "chat_template": "<turn><end>"}, "tokenizer.json": TOKENS}
        },
        {"model": llama() | {"tokenizer_config.json": ENDS, "tokenizer.json": TOKENS}},
    ),
    (
        "tokens-beyond-vocabulary",
        {
            "model": llama(vocab_size=9)
            | {"tokenizer_config.json": {**ENDS, "pad_token": {"content": "[PAD]"}}, "tokenizer.json": TOKENS}
        },
        {
            "model": llama(vocab_size=10)
            | {"tokenizer_config.json": {**ENDS, "pad_token": {"content": "[PAD]"}}, "tokenizer.json": TOKENS}
        },
    ),
    (
        "unknown-stop",
        {"model": llama() | {"tokenizer_config.json": {**ENDS, "chat_template": "<im_end>"}, "tokenizer.json": TOKENS}},
        {
            "model": llama(vocab_size=9)
            | {
                "tokenizer_config.json": {**ENDS, "chat_template": "<turn>"},
                "tokenizer.json": TOKENS,
                "generation_config.json": {"eos_token_id": [7, 8]},
            }
        },
    ),
    (
        "unknown-stop",
        {"model": llama() | {"tokenizer_config.json": ENDS, "tokenizer.json": TOKENS}, "chat_template": "chatml"},
        {"chat_template": "zephyr"},
    ),
    (
        "remote-code-from-hub",
        {"model_name_or_path": "someone/a-model", "trust_remote_code": True},
        {"trust_remote_code": False},
    ),
    # Adapters
    (
        "adapters-on-tied-head-under-fsdp",
        {"model": llama(tie_word_embeddings=True), "lora_target_modules": ["lm_head"], "strategy": "fsdp"},
        {"strategy": "zero3"},
    ),
    (
        "adapters-on-tied-head",
        {"model": llama(tie_word_embeddings=True), "lora_target_modules": ["lm_head"]},
        {"model": llama(tie_word_embeddings=False)},
    ),
    ("adapters-on-head", {"lora_target_modules": ["lm_head", "q_proj"]}, {"lora_target_modules": ["q_proj"]}),
    (
        "unknown-targets",
        {"model": llama(), "lora_target_modules": ["q_proj", "v_prjo"]},
        {"lora_target_modules": ["q_proj"]},
    ),
    (
        "no-targets",
        {"model": llama(), "lora_target_modules": ["q_prjo"]},
        {"lora_target_modules": ["q_proj"]},
    ),
    *(
        ("adapter-options-together", {"model": llama(model_type="qwen3_moe", num_experts=2), key: value}, fix)
        for key, value in {
            "lora_dropout": 0.1,
            "use_dora": True,
            "lora_bias": True,
            "init_lora_weights": "pissa",
            "rank_pattern": {".*layers.0.*": 6},
            "alpha_pattern": {"gate_up_proj": 6},
            "exclude_modules": ["mlp.experts"],
        }.items()
        for fix in (
            {"lora_target_modules": ["q_proj"], "alpha_pattern": {}, "exclude_modules": []},
            {key: FIELDS[key].default},
        )
    ),
    ("layers-beyond-model", {"model": llama(), "layers_to_transform": [0, 2]}, {"layers_to_transform": [0, 1]}),
    (
        "whole-module-and-its-tokens",
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
        {"trainable_token_indices": {"lm_head": [1]}},
    ),
]
IDS = [f"{name}-{number}" for number, (name, _, _) in enumerate(CASES)]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """No login, and none of the variables that rules look at."""
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "SLURM_JOB_END_TIME", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def put(content: dict, changes: dict) -> dict:
    """The content with other values under dotted keys; None takes a key away."""
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = content
        for key in path:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return content


def strategy_folder(folder: Path, strategy: str, changes: dict, kind: str) -> None:
    """Copies of the project's strategy files, with changes in that of one strategy."""
    for name in ("accelerate_configs", "ds_configs"):
        if not (folder / name).exists():
            shutil.copytree(asset(name), folder / name)
    file = folder / ("accelerate_configs" if kind == "yaml" else "ds_configs") / f"{strategy}.{kind}"
    content = put(yaml.safe_load(file.read_text()), changes)  # JSON is YAML
    file.write_text(json.dumps(content))


def model_folder(folder: Path, files: dict) -> str:
    """A base model: what a check looks for, and `files`."""
    folder.mkdir(parents=True)
    header = json.dumps({name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for name in WEIGHTS}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    for name, content in {"tokenizer_config.json": ENDS, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def torch_folder(folder: Path, build: dict) -> Path:
    """A torch that is built for something, as far as its file of versions says; its `__init__.py`."""
    folder.mkdir(parents=True)
    (folder / "version.py").write_text("".join(f"{key} = {value!r}\n" for key, value in build.items()))
    return folder / "__init__.py"


def adapter_folder(folder: Path, *, more: bool = False) -> str:
    folder.mkdir(parents=True)
    shape = {"base_model_name_or_path": "embedded", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(shape))
    shapes = {"A": [16, 192], "B": [256, 16]}  # of the embedded model
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": shape for part, shape in shapes.items()
    }
    tensors |= {"base_model.model.lm_head.weight": [1536, 192]} if more else {}
    save_file({name: np.zeros(shape) for name, shape in tensors.items()}, folder / "adapter_model.safetensors")
    return str(folder)


def run_folder(folder: Path, run: dict) -> Path:
    """A run with a checkpoint that has `run` as its identity, and steps that took ten minutes each."""
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    same = {
        key: getattr(resolved().config, key) for key in ("method", "lora_r", "packing", "seed", "max_length", "optim")
    }
    before = {key: value for key, value in identity_of(resolved()).items()} | same | run
    (checkpoint / "run.json").write_text(json.dumps(before))
    for name in ("trainer_state.json", "manifest.json"):
        (checkpoint / name).write_text("{}")
    (folder / "logs").mkdir()
    lines = [{"step": 1 + n, "time": 1e9 + 600 * n, "loss": 1.0} for n in range(3)]
    (folder / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def identity_of(recipe: ResolvedConfig) -> dict:
    from manyrank.config.identity import identity

    return identity(recipe.config, Precision.FLOAT32)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A situation of CASES, with its files and variables; `number` keeps several apart."""

    def make(case: dict, number: int = 0) -> tuple[dict, dict]:
        case, folder = dict(case), tmp_path / f"case{number}"
        places = {"strategy": case.pop("strategy", "ddp"), "nproc": case.pop("nproc", 2)}
        places |= {"world_size": case.pop("world_size", places["nproc"]), "hardware": case.pop("hardware", CPU)}
        places["output_dir"] = folder / "run"
        for kind in ("yaml", "json"):
            if changes := case.pop(kind, None):
                strategy_folder(folder, places["strategy"], changes, kind)
        changed = (folder / "accelerate_configs").exists()
        monkeypatch.setattr(strategy_files, "asset", lambda *parts: (folder.joinpath if changed else asset)(*parts))
        for name, value in case.pop("env", {}).items():
            monkeypatch.setenv(name, str(int(time.time()) + 7200) if value == IN_TWO_HOURS else value)
        if "model" in case:
            case["model_name_or_path"] = model_folder(folder / "model", case.pop("model"))
        there = importlib.util.find_spec
        if missing := case.pop("missing", None):
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there(name))
        if build := case.pop("torch", None):
            own = importlib.util.spec_from_file_location("torch", torch_folder(folder / "torch", build))
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: own if name == "torch" else there(name))
        if "ADAPTER" in (case.get("sft_model"), case.get("adapter")):
            path = adapter_folder(folder / "adapter", more=case.pop("more", False))
            case |= {key: path for key in ("sft_model", "adapter") if case.get(key) == "ADAPTER"}
        if "run" in case:
            run_folder(places["output_dir"], case.pop("run"))
        folder.mkdir(exist_ok=True)
        mounts = folder / "mounts"
        mounts.write_text(f"root / {case.pop('mounts', 'nfs4')} rw 0 0\n")
        monkeypatch.setattr(recipe_rules, "MOUNTS", mounts)
        return places, case

    return make


def placed(places: dict) -> dict:
    """The same for a RunContext."""
    return places | {"strategy": STRATEGIES[places["strategy"]]}


def arguments(places: dict, values: dict) -> list[str]:
    """The command line of a situation."""
    nodes = places["world_size"] // places["nproc"]
    given = [f"--strategy={places['strategy']}", f"--nproc={places['nproc']}", f"--output_dir={places['output_dir']}"]
    given += [f"--nnodes={nodes}", "--rdzv_endpoint=first:29500"] if nodes > 1 else []
    values = {"model_name_or_path": "embedded", "data_path": DATA} | {k: v for k, v in values.items() if v is not None}
    return ["train", "--print", *given, *(f"--{key}={value}" for key, value in values.items())]


def names(found) -> set[str]:
    return {violation.rule.name for violation in found}


def test_every_rule_is_covered():
    assert len(BY_NAME) == len(RULES) >= 25
    assert {name for name, _, _ in CASES} == set(BY_NAME)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in BY_NAME)


@pytest.mark.parametrize("name, broken, repair", CASES, ids=IDS)
def test_a_rule_broken_on_the_command_line(name, broken, repair, made, monkeypatch, capsys):
    places, values = made(broken)
    monkeypatch.setattr(gpus, "probe", lambda: places["hardware"])
    code = cli.main(arguments(places, values))
    printed, rule = capsys.readouterr(), BY_NAME[name]
    assert code == (2 if rule.severity == "error" else 0), printed.err
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in told(printed.err)]
    (block,) = [block for block in blocks if block.get("why", "").strip().startswith(rule.reason)]
    assert block[rule.severity] and block["where"] and block["fix"].strip().startswith(rule.fix)
    assert (rule.upstream or "") in block["why"]
    assert printed.out == "" if code else "manyrank.train" in printed.out


def told(printed: str) -> list[str]:
    return [block for block in printed.strip().split("\n\n") if not block.endswith("things are wrong")]


@pytest.mark.parametrize("name, broken, repair", CASES, ids=IDS)
def test_a_rule_repaired(name, broken, repair, made):
    places, values = made(broken)
    assert name in names(find_violations(RunContext(resolved(**values), **placed(places))))
    places, values = made(broken | repair, 1)
    found = find_violations(RunContext(resolved(**values), **placed(places)))
    assert name not in names(found)
    assert not [violation.what for violation in found if violation.rule.severity == "error"]


def test_a_rule_says_where_its_values_came_from():
    with pytest.raises(UserError) as caught:
        check_rules(situation(optim="adamw_8bit", strategy="zero2"))
    assert caught.value.what == "adamw_8bit under zero2"
    assert caught.value.where == "optim (command line, --optim), strategy (default)"
    lines = str(caught.value).splitlines()
    assert [line[:7] for line in lines] == ["error: ", "where: ", "why:   ", "fix:   "]
    assert lines[2].endswith("(https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1633)")


def test_a_rule_names_the_file_and_key(made):
    places, values = made({"strategy": "fsdp", "yaml": {"fsdp_config.fsdp_version": 1}})
    (violation,) = find_violations(RunContext(resolved(**values), **placed(places)))
    assert violation.where == "accelerate_configs/fsdp.yaml, fsdp_config.fsdp_version"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": ""}\n')
    with pytest.raises(UserErrors) as caught:
        check_rules(
            situation(
                method="int8", strategy="fsdp", optim="adamw_8bit", data_path=str(rows), model_name_or_path="./no"
            )
        )
    whats = [problem.what for problem in caught.value.problems]
    assert whats == [
        "method int8 under fsdp",
        "adamw_8bit under fsdp",
        "1 of the first 1 rows cannot be used (1 empty field)",
        "there is no folder ./no",
    ]
    text = str(caught.value)
    assert text.startswith("4 things are wrong\n\nerror: method int8")
    assert all(f"error: {what}\n" in text for what in whats)


def test_warnings_are_switched_off_by_name(capsys):
    doubtful = {"learning_rate": 0.5, "warmup_steps": 9, "max_steps": 3}
    check_rules(situation(**doubtful))
    assert [block.split("\n")[0] for block in told(capsys.readouterr().err)] == [
        "warning: warmup_steps 9, and the run has 3 steps",
        "warning: learning_rate 0.5, where method lora usually takes 1e-05 to 0.001",
    ]
    check_rules(situation(**doubtful, ignore_warnings="[unusual-learning-rate]"))
    printed = capsys.readouterr().err
    assert (
        "warmup" in printed and "ignore_warnings: [warmup-beyond-end]" in printed and "learning_rate 0.5" not in printed
    )
    check_rules(situation(**doubtful, ignore_warnings="unusual-learning-rate,warmup-beyond-end"))
    check_rules(situation(**doubtful), warn=False)
    assert capsys.readouterr().err == ""


def test_what_the_number_of_steps_decides_is_told_once_it_is_known():
    recipe = {"warmup_steps": 20, "save_steps": 50, **EVAL, "num_train_epochs": 1}
    config = resolved(**recipe).config
    save, warmup = warnings_of_length(config, 12)
    assert warmup.splitlines()[:2] == [
        "warning: warmup_steps 20, and the run has 12 steps",
        "where: warmup_steps, num_train_epochs",
    ]
    assert save.startswith("warning: save_steps 50, and the run has 12 steps\n")
    assert warnings_of_length(config, 100) == []
    assert warnings_of_length(resolved(**recipe, max_steps=12).config, 12) == []
    quiet = resolved(**recipe, ignore_warnings="never-saved").config
    assert warnings_of_length(quiet, 12) == [warmup]


@pytest.mark.parametrize(
    "name, what, fix",
    [
        ("unusual-lerning-rate", "there is no warning 'unusual-lerning-rate'", "did you mean unusual-learning-rate?"),
        ("zzz", "there is no warning 'zzz'", "`manyrank rules` lists all"),
        ("int8-in-shards", "int8-in-shards is an error and cannot be ignored", "fix what it names"),
    ],
)
def test_a_warning_that_cannot_be_ignored(name, what, fix):
    caught = error(ignore_warnings=name)
    assert (caught.what, caught.fix) == (what, fix)
    assert caught.where == "ignore_warnings (command line, --ignore_warnings)"


def test_docs_are_the_table(capsys):
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == rules_as_markdown()
    assert cli.main(["rules"]) == 0
    assert capsys.readouterr().out == rules_as_markdown()


def test_a_tracker_whose_package_is_not_installed(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else there(name))
    problem = BY_NAME["unknown-tracker"].broken(situation(report_to="mlflow"))
    assert problem == "tracker mlflow needs the package mlflow, which is not installed"


def test_a_login_in_netrc(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(file))
    rule = BY_NAME["wandb-without-login"]
    assert rule.broken(situation(report_to="wandb")) is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    assert rule.broken(situation(report_to="wandb")) == "report_to wandb, and no login for it was found"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` does
    assert rule.broken(situation(report_to="wandb")) is None


def test_the_file_system_of_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / overlay rw 0 0\nb {tmp_path}/a\\040b nfs4 rw 0 0\nc {tmp_path}/c ext4 rw 0 0\n")
    monkeypatch.setattr(recipe_rules, "MOUNTS", mounts)
    folders = [tmp_path / "a b" / "run", tmp_path / "c", tmp_path / "cd"]
    assert [filesystem(folder) for folder in folders] == ["nfs4", "ext4", "overlay"]


# Good recipes

INTENDED = {
    ("verify", "GPUS"): {"float32-on-gpus"},
}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("recipe", presets())
def test_shipped_recipes_are_quiet(recipe, strategy, embedded_model):
    if recipe in ("deepseek_32b_qlora", "reasoning_32b") and strategy not in ("single", "ddp"):
        pytest.skip("it is for one GPU")
    nproc, given = 1 if strategy == "single" else 2, resolved(recipe)
    own = resolve(recipe, [Setting("data_path", DATA, "test")])
    if own.provenance["model_name_or_path"] != NOT_GIVEN:
        given = own
    for name, machine in (("CPU", CPU), ("GPUS", GPUS)):
        found = find_violations(RunContext(given, STRATEGIES[strategy], nproc, nproc, machine))
        intended = INTENDED.get((recipe, name), set())
        if given.config.method == "qlora" and strategy == "zero3_offload":
            intended = intended | {"qlora-under-zero-offload"}
        if given.config.is_grpo and strategy == "zero3_offload":
            intended = intended | {"generation-from-host-memory"}
        assert names(found) == intended, [violation.what for violation in found]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_the_table_does_not_name_is_allowed(strategy, method):
    check_rules(situation(strategy=strategy, method=method))


# Facts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_accelerate_launch_passes_on_says_what_the_files_say(strategy):
    from manyrank.parallel.accelerator import config_environment

    read, passed = strategy_files.read(strategy), config_environment(STRATEGIES[strategy], 2)
    found = strategy_files.from_environment(passed | {"WORLD_SIZE": "1" if strategy == "single" else "2"})
    for fact in ("kind", "zero_stage", "sharded", "offloads_parameters", "offloads_optimizer", "strategy"):
        assert getattr(found, fact) == getattr(read, fact), fact
    # What hsdp's parallelism_config says stands in other variables.
    named = {"single": None, "ddp": None, "hsdp": "fsdp"}.get(strategy, strategy)
    assert (found.strategy and found.strategy.name) == named
    launched = RunContext(resolved(), STRATEGIES[strategy], 2, 2, GPUS, launched=found)
    assert not [violation for violation in find_violations(launched) if violation.rule in strategy_files_rules()]
    assert strategy_files.from_environment({}) is None


def strategy_files_rules():
    from manyrank.rules.strategy import FILE_RULES

    return FILE_RULES


def test_a_config_that_accelerate_launch_was_given(tmp_path):
    """The rules see it in the launched process, whatever --strategy says or does not say."""
    import subprocess
    import sys

    argv = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(asset("accelerate_configs", "fsdp.yaml")),
    ]
    argv += ["--num_processes=1", "--num_machines=1", "--main_process_port=0", "-m", "manyrank.train"]
    argv += [
        "--model=embedded",
        f"--data_path={DATA}",
        "--method=int8",
        f"--output_dir={tmp_path}/run",
        "--learning_rate=9",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "error: method int8 under fsdp\n" in done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[1].split("fix: ")[0]


def test_a_file_that_is_no_config_is_told_with_the_rest(made):
    places, values = made({"strategy": "zero2", "json": {"fp16": {}}})
    file = Path(strategy_files.asset("ds_configs", "zero2.json"))
    file.write_text("{")
    with pytest.raises(UserErrors) as caught:
        check_rules(RunContext(resolved(**values | {"model_name_or_path": "./no"}), **placed(places)))
    assert caught.value.problems[0].where == "ds_configs/zero2.json"


def test_the_embedded_model_has_facts(embedded_model):
    model = situation().model
    assert (model.layers, model.positions, model.ties_embeddings, model.dtype) == (4, 2048, False, "float32")
    assert model.stops() == {"<|im_end|>", "<|endoftext|>"}
    assert model.has_module("q_proj") and not model.has_module("proj")
    assert list(model.mixing()) == [] and model.experts == 0


def test_a_hub_name_in_the_cache_has_facts(tmp_path, monkeypatch):
    """And one that is not has none: no network is asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    found = find_violations(situation(model_name_or_path="some/model", gradient_checkpointing=3))
    assert "layers-beyond-model" in names(found)
    assert situation(model_name_or_path="some/other").model is None


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma2", "gpt_oss", "bloom", "falcon", "mpt", "mamba", "qwen3_next"]
)
def test_pluggable_attention_is_what_the_class_says(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from manyrank.models.model_facts import _takes_attention

    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    assert _takes_attention(model_type) == bool(cls._supports_attention_backend)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_peft_refuses_dropout_on_these_experts(model_type):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from manyrank.rules.model import ADAPTED_EXPERTS

    assert model_type in ADAPTED_EXPERTS
    small = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    small |= dict(num_key_value_heads=2, num_experts=2, num_local_experts=2, moe_intermediate_size=16)
    small |= dict(shared_expert_intermediate_size=16, num_experts_per_tok=1)
    lora = dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    config = AutoConfig.for_model(model_type, **small)
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**lora, lora_dropout=0.1))
    get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**lora))


# Data


@pytest.fixture
def data(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error(**values) -> UserError:
    with pytest.raises(UserError) as caught:
        check_rules(situation(**values))
    return caught.value


@pytest.mark.parametrize(
    "text, format_type, what, where",
    [
        ('{"question": "q", "answer": ""}', "auto", "1 of the first 1 rows", "line 1: 'answer' is empty"),
        ('\n{"question": "q"}', "question_answer", "1 of the first 1 rows", "line 2: 'answer' is missing"),
        ('{"question": "q"}', "auto", "no format has the keys ['question']", "line 1"),
        ('{"question": "q", "answer": "a"}', "alpaca", "1 of the", "line 1: 'instruction' is missing"),
        ('{"question" "q"}', "auto", "1 of the", "line 1: broken JSON: Expecting ':' delimiter (column 13)"),
        ("3", "auto", "1 of the first 1 rows", "line 1: a row is int, not an object"),
        ("", "auto", "there are no rows in it", "rows.jsonl"),
    ],
)
def test_data_errors(data, text, format_type, what, where):
    caught = error(data_path=data(text), format_type=format_type)
    assert caught.what.startswith(what)
    assert "rows.jsonl" in caught.where
    assert caught.where.endswith(where)


def test_errors_in_the_validation_data(data):
    caught = error(eval_data_path=data('{"question": "q", "answer": ""}'), eval_steps=5)
    assert caught.what == "1 of the first 1 rows cannot be used (1 empty field)"
    assert caught.where.endswith("rows.jsonl, line 1: 'answer' is empty")


def test_a_bad_row_among_the_first_is_refused_before_the_launch(data):
    rows = data('{"question": "q", "answer": "a"}\n' * 500 + "nonsense\n")
    caught = error(data_path=rows)
    assert caught.what == "1 of the first 501 rows cannot be used (1 not JSON)"
    assert "rows.jsonl, line 501: broken JSON" in caught.where
    config = resolved(data_path=rows, on_bad_row="skip").config
    assert check_data(config.data_path[0], config) == "question_answer"


def test_a_bad_row_that_the_seed_may_leave_out_is_left_to_the_run(data):
    source = {"path": data('{"question": "q", "answer": "a"}\n' * 500 + "nonsense\n"), "max_rows": 10}
    config = resolved(data_path=[source]).config
    assert check_data(config.data_path[0], config) == "question_answer"


def test_later_bad_rows_are_left_to_the_run(data):
    config = resolved(data_path=data('{"question": "q", "answer": "a"}\n' * 1000 + "nonsense\n")).config
    assert check_data(config.data_path[0], config) == "question_answer"


def test_a_source_that_only_starts_with_bad_rows(data):
    caught = error(data_path=data("nonsense\n" * 1500))
    assert caught.what == "1,000 of the first 1,000 rows cannot be used (1,000 not JSON)"
    assert caught.where.count("rows.jsonl, line ") == 10 and caught.where.endswith("and 990 more")
    config = resolved(data_path=data("nonsense\n" * 150), on_bad_row="skip").config
    assert check_data(config.data_path[0], config) == "auto"  # no reason yet to ask for a template


def test_a_data_file_that_is_not_there():
    assert error(data_path="nowhere.jsonl").what == "there is no file nowhere.jsonl"


# Model folders


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that has all that a check looks for."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def test_a_whole_model_folder(model):
    check_rules(situation(model_name_or_path=str(model)))


@pytest.mark.parametrize(
    "missing, what",
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer_config.json", "the tokenizer has no chat template"),
    ],
)
def test_a_model_folder_with_a_file_missing(model, missing, what):
    (model / missing).unlink()
    caught = error(model_name_or_path=str(model))
    assert what in caught.what
    assert caught.where == "model_name_or_path (command line, --model_name_or_path)"


def test_plain_text_needs_no_template(model, data):
    (model / "tokenizer_config.json").write_text("{}")
    check_rules(situation(model_name_or_path=str(model), data_path=data('{"text": "some words"}')))


def test_a_bad_first_row_may_be_put_aside(data):
    check_rules(situation(data_path=data('{"question": "q", "answer": ""}\n'), on_bad_row="skip"))


def test_a_tokenizer_without_a_chat_template(model, tmp_path):
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert error(model_name_or_path=str(model)).fix == "give one: --chat_template chatml, or a file"
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    check_rules(situation(model_name_or_path=str(model), chat_template=str(own)))


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_in_its_own_file(model, name):
    (model / "tokenizer_config.json").unlink()
    (model / name).write_text("{}")
    check_rules(situation(model_name_or_path=str(model)))


def test_older_weight_files(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    check_rules(situation(model_name_or_path=str(model)))


def test_a_model_folder_that_is_not_there(tmp_path):
    assert error(model_name_or_path=f"{tmp_path}/nowhere").what == f"there is no folder {tmp_path}/nowhere"
    check_rules(situation(model_name_or_path="someone/a-name-on-the-hub"))


def test_a_chat_template_file_that_is_not_there():
    assert error(chat_template="own.jinja").what == "there is no file own.jinja"


def test_a_chat_template_that_nobody_has(tmp_path, embedded_model):
    folder = shutil.copytree(embedded_model, tmp_path / "model")
    options = {"chat_template": "rag", "model_name_or_path": str(folder)}
    assert error(**options).what == "there is no chat template 'rag'" and "chatml" in error(**options).fix
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    check_rules(situation(**options))


# Output folders


def test_a_folder_without_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no run: thesis\.txt"):
        check_output_dir(resolved(overwrite_output_dir=True).config, tmp_path)
    (tmp_path / "checkpoint-5").mkdir()  # of another tool
    with pytest.raises(UserError, match=r"has no launch\.json"):
        check_output_dir(resolved(overwrite_output_dir=True).config, tmp_path)


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("key", ["model_name_or_path", "sft_model", "data_path"])
def test_a_run_does_not_overwrite_what_it_reads(key, home, tmp_path, monkeypatch):
    inside = tmp_path / "run" / "final_model"
    adapter_folder(inside) if key == "sft_model" else model_folder(inside, llama())
    (inside / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    path = str(inside / "rows.jsonl" if key == "data_path" else inside)
    if home and key != "data_path":  # which is written out when the recipe is read
        monkeypatch.setenv("HOME", str(tmp_path))
        path = path.replace(str(tmp_path), "~")
    run = situation(output_dir=tmp_path / "run", overwrite_output_dir=True, **{key: path})
    found = [violation.what for violation in find_violations(run) if violation.rule.name == "overwritten-input"]
    assert found == [f"overwrite_output_dir would remove {path}, which the run reads"]


def test_an_output_folder_with_files(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        check_output_dir(resolved().config, tmp_path)
    assert caught.value.what == f"the output folder {tmp_path} is not empty"
    assert "--resume_from_checkpoint auto" in caught.value.fix


@pytest.mark.parametrize(
    "values", [{"dry_run": True}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}]
)
def test_an_output_folder_that_may_have_files(tmp_path, values):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "launch.json").write_text("")
    check_output_dir(resolved(**values).config, tmp_path)


def test_an_output_folder_that_is_empty_or_not_there(tmp_path):
    check_output_dir(resolved().config, tmp_path)
    check_output_dir(resolved().config, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError):
        check_output_dir(resolved().config, tmp_path / "run")


def test_questions_need_a_template_too(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "bare"
    rows.write_text('{"text": "plain"}\n')
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    given = {"data_path": str(rows), "model_name_or_path": str(folder)}
    check_rules(situation(**given))
    assert error(**given, sample_questions=["why?"]).what == "the tokenizer has no chat template"


def test_a_deepspeed_file_is_that_of_the_project_in_any_folder(tmp_path, monkeypatch):
    """accelerate itself would look for it in the folder where the command is typed."""
    monkeypatch.chdir(tmp_path)
    name = "ds_configs/zero3.json"
    passed = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": "true",
        strategy_files.DEEPSPEED_FILE: name,
    }
    found = strategy_files.from_environment(passed)
    assert found.zero_stage == 3 and passed[strategy_files.DEEPSPEED_FILE] == str(asset(name))
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 2}}')
    passed[strategy_files.DEEPSPEED_FILE] = name
    assert strategy_files.from_environment(passed).zero_stage == 2 and passed[strategy_files.DEEPSPEED_FILE] == name
