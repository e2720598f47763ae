"""The keys of a recipe, with type, default and description. `resolve` reads recipes into `TrainConfig`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..topology.strategies import STRATEGIES
from .data_source import Sources
from .value_types import (
    Alphas,
    Arguments,
    Attention,
    Cache,
    Columns,
    EachEpoch,
    EvalSteps,
    Float,
    Format,
    InitialWeights,
    Int,
    Layers,
    Mapping,
    Method,
    Metric,
    MicroBatch,
    Numbers,
    Optimizer,
    Part,
    Parts,
    Patterns,
    Ranks,
    Roles,
    SaveSteps,
    Schedule,
    StrategyOrAuto,
    Strings,
    Tags,
    Task,
    Tokens,
    Vllm,
    Warmup,
)

OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OF_FULL = ("frozen_parameters", "unfrozen_parameters", "pure_bf16")


class Keys(BaseModel):
    """Base of a group of keys; its docstring, up to a colon or full stop, is their title in help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


class ModelKeys(Keys):
    """Model and method."""

    task: Task = Field(
        "sft",
        description="sft: learn the assistant's turns of the data; grpo: learn from the rewards of sampled completions",
    )
    model_name_or_path: str = Field(
        min_length=1, description="a folder, a hub name, or 'embedded' for the small model made here"
    )
    sft_model: str | None = Field(
        None,
        min_length=1,
        description="where grpo starts: a run, a checkpoint, an adapter or a merged model; its base need not be named",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    method: Method = Field(
        "lora",
        description="all weights (full), or adapters on a base of 16 (lora), 4 (qlora) or 8 bits (int8, fp8); qlora is NF4 with double quantisation unless bnb_4bit_* say otherwise, fp8 has products in float8, too",
    )
    frozen_parameters: Patterns = Field(
        [],
        description="parameters or modules that full does not train: names or patterns, as embed_tokens, layers.[0-9]",
    )
    unfrozen_parameters: Patterns = Field(
        [], description="those that full trains alone, as layers.3[01], norm, lm_head"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="numbers of a 4-bit base (default: as it is stored, else nf4)"
    )
    bnb_4bit_use_double_quant: bool | None = Field(
        None,
        description="quantise its constants, too: 0.13 bits of a weight in place of 0.5 (default: as stored, else true)",
    )
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="the type in which a 4-bit base is multiplied; it must be what bf16 and fp16 say"
    )
    bnb_4bit_quant_storage: Literal["bfloat16", "float16", "float32", "uint8"] | None = Field(
        None, description="the type into which 4-bit weights are packed, so that they can be sharded; the same"
    )


class AdapterKeys(Keys):
    """Adapters."""

    adapter: str | None = Field(
        None,
        min_length=1,
        description="a run, a checkpoint or a LoRA adapter of any tool, whose training continues with new data; its base need not be named",
    )
    new_adapter: bool = Field(
        False, description="freeze that adapter and train another on top; both are saved as one adapter on the base"
    )
    allow_base_change: bool = Field(
        False, description="put that adapter on another base than the one that it was made for"
    )
    lora_r: Int = Field(16, gt=0, description="rank of the adapters")
    lora_alpha: Float = Field(32, gt=0, description="adapters are scaled by lora_alpha / lora_r")
    use_rslora: bool = Field(False, description="scale adapters by lora_alpha / sqrt(lora_r), for large ranks (rsLoRA)")
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters")
    lora_target_modules: Literal["all-linear"] | Strings = Field(
        "all-linear", description="'all-linear' (every linear layer but the lm_head) or a list of module names"
    )
    exclude_modules: Patterns = Field([], description="modules without adapters: names, or patterns of whole names")
    layers_to_transform: Numbers = Field([], description="numbers of the layers that have adapters (default: all)")
    layers_pattern: Strings = Field([], description="names of the lists that layers_to_transform counts (default: any)")
    rank_pattern: Ranks = Field({}, description="other ranks than lora_r, by names or patterns of modules")
    alpha_pattern: Alphas = Field({}, description="other alphas than lora_alpha, by names or patterns of modules")
    target_parameters: Strings = Field(
        [], description="parameters with adapters that are no linear layers, as mlp.experts.gate_up_proj"
    )
    init_lora_weights: InitialWeights = Field(
        "true",
        description="start of the adapters: true (A random, B zero), gaussian, orthogonal; from the base's weights pissa, "
        "pissa_niter_N or olora; from the data eva; loftq, for qlora",
    )
    use_dora: bool = Field(False, description="train a magnitude of each output, too (DoRA); slower")
    lora_bias: bool = Field(False, description="train a bias with each adapter")
    modules_to_save: Strings = Field(
        [], description="modules that are trained whole beside the adapters, as embed_tokens"
    )
    trainable_token_indices: Tokens = Field(
        [], description="ids of tokens whose embeddings are trained; {MODULE: ids} for other modules than the embedding"
    )
    add_tokens: Strings = Field(
        [], description="tokens that the tokenizer gets; their embeddings start as the mean of all, and are trained"
    )
    add_special_tokens: Strings = Field(
        [], description="the same of tokens that are no text, as <tool_call>: completions are shown without them"
    )
    loraplus_lr_ratio: Float | None = Field(
        None, ge=1, description="learning rate of the matrices B over that of the matrices A (LoRA+)"
    )


