"""A recipe to a run: start the strategy, read the data, load and wrap the model, and set up its trainer."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..checkpoint.resume import Start, broadcast_from_rank0, find_start
from ..config.identity import batch_per_process, identity, refuse_changes
from ..config.resolve import TrainConfig
from ..data.dataset import Examples, prepare
from ..models import flash
from ..models.adapter_start import start_adapters, weights_of
from ..models.adapters import remove_adapters
from ..models.freezing import cast_frozen, check_kept_in_bf16
from ..models.load import (
    fitted,
    load_model,
    plan_load,
    read_config,
    resolve_name,
    with_adapters,
)
from ..models.new_tokens import NewTokens, new_tokens
from ..models.quantised_cache import cached_base
from ..models.skeleton import check_trained
from ..models.tokenizer import load_tokenizer
from ..parallel import compile_locks
from ..parallel.accelerator import start_accelerator
from ..parallel.sharded_engines import prepare_engine
from ..parallel.zero3_preparation import without_zero_init
from ..plan.planned_run import PlannedRun
from ..runs import artifact
from ..runs.heartbeats import HeartbeatWriter, new_run
from ..topology.precision import Precision
from ..topology.ranks import Topology
from . import numerics, trackers
from .memory import plan_run, take_peaks
from .metrics import Meter, kind_of
from .optim import build_optimizer
from .run import TrainingRun
from .task import Task, UserObjects
from .trainer import Trainer


def build_run(
    config: TrainConfig,
    place: Topology,
    kind: type[Task],
    *,
    output_dir: Path,
    precision: Precision,
    objects: UserObjects | None = None,
    heartbeat: HeartbeatWriter | None = None,
) -> TrainingRun:
    """Start the strategy, read the data, load and wrap the model.

    Args:
        kind: what the run learns from (`tasks.find_task`).
        heartbeat: of a run that has `output_dir` for itself; its signs of life are written there once all ranks have met.

    Raises:
        UserError: something that only shows now is wrong: a row, the model, a checkpoint.
    """
    objects = objects or UserObjects()
    with contextlib.ExitStack() as undo:
        undo.callback(numerics.set_up(config))
        with _restored_on_failure(objects.model), numerics.naming_the_option():
            run = _build(config, place, kind, output_dir, objects, heartbeat, precision=precision)
        undo.callback(run.give_back)
        run.give_back = undo.pop_all().close
    return run


def _build(
    config: TrainConfig,
    place: Topology,
    kind: type[Task],
    output_dir: Path,
    objects: UserObjects,
    heartbeat: HeartbeatWriter | None,
    *,
    precision: Precision,
) -> TrainingRun:
    _prepare_environment(config, place, output_dir)
    own_folder, heartbeat = (
        output_dir if heartbeat and not config.dry_run else None,
        heartbeat or HeartbeatWriter(place.rank),
    )
    heartbeat.beat(0, "loading the tokenizer")
    tokenizer = _tokenizer(config, objects)
    accelerator = _meet(config, place, heartbeat, own_folder, precision=precision)
    start = find_start(config, output_dir, accelerator)
    per_process = batch_per_process(config)
    config, needed = _amounts(config, kind, start, accelerator.num_processes)
    config, planned = _plan(config, accelerator, place, objects.model, precision=precision)
    task = kind(config, objects)
    heartbeat.beat(0, "reading and tokenising the data")
    train, evaluation = _examples(task, tokenizer, needed, accelerator)
    base, give_back = _fingerprint(objects.model), _lent(objects.model)
    heartbeat.beat(0, "loading the model")
    model, adapter = _model(config, accelerator, objects.model, tokenizer, start, precision=precision)
    task.prepare_model(model, accelerator, tokenizer, precision=precision)
    _check_alike(model, accelerator)
    with heartbeat.waiting("distributing the model and the optimizer", compile_locks.explain):
        engine = prepare_engine(accelerator, model, build_optimizer(model, config))
    loading = take_peaks()
    torch.manual_seed(config.seed + accelerator.process_index)  # each rank has dropout of its own
    commit = getattr(model.config, "_commit_hash", None)
    run = identity(
        config,
        precision,
        **task.identity(),
        model=base or artifact.base_fingerprint(resolve_name(config.model_name_or_path), commit),
        loss=objects.loss and f"{objects.loss.__module__}.{objects.loss.__qualname__}",
        adapter=adapter,
        data=train.fingerprint,
        global_batch_size=config.batch(accelerator.num_processes),
        # What stands beside a global batch is only how it is laid out.
        batch_per_process=per_process or start.run.get("batch_per_process"),
        needed=needed,
        examples=len(train),
        tokens=int(train.lengths.sum()),
    )
    meter = Meter(accelerator.device.type, planned, kind_of(accelerator.device))
    options = {"output_dir": output_dir, "callbacks": objects.callbacks, "heartbeat": heartbeat}
    trainer = Trainer(config, engine, tokenizer, task, train, evaluation, run=run, meter=meter, **options)
    _try_out(task, trainer, start, heartbeat, precision=precision)
    start = _with_changes(start, trainer.run, config)
    own = objects.tokenizer is not None
    return TrainingRun(config, engine, tokenizer, trainer, output_dir, start, planned, loading, own, give_back)


def _try_out(task: Task, trainer: Trainer, start: Start, heartbeat: HeartbeatWriter, *, precision: Precision) -> None:
    """Check the loss, and let a new run's task begin, while nothing is written yet."""
    heartbeat.beat(0, "trying the loss on a small example")
    task.check(precision=precision)
    if not start.folder:
        task.begin(trainer.loader)


