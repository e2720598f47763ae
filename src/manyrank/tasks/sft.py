"""Supervised fine-tuning: the summed cross-entropy of the supervised tokens, over the step's number of them."""

from __future__ import annotations

import contextlib
import math
import zlib
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from transformers import PreTrainedTokenizerBase

from ..data.dataset import Examples
from ..data.loader import MicroBatch, Step, StepLoader, trial
from ..errors import UserError
from ..models.embedding_noise import Documents, EmbeddingNoise
from ..models.input_directions import input_directions
from ..models.load import resolve_name
from ..models.positions import check_lengths
from ..models.unlearned_rows import find_unlearned, rows_of, vocabulary_modules
from ..topology.precision import Precision
from ..training.loss import TokenLoss
from ..training.packing_trial import prove_packing
from ..training.task import StepLoss, Task

LOOKED_AT = 200  # examples
START_ROWS = 32  # on which EVA starts the adapters


def special_tokens(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], set[int]]:
    """The added tokens of a tokenizer that some examples have, and those that are learned there."""
    some = [examples[at] for at in np.linspace(0, len(examples) - 1, min(LOOKED_AT, len(examples)), dtype=int)]
    ids, labels = (np.unique(np.concatenate([row[key] for row in some])) for key in ("input_ids", "labels"))
    added = tokenizer.added_tokens_decoder.keys()
    return set(ids.tolist()) & added, set(labels.tolist()) & added