class DataKeys(Keys):
    """Data."""

    data_path: Sources = Field(description="training data: a file, folder or hub name, or a list of sources")
    eval_data_path: Sources | None = Field(None, description="validation data, see eval_steps")
    eval_split: Part = Field(
        0.0,
        ge=0,
        description="share of the training data to validate on instead, or from 1 on a number of examples; a hash of the "
        "content chooses them",
    )
    format_type: Format = Field(
        "auto", description="how rows are read; 'auto' goes by the first row that fits; or module:function"
    )
    columns: Columns | None = Field(None, description="the format's fields, and the names that they have in the rows")
    max_rows: Int | None = Field(
        None,
        gt=0,
        description="at most so many rows of each source, chosen by the seed (of a stream the first); a source may have its own",
    )
    streaming: bool = Field(
        False,
        description="read only the first rows of a source: max_rows, or what max_steps needs; for sources too large for the disk",
    )
    sampling_temperature: Float = Field(
        1.0,
        ge=1,
        description="of several sources: an epoch has as many rows as there are, in shares of (rows of the source) ** (1 / this); 1: each row once",
    )
    max_repeats: Float | None = Field(
        None, ge=1, description="how often a row is seen in an epoch at most, with sampling_temperature"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="an invalid row: stop, or skip it and list it in logs/quarantine.jsonl"
    )
    duplicates: Literal["keep", "drop"] = Field("keep", description="rows that equal an earlier one")
    max_length: Int = Field(1024, gt=1, description="most tokens of an example; for longer ones see `overlong`")
    overlong: Literal["truncate", "drop", "split", "error"] = Field(
        "truncate", description="what happens to a longer example"
    )
    packing: Literal["step", "dataset", "none"] = Field(
        "step",
        description="'step': the examples of each step without padding; 'dataset': examples packed to max_length over the whole data "
        "set, and a batch counts packs; 'none': padded rows",
    )
    dataset_num_proc: Int | None = Field(None, gt=0, description="processes that tokenise; none: by rows and cores")


class LearnedKeys(Keys):
    """What is learned."""

    chat_template: str | None = Field(
        None,
        min_length=1,
        description="a Jinja file, one of chatml, llama3, gemma, mistral, zephyr, deepseek_r1, plain, or one of the tokenizer's own templates",
    )
    chat_template_kwargs: Mapping = Field(
        {}, description="variables for the template, such as {enable_thinking: false}"
    )
    stop_tokens: Strings = Field([], description="tokens that end a turn, for templates (GLM's) that do not write one")
    thinking: Literal["keep", "strip"] = Field(
        "keep", description="the assistant's thinking: as the template writes it, or removed"
    )
    roles_to_train: Roles = Field(
        ["assistant"], description="whose messages are learned: assistant, user, system, tool"
    )
    train_on_eos: Literal["turn", "all", "last"] = Field(
        "turn",
        description="end-of-turn tokens that are learned: those of the learned messages, all of the conversation, or its last one",
    )
    train_on_last_turn: bool = Field(False, description="learn only the last assistant turn of each conversation")
    train_on_prompt: bool = Field(False, description="learn every token, also those of the prompt")
    train_on_opening: bool = Field(
        False, description="learn also what the template writes before an answer, such as an empty thinking block"
    )


