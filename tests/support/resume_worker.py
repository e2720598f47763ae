"""One rank that resumes from several checkpoints, one after the other, and writes down what follows each.

torchrun --nproc_per_node 2 tests/support/resume_worker.py OUT.json OUTPUT_DIR CHECKPOINT ... -- verify --strategy=fsdp ...
"""

import json
import sys
from pathlib import Path

from manyrank.config.args import parse
from manyrank.config.resolve import resolve
from manyrank.tasks.sft import SFT
from manyrank.topology import ranks
from manyrank.topology.precision import Precision
from manyrank.training.build import build_run
from manyrank.training.exits import exit_now, run_with_exit_codes


def main() -> int:
    cut = sys.argv.index("--")
    out, output_dir, *checkpoints = map(Path, sys.argv[1:cut])
    line = parse(sys.argv[cut + 1 :], prog="resume_worker", launch=False)
    config, place = resolve(line.recipe, line.overrides).config, ranks.from_environment()

    def work() -> None:
        run = build_run(config, place, SFT, output_dir=output_dir, precision=Precision.FLOAT32)
        trainer, found = run.trainer, {}
        run._write_facts()
        for folder in checkpoints:
            trainer.resume(folder)
            first, results = trainer.state.global_step, []
            trainer.train()
            results = [entry for entry in trainer.state.log_history if entry["step"] > first]
            found[str(folder)] = [[entry["loss"], entry["grad_norm"]] for entry in results]
            trainer.control.should_training_stop = False
        if place.is_main:
            out.write_text(json.dumps(found))
        run.close()

    return run_with_exit_codes(work, place)


if __name__ == "__main__":
    exit_now(main())