def _advice(ids: list[int], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    modules = [name.rpartition(".")[2] for name in vocabulary_modules(model)]
    line = f"{ids}" if len(modules) == 1 else f"{{{', '.join(f'{name}: {ids}' for name in modules)}}}"
    tokens = ", ".join(tokenizer.convert_ids_to_tokens(ids))
    return (
        f"the base has never learned {tokens}, which the data has, and adapters on layers do not train their embeddings: "
        f"add trainable_token_indices: {line}"
    )


class SFT(Task):
    """Learns the supervised tokens of the examples."""

    def select_examples(
        self, train: Examples, evaluation: Examples | None, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Examples, Examples | None]:
        lengths = [int(part.lengths.max()) for part in (train, evaluation) if part and len(part)]
        check_lengths(self.config, lengths, self.objects.model)
        self.special = special_tokens(train, tokenizer)
        return train, evaluation

    def prepare_model(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Precision,
    ) -> None:
        """Say which learned tokens have rows that the base has never learned."""
        if not self.config.uses_lora or not accelerator.is_main_process:
            return
        read, learned = self.special
        rows = rows_of(resolve_name(self.config.model_name_or_path), self.objects.model)
        ids = find_unlearned(model, read, tokenizer.added_tokens_decoder, len(tokenizer), rows) if learned else []
        if learned & set(ids):
            print(_advice(ids, model, tokenizer), flush=True)

    def use_engine(self) -> None:
        engine = self.engine
        self.device = engine.accelerator.device
        own, config = self.objects.loss, self.config
        for key in ("label_smoothing_factor", "dft_loss"):
            if own and getattr(config, key):
                raise UserError(f"{key} with a loss of your own", where=key, fix="do it there, and leave the key out")
        options = {"fused": "lm_head" not in config.disable_fused, "function": own}
        options |= {"smoothing": config.label_smoothing_factor, "dynamic": config.dft_loss}
        self.token_loss = TokenLoss(engine.wrapped, engine.model, **options)
        alpha = config.neftune_noise_alpha
        self.noise = EmbeddingNoise(engine.model.get_input_embeddings(), alpha) if alpha else None

    def loader(self, examples: Examples, *, training: bool) -> StepLoader:
        config, accelerator = self.config, self.engine.accelerator
        eval_batch = config.per_device_eval_batch_size or config.micro_batch
        return StepLoader(
            examples=examples,
            batch_size=config.batch(accelerator.num_processes) if training else eval_batch * accelerator.num_processes,
            micro_batch_size=config.micro_batch if training else eval_batch,
            max_length=config.max_length,
            # Packs of the whole data set are for training: a validation keeps the order of the file.
            packing="step" if not training and config.packing == "dataset" else config.packing,
            pad_token=self.tokenizer.pad_token_id,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            seed=config.order_seed if training else None,
        )

    def begin(self, loader: StepLoader) -> None:
        """Start adapters by EVA; each rank forwards the same rows, in the same layout on any number of them."""
        if self.config.init_lora_weights != "eva":
            return
        packing = "none" if loader.packing == "none" else "step"
        layout = {"batch_size": START_ROWS, "micro_batch_size": 1, "packing": packing, "rank": 0, "ranks": 1}
        batches = [micro.to(self.device) for micro in replace(loader, **layout).step(0).micro_batches]
        tokens = [micro.positions + 1 for micro in batches]  # that are learned

        def forward(number: int) -> None:
            self.in_phase("finding where the adapters start")
            self._loss(batches[number])

        with self.engine.evaluating():
            starts = input_directions(self.engine.model, tokens, forward, seed=self.config.seed)
        for name, value in starts.items():
            value = broadcast(value.contiguous())
            self.engine.set_parameter(f"base_model.model.{name}.lora_A.default.weight", value)

    def check(self, *, precision: Precision) -> None:
        """Check that packs, and then the fused lm_head, leave the model's results as they are."""
        engine, packed = self.engine, self.config.packing != "none"
        micro = trial(packed=packed).to(self.device)
        with engine.evaluating():
            if packed:
                rounds = self.config.method in ("int8", "fp8")  # rows of activations
                exact = not precision.half and not rounds
                prove_packing(engine.wrapped, engine.model, exact=exact, device=self.device)
            self.token_loss.prove(micro.inputs, micro.positions, micro.targets, agree=self._agree)

    def _agree(self, seen: bool) -> bool:
        return self.engine.sum(torch.tensor(float(not seen), device=self.device)).item() == 0

    def forward_backward(self, step: Step, *, number: int) -> StepLoss:
        losses = []
        # Every strategy averages gradients over ranks; the loss contract wants their sum over the step's tokens.
        scale = self.engine.accelerator.num_processes / step.supervised
        for index, micro in enumerate(step.micro_batches):
            last = index + 1 == len(step.micro_batches)
            self.in_phase(f"forward and backward of micro-batch {index + 1}")
            noise = self.noise.on(self._documents(micro, number)) if self.noise else contextlib.nullcontext()
            with self.engine.forward_backward(last=last), noise:
                loss = self._loss(micro)
                self.engine.backward(loss * scale, last=last)
            losses.append(loss.detach())
        return StepLoss(losses, step.supervised)

    def _documents(self, micro: MicroBatch, number: int) -> Documents:
        """The documents of a micro-batch, each with a seed that is its own in this step."""
        seeds = (f"{self.config.seed} {number} {source} {row}" for source, row in micro.rows)
        places = zip(micro.documents(), seeds, strict=True)
        return [(start, length, zlib.crc32(seed.encode())) for (start, length), seed in places]

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        micro = micro.to(self.device)
        return self.token_loss(micro.inputs, micro.positions, micro.targets)

    def zero_step(self, step: Step) -> None:
        micro = step.micro_batches[0].to(self.device)
        nothing = micro.positions[:0]
        with self.engine.forward_backward(last=True):
            self.engine.backward(self.token_loss(micro.inputs, nothing, nothing), last=True)

    def evaluate(self, loader: StepLoader, *, number: int) -> dict[str, float]:
        """Mean loss and perplexity over the supervised tokens."""
        total, supervised = torch.zeros((), device=self.device), 0
        with self.engine.evaluating():
            for index in range(loader.steps_per_epoch):
                self.in_phase(f"step {index + 1} of the validation")
                step = loader.step(index)
                supervised += step.supervised
                for micro in step.micro_batches:
                    total += self._loss(micro)
        loss = self.engine.sum(total).item() / supervised
        own = bool(self.token_loss.function)  # whose exponential is no perplexity
        return {"eval_loss": loss} if own else {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}

    def describe(self, loader: StepLoader) -> str | None:
        if loader.ranks == 1 or loader.packing == "none":
            return None
        return f"packing: {loader.packing}; {loader.imbalance():.1%} between the longest rank and the mean"

    def close(self) -> None:
        if self.noise:
            self.noise.release()
        if self.token_loss.head:
            self.token_loss.head.release()