class GrpoKeys(Keys):
    """Rewards and completions (GRPO): a batch counts completions."""

    rewards: Mapping = Field(
        {},
        description="by name a weight, or {weight: 1, option: ...}: numeric, exact, normalised, f1, choice, format, length, "
        "repetition, command, model or module:function",
    )
    on_reward_error: Literal["error"] | Float = Field(
        "error",
        description="a completion whose reward cannot be computed: stop and name the row, or give it this score",
    )
    num_generations: Int = Field(4, gt=1, description="completions of each prompt, which are compared with each other")
    max_completion_length: Int = Field(256, gt=0, description="most tokens of a completion")
    beta: Float = Field(0.04, ge=0, description="weight of the KL divergence from the model at the start")
    temperature: Float = Field(1.0, gt=0, description="sampling temperature")
    top_p: Float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: the likeliest tokens of this total probability"
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        "dapo",
        description="how token losses are averaged: over the step, each completion, the micro-batch, or a fixed length",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="advantages are divided by the standard deviation of the group, of the batch, or not at all",
    )
    mask_truncated_completions: bool = Field(False, description="leave completions that are cut off out of the loss")
    use_vllm: Vllm = Field("off", description="generate with vLLM: on the training's GPUs (colocate), or on a server")
    vllm_server_base_url: str | None = Field(
        None, min_length=1, description="address of the vLLM server, as http://host:8000"
    )
    vllm_gpu_memory_utilization: Float = Field(
        0.3, gt=0, lt=1, description="share of a GPU's memory that a colocated vLLM takes"
    )


class OptimisationKeys(Keys):
    """Batch and optimisation."""

    per_device_train_batch_size: MicroBatch = Field(
        4,
        description="examples of max_length that a process forwards at once; auto: as many as fit, with a global_batch_size "
        "(default with a global_batch_size on one machine with GPUs: as many as keep them busy and fit)",
    )
    gradient_accumulation_steps: Int | None = Field(None, gt=0, description="micro-batches to one optimizer step")
    global_batch_size: Int | None = Field(None, gt=0, description="examples to one optimizer step, over all processes")
    per_device_eval_batch_size: Int | None = Field(
        None, gt=0, description="the same for validation (default: as for training)"
    )
    learning_rate: Float = Field(2e-4, ge=0, description="peak learning rate")
    lr_scheduler_type: Schedule = Field("cosine", description="shape of the learning rate's schedule")
    lr_scheduler_kwargs: Mapping = Field(
        {}, description="arguments of the schedule, as {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    warmup_steps: Warmup = Field(
        0, description="steps in which the learning rate rises from 0, or a share of the run's"
    )
    num_train_epochs: Float = Field(3.0, gt=0, description="epochs")
    max_steps: Int = Field(-1, ge=-1, description="optimizer steps; overrides num_train_epochs when positive")
    optim: Optimizer = Field("adamw_torch", description="optimizer")
    optim_args: Arguments = Field(
        {}, description="its arguments that are no keys of their own, as {momentum: 0.9} of sgd"
    )
    weight_decay: Float = Field(0.0, ge=0, description="weight decay of matrices (not of biases and norms)")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="first decay rate of AdamW and Lion")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="second decay rate of AdamW and Lion")
    adam_epsilon: Float = Field(1e-8, gt=0, description="AdamW's epsilon")
    label_smoothing_factor: Float = Field(
        0.0, ge=0, lt=1, description="share of each target that is spread over the vocabulary, in training"
    )
    dft_loss: bool = Field(
        False, description="scale each token's loss by its probability in training (Dynamic Fine-Tuning)"
    )
    neftune_noise_alpha: Float | None = Field(
        None, ge=0, description="noise on the embeddings in training, of up to this / sqrt(length x width) (NEFTune)"
    )
    max_grad_norm: Float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 does not clip")
    seed: Int = Field(
        42, ge=0, lt=2**32, description="seed of the adapters' initial weights, the data's order and dropout"
    )
    data_seed: Int | None = Field(
        None, ge=0, lt=2**32, description="seed of the data's order and of max_rows (default: seed)"
    )


