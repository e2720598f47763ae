"""What the dialects share about data: roles, columns and splits of a source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...config.peft_config import PEFT_NAMES
from ...config.resolve import canonical
from ...config.spellings import as_ours
from ...data.messages import ROLES
from .translation import Translation

TURN_KEYS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})

# Models whose own template has the system message that other tools write for them; the bases have another one.
QWEN25 = r"qwen2\.5-(?!math).*instruct"
ONE_RATE = "adapters of embeddings have the learning rate of the others"
OWN_OR_JINJA = "leave it out for the model's own template, or write chat_template: and a Jinja file with its text"


def _attention(key: str, choice: str | None = None) -> Callable[[Translation, Any], None]:
    """Make the handler of a key that chooses attention; what it is without a choice is as fast as flash attention."""

    def handler(t: Translation, value: Any) -> None:
        ours = (choice if value else None) or as_ours("attn_implementation", value)
        if ours in ("eager", "sdpa"):
            t.give("attn_implementation", ours, key)
        else:
            t.drop(key, value, "documents of a pack attend by flash attention wherever the GPU has it")

    return handler


ATTENTION = {
    **{
        key: _attention(key)
        for key in ("attn_implementation", "flash_attn", "flash_attention", "use_flash_attention_2")
    },
    "sdp_attention": _attention("sdp_attention", "sdpa"),
    "eager_attention": _attention("eager_attention", "eager"),
}


def keep_shape(t: Translation) -> None:
    """Leave the shape of adapters to a saved one that is trained further, as its tool does."""
    saved = any(canonical(entry.key) == "adapter" for entry in t.settings)
    if saved and not t.has("new_adapter"):
        t.remove((*PEFT_NAMES, "lora_dropout"), "the saved adapter says it")


def is_own_template(t: Translation, pattern: str | None) -> bool:
    """Return whether a template is that of the model, by the model's name."""
    return bool(pattern and re.search(pattern, model_of(t), re.IGNORECASE))


def model_of(t: Translation) -> str:
    """The model, whether its key is looked at already or not."""
    given = [entry.value for entry in t.settings if canonical(entry.key) == "model_name_or_path"]
    waiting = [value for key, value in t.theirs.items() if canonical(key) == "model_name_or_path"]
    return str(next(iter(given + waiting), ""))


def split_of(t: Translation, key: str, source: dict[str, Any]) -> dict[str, Any]:
    """The split and configuration of a source; a part of a split is left to the user."""
    split = source.pop("split", None)
    if split and "[" in str(split):
        t.decide(f"{key}.split", split, "a part of a split is not read: write max_rows, which the seed chooses")
        split = str(split).partition("[")[0]
    given = {"split": split, "name": source.pop("name", None)}
    return {name: value for name, value in given.items() if value}


def check_roles(t: Translation, key: str, roles: Mapping[str, Any] | None) -> None:
    """Check that every name of a role means here what it means there: {ours: [names in the data]}."""
    for role, names in (roles or {}).items():
        for name in [names] if isinstance(names, str) else names:
            if ROLES.get(name) != ROLES.get(role, role):
                t.decide(f"{key}.roles", {role: names}, f"{name!r} is read as {ROLES.get(name, 'no role')} here")


def check_turns(t: Translation, key: str, role: str, content: str) -> None:
    """Check that role and content of a message stand under names that are read here."""
    if {"role": role, "content": content} not in TURN_KEYS:
        t.decide(key, {"role": role, "content": content}, "messages have role and content, or from and value")
