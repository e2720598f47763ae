"""A recipe to a session: start the strategy, read the data, load and wrap the model, and set up its trainer."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..checkpoint.resume import Start, base_fingerprint, find_start
from ..config.identity import batch_per_process, identity, refuse_changes
from ..config.resolve import TrainConfig
from ..data.dataset import Examples, prepare
from ..data.loader import trial
from ..data.questions import Question
from ..errors import UserError
from ..models.adapters import remove_adapters
from ..models.load import (
    evaluation_mode,
    fitted,
    load_adapter,
    load_model,
    load_tokenizer,
    plan_load,
    read_config,
    resolve_name,
    with_adapters,
)
from ..models.positions import check_lengths
from ..parallel import compile_locks
from ..parallel.accelerator import start_accelerator
from ..parallel.engine import prepare_engine
from ..plan.planned_run import PlannedRun
from ..runs import artifact
from ..topology.ranks import Topology
from . import trackers
from .memory import describe_checkpointing, plan_run
from .metrics import Meter, kind_of
from .optim import build_optimizer
from .packing_trial import prove_packing
from .session import Session, UserObjects
from .trainer import Trainer
from .watchdog import Heart


class Task(Protocol):
    """What a run learns from, where that is more than the examples."""

    def questions_of(
        self,
        train: Examples,
        evaluation: Examples | None,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
    ) -> tuple[Examples, Examples | None, Sequence[Question]]:
        """The examples that have a question, and these."""

    def trainer_of(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        bf16: bool,
    ) -> tuple[Callable[..., Trainer], str]:
        """What makes the trainer, and the fingerprint of the questions."""


def open_session(
    config: TrainConfig,
    place: Topology,
    *,
    output_dir: Path,
    bf16: bool,
    task: Task | None = None,
    user_objects: UserObjects | None = None,
    heart: Heart | None = None,
) -> Session:
    """Start the strategy, read the data, load and wrap the model.

    Args:
        task: what the run learns from, where that is more than the examples (`tasks.of`).
        heart: of a run that has `output_dir` for itself; its signs of life are written there once all ranks have met.

    Raises:
        UserError: something that only shows now is wrong: a row, the model, a checkpoint.
    """
    if config.is_grpo != (task is not None):
        raise ValueError(f"the task of the recipe is {config.task}, and {task} was given")
    user_objects = user_objects or UserObjects()
    with _restored_on_failure(user_objects.model):
        return _open(config, place, output_dir, task, user_objects, heart, bf16=bf16)


def _open(
    config: TrainConfig,
    place: Topology,
    output_dir: Path,
    task: Task | None,
    user_objects: UserObjects,
    heart: Heart | None,
    *,
    bf16: bool,
) -> Session:
    _prepare_environment(config, place, output_dir)
    own_folder, heart = output_dir if heart and not config.dry_run else None, heart or Heart(place.rank)
    heart.beat(0, "loading the tokenizer")
    tokenizer = _tokenizer(config, user_objects)
    accelerator = _meet(config, place, heart, own_folder, bf16=bf16)
    start = find_start(config, output_dir, accelerator)
    per_process = batch_per_process(config)
    config, needed = _amounts(config, start, accelerator.num_processes)
    heart.beat(0, "reading and tokenising the data")
    train, evaluation, questions = _data(config, tokenizer, needed, task, user_objects.model)
    if accelerator.is_main_process:
        _tell(config, train, evaluation)
    planned = _plan(config, accelerator, place, user_objects.model, bf16=bf16)
    if planned:
        settled = planned.config.gradient_checkpointing
        config = config.model_copy(update={"gradient_checkpointing": settled})
    base, give_back = _fingerprint(user_objects.model), _lent(user_objects.model)
    heart.beat(0, "loading the model")
    model = _model(config, accelerator, user_objects.model, bf16=bf16)
    kind, rows = _kind(config, task, model, accelerator, tokenizer, questions, bf16=bf16)
    with heart.waiting("distributing the model and the optimizer", compile_locks.explain):
        engine = prepare_engine(accelerator, model, build_optimizer(model, config))
    torch.manual_seed(config.seed + accelerator.process_index)  # each rank has dropout of its own
    run = _run(
        config,
        accelerator,
        start,
        train,
        model,
        base=base,
        rows=rows,
        user_objects=user_objects,
        per_process=per_process,
        needed=needed,
        bf16=bf16,
    )
    meter = Meter(accelerator.device.type, planned, kind_of(accelerator.device))
    given = {"callbacks": user_objects.callbacks, "loss": user_objects.loss, "heart": heart}
    trainer = kind(config, engine, tokenizer, train, evaluation, output_dir=output_dir, run=run, meter=meter, **given)
    heart.beat(0, "trying the loss on a small example")
    _prove(trainer, bf16=bf16)
    start = _with_changes(start, trainer.run, config)
    _tell_balance(config, trainer, accelerator)
    own_tokenizer = user_objects.tokenizer is not None
    return Session(config, engine, tokenizer, trainer, output_dir, start, planned, own_tokenizer, give_back)


def _amounts(config: TrainConfig, start: Start, processes: int) -> tuple[TrainConfig, int | None]:
    """The recipe with the batch that a resumed run is bound to, and the examples that the run needs."""
    if not start.folder:
        return config, _needed(config, processes)
    if config.global_batch_size is None:  # fixed in the run, whatever the number of processes is now
        config = config.model_copy(update={"global_batch_size": start.run["global_batch_size"]})
    return config, start.run["needed"]


def _meet(config: TrainConfig, place: Topology, heart: Heart, folder: Path | None, *, bf16: bool) -> Accelerator:
    """Start the strategy; from then on the signs of life are written into the folder, if this run has one for itself."""
    with heart.waiting(f"waiting for all {place.world_size} processes to meet", compile_locks.explain):
        accelerator = start_accelerator(config, place, bf16=bf16)
    if folder:
        heart.attach(folder)
    heart.beat(0, "looking for a checkpoint")
    return accelerator


def _kind(
    config: TrainConfig,
    task: Task | None,
    model: torch.nn.Module,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    bf16: bool,
) -> tuple[Callable[..., Trainer], str | None]:
    """What makes the task's trainer, and the fingerprint of the questions that it asks."""
    return task.trainer_of(model, config, accelerator, tokenizer, questions, bf16=bf16) if task else (Trainer, None)


