"""A recipe as keyword arguments of Python. No torch: notebooks import it at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from .resolve import NOT_GIVEN, ResolvedConfig, Setting, resolve
from .schema import TrainConfig


class SFTConfig(TrainConfig):
    """A recipe as keyword arguments: every key of docs and `manyrank train --help all`, also by its other names.

    Args:
        recipe: a YAML file or a preset's name to start from; without it and without values, the preset default.
        **values: override it; `use_lora=False`, `learning_rate=1e-4`, `data_path=["a.json", "b.json"]`, ...

    Raises:
        UserError: an unknown key, or a wrong value.
    """

    _resolved: ResolvedConfig = PrivateAttr()

    @property
    def model_is_default(self) -> bool:
        """Whether nobody has named the model."""
        return self._resolved.provenance.get("model_name_or_path") == NOT_GIVEN

    if not TYPE_CHECKING:  # a type checker sees the fields

        def __init__(self, recipe: str | Path | None = None, **values: Any) -> None:
            recipe = recipe if recipe or values else "default"
            # None is what a key without a value has; in Axolotl's recipes a blank adapter is full fine-tuning.
            given = {key: value for key, value in values.items() if not (key == "adapter" and value is None)}
            entries = [Setting(key, _plain(value), f"SFTConfig, {key}") for key, value in given.items()]
            resolved = resolve(None if recipe is None else str(recipe), entries)
            super().__init__(**dict(resolved.config))
            self._resolved = resolved


def _plain(value: Any) -> Any:
    """Paths as text, also inside lists and mappings."""
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
