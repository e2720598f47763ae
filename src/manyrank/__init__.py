"""manyrank: one recipe fine-tunes a language model on any topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import SFTDataset, SFTTrainer, Trained
    from .config.keywords import SFTConfig
    from .errors import UserError
    from .models.inference import load_model

__version__ = "0.1.0"
__all__ = ["SFTConfig", "SFTDataset", "SFTTrainer", "Trained", "UserError", "load_model"]
_WITHOUT_TORCH = {"SFTConfig": "config.keywords", "UserError": "errors"}


def __getattr__(name: str) -> object:
    """Import what is first used, torch only where it is needed, so that the command line and a config start at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _WITHOUT_TORCH:
        return getattr(import_module(f".{_WITHOUT_TORCH[name]}", __name__), name)
    from .launch.command import before_imports
    from .topology.gpus import probe

    before_imports(probe())
    return getattr(import_module(".models.inference" if name == "load_model" else ".api", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
