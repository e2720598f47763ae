"""How fast conversations become masked tokens, and lengths packs: tables of medians.

    python benchmarks/prepare_data.py [ROWS.jsonl]        rows with "question" and "answer"; the sample, repeated, without

What transformers needs for the same text and tokens, without any mask, is the measure. Both take turns in one process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from arguments import existing_file
from transformers import AutoTokenizer

from manyrank.chat_template.render import render
from manyrank.data.packing import dataset_layout, imbalance, step_layout
from manyrank.models.tiny import ensure
from manyrank.project_files import asset

ROUNDS, ROWS = 5, 2000


def conversations(path: Path) -> list[list[dict]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = (rows * (ROWS // len(rows) + 1))[:ROWS]
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]


def per_second(work, items) -> float:
    started = time.process_time()
    for item in items:
        work(item)
    return len(items) / (time.process_time() - started)


def rendering(path: Path) -> np.ndarray:
    tokenizer, chats = AutoTokenizer.from_pretrained(ensure()), conversations(path)
    ways = {
        "transformers: text and tokens, no mask": lambda chat: tokenizer.apply_chat_template(chat, tokenize=True),
        "manyrank: text, tokens and checked mask": lambda chat: render(tokenizer, chat),
    }
    speeds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            speeds[name].append(per_second(work, chats))
    print(f"{'conversations per second of one core':<42} {'median':>7}  of the first")
    first = statistics.median(speeds["transformers: text and tokens, no mask"])
    for name, found in speeds.items():
        print(f"{name:<42} {statistics.median(found):>7.0f}  {statistics.median(found) / first:.2f}")
    return np.array([len(render(tokenizer, chat).input_ids) for chat in chats])


def packing(lengths: np.ndarray) -> None:
    print(f"\n{'packs of the data set':<42} {'seconds':>7}  filled")
    many = np.random.default_rng(0).choice(lengths, 1_000_000)
    for name, found in ((f"{len(lengths):,} lengths", lengths), ("1,000,000 lengths", many)):
        started = time.perf_counter()
        packs = dataset_layout(found, capacity=2048)
        print(f"{name:<42} {time.perf_counter() - started:>7.2f}  {found.sum() / len(packs) / 2048:.2%}")
    print(f"\n{'64 examples of a step':<42} {'mean':>7}  largest")
    for ranks in (2, 4, 8, 16):
        over = []
        for step in range(100):
            chosen = np.random.default_rng(step).choice(lengths, 64).tolist()
            over.append(imbalance(step_layout(chosen, ranks=ranks, token_budget=4 * 2048), chosen))
        name = f"{ranks} ranks, longest over the mean"
        print(f"{name:<42} {statistics.mean(over):>7.2%}  {max(over):.2%}")


def preparing(path: Path, numbers: tuple[int, ...] = (25_000, 50_000, 100_000)) -> None:
    """From a file of rows to the table of masked tokens, each in a process of its own and without a cache."""
    print(f"\n{'rows prepared from scratch':<42} {'seconds':>7}  GiB of the largest process")
    chats = conversations(path)
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            with file.open("w", encoding="utf-8") as lines:
                for index in range(number):
                    (question, answer), row = chats[index % len(chats)], f"{index}: "
                    lines.write(json.dumps({"question": row + question["content"], "answer": answer["content"]}) + "\n")
            environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "MANYRANK_BENCH_ROWS": str(file)}
            started = time.perf_counter()
            subprocess.run([sys.executable, __file__, "--prepare"], env=environment, check=True, capture_output=True)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"{number:<42,} {seconds:>7.1f}  {peak:.2f}")


def prepare_rows() -> None:
    from manyrank.config.resolve import Setting, resolve
    from manyrank.data.dataset import prepare
    from manyrank.models.tokenizer import load_tokenizer

    given = {"model_name_or_path": "embedded", "data_path": os.environ["MANYRANK_BENCH_ROWS"]}
    config = resolve(None, [Setting(key, value, "bench") for key, value in given.items()]).config
    prepare(config.data_path, load_tokenizer(config), config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "rows", nargs="?", type=existing_file, default=asset("data", "sample.jsonl"), help="a .jsonl file"
    )
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)  # in a process of its own, measured
    options = parser.parse_args()
    if options.prepare:
        prepare_rows()
    else:
        packing(rendering(options.rows))
        preparing(options.rows)
