"""What `manyrank doctor` does on every rank: python -m manyrank.tools.doctor.ranks FOLDER, started as the training is.

Stage by stage, each rank writes what it finds into FOLDER, a folder of its machine (see `launch`), so that what
was found stays when a later stage ends a rank. `rank_checks` judges it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.args import parse
from ...config.resolve import Resolved, resolve
from ...errors import EXIT_FAILED, UserError
from ...models.tiny import EMBEDDED
from ...signals import end_with_parent
from ...topology import gpus as hardware
from ...topology import ranks as topology
from ...topology.ranks import Topology
from ...training.exits import leave
from ...training.watchdog import Heart

if TYPE_CHECKING:
    import torch

SEEN_SECONDS = 5.0  # that a network file system may take to show a new file


@dataclass(frozen=True)
class Job:
    """What the ranks of one machine are to do.

    Attributes:
        argv: the recipe and its overrides, as the train module takes them.
        run: a folder to make for the step, where the run's folder would be; rank 0's counts.
        timeout: seconds that a rank waits for the others.
    """

    argv: list[str]
    strategy: str
    run: str
    timeout: float


class Notes:
    """What this rank has found, by stage, in a file; and which stage it is in."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file, self.found = folder / f"rank-{rank:05d}.json", {}
        self.heart = Heart(rank)
        self.heart.attach(folder)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Within it, facts are put into what it gives; they count when it ends well."""
        self.heart.beat(0, name)
        facts, started = {}, time.perf_counter()
        yield facts
        self.tell(name, facts | {"seconds": time.perf_counter() - started})

    def tell(self, name: str, facts: Any) -> None:
        self.found[name] = facts
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        partial.replace(self.file)


def main(argv: Sequence[str] | None = None) -> int:
    """Go through the stages.

    Returns:
        The exit code: 0 when all stages are through, whatever they have found.
    """
    end_with_parent()
    folder = Path((argv or sys.argv[1:])[0])
    place = topology.from_environment()
    _print_to(folder / f"log-{place.rank:05d}.txt")
    notes = Notes(folder, place.rank)
    try:
        _examine(Job(**json.loads((folder / "job.json").read_text())), place, folder, notes)
    except Exception as error:  # whatever it is, it is a line of the report
        traceback.print_exc()
        notes.tell("problem", _problem(error))
        return EXIT_FAILED
    notes.heart.stop()
    return 0


def _problem(error: Exception) -> dict[str, str]:
    if isinstance(error, UserError):
        return {"what": error.what, "fix": error.fix}
    return {"what": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "fix": ""}


def _print_to(file: Path) -> None:
    """What libraries print here is not the report's."""
    sys.stdout.flush()
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _examine(job: Job, place: Topology, folder: Path, notes: Notes) -> None:
    line = parse(job.argv, prog="manyrank doctor", launch=False)
    resolved, machine = resolve(line.recipe, line.overrides), hardware.probe()
    with notes.stage("start") as facts:
        here = _wait_for(folder / "machine.json", job.timeout)
        _before_imports(here, folder)
        from . import exchange
        from . import step as doctor_step

        device = _device(place, machine)
        facts |= _torch_facts(device)
    with notes.stage("model") as facts:
        if place.local_rank == 0:
            facts |= _read_model(resolved)
            doctor_step.make_model(folder / "model")
    if place.world_size > 1:
        with notes.stage("process group") as facts:
            facts["backend"] = exchange.meet(place, device, timeout=job.timeout)
            facts["ranks"] = place.world_size
        _compare(place, device, here, notes)
    with notes.stage("output folder") as facts:
        run = _make_folder(Path(job.run), place, facts)
    if run is not None:
        _train(job, resolved, place, folder, run, notes)


