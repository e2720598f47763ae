"""The training loops of the speed benchmark: this project with each optimization off in turn, trl's SFTTrainer, and bare loops.

    python benchmarks/loops.py NAME FOLDER OUT --steps N      one round in its own process; writes OUT/RANK.json

All of them train on the same rows in the same order, with the same model, adapters and optimizer, and count real tokens only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from manyrank.topology.gpus import probe
from manyrank.topology.precision import Precision, find_precision

BATCH, LENGTH, RATE = 8, 512, 1e-3  # rows (or packs) to a step over all processes, tokens at most, learning rate
STARTED = "MANYRANK_BENCH_STARTED"  # when the round's process was started, in seconds since 1970


@dataclass
class Clock:
    """Seconds of each step, and the time to the first one."""

    start_up: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """The first step begins. The others begin where the one before ends: reading and collating count, too."""
        if not self.start_up:
            self.start_up = time.time() - float(os.environ[STARTED])
            self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.wall.append(now[0] - self._began[0])
        self.cpu.append(now[1] - self._began[1])
        self._began = now


@dataclass(frozen=True)
class Round:
    """What one process of a round measured. tokens: real tokens of each step; over the processes they add up."""

    clock: Clock
    tokens: list[int]
    losses: list[float]
    peak: int  # bytes of resident memory


def config(folder: Path, **more):
    from manyrank.config.resolve import Setting, resolve

    values = {
        "model_name_or_path": str(folder / "model"),
        "data_path": str(folder / "rows.jsonl"),
        "max_length": LENGTH,
        "global_batch_size": BATCH,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": "off",
    }
    return resolve(None, [Setting(key, value, "bench") for key, value in (values | more).items()]).config


def ours(folder: Path, steps: int, clock: Clock, **more) -> tuple[list[int], list[float]]:
    from manyrank.tasks.sft import SFT
    from manyrank.topology import ranks
    from manyrank.training.build import build_run

    chosen = config(folder, max_steps=steps, **more)
    precision = find_precision(chosen.bf16, chosen.fp16, probe())
    with tempfile.TemporaryDirectory() as output:
        run = build_run(chosen, ranks.from_environment(), SFT, output_dir=Path(output), precision=precision)
        run.trainer.handler.add_callback(_timer(clock))
        run.trainer.train()
        main = run.accelerator.is_main_process  # these are the tokens of all processes
        tokens = [run.trainer.loader.step(number).tokens if main else 0 for number in range(steps)]
        return tokens, [line["loss"] for line in run.trainer.state.log_history]


def trl(folder: Path, steps: int, clock: Clock, *, bf16: bool | str = "auto", **more) -> tuple[list[int], list[float]]:
    """SFTTrainer on the rows of `packing: step`, or packed its own way."""
    with tempfile.TemporaryDirectory() as output:
        return _trl(folder, steps, clock, Path(output), bf16=_in_bf16(bf16), **more)


def _in_bf16(setting: bool | str) -> bool:
    return find_precision(setting, False, probe()) is Precision.BF16


def _trl(folder: Path, steps: int, clock: Clock, output: Path, *, bf16: bool, **more):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer, rows = _rows(folder, steps * (4 if more.get("packing") else 1))
    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(label >= 0) for label in labels]} for ids, labels in rows]
    )
    arguments = SFTConfig(
        output_dir=output,
        bf16=bf16,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=RATE,
        max_steps=steps,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        warmup_steps=0,
        max_length=None if more.get("padding_free") else LENGTH,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        disable_tqdm=True,
        completion_only_loss=True,
        **more,
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype),
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[_timer(clock)],
    )
    tokens = []
    forward = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        tokens.append(
            int(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel())
        )
        return forward(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    return tokens, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def bare(
    folder: Path, steps: int, clock: Clock, *, packed: bool, bf16: bool | str = "auto"
) -> tuple[list[int], list[float]]:
    """A loop of a page: padded rows with all logits, or packed rows with supervised logits."""
    bf16 = _in_bf16(bf16)
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from manyrank.models.attention import use_packed_attention

    _, rows = _rows(folder, steps)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16 if bf16 else torch.float32)
    set_seed(42)
    if packed:
        use_packed_attention(model, plain=True)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    tokens, losses = [], []
    for step in range(steps):
        clock.begin()
        chosen = rows[step * BATCH : (step + 1) * BATCH]
        inputs, targets = _packed(chosen) if packed else _padded(chosen)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**inputs, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.end()
        tokens.append(sum(len(ids) for ids, _ in chosen))
    return tokens, losses


def _rows(folder: Path, steps: int) -> tuple[object, list[tuple[list[int], list[int]]]]:
    """The tokenizer, and (ids, labels) of the first steps' rows in the order in which this project trains on them.

    The first to ask writes them down, so that the peers' start-up has nothing of this project.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    file = folder / f"rows-{steps}.json"
    if not file.exists():
        from manyrank.data.dataset import prepare
        from manyrank.data.loader import epoch_order

        recipe = config(folder)
        examples = prepare(recipe.data_path, tokenizer, recipe, needed=steps * BATCH)
        order = [int(i) for epoch in range(9) for i in epoch_order(examples, recipe.seed, epoch)][: steps * BATCH]
        rows = (examples[index] for index in order)
        file.write_text(json.dumps([(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]))
    return tokenizer, json.loads(file.read_text())


def _padded(rows):
    import torch

    longest = max(len(ids) for ids, _ in rows)
    pad = lambda values, value: [*values, *[value] * (longest - len(values))]  # noqa: E731
    ids, labels = (torch.tensor([pad(row[part], (0, -100)[part]) for row in rows]) for part in (0, 1))
    mask = torch.tensor([pad([1] * len(row[0]), 0) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}, torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def _packed(rows):
    from manyrank.data.loader import side_by_side

    micro = side_by_side([{"input_ids": ids, "labels": labels, "source": "", "row": 0} for ids, labels in rows])
    return micro.inputs | {"logits_to_keep": micro.positions}, micro.targets


def _timer(clock: Clock):
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.begin()

        def on_step_end(self, *args, **kwargs):
            clock.end()

    return Timer()


Loop = Callable[[Path, int, Clock], tuple[list[int], list[float]]]
LOOPS: dict[str, Loop] = {
    "dataset": partial(ours, packing="dataset"),
    "step": ours,
    "step -head": partial(ours, disable_fused=["lm_head"]),
    "step -lora": partial(ours, disable_fused=["lora"]),
    "step -attention": partial(ours, disable_fused=["attention"]),
    "step -rope": partial(ours, disable_fused=["rope"]),
    "step -all": partial(ours, disable_fused=["lm_head", "lora", "attention"]),
    "step fp32": partial(ours, bf16=False),
    "padded": partial(ours, packing="none"),
    "padded fp32": partial(ours, packing="none", bf16=False),
    "trl fp32": partial(trl, bf16=False),
    "trl": trl,
    "trl packing": partial(trl, packing=True),
    "trl padding-free": partial(trl, padding_free=True),
    "bare padded fp32": partial(bare, packed=False, bf16=False),
    "bare padded": partial(bare, packed=False),
    "bare packed": partial(bare, packed=True),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOOPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder for what each rank measured")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe, for this project's own")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    clock = Clock()
    more = dict(setting.split("=", 1) for setting in options.set)
    tokens, losses = LOOPS[options.name](options.folder, options.steps, clock, **more)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = asdict(Round(clock, tokens, losses, peak))
    (options.out / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(measured))


def read(out: Path) -> list[Round]:
    """What the processes of a round have written, by rank."""
    rounds = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    return [Round(Clock(**values.pop("clock")), **values) for values in rounds]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes hangs where the interpreter takes it down
