"""One step of GRPO by trl's GRPOTrainer: completions, rewards, advantages and loss. All that touches trl is in this file.

trl is given this project's accelerator and model and is never asked to train: no second loop, optimizer or checkpoint.
The reference of the KL divergence is the model as it was at the start: trl keeps a frozen second adapter "ref".

What is used of trl 1.16 that is not public, and has to be looked at with every new version:
    overridden  create_accelerator_and_postprocess, _tokenize_prompts
    called      _prepare_inputs
    read, set   _buffered_inputs, _step, _metrics, _logs, _tokenizer, current_gradient_accumulation_steps
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from ...chat_template.render import prompt_ids, render_options, stop_ids
from ...config.resolve import TrainConfig
from ...data.questions import Question
from ...data.rewards import Reward
from ...topology.precision import Precision
from ...training.callbacks import training_arguments
from .rewards import reward_functions


@dataclass(frozen=True)
class CompletionRecord:
    """A completion with its rewards, for people. `place` is the row's."""

    place: str
    prompt: str
    answer: str
    reference: str
    rewards: dict[str, float]
    advantage: float


class TrlStep(GRPOTrainer):
    """trl's trainer on a model and accelerator of this project.

    Args:
        model: with its adapters, not yet wrapped by a strategy; `join` takes the wrapped one.
        questions: by number, the prompts and references of all rows.
        accumulation: the micro-batches of a step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        rewards: Sequence[Reward],
        accumulation: int,
        precision: Precision,
    ) -> None:
        self.run_accelerator, self.questions, self.rendering = accelerator, questions, render_options(config)
        stops = sorted(token for token in stop_ids(tokenizer, self.rendering) if token is not None)
        model.generation_config.eos_token_id = stops  # what ends an answer in the data, too
        masters = {
            p: p.detach().clone() for p in model.parameters() if p.requires_grad and hasattr(model, "peft_config")
        }
        # transformers makes the folder that its arguments name; nothing is ever written there.
        args = training_arguments(
            config,
            output_dir=Path(tempfile.gettempdir()),
            total_steps=1,
            on_cpu=accelerator.device.type == "cpu",
            kind=GRPOConfig,
            **_options(config, rewards, accumulation, precision=precision),
        )
        if args.n_gpu > 1:  # one process sees several, of which it uses one
            args._n_gpu = 1  # transformers 5.23 has no other way to say so, and trl refuses DataParallel
        # With that variable its arguments would set up DeepSpeed a second time (see `training_arguments`).
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
            super().__init__(
                model,
                reward_functions(rewards, config, questions, tokenizer, accelerator.device),
                args,
                train_dataset=Dataset.from_dict({"prompt": ["-"]}),
                processing_class=tokenizer,
            )
        _copy_to_reference(model)
        for parameter, value in masters.items():  # trl 1.16 rounds the adapters of a quantised base to bf16
            parameter.data = value

    def create_accelerator_and_postprocess(self) -> None:
        """Take the accelerator that is there."""
        self.accelerator, self.gather_function = self.run_accelerator, self.run_accelerator.gather_for_metrics
        self.is_deepspeed_enabled = self.run_accelerator.state.deepspeed_plugin is not None
        self.is_fsdp_enabled = getattr(self.run_accelerator.state, "fsdp_plugin", None) is not None

    def join(self, wrapped: torch.nn.Module) -> None:
        """Generate and compute with the model as the strategy has wrapped it."""
        self.model_wrapped = wrapped

    # A step

    def complete(self, numbers: Sequence[int], *, step: int) -> list[dict]:
        """Complete prompts, score the completions, and lay them out in the micro-batches of a step.

        Args:
            numbers: of the questions of this process, each `num_generations` times in a row over all processes.
            step: optimizer steps until now, by which vLLM is sent the weights.

        Raises:
            UserError: a reward cannot be computed.
        """
        batch = [{"prompt": self.questions[number].prompt, "number": number} for number in numbers]
        self.numbers, self._step, self._buffered_inputs, self.state.global_step = numbers, 0, None, step
        with self.accelerator.autocast(), self._without_checkpointing():
            first = self._prepare_inputs(batch)
        return self._buffered_inputs if self.model.training else [first]

    def loss(self, inputs: dict, *, micro_batches: int) -> torch.Tensor:
        """The loss of one micro-batch; the sum over a step's, averaged over ranks, is the step's."""
        self.current_gradient_accumulation_steps = micro_batches
        return self.compute_loss(self.model_wrapped, inputs)

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """Render prompts as SFT does; trl would read special tokens in a user's words as such."""
        return [prompt_ids(self._tokenizer, prompt, options=self.rendering) for prompt in prompts], None, {}

    @contextlib.contextmanager
    def _without_checkpointing(self) -> Iterator[None]:
        """trl would switch it off to generate, and then on for all layers, with one more hook on the embedding each time."""
        checkpointed = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in checkpointed:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True

    # Metrics and records

    def measured(self) -> dict[str, float]:
        """The means of trl's metrics since the last call, of all ranks; those that had no value are left out."""
        means = _means(self._metrics["train"])
        self._metrics["train"].clear()
        return means

    @property
    def unmeasured(self) -> dict[str, list[float]]:
        """The values whose means the next call of `measured` returns; a checkpoint keeps them."""
        return {key: list(values) for key, values in self._metrics["train"].items()}

    @unmeasured.setter
    def unmeasured(self, values: dict[str, list[float]]) -> None:
        self._metrics["train"].clear()
        self._metrics["train"].update({key: list(values) for key, values in values.items()})

    def validated(self, completions: int) -> dict[str, list[float]]:
        """Return the rewards of the last step's first completions over all ranks, by name, and drop trl's means."""
        self._metrics["eval"].clear()
        return {name: list(values)[:completions] for name, values in self._logs["rewards"].items()}

    def completion_records(self, most: int) -> list[CompletionRecord]:
        """The first completions of the last step, on rank 0, whose questions come first."""
        logs, numbers = self._logs, self.numbers
        rows = range(min(most, len(numbers), len(logs["completion"])))
        return [
            CompletionRecord(
                place=self.questions[numbers[row]].place,
                prompt=self.questions[numbers[row]].prompt[-1]["content"],
                answer=_content(logs["completion"][row]),
                reference=self.questions[numbers[row]].reference,
                rewards={name: values[row] for name, values in logs["rewards"].items()},
                advantage=logs["advantages"][row],
            )
            for row in rows
        ]


