"""Other names of a recipe's keys: the project's own short forms, and what other tools call the same thing.

ALIASES, METHOD_FLAGS    short forms; in help texts
DATA_ALIASES             of data_path; in a recipe, where they hold keys, these are names of sections
OTHER_TOOLS              the same meaning in TRL, Axolotl, LLaMA-Factory or Unsloth, or as people guess it: read, and not in help texts
OPPOSITES                those of them that say the opposite, yes for no
WHEN                     keys of transformers that say when something is done
VALUES                   values that these have for a key, and ours
INSTEAD                  another meaning, or nothing to set: an error that says what to write
"""

from __future__ import annotations

from typing import Any

# Dashes and underscores are the same everywhere.
ALIASES = {
    "train_data": "data_path",
    "dataset_path": "data_path",
    "val_data": "eval_data_path",
    "val_size": "eval_split",
    "dedup": "duplicates",
    "train_on_inputs": "train_on_prompt",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch": "per_device_train_batch_size",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "experiment_name": "run_name",
    "resume_from": "resume_from_checkpoint",
    "num_samples": "num_generations",
    "max_new_tokens": "max_completion_length",
    "plain_parts": "disable_fused",
}
DATA_ALIASES = {"data": "data_path", "dataset": "data_path"}
OTHER_TOOLS = {
    "model_path": "model_name_or_path",
    "model_id": "model_name_or_path",
    "base_model_name": "model_name_or_path",
    "pretrained_model_name_or_path": "model_name_or_path",
    "dataset_name": "data_path",
    "datasets": "data_path",
    "data_file": "data_path",
    "train_file": "data_path",
    "train_path": "data_path",
    "train_data_path": "data_path",
    "training_data": "data_path",
    "eval_data": "eval_data_path",
    "eval_file": "eval_data_path",
    "eval_dataset": "eval_data_path",
    "val_path": "eval_data_path",
    "val_data_path": "eval_data_path",
    "validation_data": "eval_data_path",
    "validation_file": "eval_data_path",
    "val_split": "eval_split",
    "val_set_size": "eval_split",
    "validation_split": "eval_split",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "seq_len": "max_length",
    "seq_length": "max_length",
    "context_length": "max_length",
    "block_size": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "batch": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "total_batch_size": "global_batch_size",
    "effective_batch_size": "global_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "n_epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "overwrite": "overwrite_output_dir",
    "save_every": "save_steps",
    "save_strategy": "save_steps",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "logging_strategy": "logging_steps",
    "eval_every": "eval_steps",
    "log_every": "logging_steps",
    "scheduler": "lr_scheduler_type",
    "lr_schedule": "lr_scheduler_type",
    "wd": "weight_decay",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "val": "eval_data_path",
    "test_data": "eval_data_path",
    "compile": "torch_compile",
    "grad_checkpointing": "gradient_checkpointing",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "finetuning_type": "method",
    "quantization_bit": "method",
    "lora_target": "lora_target_modules",
    "neat_packing": "packing",
    "sample_packing": "packing",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "group_size": "num_generations",
    "num_samples_per_question": "num_generations",
    "kl_coef": "beta",
    "output_path": "output_dir",
    "save_dir": "output_dir",
    "wandb_name": "run_name",
    "wandb_run_name": "run_name",
    "resume": "resume_from_checkpoint",
    "adapter_name_or_path": "adapter",
    "adapter_path": "adapter",
    "lora_model_dir": "adapter",
    "peft_model_id": "adapter",
    "max_samples": "max_rows",
    "mask_history": "train_on_last_turn",
    "assistant_only_loss": "train_on_prompt",
    "completion_only_loss": "train_on_prompt",
    "train_on_responses_only": "train_on_prompt",
    "train_on_eot": "train_on_eos",
}
OPPOSITES = frozenset({"assistant_only_loss", "completion_only_loss", "train_on_responses_only"})
ADAPTERS = frozenset({"lora", "qlora", "int8", "fp8"})
# Yes/no keys that each allow some methods; "no" allows the others. Together they must leave at least one.
METHOD_FLAGS = {
    "use_lora": ADAPTERS,
    "use_peft": ADAPTERS,
    "no_lora": frozenset({"full"}),
    "use_qlora": frozenset({"qlora"}),
    "use_4bit": frozenset({"qlora"}),
    "load_in_4bit": frozenset({"qlora"}),
    "no_4bit": frozenset({"full", "lora", "int8", "fp8"}),
    "use_8bit": frozenset({"int8"}),
    "load_in_8bit": frozenset({"int8"}),
    "fp8": frozenset({"fp8"}),
}
# Other tools' names of `method` whose values allow some methods, as these flags do: with load_in_4bit, their lora is qlora.
METHOD_VALUES: dict[str, dict[str, frozenset[str]]] = {
    "finetuning_type": {"lora": ADAPTERS, "full": frozenset({"full"})},
    "adapter": {"lora": ADAPTERS, "qlora": frozenset({"qlora"}), "none": frozenset({"full"})},
    "quantization_bit": {"4": frozenset({"qlora"}), "8": frozenset({"int8"}), "none": frozenset({"full", "lora"})},
}
FORMATS_ELSEWHERE = {"chat_template": "messages", "openai": "messages", "chatml": "messages", "completion": "text"}
# Values of the keys that say when something is done; with `steps`, a number of steps stands beside it.
WHEN: dict[str, tuple[str, ...]] = {
    "save_strategy": ("no", "epoch"),
    "eval_strategy": ("no", "epoch"),
    "evaluation_strategy": ("no", "epoch"),
    "logging_strategy": ("epoch",),
}
VALUES: dict[str, dict[str, str]] = {
    "format_type": FORMATS_ELSEWHERE,
    "lora_target_modules": {"all": "all-linear"},
    "optim": {"adamw": "adamw_torch", "adamw_torch_fused": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"},
    "packing": {"true": "dataset", "false": "step"},
    "gradient_checkpointing": {"unsloth": "full"},
    "resume_from_checkpoint": {"true": "auto", "false": "none"},
}
_INSTEAD = {
    "deepspeed deepspeed_config": "choose --strategy zero2 or zero3; ds_configs/ has their files",
    "fsdp fsdp_config": "choose --strategy fsdp; accelerate_configs/ has its file",
    "stage": "write task: sft or grpo",
    "template": "leave it out for the model's own chat template, or write chat_template: chatml, llama3, ... or a file",
    "mix_strategy interleave_probs probabilities": "write data_path: [{path: A, weight: 2}, B], where weight says how often "
    "rows are seen in an epoch, or sampling_temperature: 2, which evens out the shares of sources; without them each row is seen once",
    "attn_implementation flash_attn flash_attention use_flash_attention_2": "leave it out: documents of a pack attend by "
    "flash attention wherever the GPU has it",
    "liger_kernel use_liger_kernel": "leave it out: this project's own kernels are on; disable_fused switches them off",
    "quantization": "write use_4bit: true (QLoRA, NF4 with double quantisation) or use_8bit: true",
    "use_nested_quant bnb_4bit_use_double_quant bnb_4bit_quant_type bnb_4bit_compute_dtype": "leave it out: use_4bit is NF4 "
    "with double quantisation, computed in bf16, with fp16: true in float16, or with bf16: false in float32",
    "dtype torch_dtype": "write bf16: true, fp16: true, or bf16: false for float32",
    "model_type tokenizer_type is_llama_derived_model use_fast_tokenizer tokenizer_use_fast": "leave it out: the model's own files say it",
    "special_tokens": "leave it out: the tokenizer has its own, and there is no padding; stop_tokens adds what ends a completion",
    "strict": "leave it out: a key that is not known is always an error",
    "dataset_dir": "write data_path: with the folder in it, as data_path: FOLDER/FILE",
    "dataset_prepared_path overwrite_cache": "leave it out: tokenised rows are kept, and made anew where something changed",
    "preprocessing_num_workers dataset_processes num_proc": "leave it out: rows are tokenised on the cores that are there",
    "lora_target_linear": "write lora_target_modules: all-linear",
    "lora_modules_to_save additional_target": "leave it out: adapters are plain LoRA or rsLoRA, without whole modules beside them",
    "tf32": "leave it out: products in float32 are exact here",
    "xformers_attention sdp_attention s2_attention": "leave it out: documents of a pack attend by flash attention wherever the GPU has it",
    "plot_loss": "leave it out: report.html has the curves",
    "include_tokens_per_second include_num_input_tokens_seen": "leave it out: metrics have both",
    "ddp_find_unused_parameters": "leave it out: what gets no gradient is frozen, or named",
    "do_train": "leave it out: `manyrank train` trains",
    "do_eval": "leave it out: with eval_data_path or eval_split it validates",
    "dataloader_num_workers": "leave it out: a thread reads the next step",
    "remove_unused_columns": "leave it out: other columns of a row are not read",
    "pad_to_sequence_len": "leave it out: there is no padding",
    "logging_dir": "leave it out: logs are in the run's folder",
    "hub_strategy hub_always_push": "leave it out: push_to_hub uploads final_model at the end, and no checkpoints",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "num_gpus num_gpu n_gpus n_gpu devices world_size nproc num_processes nproc_per_node": "give --nproc N on the command "
    "line; without it there is a process for each GPU",
    "device cuda cpu use_cpu no_cuda": "leave it out: GPUs are used where there are any; CUDA_VISIBLE_DEVICES='' in front of "
    "the command trains on the CPU",
    "qlora 4bit": "write method: qlora, a base in 4 bits",
    "8bit": "write method: int8",
    "quantize bits": "write method: qlora, a base in 4 bits, or int8",
    "lora": "write method: lora, the default",
    "full": "write method: full",
    "fp32 float32": "write bf16: false",
    "offload cpu_offload zero_stage": "choose --strategy zero2, zero3, fsdp_offload or zero3_offload",
    "ddp zero2 zero3": "choose --strategy ddp, zero2 or zero3",
    "tokenizer tokenizer_name tokenizer_name_or_path": "leave it out: the model's own tokenizer is used",
    "system_prompt": "put it into the rows: a system message, or the column system",
    "prompt_template": "write chat_template: chatml, llama3, ... or a file",
    "dataset_text_field text_column": "write columns: {text: NAME}",
    "token hf_token hub_token": "set the environment variable HF_TOKEN, or run `hf auth login`",
    "cache_dir": "set the environment variable HF_HOME",
    "continue": "write resume_from_checkpoint: auto",
    "use_dora lora_bias modules_to_save": "leave it out: adapters are plain LoRA or rsLoRA, without biases",
    "neftune_noise_alpha": "leave it out: no noise is added to embeddings here",
    "message_field_training": "leave it out: `train`, `training` or `weight` of a message is read",
    "streaming": "leave it out: rows are read one at a time, and tokens are kept on disk, not in memory. For less of them write data_path: "
    "{path: FILE, max_rows: N}; the environment variable HF_DATASETS_CACHE names a larger disk, and a run with max_steps reads what it needs",
    "shuffle": "leave it out: rows are shuffled anew in every epoch, by the seed",
    "max_tokens": "write max_length, tokens of a row; or for grpo max_completion_length",
    "max_train_samples": "write data_path: {path: FILE, max_rows: N}",
    "group_by_length padding_side": "leave it out: there is no padding",
    "auto_find_batch_size": "write per_device_train_batch_size: auto, with a global_batch_size",
    "train_batch_size": "write global_batch_size, examples to a step, or per_device_train_batch_size, examples at once",
    "tensorboard mlflow": "write report_to: tensorboard, mlflow, ...",
    "master_addr master_port": "give --rdzv_endpoint HOST:PORT on the command line",
    "local_rank": "leave it out: the launcher sets it",
    "rope_scaling": "set it in the config.json of the model",
}
INSTEAD = {name: what for names, what in _INSTEAD.items() for name in names.split()}


def as_ours(key: str, value: Any) -> Any:
    """Translate a value that another tool has for a key."""
    return VALUES.get(key, {}).get(str(value).strip().lower(), value) if isinstance(value, str | bool) else value