class SpeedKeys(Keys):
    """Precision, memory and speed."""

    bf16: bool | Literal["auto"] = Field(
        "auto", description="compute in bf16; auto: where the GPU or CPU does it natively"
    )
    fp16: bool = Field(
        False, description="compute in float16 with a loss scale, for GPUs before Ampere (T4, V100); in place of bf16"
    )
    pure_bf16: bool = Field(
        False,
        description="full: keep weights, gradients and moments in bf16, too, half of the memory; small updates are rounded away",
    )
    tf32: bool = Field(False, description="products in float32 of GPUs from Ampere on in TF32, which rounds at 5e-4")
    full_determinism: bool = Field(False, description="deterministic algorithms: the same bits each time, slower")
    attn_implementation: Attention | None = Field(None, description="kernel of the attention (default: the fastest)")
    quantized_cache: Cache = Field(
        "auto",
        description="where qlora keeps the quantised base of a model that it loads in shards, for the next start: a folder, off, or "
        "auto: in $MANYRANK_CACHE or ~/.cache/manyrank",
    )
    gradient_checkpointing: Layers = Field(
        "auto",
        description="recompute activations instead of keeping them: off, full (every layer), the first N layers, "
        "or auto: as few as the GPU's memory asks for",
    )
    torch_compile: bool = Field(False, description="compile each layer; takes a minute or two at the start")
    disable_fused: Parts = Field(
        [],
        description="parts to run without this project's kernels, to compare: lm_head, lora, attention (on CPUs in bf16; FlashAttention 3 and 4), norm (on CUDA), mlp, rope",
    )


class OutputKeys(Keys):
    """Validation, saving and logging."""

    output_dir: str | None = Field(None, min_length=1, description="the run's folder (default: output/RECIPE)")
    overwrite_output_dir: bool = Field(
        False, description="remove an earlier run from output_dir first; what is not a run's stays"
    )
    eval_steps: EvalSteps = Field(
        None,
        description="steps between two validations, or a share of the run's; epoch, the default with validation data; or off",
    )
    eval_on_start: bool = Field(False, description="validate before the first step, too")
    save_steps: SaveSteps = Field(
        "auto",
        description="steps between checkpoints, or a share of the run; auto: each epoch, 50 to 500 steps apart",
    )
    save_total_limit: Int | None = Field(3, gt=0, description="checkpoints to keep; the best one stays")
    load_best_model_at_end: bool = Field(False, description="final_model is the checkpoint with the best metric")
    metric_for_best_model: Metric = Field(
        "eval_loss",
        description="validation metric that decides which checkpoint is best: loss, perplexity, reward, ...",
    )
    greater_is_better: bool = Field(False, description="whether a greater metric is better")
    early_stopping_patience: Int | None = Field(
        None, gt=0, description="validations without a better metric after which the run stops"
    )
    early_stopping_threshold: Float = Field(0.0, ge=0, description="by how much a better metric must be better")
    resume_from_checkpoint: str | None = Field(
        None, min_length=1, description="a checkpoint folder, or 'auto' for the run's newest"
    )
    resume_changes: Strings = Field(
        [],
        description="keys that may differ from the checkpoint on a resume: learning_rate, max_steps, data_path, ...",
    )
    run_name: str | None = Field(None, min_length=1, description="name of the run in the trackers")
    logging_steps: EachEpoch = Field(10, description="steps between lines of metrics, or a share of the run's; epoch")
    logging_first_step: bool = Field(False, description="a line of metrics for the first step, too")
    report_to: Strings = Field([], description="trackers: none, wandb, tensorboard, mlflow, ...")
    wandb_project: str | None = Field(None, min_length=1, description="W&B project")
    wandb_tags: Tags = Field([], description="tags of the W&B run")
    push_to_hub: bool = Field(False, description="upload final_model to the hub at the end, as `manyrank push` does")
    hub_model_id: str | None = Field(
        None, min_length=1, description="repository on the hub, as USER/NAME (default: the name of output_dir)"
    )
    hub_private_repo: bool = Field(False, description="make that repository private")
    callbacks: Strings = Field([], description="your TrainerCallback classes, as module:Class")
    sample_questions: Strings = Field([], description="prompts that are completed before and after the training")
    sample_max_new_tokens: Int = Field(64, gt=0, description="most tokens of these completions")
    ignore_warnings: Strings = Field([], description="names of warnings (docs/rules.md) that are not printed")