@torch.no_grad()
def _copy_to_reference(model: torch.nn.Module) -> None:
    """Give the reference its tokens and embeddings: trl 1.16 copies only what stands in a module of its own."""
    values = dict(model.named_parameters())
    for name, value in values.items():
        if name.endswith(".default") and (reference := values.get(f"{name.removesuffix('default')}ref")) is not None:
            reference.copy_(value)


def _options(config: TrainConfig, rewards: Sequence[Reward], accumulation: int, *, precision: Precision) -> dict:
    """Translate the recipe into trl's options."""
    vllm = {
        "use_vllm": True,
        "vllm_mode": config.use_vllm,
        "vllm_server_base_url": config.vllm_server_base_url,
        "vllm_gpu_memory_utilization": config.vllm_gpu_memory_utilization,
    }
    return {
        "gradient_accumulation_steps": accumulation,
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "beta": config.beta,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "loss_type": config.loss_type,
        "scale_rewards": config.scale_rewards,
        "mask_truncated_completions": config.mask_truncated_completions,
        "reward_weights": [reward.weight for reward in rewards],
        "chat_template_kwargs": config.chat_template_kwargs,
        "trust_remote_code": config.trust_remote_code,
        "disable_dropout": True,
        "bf16": precision is Precision.BF16,
        "fp16": precision is Precision.FP16,
        "gradient_checkpointing": False,  # the layers have it already
        "eval_strategy": "no",
        "report_to": "none",  # else trl would tell trackers of its own time
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "num_generations_eval": config.num_generations,
        "log_completions": False,
        **(vllm if config.use_vllm != "off" else {}),
    }


def _content(completion: list[dict] | str) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"].strip()


def _means(metrics: dict[str, list[float]]) -> dict[str, float]:
    valid = {
        key: [value for value in values if not math.isnan(value)]
        for key, values in metrics.items()
        if key != "num_tokens"  # the loop counts its own
    }
    return {key: sum(values) / len(values) for key, values in valid.items() if values}
