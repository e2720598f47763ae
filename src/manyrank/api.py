"""The command line's training from Python: in a notebook on one process, or in a script under torchrun.

from manyrank import SFTConfig, SFTTrainer

config = SFTConfig(model_name_or_path="Qwen/Qwen2.5-1.5B", data_path="data/alpaca.json", output_dir="output", lora_r=8)
result = SFTTrainer(config).train()
result.final_model     # output/final_model
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from . import train
from .config.keywords import SFTConfig
from .data.dataset import prepare
from .errors import UserError
from .models.tokenizer import load_tokenizer
from .runs import run_folder
from .signals import STOP, end_with_parent
from .topology import ranks
from .topology.ranks import Topology
from .training.task import UserObjects


@dataclass(frozen=True)
class Trained:
    """A run that has come to its end.

    Attributes:
        folder: the run's folder. final_model: the folder of the adapter, or of the whole model; None after a dry run.
        global_step: optimizer steps of the run.
        metrics: the last values that were logged, also of validation: loss, grad_norm, eval_loss, ...
        history: every line of metrics, oldest first.
    """

    folder: Path
    final_model: Path | None
    global_step: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]


class SFTTrainer:
    """Trains as a config says, with the code that `manyrank train` runs on each rank.

    Under torchrun every rank makes one and calls `train`; `strategy` names how they work together (ddp unless given).

    Args:
        config: an SFTConfig, or a recipe's file or preset.
        model: a base in memory in place of `model_name_or_path`, which then only names it; without adapters. It is
            trained as it is: afterwards it has the adapters, or the new weights.
        tokenizer: in place of the model's own; it is copied.
        callbacks: transformers callbacks, beside the recipe's.
        loss: a function of logits (n, vocabulary) in float32 and targets (n,) of supervised tokens that gives their
            summed loss, a scalar; it is divided by the step's supervised tokens as cross-entropy is.
    """

    def __init__(
        self,
        config: SFTConfig | str | Path,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.config = config if isinstance(config, SFTConfig) else SFTConfig(config)
        self.objects = UserObjects(model, tokenizer, tuple(callbacks), loss)
        if model is not None and tokenizer is None and self.config.model_is_default:
            fix = "give tokenizer=, or model_name_or_path with the model's name"
            raise UserError("a model without its tokenizer", where="SFTTrainer, model", fix=fix)
        if self.config.per_device_train_batch_size == "auto":
            raise UserError(
                "a micro-batch of auto is decided by `manyrank train`",
                where="per_device_train_batch_size",
                fix="give a number",
            )

    def train(self) -> Trained:
        """Train to the end and save final_model.

        Raises:
            UserError: something of the config, the data or the machine is wrong.
            NonFiniteError: a loss or gradient is not finite; the optimizer has not used it.
            Preempted: a signal came, and the checkpoint is complete; it ends a script with exit code 75.
        """
        place = ranks.from_environment()
        folder = Path(self.config.output_dir or _folder(self.config, place))
        end_with_parent()  # where torchrun or accelerate has started this script
        with STOP.listening(), _as_it_was():
            run = train.train(self.config._resolved, place, folder, self.objects)
        state = run.trainer.state
        return Trained(
            folder,
            None if self.config.dry_run else folder / "final_model",
            state.global_step,
            {key: value for line in state.log_history for key, value in line.items()},
            state.log_history,
        )


def _folder(config: SFTConfig, place: Topology) -> Path:
    """The folder of a run that nobody has named: the next free one, where no other rank has to come to the same name."""
    last, free = run_folder.free_folder(Path("output/run"))
    if place.world_size > 1 or config.overwrite_output_dir:
        return Path("output/run")
    return last if config.resume_from_checkpoint else free


@contextmanager
def _as_it_was() -> Iterator[None]:
    """The environment and accelerate's state of the process, which a strategy sets, given back for the next training."""
    before = dict(os.environ)
    _reset()
    try:
        yield
    finally:
        _reset()
        if "wandb" in sys.modules:  # else the next training would go on in this one's run
            sys.modules["wandb"].finish()
        os.environ.clear()
        os.environ.update(before)


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class SFTDataset(Dataset):
    """Tokenised examples with their labels, as the training sees them.

    Args:
        data_path: a file, folder or hub name, or a list of sources as in a recipe.
        use_chat_template: the tokenizer's own (or the option chat_template); False: the messages alone, with an end
            after each answer (data/templates/plain.jinja).
        **options: any other key of a recipe that concerns the data: columns, overlong, thinking, duplicates, ...

    Raises:
        UserError: the data cannot be read, or a row cannot be used (see `on_bad_row`).
    """

    def __init__(
        self,
        data_path: str | Path | list,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        format_type: str = "auto",
        use_chat_template: bool = True,
        **options: Any,
    ) -> None:
        if not use_chat_template and options.setdefault("chat_template", "plain") != "plain":
            raise UserError("a chat template that is not used", where="use_chat_template", fix="leave one of them out")
        self.config = SFTConfig(
            model_name_or_path=tokenizer.name_or_path or "tokenizer",
            data_path=data_path,
            max_length=max_length,
            format_type=format_type,
            **options,
        )
        if self.config.sampling_temperature != 1:
            what = "a data set has each row once, and no epochs"
            raise UserError(what, where="sampling_temperature", fix="leave it out, and sample in your training")
        if self.config.streaming and not all(x.max_rows or self.config.max_rows for x in self.config.data_path):
            raise UserError("a stream without max_rows has no end", where="streaming", fix="give max_rows")
        self.tokenizer = load_tokenizer(self.config, tokenizer)
        self.examples = prepare(self.config.data_path, self.tokenizer, self.config)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, each (tokens,), int64; labels are -100 where nothing is learned."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        example = self.examples[index % len(self)]
        ids = torch.tensor(example["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(example["labels"])}
