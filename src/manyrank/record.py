"""What a session writes down for its report, on rank 0: what came up, the data, the versions, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, metrics, report
from .config import TrainConfig
from .data import Examples, write_quarantine
from .doctor_probe import software
from .errors import Preempted, UserError
from .hardware import probe
from .run_folder import TOKENIZER
from .runtime import Facts
from .survey import of_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_facts(
    config: TrainConfig, output_dir: Path, facts: Facts, train: Examples, evaluation: Examples | None
) -> None:
    """logs/strategy.json, data.json, versions.json, and the rows that were put aside."""
    logs = output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "strategy.json").write_text(json.dumps(facts.as_dict(), indent=1))
    write_quarantine(train, logs / "quarantine.jsonl")
    if evaluation and not config.eval_split:
        write_quarantine(evaluation, logs / "eval_quarantine.jsonl")
    data = of_run(config, train, evaluation)
    (logs / "data.json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    (logs / "versions.json").write_text(json.dumps(_versions(), indent=1))


def write_tokenizer(own: PreTrainedTokenizerBase | None, output_dir: Path) -> None:
    """Keep a tokenizer that is not the base's, so that checkpoints are used with it; None: it is the base's."""
    folder = output_dir / TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)  # of the run that this one goes on with
    if own:
        own.save_pretrained(folder)


def _versions() -> dict[str, str]:
    found, machine = software(), probe()
    libraries = {name: version for name, version in found.libraries.items() if version}
    gpus = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    cuda = {"CUDA": found.cuda} if found.cuda else {}
    where = {"GPUs": f"{len(machine.gpus)} x {gpus}"} if gpus else {"CPU cores": str(machine.cpu_cores)}
    return {"manyrank": __version__, "python": found.python, **libraries, **cuda, **where, "host": os.uname().nodename}


@contextlib.contextmanager
def history(output_dir: Path, *, step: Callable[[], int], event: str, **facts: object) -> Iterator[None]:
    """Write down how a run begins and how it ends, and make its report whichever way that is.

    Args:
        step: asks for the step that the run has come to.
        event: how it begins.
    """
    with metrics.beside_the_point():
        metrics.note(output_dir, event, step=step(), **facts)
    try:
        yield
    except (Exception, Preempted) as error:
        ending = {"event": "preempted"} if isinstance(error, Preempted) else {"event": "failed", "why": _what(error)}
        with metrics.beside_the_point():
            metrics.note(output_dir, step=step(), **ending)
        make_report(output_dir)
        raise
    with metrics.beside_the_point():
        metrics.note(output_dir, "finished", step=step())


def make_report(output_dir: Path) -> Path | None:
    """report.html. The training is over and saved: whatever is wrong with its page is told, and changes nothing of that."""
    try:
        return report.make(output_dir)
    except Exception as error:
        print(
            f"WARNING: the report could not be made: {_what(error)}. `manyrank report {output_dir}` tries again",
            file=sys.stderr,
            flush=True,
        )
        return None


def _what(error: BaseException) -> str:
    """What is wrong, in one line."""
    if isinstance(error, UserError):
        return error.what
    return f"{type(error).__name__}: {error}".split("\n")[0].strip().removesuffix(":")
