"""Make the workload of the benchmarks: a random Qwen3 model, a tokenizer for it, and chats to train on.

FOLDER/model/        Qwen3, hidden 256, 6 layers, 32,768 tokens; random weights: speed does not depend on them
FOLDER/rows.jsonl    chats from GSM8K and Alpaca where somebody has put them beside the checkout, else the sample's
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from manyrank.models.tiny import CHAT_TEMPLATE, END, START, STOP
from manyrank.project_files import asset

BESIDE = ("gsm8k_train.jsonl", "alpaca_en_demo.json")  # files of DATA, mixed half and half
DATA = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = 32_768
SHAPE = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def build(folder: Path, *, data: Path = DATA, layers: int | None = None) -> str:
    """Write the model and the rows into `folder`.

    Args:
        layers: another number of them than usual.

    Returns:
        What it is, in a line.
    """
    rows = chats(data)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": row}) + "\n" for row in rows)
    tokenizer = _tokenizer(message["content"] for row in rows for message in row)
    tokenizer.save_pretrained(folder / "model")
    _model(folder / "model", tokenizer.eos_token_id, SHAPE | ({"num_hidden_layers": layers} if layers else {}))
    names = " and ".join(BESIDE) if _beside(data) else "the project's sample"
    return f"{len(rows):,} chats from {names}, tokenizer of {len(tokenizer):,} tokens, a model with {VOCABULARY:,}"


def chats(data: Path = DATA) -> list[list[dict]]:
    """Conversations in random order: as many of GSM8K as of Alpaca, or the sample's."""
    files = _beside(data) or [asset("data", "sample.jsonl")]
    sources = [[_chat(row) for row in _rows(file)] for file in files]
    least = min(map(len, sources))
    order = random.Random(0)
    return order.sample([row for rows in sources for row in order.sample(rows, least)], least * len(sources))


def _beside(data: Path) -> list[Path]:
    files = [data / name for name in BESIDE]
    return files if all(file.is_file() for file in files) else []


def _rows(file: Path) -> list[dict]:
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def _chat(row: dict) -> list[dict]:
    question = row.get("question") or "\n".join(filter(None, (row.get("instruction"), row.get("input"))))
    answer = row["answer"] if "answer" in row else row["output"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tokenizer(texts: Iterable[str]):
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer(eos_token=STOP, pad_token=END, extra_special_tokens=[START])
    tokenizer = empty.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(folder: Path, stop: int, shape: dict) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**shape, vocab_size=VOCABULARY, eos_token_id=stop, pad_token_id=stop)
    Qwen3ForCausalLM(config).save_pretrained(folder)
