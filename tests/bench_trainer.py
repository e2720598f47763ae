"""One optimizer step here and in transformers' Trainer, on the same batches: `make bench`.

Rounds are separate processes that alternate, so that noise of the machine meets both. The first steps of a round are
left out. "padded" is the Trainer's own layout; "step" is ours by default, with the same losses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 3
GIVEN = {
    "model_name_or_path": "embedded", "data_path": "data/sample.jsonl", "max_length": 512, "per_device_train_batch_size": 8,
    "learning_rate": 1e-3, "lr_scheduler_type": "constant", "bf16": False, "logging_steps": 1, "max_grad_norm": 1.0,
}  # fmt: skip


def config(**more):
    from manyrank.config import Entry, resolve

    return resolve(None, [Entry(key, value, "bench") for key, value in (GIVEN | more).items()]).config


def timer():
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.started)

    return Timer()


def ours(packing: str, steps: int, folder: Path) -> dict:
    from manyrank.session import open_session
    from manyrank.topology import Topology

    session = open_session(config(packing=packing, max_steps=steps), Topology(), output_dir=folder, bf16=False)
    clock = timer()
    session.trainer.handler.add_callback(clock)
    session.trainer.train()
    return {"seconds": clock.seconds, "losses": [line["loss"] for line in session.trainer.state.log_history]}


def theirs(steps: int, folder: Path) -> dict:
    """transformers' Trainer with the same model, adapters, optimizer and order of rows."""
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    from manyrank.data import prepare
    from manyrank.embedded import ensure
    from manyrank.model import load_tokenizer

    recipe = config()
    tokenizer = load_tokenizer(recipe)
    examples = prepare(recipe.data_path, tokenizer, recipe)
    order = np.concatenate([np.random.default_rng([42, epoch]).permutation(len(examples)) for epoch in range(9)])
    rows = [examples.dataset[int(i)] for i in order[: steps * 8]]
    data = Dataset.from_list([{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(ensure())
    set_seed(42)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant", max_steps=steps,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    clock = timer()
    trainer = Trainer(
        get_peft_model(model, lora), arguments, train_dataset=data, callbacks=[clock],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.train()
    return {"seconds": clock.seconds, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def one_round(who: str, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = theirs(steps, Path(folder)) if who == "Trainer" else ours(who, steps, Path(folder))
    print("RESULT" + json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--round", choices=["Trainer", "none", "step"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.round:
        one_round(options.round, options.steps)
        return
    from manyrank.launcher import CPU_VARIABLES

    seconds, losses = {}, {}
    for _ in range(options.rounds):
        for who in ("Trainer", "none", "step"):
            argv = [sys.executable, __file__, f"--round={who}", f"--steps={options.steps}"]
            done = subprocess.run(argv, capture_output=True, text=True, check=True, env={**os.environ, **CPU_VARIABLES})
            result = json.loads(done.stdout.split("RESULT")[1])
            seconds.setdefault(who, []).extend(result["seconds"][WARM_UP:])
            losses[who] = result["losses"]
    base = statistics.median(seconds["Trainer"])
    print(f"{'who':<24} {'ms/step':>8} {'of Trainer':>10} {'largest loss difference':>24}")
    for who, name in (("Trainer", "transformers Trainer"), ("none", "manyrank, padded"), ("step", "manyrank, step")):
        median = statistics.median(seconds[who])
        apart = max(abs(a - b) for a, b in zip(losses[who], losses["Trainer"], strict=True))
        print(f"{name:<24} {median * 1e3:>8.1f} {median / base:>10.2f} {apart:>24.1e}")


if __name__ == "__main__":
    main()