class PlaceKeys(Keys):
    """Where to run: what a recipe may say of it."""

    strategy: StrategyOrAuto = Field(
        None,
        description=f"one of auto, {', '.join(STRATEGIES)}; auto: on GPUs the fastest that fits, else single or ddp",
    )
    hsdp_shard_size: Int | None = Field(
        None, gt=1, description="processes that share one copy of the model under hsdp; none: those of one machine"
    )
    elastic: bool = Field(False, description="continue with the machines that are left when others fail")
    hang_timeout: Float = Field(
        600, gt=0, description="seconds without progress after which a rank is named and its stacks are written"
    )
    ddp_timeout: Int = Field(
        900, gt=0, description="seconds that ranks wait for another in a training step, after which the run ends"
    )
    dry_run: bool = Field(False, description="load everything, run one step forward and backward, save nothing")


# Of several bases, pydantic takes the fields of the last one first.
class TrainConfig(
    PlaceKeys, OutputKeys, SpeedKeys, OptimisationKeys, GrpoKeys, LearnedKeys, DataKeys, AdapterKeys, ModelKeys
):
    """Keys of a recipe. Typed and frozen; batch sizes count examples, lengths count tokens."""

    model_config = ConfigDict(defer_build=False)

    @property
    def is_grpo(self) -> bool:
        return self.task == "grpo"

    @property
    def subtracts_start(self) -> bool:
        """Whether the adapters' start is subtracted from the base: a copy of it lies frozen below them."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def start_model(self) -> str | None:
        """What the run starts from on its base: an adapter, or for grpo also a merged model."""
        return self.adapter or self.sft_model

    @property
    def method_options(self) -> dict[str, Any]:
        """The keys that shape what is trained and are not at their defaults, beside rank, alpha, dropout and targets."""
        keys = [key for key in AdapterKeys.model_fields if key not in OF_LORA] if self.uses_lora else OF_FULL
        return {key: getattr(self, key) for key in keys if getattr(self, key) != type(self).model_fields[key].default}

    @property
    def order_seed(self) -> int:
        """The seed of the data's order, and of the rows that a part of a source has."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def expandable_segments(self) -> bool:
        """Whether torch may use expandable segments of GPU memory, see `topology.allocator`."""
        return not (self.is_grpo and self.use_vllm == "colocate")

    def plain(self) -> dict[str, Any]:
        """The values as YAML writes them; a source that is only a path is that path."""
        values = self.model_dump()
        for key in ("data_path", "eval_data_path"):
            sources = [source.model_dump(exclude_defaults=True) for source in getattr(self, key) or []]
            plain = [source["path"] if len(source) == 1 else source for source in sources]
            values[key] = (plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain) or None
        return values

    @property
    def has_validation(self) -> bool:
        return bool(self.eval_data_path or self.eval_split) and self.eval_steps != "off"

    @property
    def uses_lora(self) -> bool:
        return self.method != "full"

    @property
    def micro_batch(self) -> int:
        """per_device_train_batch_size, once a launch has decided what `auto` is."""
        if isinstance(self.per_device_train_batch_size, str):
            raise ValueError("per_device_train_batch_size is auto, and no launch has decided it")
        return self.per_device_train_batch_size

    def batch(self, world_size: int) -> int:
        """Examples to one optimizer step; the product with `world_size` unless the recipe fixes it."""
        return self.global_batch_size or (self.micro_batch * (self.gradient_accumulation_steps or 1) * world_size)