def _amounts(config: TrainConfig, kind: type[Task], start: Start, processes: int) -> tuple[TrainConfig, int | None]:
    """The recipe with the batch that a resumed run is bound to, and the examples that the run needs."""
    if not start.folder:
        return config, _needed(config, kind, processes)
    if config.global_batch_size is None:  # fixed in the run, whatever the number of processes is now
        config = config.model_copy(update={"global_batch_size": start.run["global_batch_size"]})
    return config, start.run["needed"]


def _meet(
    config: TrainConfig, place: Topology, heartbeat: HeartbeatWriter, folder: Path | None, *, precision: Precision
) -> Accelerator:
    """Start the strategy; from then on the signs of life are written into the folder, if this run has one for itself."""
    with heartbeat.waiting(f"waiting for all {place.world_size} processes to meet", compile_locks.explain):
        accelerator = start_accelerator(config, place, precision=precision)
    if folder:
        run = broadcast_from_rank0(accelerator, lambda: new_run(folder))
        heartbeat.attach(folder, run=run, meet=accelerator.wait_for_everyone)
    heartbeat.beat(0, "looking for a checkpoint")
    return accelerator


def _with_changes(start: Start, run: dict, config: TrainConfig) -> Start:
    """Add notes about what differs from the checkpoint and may do so."""
    if not start.folder:
        return start
    changed = refuse_changes(start.folder, run, allowed=config.resume_changes)
    return replace(start, notes=(*start.notes, *(f"changed, as allowed: {change}" for change in changed)))


def _examples(
    task: Task, tokenizer: PreTrainedTokenizerBase, needed: int | None, accelerator: Accelerator
) -> tuple[Examples, Examples | None]:
    """The examples that the task trains on and validates with."""
    config = task.config
    if task.objects.model is None:
        with without_zero_init(accelerator):
            check_trained(config)  # before the data, which may take long
    train, evaluation = task.select_examples(*_data(config, tokenizer, needed), tokenizer)
    if accelerator.is_main_process and config.trust_remote_code:
        print(f"trust_remote_code is on: code from {config.model_name_or_path} runs here", flush=True)
    return train, evaluation


def _plan(
    config: TrainConfig, accelerator: Accelerator, place: Topology, own: PreTrainedModel | None, *, precision: Precision
) -> tuple[TrainConfig, PlannedRun | None]:
    """The recipe with the recomputed layers that the plan settles, and the plan where there is one."""
    shape = own.config.to_dict() if own else read_config(config)
    planned = plan_run(config, accelerator, place, shape, precision=precision)
    if planned is None:
        return config, None
    settled = planned.config.gradient_checkpointing
    return config.model_copy(update={"gradient_checkpointing": settled}), planned