def _run(
    config: TrainConfig,
    accelerator: Accelerator,
    start: Start,
    train: Examples,
    model: torch.nn.Module,
    *,
    base: str | None,
    rows: str | None,
    user_objects: UserObjects,
    per_process: int | None,
    needed: int | None,
    bf16: bool,
) -> dict:
    """The values that a resumed run must share with this one."""
    commit = getattr(model.config, "_commit_hash", None)
    return identity(
        config,
        model=base or base_fingerprint(resolve_name(config.model_name_or_path), commit),
        sft_model=_sft_fingerprint(config),
        rows=rows,
        loss=user_objects.loss and f"{user_objects.loss.__module__}.{user_objects.loss.__qualname__}",
        data=train.fingerprint,
        global_batch_size=config.batch(accelerator.num_processes),
        # What stands beside a global batch is only how it is laid out.
        batch_per_process=per_process or start.run.get("batch_per_process"),
        needed=needed,
        examples=len(train),
        tokens=int(train.lengths.sum()),
        bf16=bf16,
    )


def _with_changes(start: Start, run: dict, config: TrainConfig) -> Start:
    """With what a resumed run has otherwise than its checkpoint, as it may."""
    if not start.folder:
        return start
    changed = refuse_changes(start.folder, run, allowed=config.resume_changes)
    return replace(start, notes=(*start.notes, *(f"changed, as allowed: {change}" for change in changed)))


def _tell(config: TrainConfig, train: Examples, evaluation: Examples | None) -> None:
    print(f"training data: {train.describe()}", flush=True)
    if evaluation:
        print(f"validation data: {evaluation.describe()}", flush=True)
    if config.trust_remote_code:
        print(f"trust_remote_code is on: code from {config.model_name_or_path} runs here", flush=True)


def _tell_balance(config: TrainConfig, trainer: Trainer, accelerator: Accelerator) -> None:
    if accelerator.is_main_process and accelerator.num_processes > 1 and config.packing != "none":
        balance = f"{trainer.loader.imbalance():.1%} between the longest rank and the mean"
        print(f"packing: {config.packing}; {balance}", flush=True)


def _plan(
    config: TrainConfig, accelerator: Accelerator, place: Topology, own: PreTrainedModel | None, *, bf16: bool
) -> PlannedRun | None:
    shape = own.config.to_dict() if own else read_config(config)
    planned = plan_run(config, accelerator, place, shape, bf16=bf16)
    if planned and accelerator.is_main_process and (note := describe_checkpointing(planned, config)):
        print(note, flush=True)
    return planned


def _model(
    config: TrainConfig, accelerator: Accelerator, own: PreTrainedModel | None, *, bf16: bool
) -> torch.nn.Module:
    if own and config.is_grpo and config.beta and not config.uses_lora:
        fix = "use adapters, or beta=0: the reference would be loaded from model_name_or_path"
        raise UserError("grpo of a whole model that is brought along", where="model", fix=fix)

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print(line, flush=True)

    if own:
        model = with_adapters(fitted(own, config, bf16=bf16, say=say), config, say=say)
    else:
        model = load_model(plan_load(config, accelerator, bf16=bf16), config, say=say)
    if adapter := _sft_adapter(config):
        load_adapter(model, adapter)
    _check_alike(model, accelerator)
    return model


