"""The shape of a model by its name: a folder, a config.json, a hub name, or one of the list that ships with the project.

`data/architectures.json` holds configs by short names, so that well-known models can be planned offline.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..project_files import asset
from ..runs.mapping_files import read_json_object
from .model_facts import find_facts
from .spec import ModelSpec, from_config

FIX = "give a model's config.json"


def read(model: str) -> ModelSpec:
    """The shape of a shipped name, a model folder or a config.json; hub names from the local cache.

    Raises:
        UserError: it is none of these, or not a language model's config.
    """
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return from_config(read_json_object(path, fix=FIX), name=model, where=str(path))
    shipped = known()
    key = _short(model, shipped)
    if key in shipped:
        return from_config(shipped[key], name=model, where=f"data/architectures.json, {key}")
    if facts := find_facts(model):
        return from_config(facts.whole, name=model, where=facts.place("config.json"))
    if path := _of_another_revision(model):
        return from_config(read_json_object(path, fix=FIX), name=model, where=str(path))
    close = difflib.get_close_matches(key, shipped, 3, 0.5)
    raise UserError(
        f"nothing is known here of the model {model}",
        where="model_name_or_path",
        fix="give its folder or config.json" + (f", or a known name: {', '.join(close)}" if close else ""),
    )


def _of_another_revision(model: str) -> Path | None:
    """config.json of a hub name that was downloaded as a revision other than main."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")
    return max(folders, default=None)


def known() -> dict[str, dict[str, Any]]:
    """The shipped configs by their short names."""
    shipped = read_json_object(asset("data", "architectures.json"))

    def whole(entry: dict[str, Any]) -> dict[str, Any]:
        return {**whole(shipped[entry["like"]]), **entry} if "like" in entry else entry

    return {name: whole(entry) for name, entry in shipped.items()}


# Parts of a hub name that do not change the architecture.
VARIANTS = frozenset(
    [
        "instruct",
        "chat",
        "base",
        "it",
        "hf",
        "pt",
        "4bit",
        "bnb",
        "unsloth",
        "fp16",
        "bf16",
        "meta",
        "rl",
        "dpo",
        "beta",
        "preview",
        "thinking",
        "reasoning",
    ]
)
DATED = re.compile(r"v[0-9.]+|[0-9]{4}|[0-9]+[km]")  # and what else comes after the size


def _short(model: str, names: Collection[str]) -> str:
    """The short name: `Qwen/Qwen2.5-7B-Instruct` and `qwen2.5-7b` are one architecture, as are dated versions.

    A name that ends with a known one is a model made from it, such as `OpenHermes-2.5-Mistral-7B`.
    """
    parts = model.rsplit("/", 1)[-1].lower().replace("_", "-").split("-")
    parts = [part for part in parts if part not in VARIANTS]
    undated = [part for part in parts if not re.fullmatch("[0-9]{4}", part)]
    ends = [parts]
    while len(ends[-1]) > 1 and DATED.fullmatch(ends[-1][-1]):  # a size or a family is another model
        ends.append(ends[-1][:-1])
    written = [*ends, undated, *(undated[start:] for start in range(1, len(undated)))]
    return next((name for name in map("-".join, written) if name in names), "-".join(parts))
