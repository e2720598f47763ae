"""Kills a save at each of its writes, fsyncs, renames and removals, one after the other, and resumes every time.

python tests/support/fault_worker.py OUTPUT_DIR        prints one JSON line for each point

The run has saved its second step. A child process saves the third one and is killed with SIGKILL at its Nth operation, a
write half way through. The parent then does what the next start does: clear up, find, resume, train to the end.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

from manyrank.config.resolve import Setting, resolve
from manyrank.runs import run_folder
from manyrank.tasks.sft import SFT
from manyrank.topology import ranks
from manyrank.topology.precision import Precision
from manyrank.training.build import build_run
from manyrank.training.exits import exit_now
from manyrank.training.optim import advance


class Killer:
    """Counts operations and kills this process at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(owner, name, self.wrapped(getattr(owner, name), name))
        original_write, original_serialize = run_folder.write, safetensors.torch.serialize_file

        def write(file: Path, text: str) -> None:
            if self.hit(f"write {file.name}"):
                file.write_text(text[: len(text) // 2])
                self.kill()
            original_write(file, text)

        def serialize(tensors, file, metadata=None) -> None:
            hit = self.hit(f"write {Path(file).name}")
            original_serialize(tensors, file, metadata)
            if hit:
                os.truncate(file, Path(file).stat().st_size // 2)
                self.kill()

        run_folder.write, safetensors.torch.serialize_file = write, serialize

    def hit(self, what: str) -> bool:
        self.count += 1
        self.what = what
        return self.count == self.at

    def wrapped(self, original, name: str):
        def run(*args, **kwargs):
            if self.hit(f"{name} {args[0]}"):
                self.kill()
            return original(*args, **kwargs)

        return run

    def kill(self) -> None:
        print(self.what, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    output = Path(sys.argv[1])
    entries = {"save_total_limit": 1, "max_steps": 4, "lora_dropout": 0.1, "strategy": "single"}
    entries |= {"global_batch_size": 2}  # of which hundreds of steps are made
    config = resolve("verify", [Setting(key, value, "test") for key, value in entries.items()]).config
    run = build_run(config, ranks.from_environment(), SFT, output_dir=output, precision=Precision.FLOAT32)
    trainer = run.trainer
    run._write_facts()

    def train_to(step: int) -> None:
        for number in range(trainer.state.global_step, step):
            trainer.train_step(trainer.loader.step(number))
            advance(trainer.schedule)
            trainer.state.global_step += 1

    def adapter() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trainer.engine.trainable.items()}

    train_to(2)
    trainer._save()
    train_to(4)
    whole = adapter()
    shutil.copytree(output, output.with_name("before"))
    at, killed = 0, True
    while killed:
        at += 1
        shutil.rmtree(output)
        shutil.copytree(output.with_name("before"), output)
        trainer.resume(output / "checkpoint-2")
        train_to(3)
        child = os.fork()
        if child == 0:
            Killer(at)
            trainer._save()
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = sorted(path.name for path in output.iterdir())
        run_folder.tidy(output)
        found = run_folder.find(output, "auto")
        trainer.resume(found.folder)
        first = trainer.state.global_step
        train_to(4)
        same = all((tensor == whole[name]).all() for name, tensor in adapter().items())
        after = sorted(path.name for path in output.iterdir() if path.name != "logs")
        print(
            json.dumps({"killed": killed, "from": first, "same": bool(same), "left": left, "after": after}), flush=True
        )


if __name__ == "__main__":
    main()
    exit_now(0)