def _check_alike(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Raise where ranks train other parameters: each has looked by itself at what a text reaches."""
    names = "\n".join(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    digests = gather_object([hashlib.sha256(names.encode()).hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks have other trained parameters than rank {accelerator.process_index}: {digests}")


def _tokenizer(config: TrainConfig, user_objects: UserObjects) -> PreTrainedTokenizerBase:
    """That of the recipe's model, or of what SFT has made of it."""
    own = artifact.find(config.sft_model).own_tokenizer if config.sft_model else None
    return load_tokenizer(
        config.model_copy(update={"model_name_or_path": own}) if own else config, user_objects.tokenizer
    )


def _context(config: TrainConfig, own: PreTrainedModel | None) -> int | None:
    shape = own.config.to_dict() if own else read_config(config)
    return (shape.get("text_config") or shape).get("max_position_embeddings")


def _sft_adapter(config: TrainConfig) -> Path | None:
    """The adapter that GRPO goes on from."""
    return artifact.find(config.sft_model).adapter if config.sft_model else None


def _sft_fingerprint(config: TrainConfig) -> str | None:
    if not (adapter := _sft_adapter(config)):
        return None
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:32]


def _fingerprint(own: PreTrainedModel | None) -> str | None:
    """Of a model that a script brings: its shape, and the first values of each tensor. It has no files to tell it by."""
    if own is None:
        return None
    digest = hashlib.sha256(own.config.to_json_string().encode())
    for parameter in own.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _lent(own: PreTrainedModel | None) -> Callable[[], None]:
    """Return what gives a script's model its attention back; the training's knows no key-value cache."""
    if own is None:
        return lambda: None
    before = own.config._attn_implementation
    return lambda: own.set_attn_implementation(before)


@contextlib.contextmanager
def _restored_on_failure(own: PreTrainedModel | None) -> Iterator[None]:
    """If the session cannot be opened, a script's model has no adapters and its own attention again."""
    if own is None or hasattr(own, "peft_config"):  # which is refused as it is
        yield
        return
    give_back = _lent(own)
    trained = [(parameter, parameter.requires_grad) for parameter in own.parameters()]
    try:
        yield
    except BaseException:
        give_back()
        remove_adapters(own)
        vars(own.get_output_embeddings() or own).pop("forward", None)  # the fused one
        for parameter, before in trained:
            parameter.requires_grad_(before)
        raise


def _prove(trainer: Trainer, *, bf16: bool) -> None:
    """All ranks see alike whether packs, and then the fused head, leave the model's results as they are."""
    engine, packed = trainer.engine, trainer.config.packing != "none"
    if not packed and trainer.token_loss is None:
        return
    with evaluation_mode(engine.wrapped):
        if packed:
            exact = not bf16 and trainer.config.method != "int8"  # whose products round each row of activations
            prove_packing(engine.wrapped, engine.model, exact=exact)
        _prove_head(trainer)
    engine.reshard()


def _prove_head(trainer: Trainer) -> None:
    if trainer.token_loss is None:
        return
    engine, micro = trainer.engine, trial(packed=trainer.config.packing != "none").to(trainer.device)

    def agree(seen: bool) -> bool:
        return engine.sum(torch.tensor(float(not seen), device=trainer.device)).item() == 0

    trainer.token_loss.prove(micro.inputs, micro.positions, micro.targets, agree=agree)


def _needed(config: TrainConfig, world: int) -> int | None:
    """The examples that a short run will see: it does not tokenise more. None: all."""
    whole = config.eval_split or config.packing == "dataset" or config.max_steps <= 0
    answers = config.num_generations if config.is_grpo else 1
    return None if whole else -(-config.max_steps * config.batch(world) // answers)


def _data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    needed: int | None,
    task: Task | None,
    own: PreTrainedModel | None,
) -> tuple[Examples, Examples | None, Sequence[Question]]:
    """The examples to train on and to validate with; of a task that asks questions, those that have one, and these."""
    train, evaluation = prepare(config.data_path, tokenizer, config, needed=needed), None
    if config.eval_split:
        train, evaluation = train.split(config.eval_split)
    elif config.eval_data_path:
        evaluation = prepare(config.eval_data_path, tokenizer, config)
    if task is None:
        check_lengths(config, [int(rows.lengths.max()) for rows in (train, evaluation) if rows and len(rows)], own)
        return train, evaluation, ()
    return task.questions_of(train, evaluation, config, tokenizer, _context(config, own))


def _prepare_environment(config: TrainConfig, place: Topology, output_dir: Path) -> None:
    transformers_logging.disable_progress_bar()  # of reading weights, once for each rank
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of an earlier training in this process
    if not place.is_main:
        transformers_logging.set_verbosity_error()  # what all ranks would say alike
    trackers.prepare(config, output_dir)
