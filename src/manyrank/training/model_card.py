"""README.md of a final model, as the hub shows it: base, method, data, results, how it was trained and how to use it.

Paths are shortened to their last part: a card is published, and says nothing of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from .. import __version__
from ..config.resolve import TrainConfig
from ..config.schema import OF_LORA
from ..project_files import EMBEDDED

RESULTS = {
    "loss": "last training loss",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "reward": "mean reward of the last step",
    "eval_reward": "validation reward",
}
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_length",
    "packing",
    "seed",
)
THIS_MODEL = "FOLDER OR HUB NAME OF THIS MODEL"  # `manyrank push` writes its name
USE_ADAPTER = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{THIS_MODEL}")
tokenizer = AutoTokenizer.from_pretrained("{THIS_MODEL}")"""
USE_MODEL = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{THIS_MODEL}")
tokenizer = AutoTokenizer.from_pretrained("{THIS_MODEL}")"""


def model_card(
    config: TrainConfig, output_dir: Path, *, steps: int, batch: int, log_history: Sequence[Mapping[str, float]]
) -> str:
    """Write the card of a run that has ended.

    Args:
        batch: examples of a step.
        log_history: metrics by name, in order.
    """
    base = config.model_name_or_path
    name = Path(base).name if base == EMBEDDED or Path(base).expanduser().exists() else base
    header = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="peft" if config.uses_lora else "transformers",
        pipeline_tag="text-generation",
        tags=[config.task, config.method, "manyrank"],
    )
    last = {key: value for line in log_history for key, value in line.items() if key in RESULTS}
    results = {RESULTS[key]: f"{last[key]:.4g}" for key in RESULTS if key in last}
    options = config.method_options
    options |= {"adapter": Path(options["adapter"]).name} if "adapter" in options else {}
    settings = {"steps": steps, "examples of a step": batch}
    settings |= {key: getattr(config, key) for key in OF_LORA if config.uses_lora} | options
    settings |= {key: getattr(config, key) for key in SETTINGS}
    part = "in part" if config.frozen_parameters or config.unfrozen_parameters else "as a whole"
    adapter = f"An adapter (`{config.method}`) for {name}" if config.uses_lora else f"{name}, trained {part}"
    title = config.run_name or (f"{name.rpartition('/')[2]}-{config.method}")
    parts = [
        f"---\n{header.to_yaml()}\n---\n\n# {title}",
        f"{adapter}: {config.task.upper()} with manyrank {__version__}.",
        _section("Data", _data(output_dir)),
        _section("Results", [f"{what}: {value}" for what, value in results.items()]),
        _section("Training", [f"{key}: {_text(value)}" for key, value in settings.items()]),
        f"## Use\n\n```python\n{USE_ADAPTER if config.uses_lora else USE_MODEL}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""


def _data(output_dir: Path) -> list[str]:
    """Name the sources with what was used of them, as logs/data.json has it."""
    file = output_dir / "logs" / "data.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"readings": []}
    used = {"data_path": "training", "eval_data_path": "validation"}
    return [
        f"{used.get(reading['name'], reading['name'])}: {Path(source['path']).name} ({source['format_type']}), "
        f"{source['examples']:,} examples, {source['tokens']:,} tokens, of which {source['supervised']:,} supervised"
        for reading in facts["readings"]
        for source in reading["sources"]
    ]


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
