"""One rank that takes the same answers on any layout: the norm of their gradient for each loss, and how far off the reference is.

torchrun --nproc_per_node 2 tests/support/grpo_worker.py OUT.json SFT_RUN fast_test --strategy=fsdp ...
"""

import json
import sys
from pathlib import Path

import torch

from manyrank.config.args import parse
from manyrank.config.resolve import resolve
from manyrank.models.inference import load_model
from manyrank.tasks.grpo.task import GRPO
from manyrank.topology import ranks
from manyrank.topology.precision import Precision
from manyrank.training.build import build_run
from manyrank.training.exits import exit_now, run_with_exit_codes

ROWS, PROMPT, ANSWER = 16, 6, 5
LOSSES = ("dapo", "grpo", "dr_grpo")  # bnpo divides by the micro-batch


def answers() -> dict[str, torch.Tensor]:
    """Of all ranks, with advantages and answers of several lengths."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 1000, (ROWS, PROMPT + ANSWER), generator=draw)
    kept = torch.randint(1, ANSWER + 1, (ROWS, 1), generator=draw)
    mask = (torch.arange(ANSWER)[None] < kept).long()
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.randn(ROWS, generator=draw),
    }


def main() -> int:
    out, sft = map(Path, sys.argv[1:3])
    line = parse(sys.argv[3:], prog="grpo_worker", launch=False)
    config, place = resolve(line.recipe, line.overrides).config, ranks.from_environment()

    def work() -> None:
        own, _ = load_model(str(sft), dtype="float32")  # not after ZeRO-3 is there, which would have a part of it
        run = build_run(config, place, GRPO, output_dir=out.with_suffix(""), precision=Precision.FLOAT32)
        trainer, engine, policy = run.trainer, run.engine, run.trainer.task.trl
        whole = answers()
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
        with torch.no_grad():
            logits = own(input_ids=ids).logits[:, :-1].log_softmax(-1)
        expected = logits.gather(-1, ids[:, 1:, None])[:, -ANSWER:, 0]
        with engine.whole():
            reference = policy.complete(trainer.loader.step(0).numbers, step=0)[0]
        said = torch.cat([reference["prompt_ids"], reference["completion_ids"]], 1)
        mask = torch.cat([reference["prompt_mask"], reference["completion_mask"]], 1)
        with torch.no_grad():
            logits = own(input_ids=said, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        right = logits.gather(-1, said[:, 1:, None])[:, -reference["completion_ids"].shape[1] :, 0]
        off = ((reference["ref_per_token_logps"] - right) * reference["completion_mask"]).abs().max()

        whole["ref_per_token_logps"] = expected - 0.3
        whole["num_items_in_batch"] = whole["completion_mask"].sum()
        each, micro = ROWS // place.world_size, config.per_device_train_batch_size
        norms = {}
        for policy.loss_type in LOSSES:
            for at in range(0, each, micro):
                rows = slice(place.rank * each + at, place.rank * each + at + micro)
                part = {key: value[rows] if value.ndim else value for key, value in whole.items()}
                last = at + micro == each
                with engine.forward_backward(last=last):
                    engine.backward(policy.loss(part, micro_batches=each // micro), last=last)
            sums = torch.zeros(1, device=engine.accelerator.device)
            _, norms[policy.loss_type] = engine.step(learning_rate=0.0, max_grad_norm=1e9, sums=sums)
        off = engine.sum(off.reshape(1)).item()
        if place.is_main:
            out.write_text(json.dumps({"norms": norms, "reference": off}))
        run.close()

    return run_with_exit_codes(work, place)


if __name__ == "__main__":
    exit_now(main())
