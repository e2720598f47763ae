"""Break the code on purpose, one line at a time, and show that the default tier of the tests notices each.

    python tests/mutations.py [NAME ...]

Each row is changed in a copy of the project, where the tests named beside it must fail and none may be an error of the
copy itself. It takes some minutes; run it after changes to what it breaks.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """`before` stands once in the file, and becomes `after`; `tests` are arguments of pytest."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    Mutation(
        "mask off by one token",
        "data/loader.py",
        "at - 1, labels[at]",
        "at, labels[at]",
        "tests/training/test_train.py",
    ),
    Mutation(
        "mean of means",
        "tasks/sft.py",
        "scale = self.engine.accelerator.num_processes / step.supervised",
        "scale = 1 / (sum(len(m.targets) for m in step.micro_batches) or 1)",
        "tests/training/test_train.py tests/equivalence/test_verify.py",
    ),
    Mutation(
        "exchange in every micro-batch but the last",
        "tasks/sft.py",
        "last = index + 1 == len(step.micro_batches)",
        "last = index == 0",
        "tests/training/test_train.py -k layout",
    ),
    Mutation(
        "lost second moment",
        "checkpoint/state.py",
        "_write_optimizer(engine, partial, attempt)\n",
        "_write_optimizer(engine, partial, attempt)\n        _lose(partial)\n",
        "tests/checkpoint/test_resume.py",
    ),
    Mutation(
        "skipped fsync",
        "runs/run_folder.py",
        "    try:\n        os.fsync(descriptor)\n",
        "    try:\n        pass\n",
        "tests/checkpoint/test_faults.py",
    ),
    Mutation(
        "unchecked hashes",
        "runs/run_folder.py",
        "file.stat().st_size != size or _hash(file) != digest",
        "file.stat().st_size != size",
        "tests/checkpoint/test_resume.py tests/checkpoint/test_faults.py",
    ),
    Mutation(
        "final name before the files are complete",
        "runs/run_folder.py",
        'partial = output_dir / f"checkpoint-{step}{PARTIAL}"',
        'partial = output_dir / f"checkpoint-{step}"',
        "tests/checkpoint/test_faults.py tests/checkpoint/test_resume.py",
    ),
    Mutation(
        "every rank reads the first rank's rows",
        "data/loader.py",
        "for members in dealt[self.rank]]",
        "for members in dealt[0]]",
        "tests/equivalence/test_verify.py",
    ),
    Mutation(
        "attention across documents",
        "data/loader.py",
        "DocumentLengths(tuple(lengths))",
        "DocumentLengths((sum(lengths),))",
        "tests/models/test_model_inputs.py",
    ),
    Mutation(
        "attention across documents on GPUs",
        "data/loader.py",
        "torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)",
        "torch.tensor([0, sum(lengths)], dtype=torch.int32)",
        "tests/models/test_model_inputs.py",
    ),
    Mutation(
        "positions that run on",
        "data/loader.py",
        "torch.cat([torch.arange(length) for length in lengths])[None]",
        "torch.arange(sum(lengths))[None]",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "micro-batches over the budget",
        "data/packing.py",
        "rounds = max(1, -(-sum(lengths) // (ranks * token_budget)))\n    while True:",
        "rounds = 1\n    while True:\n        token_budget = 10**9",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "the same order every epoch",
        "data/loader.py",
        "default_rng([seed, epoch])",
        "default_rng([seed])",
        "tests/data/test_data.py",
    ),
    Mutation(
        "adapters without their scale",
        "models/lora.py",
        "y = base.addmm_(thin, wide, alpha=scaling)",
        "y = base.addmm_(thin, wide)",
        "tests/models/test_lora.py",
    ),
    Mutation(
        "half a gradient of A",
        "models/lora.py",
        "ddown, dup = torch.addmm(down, dthin.T, entry,",
        "ddown, dup = torch.addmm(down, dthin.T, entry / 2,",
        "tests/models/test_lora.py",
    ),
    Mutation(
        "adapters cast in every layer",
        "models/lora.py",
        "down, up = casts or (down, up)",
        "pass",
        "tests/test_counts.py -k steps",
    ),
    Mutation(
        "a read in every micro-batch",
        "tasks/sft.py",
        "losses.append(loss.detach())",
        "losses.append(loss.detach() if loss.isfinite() else loss)",
        "tests/test_counts.py -k steps",
    ),
    Mutation(
        "a head that forgets its chunks",
        "models/fused_head.py",
        "loss += part_loss",
        "loss = part_loss",
        "tests/models/test_head.py",
    ),
    Mutation(
        "no clipping",
        "parallel/engine.py",
        "clip_grad_norm_(self.trainable.values(), max_grad_norm or math.inf)",
        "clip_grad_norm_(self.trainable.values(), math.inf)",
        "tests/training/test_train.py -k clipping",
    ),
    Mutation(
        "decay of biases and norms",
        "training/optim.py",
        '<= 1], "weight_decay": 0.0}',
        '<= 1], "weight_decay": config.weight_decay}',
        "tests/training/test_optim.py",
    ),
    Mutation(
        "a norm that is not finite is used",
        "parallel/engine.py",
        '        if not math.isfinite(norm):\n            self._lower_scale()\n            raise NonFiniteGradientError(f"the gradient\'s norm is {norm}")\n',
        "",
        "tests/training/test_train.py -k non_finite_gradient",
    ),
    Mutation(
        "a stop that says it is done",
        "training/exits.py",
        "return for_good(error.code) if error.final",
        "return for_good(0) if error.final",
        "tests/launchers/test_preemption.py",
    ),
    Mutation(
        "a resume that begins one step late",
        "data/loader.py",
        "epoch, turn = divmod(number, self.steps_per_epoch)",
        "epoch, turn = divmod(number + (number > 2), self.steps_per_epoch)",
        "tests/training/test_train.py tests/data/test_data.py",
    ),
    Mutation(
        "blanks that are not learned",
        "chat_template/render.py",
        "        start = before[0]\n",
        "        pass\n",
        "tests/chat_template/test_render.py",
    ),
    Mutation(
        "optimizer states whole on every rank in the plan",
        "plan/memory.py",
        "spread = run.shards if run.strategy.shards else 1",
        "spread = 1",
        "tests/plan/test_planner.py",
    ),
)
LOSE = """

def _lose(folder):
    from safetensors.torch import load_file

    for file in folder.glob("optimizer*.safetensors"):
        state = load_file(file)
        save_file({k: torch.zeros_like(v) if "exp_avg_sq" in k else v for k, v in state.items()}, file)
"""


def noticed(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Whether the tests fail in a copy with the mutation, and pytest's last line."""
    copy = folder / mutation.name.replace(" ", "-").replace("'", "")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "output", "__pycache__"))
    file = copy / "src" / "manyrank" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.before!r} stands {text.count(mutation.before)} times in {mutation.file}"
        )
    text = text.replace(mutation.before, mutation.after)
    file.write_text(text + (LOSE if "_lose(" in mutation.after else ""), encoding="utf-8")
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutation.tests)]
    env = {**os.environ, "PYTHONPATH": str(copy / "src")}
    done = subprocess.run(argv, cwd=copy, env=env, capture_output=True, text=True)
    shutil.rmtree(copy)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1 and bool(failed), (failed or done.stdout.splitlines() or [""])[-1]


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="manyrank-mutations-") as folder:
        for mutation in chosen:
            found, line = noticed(mutation, Path(folder))
            missed += not found
            print(f"{'noticed' if found else 'MISSED':<8} {mutation.name}: {line}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
