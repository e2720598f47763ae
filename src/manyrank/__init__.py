"""manyrank: one recipe fine-tunes a language model on any topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import SFTConfig, SFTDataset, SFTTrainer, Trained
    from .errors import UserError
    from .models.inference import load_model

__version__ = "0.1.0"
__all__ = ["SFTConfig", "SFTDataset", "SFTTrainer", "Trained", "UserError", "load_model"]
_WHERE = {"UserError": "errors", "load_model": "models.inference"}


def __getattr__(name: str) -> object:
    """Torch is imported when one of these is first used, so that the command line starts at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .launch.command import before_imports
    from .topology.gpus import probe

    before_imports(probe())
    return getattr(import_module(f".{_WHERE.get(name, 'api')}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
