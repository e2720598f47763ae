"""The facts that rank 0 writes for the report: the active strategy, the data, versions, and how the run ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..config.resolve import TrainConfig
from ..data.dataset import Examples, write_quarantine
from ..data.stats import of_run
from ..errors import Preempted, in_one_line
from ..models import flash
from ..parallel.engine import StrategyInfo
from ..runs import logs
from ..runs.run_folder import TOKENIZER
from ..runs.versions import software
from ..topology.gpus import probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_facts(
    config: TrainConfig, output_dir: Path, facts: StrategyInfo, train: Examples, evaluation: Examples | None
) -> None:
    """logs/strategy.json, data.json, versions.json, and the rows that are quarantined."""
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strategy.json").write_text(json.dumps(facts.as_dict(), indent=1))
    write_quarantine(train, folder / "quarantine.jsonl")
    if evaluation and not config.eval_split:
        write_quarantine(evaluation, folder / "eval_quarantine.jsonl")
    data = of_run(config, train, evaluation)
    (folder / "data.json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(_versions(), indent=1))


def write_tokenizer(own: PreTrainedTokenizerBase | None, output_dir: Path) -> None:
    """Keep a tokenizer that is not the base's, so that checkpoints are used with it; None: it is the base's."""
    folder = output_dir / TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)  # of the run that this one goes on with
    if own:
        own.save_pretrained(folder)


def _versions() -> dict[str, str]:
    versions, machine = software(), probe()
    libraries = {name: version for name, version in versions.libraries.items() if version}
    gpus = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    cuda = {"CUDA": versions.cuda} if versions.cuda else {}
    where = {"GPUs": f"{len(machine.gpus)} x {gpus}"} if gpus else {"CPU cores": str(machine.cpu_cores)}
    if gpus:
        where["flash attention"] = flash.active() or "torch's own"
    return {
        "manyrank": __version__,
        "python": versions.python,
        **libraries,
        **cuda,
        **where,
        "host": os.uname().nodename,
    }


@contextlib.contextmanager
def history(
    output_dir: Path, *, step: Callable[[], int], event: str, failed: Callable[[Path], object], **facts: object
) -> Iterator[None]:
    """Write down how a run begins and how it ends.

    Args:
        step: asks for the step that the run has come to.
        event: how it begins.
        failed: what is done with the folder of a run that ends with an error, once that is written down.
    """
    with logs.warn_on_write_error():
        logs.note(output_dir, event, step=step(), **facts)
    try:
        yield
    except (Exception, Preempted) as error:
        ending = (
            {"event": "preempted"} if isinstance(error, Preempted) else {"event": "failed", "why": in_one_line(error)}
        )
        with logs.warn_on_write_error():
            logs.note(output_dir, step=step(), **ending)
        failed(output_dir)
        raise
    with logs.warn_on_write_error():
        logs.note(output_dir, "finished", step=step())