def _model(
    config: TrainConfig,
    accelerator: Accelerator,
    own: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    *,
    precision: Precision,
) -> tuple[torch.nn.Module, str | None]:
    """The base with its adapters, and rows for new tokens; and the fingerprint of what the training continues from."""
    new = new_tokens(tokenizer, config)

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print(line, flush=True)

    if own:
        model = with_adapters(fitted(own, config, precision=precision, say=say), config, say=say)
    else:
        plan = plan_load(config, accelerator, precision=precision, new=new)
        read = partial(cached_base, where=config.quantized_cache, say=say)
        with without_zero_init(accelerator) if plan.share else contextlib.nullcontext():
            model = load_model(plan, config, say=say, read=read)
    if config.method == "full" and precision.half:
        cast_frozen(model, getattr(torch, precision.dtype))
    if config.pure_bf16:
        check_kept_in_bf16(model)
    if config.tf32:
        numerics.keep_positions_exact(model)
    return model, _start(model, config, own, start, new)


def _start(
    model: torch.nn.Module, config: TrainConfig, own: PreTrainedModel | None, start: Start, new: NewTokens
) -> str | None:
    """Give the adapters their first values, and return the fingerprint of those that the training continues from."""
    adapter = artifact.find(config.adapter).adapter if config.adapter else None
    if config.uses_lora:
        weights = weights_of(resolve_name(config.model_name_or_path), own)
        start_adapters(model, config, weights, adapter=adapter, resumed=start.folder, new=new)
    return artifact.adapter_fingerprint(adapter) if adapter else None


def _check_alike(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Raise where ranks train other parameters: each has looked by itself at what a text reaches."""
    names = "\n".join(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    digests = gather_object([hashlib.sha256(names.encode()).hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks have other trained parameters than rank {accelerator.process_index}: {digests}")


def _tokenizer(config: TrainConfig, objects: UserObjects) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe's model, or of the run that this one starts from."""
    own = artifact.find(config.start_model).own_tokenizer if config.start_model else None
    return load_tokenizer(config.model_copy(update={"model_name_or_path": own}) if own else config, objects.tokenizer)


def _fingerprint(own: PreTrainedModel | None) -> str | None:
    """Fingerprint a model that a script passes, which has no files: its shape, and the first values of each tensor."""
    if own is None:
        return None
    digest = hashlib.sha256(own.config.to_json_string().encode())
    for parameter in own.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _lent(own: PreTrainedModel | None) -> Callable[[], None]:
    """Return what gives torch its flash attention back, and a script's model its own, which has a cache, and all its weights."""
    before = own and own.config._attn_implementation
    trained = [(parameter, parameter.requires_grad) for parameter in own.parameters()] if own is not None else []

    def give_back() -> None:
        flash.restore()
        if own is None:
            return
        own.set_attn_implementation(before)
        for parameter, wanted in trained if not hasattr(own, "peft_config") else ():
            parameter.requires_grad_(wanted)

    return give_back


@contextlib.contextmanager
def _restored_on_failure(own: PreTrainedModel | None) -> Iterator[None]:
    """If the session cannot be opened, a script's model has no adapters and its own attention again."""
    if own is None or hasattr(own, "peft_config"):  # which is refused as it is
        yield
        return
    give_back = _lent(own)
    try:
        yield
    except BaseException:
        remove_adapters(own)
        give_back()
        vars(own.get_output_embeddings() or own).pop("forward", None)  # the fused one
        raise


def _needed(config: TrainConfig, kind: type[Task], world: int) -> int | None:
    """The examples that a short run will see: it does not tokenise more. None: all."""
    whole = (
        config.eval_split or config.packing == "dataset" or config.max_steps <= 0 or config.sampling_temperature != 1
    )
    return None if whole else kind.rows_needed(config, config.max_steps * config.batch(world))


def _data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, needed: int | None
) -> tuple[Examples, Examples | None]:
    """The examples to train on and to validate with."""
    train, evaluation = prepare(config.data_path, tokenizer, config, needed=needed), None
    if config.eval_split:
        train, evaluation = train.split(config.eval_split)
    elif config.eval_data_path:
        evaluation = prepare(config.eval_data_path, tokenizer, config)
    return train.tempered(config), evaluation


def _prepare_environment(config: TrainConfig, place: Topology, output_dir: Path) -> None:
    transformers_logging.disable_progress_bar()  # of reading weights, once for each rank
    take_peaks()  # of an earlier training in this process
    if not place.is_main:
        transformers_logging.set_verbosity_error()  # what all ranks would say alike
    trackers.prepare(config, output_dir)
