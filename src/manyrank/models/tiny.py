"""The embedded model: a small Qwen3 and its tokenizer, made on this machine from the project's sample.

It stands in for a downloaded model in examples and tests. Pre-training sees the sample's lines one by one and in
random order, never a question with its answer: the model writes the sample's language, but its answers are wrong
until it is fine-tuned.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..project_files import asset, cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

FILES = ("config.json", "generation_config.json", "model.safetensors")
FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SEED = 0
THREADS = 1  # a sum split over threads may end in other bits; two are faster on idle cores, far slower on busy ones
STEPS, BATCH, WINDOW = 150, 8, 128  # optimizer steps, sequences per step, tokens per sequence
LEARNING_RATE, WARMUP = 3e-3, 20  # peak, steps
MAX_LENGTH = 2048  # tokens
VOCABULARY = 1536  # tokens at most; the sample has few more words and parts of words
SHAPE = dict(
    architectures=["Qwen3ForCausalLM"],
    dtype="float32",
    max_position_embeddings=MAX_LENGTH,
    tie_word_embeddings=False,  # an untied head is sharded and saved like any other weight
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,  # these and the key heads divide over 2 or 4 ranks
    num_key_value_heads=4,
    head_dim=32,
    initializer_range=0.06,  # measured: 15 epochs of LoRA then end at a loss of 0.06, with the usual 0.02 at 0.86
)

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# What may follow a line. LoRA freezes the embeddings, so each mark and the newline must get theirs here.
LINE_ENDS = ("\n", END, START, f"{STOP}\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ensure(folder: Path | None = None) -> Path:
    """The folder of the embedded model, which is made first (about 30 s on one core) if it is not there.

    Any number of processes may call this at once: one makes the model, the others wait for it.

    Args:
        folder: where it is or shall be; None for a folder in $MANYRANK_CACHE or ~/.cache/manyrank.

    Raises:
        UserError: the folder holds something else.
    """
    from filelock import FileLock

    folder = Path(folder) if folder else default_folder()
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if _is_complete(folder):
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                "the folder for the embedded model holds other files", where=str(folder), fix="name an empty folder"
            )
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        started = time.monotonic()
        # Not to stdout, which belongs to the caller's own output.
        print("making the embedded model (once)", end=" ... ", file=sys.stderr, flush=True)
        try:
            build(part)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    print(f"{time.monotonic() - started:.0f} s: {folder}", file=sys.stderr, flush=True)
    return folder


def default_folder() -> Path:
    """Named after all that decides the model's bytes: the sample, this module and the libraries' versions."""
    versions = " ".join(version(name) for name in ("torch", "transformers", "tokenizers"))
    digest = hashlib.sha256(_sample().read_bytes() + Path(__file__).read_bytes() + versions.encode()).hexdigest()
    return cache_folder() / f"embedded-{digest[:12]}"


def build(folder: Path, steps: int = STEPS) -> None:
    """Train the tokenizer and the model and write both into `folder`; the same bytes on each run of one machine."""
    from safetensors.torch import save_file

    lines = _lines()
    tokenizer = _train_tokenizer(lines)
    model = _pretrain(tokenizer, lines, steps)
    tokenizer.save_pretrained(folder)
    # Not the model's save_pretrained, which shows a progress bar.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _sample() -> Path:
    return asset("data", "sample.jsonl")


def _lines() -> list[str]:
    """Every question, answer and source of the sample as a line of its own, each text once."""
    rows = [json.loads(row) for row in _sample().read_text(encoding="utf-8").splitlines() if row.strip()]
    lines = [text for row in rows for text in (row["question"], row["answer"], f"Source: {row['source']}")]
    return list(dict.fromkeys(lines))


def _train_tokenizer(lines: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `VOCABULARY` tokens, with the chat template.

    It starts from an empty Qwen2Tokenizer because transformers loads the tokenizer of every qwen3 folder as that class
    with that class's split rules, whatever the file says: other rules would give other ids after loading.
    """
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer(
        eos_token=STOP, pad_token=END, extra_special_tokens=[START], model_max_length=MAX_LENGTH, padding_side="right"
    )
    tokenizer = empty.train_new_from_iterator([f"{line}\n" for line in lines], VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _pretrain(tokenizer: PreTrainedTokenizerBase, lines: list[str], steps: int) -> Qwen3ForCausalLM:
    """Plain language-model training on windows of the shuffled lines, float32 on the CPU."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(**SHAPE, vocab_size=len(tokenizer), eos_token_id=stop, pad_token_id=pad)
    with _reproducible():
        model = Qwen3ForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        tokens = _stream(tokenizer, lines)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, 1 - step / steps)
            window = torch.tensor([next(tokens) for _ in range(BATCH * WINDOW)]).view(BATCH, WINDOW)
            model(input_ids=window, labels=window).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.generation_config = GenerationConfig(eos_token_id=[stop, pad], pad_token_id=pad)
    return model.eval()


def _stream(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> Iterator[int]:
    """Token ids without end: all lines in a new order, each with a random end, again and again."""
    order = random.Random(SEED)
    while True:
        text = "".join(line + order.choice(LINE_ENDS) for line in order.sample(lines, len(lines)))
        yield from tokenizer.backend_tokenizer.encode(text).ids


@contextmanager
def _reproducible() -> Iterator[None]:
    """Fix torch's CPU seed and thread count, and give the caller's own back after."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would also reseed the caller's GPUs
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
