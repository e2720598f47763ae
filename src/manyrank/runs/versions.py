"""Versions of Python and of the libraries that a run depends on. No torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import runpy
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Software:
    """Versions of Python, of LIBRARIES, and the CUDA version that torch was built for (None: for the CPU)."""

    python: str
    libraries: dict[str, str | None]
    cuda: str | None


def software() -> Software:
    return Software(platform.python_version(), {name: _version(name) for name in LIBRARIES}, torch_build().get("cuda"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> dict[str, str | None]:
    """The values of torch's file of versions, `cuda` and `hip` among them: importing torch takes seconds. Empty without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return {}
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))