def _before_imports(here: dict[str, Any], folder: Path) -> None:
    """What the libraries read when they are imported. `hub`: without it, its client would try again and again."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    if not here["hub"]:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _device(place: Topology, machine: hardware.Hardware) -> torch.device:
    import torch

    if not machine.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        fix = "install a CUDA build of torch that fits the driver, or hide the GPUs: CUDA_VISIBLE_DEVICES=''"
        raise UserError("there are GPUs that torch cannot use", where=f"torch {torch.__version__}", fix=fix)
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _torch_facts(device: torch.device) -> dict[str, Any]:
    import torch

    facts = {"host": socket.gethostname(), "torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
    return facts


def _wait_for(file: Path, seconds: float) -> dict[str, Any]:
    """What the command writes, at once, about its machine."""
    end = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return json.loads(file.read_text())


# The model


def _read_model(resolved: Resolved) -> dict[str, Any]:
    """The recipe's config, tokenizer and weights, as this machine can read them."""
    from safetensors import safe_open
    from transformers import AutoConfig

    from ...checkpoint.resume import base_fingerprint
    from ...models.load import load_tokenizer

    config = resolved.config
    name = config.model_name_or_path
    if name == EMBEDDED:
        return {"name": name}
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not path.is_dir():
        return {"name": name, "what": "there is no such folder", "fix": ""}
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code).model_type
        tokens = len(load_tokenizer(config))
        files = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")] if path.is_dir() else []
        if path.is_dir() and not files:
            return {"name": name, "what": "it has no weights", "fix": "it needs model*.safetensors"}
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
    except Exception as error:  # of any library: it is the model's line, and the rest goes on
        return {"name": name, **_problem(error)}
    digest = base_fingerprint(name, None) if files else None
    size = sum(file.stat().st_size for file in files)
    return {"name": name, "kind": kind, "tokens": tokens, "bytes": size, "digest": digest}


# Stages


def _compare(place: Topology, device: torch.device, here: dict[str, Any], notes: Notes) -> None:
    """The stages that need the others but no training."""
    from . import exchange

    with notes.stage("same software") as facts:
        model = notes.found["model"] if place.local_rank == 0 else None
        mine = {"rank": place.rank, **notes.found["start"], "machine": here, "model": model}
        facts["machines"] = [told for told in exchange.gathered(mine) if told["model"] is not None]
    leaders = [machine["rank"] for machine in facts["machines"]]
    with notes.stage("all-reduce") as facts:
        facts["all"] = exchange.exchanges(range(place.world_size), place.rank, device)
        facts["machine"] = exchange.within_machines(leaders, place, device) if len(leaders) > 1 else None
    with notes.stage("clocks") as facts:
        facts["offsets"] = exchange.compare_clocks(leaders, place.rank)


def _make_folder(wanted: Path, place: Topology, facts: dict) -> Path | None:
    """A folder for the step, where the run's would be: rank 0 makes it, and every machine looks for it.

    Returns:
        The folder; None where it cannot be made, or a machine does not see it.
    """
    from .exchange import from_main, gathered

    problem = None
    if place.is_main:
        try:
            wanted.mkdir()
            (wanted / "token").write_text("written by rank 0")
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}"
    run, problem = from_main((str(wanted), problem))
    facts |= {"folder": str(Path(run).parent), "problem": problem, "blind": []}
    if problem:
        return None
    seen = gathered((socket.gethostname(), _sees(Path(run))))
    facts["blind"] = sorted({host for host, sees in seen if not sees})
    return None if facts["blind"] else Path(run)


def _sees(run: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if (run / "token").read_text() == "written by rank 0":
                return True
        time.sleep(0.2)
    return False


def _train(job: Job, resolved: Resolved, place: Topology, folder: Path, run: Path, notes: Notes) -> None:
    from . import step as doctor_step

    config = doctor_step.step_config(
        resolved.config, strategy=job.strategy, model=folder / "model", world_size=place.world_size
    )
    bf16 = hardware.computes_in_bf16(config.bf16, hardware.probe())
    with notes.stage("step") as facts:
        session, found = doctor_step.take_steps(config, place, run, bf16=bf16)
        _KEPT.append(session)
        facts |= found
    with notes.stage("save and load") as facts:
        facts |= doctor_step.load_and_repeat(session)


_KEPT: list[object] = []  # for the reason that train keeps its session


if __name__ == "__main__":
    leave(main())
