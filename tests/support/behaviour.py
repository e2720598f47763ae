"""Record what a change of the house must leave as it is, and compare two records of one machine.

    python tests/support/behaviour.py record before.json       in the tree of before
    python tests/support/behaviour.py record after.json        in the changed tree
    python tests/support/behaviour.py compare before.json after.json

A record has the losses, gradient norms and hashes of the final adapters of short runs (every row of `manyrank verify`,
and one run for each layout, method and task), the token ids and labels of every template of the tests, plans, launch
commands, and the exit codes of wrong input. Everything is compared exactly, so that a machine compares with itself.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import warm
from launches import ROOT

os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

RUNS = {
    "packing none": "verify --packing=none --max_steps=4 --strategy=single",
    "packing dataset": "verify --packing=dataset --max_steps=4 --strategy=ddp --nproc=2",
    "packing step, validation": "verify --eval_split=0.1 --eval_steps=2 --max_steps=4 --strategy=single",
    "recomputed layers": "verify --gradient_checkpointing --max_steps=4 --strategy=fsdp --nproc=2",
    "dropout": "verify --lora_dropout=0.1 --max_steps=4 --strategy=ddp --nproc=2",
    "int8": "verify --method=int8 --max_steps=4 --strategy=single",
    "bf16": "verify --bf16=auto --method=qlora --max_steps=4 --strategy=single",
    "another optimizer and schedule": "verify --optim=sgd --lr_scheduler_type=cosine --warmup_steps=2 --max_steps=4 --strategy=single",
    "offload": "verify --max_steps=4 --strategy=zero3_offload --nproc=2",
    "a resume on other ranks": "verify --max_steps=6 --strategy=fsdp --nproc=2 --resume_from_checkpoint={packing}/checkpoint-3",
    "GRPO": "--config=fast_test --task=grpo --model=embedded --data_path={sums} --rewards={{f1: 1.0, numeric: 0.5}} --num_generations=4 "
    "--max_completion_length=12 --bf16=no --lr=1e-3 --lr_scheduler_type=constant --per_device_train_batch_size=4 --global_batch_size=16 --max_steps=2",
    "GRPO on two ranks": "--config=fast_test --task=grpo --model=embedded --data_path={sums} --rewards={{f1: 1.0}} --num_generations=4 "
    "--max_completion_length=12 --bf16=no --lr=1e-3 --per_device_train_batch_size=4 --global_batch_size=16 --max_steps=2 --strategy=fsdp --nproc=2",
}
CONVERSATIONS = [
    [("user", "What is two and two?"), ("assistant", "Four.")],
    [("system", "Be brief."), ("user", "What is two and two?"), ("assistant", "Four.")],
    [("user", "Hello!"), ("assistant", "Good day."), ("user", "And now?"), ("assistant", "Good night.")],
    [("user", "What is two and two?"), ("assistant", "<think>\nTwo fingers.\n</think>\n\nFour.")],
    [("user", "Hello  \n"), ("assistant", "  Hello\n\n")],
    [("user", "Hello"), ("assistant", "Hello"), ("user", "Hello"), ("assistant", "Hello")],
]
PLANS = [
    "quickstart --gpu L4 --nproc 1",
    "--model qwen3-8b --gpu H100 --nproc 8",
    "--model qwen3-8b --gpu L4 --nproc 2 --method qlora",
    "--model llama-3.1-8b --gpu A100-80GB --nproc 8 --method full",
    "--model llama-3.1-8b --gpu H100 --nproc 8 --nnodes 4 --max_length 8192",
    "deepseek_32b_qlora --gpu H100 --nproc 8",
    "full_zero3 --model qwen3-8b --gpu H100 --nproc 8",
    "low_memory --model qwen3-4b --gpu RTX4090 --nproc 1",
    "--model qwen3-8b --gpu H200 --nproc 8 --task grpo --rewards={numeric: 1}",
    "verify --nproc 2",
]
LAUNCHES = [
    "quickstart",
    "quickstart --nproc=2",
    "quickstart --nproc=2 --via=torchrun",
    "verify --strategy=fsdp --nproc=4",
    "verify --strategy=zero3 --nproc=2",
    "verify --strategy=hsdp --nproc=4 --hsdp_shard_size=2",
    "verify --strategy=ddp --nproc=2 --nnodes=2 --rdzv_endpoint=host:29500",
    "verify --strategy=ddp --nproc=2 --nnodes=2 --node_rank=1 --rdzv_endpoint=host:29500 --via=torchrun",
    "verify --nproc=2 --max_restarts=2 --via=torchrun",
    "verify --nproc=2 --nnodes=4 --elastic --rdzv_endpoint=host:29500",
]
REFUSED = [
    "train nowhere.yaml",
    "train verify --learnin_rate=1",
    "train verify --lr=much",
    "train verify --lr=inf",
    "train verify --strategy=dpp",
    "train verify --method=int8 --strategy=fsdp --nproc=2",
    "train verify --data_path=nowhere.jsonl",
    "train verify --data_path=empty.jsonl",
    "train verify --data_path=bad.jsonl",
    "train verify --data_path=shapes.jsonl",
    "train verify --data_path=",
    "train verify --model=nowhere/at-all/x",
    "train verify --model=empty",
    "train verify --model=broken",
    "train verify --max_length=0",
    "train verify --lora_r=-1",
    "train verify --lora_dropout=2",
    "train verify --global_batch_size=0",
    "train verify --eval_steps=0",
    "train verify --packing=maybe",
    "train verify --resume_from_checkpoint=nowhere",
    "train verify --output_dir=taken",
    "train verify --via=python --nproc=2",
    "train verify --nnodes=2",
    "train verify --node_rank=1",
    "train verify --elastic",
    "train verify --strategy=single --nproc=2",
    "train verify --chat_template=broken.jinja",
    "train verify --chat_template=nowhere.jinja",
    "train verify --report_to=nobody",
    "train verify --optim=none",
    "train verify --lr_scheduler_type=none",
    "train verify --bf16=perhaps",
    "train verify --format_type=nothing",
    "train verify --target_modules=none_such",
    "train wrong.yaml",
    "train list.yaml",
    "train circle.yaml",
    "plan --model=nowhere/at-all/x",
    "plan quickstart --gpu=Z80",
    "plan",
    "plan quickstart --nproc=0",
    "data inspect verify --data_path=nowhere.jsonl",
    "data prepare nowhere",
    "data",
    "merge nowhere",
    "generate nowhere in.jsonl out.jsonl",
    "evaluate nowhere",
    "chat nowhere",
    "report nowhere",
    "doctor nowhere.yaml",
    "verify --methods=none",
    "nonsense",
    "trian verify",
]
FILES = {
    "empty.jsonl": "",
    "bad.jsonl": '{"question": "q"\n',
    "shapes.jsonl": '{"colour": 1}\n',
    "broken/config.json": "{",
    "taken/mine.txt": "mine",
    "broken.jinja": "{% for m in messages %}",
    "wrong.yaml": "learnin_rate: 1\n",
    "list.yaml": "- a\n- b\n",
    "circle.yaml": "base: circle.yaml\n",
}


def manyrank(line: str, cwd: Path = ROOT):
    words: list[str] = []
    for word in line.split(" "):  # a value in braces has spaces
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return warm.run([sys.executable, "-m", "manyrank.cli", *words], cwd=cwd)


def trained(line: str, folder: Path) -> dict:
    """Losses, gradient norms and the hash of what was saved, by a run into `folder`."""
    done = manyrank(f"train {line} --output_dir={folder} --logging_steps=1")
    if done.returncode:
        raise SystemExit(f"{line}\n{done.stderr}")
    entries = list(map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines()))
    keys = ("loss", "grad_norm", "eval_loss", "reward", "kl", "learning_rate", "num_tokens")
    return {
        "metrics": {key: [entry[key] for entry in entries if key in entry] for key in keys},
        "saved": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((folder / "final_model").glob("*.safetensors"))
        },
    }


def runs(folder: Path) -> Iterator[tuple[str, dict]]:
    for method, strategy in product(("lora", "qlora", "full"), ("single", "ddp", "fsdp", "hsdp", "zero2", "zero3")):
        nproc = {"single": 1, "hsdp": 4}.get(strategy, 2)
        options = f"--method={method} --strategy={strategy} --nproc={nproc} --max_steps=3"
        options += " --hsdp_shard_size=2" if strategy == "hsdp" else ""
        for via in ("python",) if strategy == "single" else ("accelerate", "torchrun"):
            yield (
                f"{method} {strategy} {via}",
                trained(f"verify {options} --via={via}", folder / f"{method}-{strategy}-{via}"),
            )
    sums = folder / "sums.jsonl"
    rows = [{"question": f"What is {i} + {j}?", "answer": f"{i + j}"} for i in range(8) for j in range(8)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained("verify --max_steps=6 --save_steps=3 --strategy=ddp --nproc=2", folder / "packing")
    for name, line in RUNS.items():
        yield name, trained(line.format(sums=sums, packing=folder / "packing"), folder / name.replace(" ", "-"))


def masks(folder: Path) -> Iterator[tuple[str, object]]:
    from templates import TEMPLATES, tokenizer_for

    from manyrank import SFTDataset
    from manyrank.errors import UserError

    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_for(template)
        for number, conversation in enumerate(CONVERSATIONS):
            file = folder / f"row-{number}.jsonl"
            messages = [{"role": role, "content": content} for role, content in conversation]
            file.write_text(json.dumps({"messages": messages}) + "\n")
            try:
                row = SFTDataset(str(file), tokenizer)[0]
                found = [row["input_ids"].tolist(), row["labels"].tolist()]
            except UserError:
                found = "refused"
            yield f"{name}, {number}", found


def plans(folder: Path) -> Iterator[tuple[str, object]]:
    for line in PLANS:
        done = manyrank(f"plan {line} --json")
        yield line, json.loads(done.stdout) if done.returncode == 0 else done.returncode


def launches(folder: Path) -> Iterator[tuple[str, str]]:
    for line in LAUNCHES:
        done = manyrank(f"train --print {line}")
        yield line, done.stdout.replace(str(ROOT), "ROOT").replace(sys.prefix, "PREFIX") or done.stderr


def refusals(folder: Path) -> Iterator[tuple[str, list]]:
    """The exit code, whether there was a traceback, and what was left behind."""
    for number, line in enumerate(REFUSED):
        place = folder / f"refused-{number}"
        for name in ("empty", "broken", "taken"):
            (place / name).mkdir(parents=True)
        for name, text in FILES.items():
            (place / name).write_text(text)
        before = set(place.rglob("*"))
        done = manyrank(line, cwd=place)
        left = sorted(str(path.relative_to(place)) for path in set(place.rglob("*")) - before)
        yield line, [done.returncode, "Traceback" in done.stderr, left]


PARTS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    "refusals": refusals,
    "launches": launches,
    "plans": plans,
    "masks": masks,
    "runs": runs,
}


def record(file: Path, parts: list[str]) -> None:
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            started = time.monotonic()
            found[part] = dict(PARTS[part](Path(folder)))
            file.write_text(json.dumps(found, indent=1, sort_keys=True))
            print(f"{part}: {len(found[part])} in {time.monotonic() - started:.0f} s", flush=True)


def compare(one: Path, other: Path) -> int:
    """Print what differs.

    Returns:
        How much that is.
    """
    before, after = json.loads(one.read_text()), json.loads(other.read_text())
    differences = 0
    for part in sorted(before.keys() | after.keys()):
        for name in sorted(before.get(part, {}).keys() | after.get(part, {}).keys()):
            was, now = before.get(part, {}).get(name), after.get(part, {}).get(name)
            if was != now:
                differences += 1
                print(f"{part}, {name}:\n  was {str(was)[:300]}\n  now {str(now)[:300]}")
    print(f"{differences} differences")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record")
    command.add_argument("file", type=Path)
    command.add_argument("parts", nargs="*", default=list(PARTS), metavar=f"{{{','.join(PARTS)}}}")
    command = commands.add_parser("compare")
    command.add_argument("one", type=Path)
    command.add_argument("other", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        record(given.file, given.parts)
    else:
        sys.exit(min(compare(given.one, given.other), 100))
