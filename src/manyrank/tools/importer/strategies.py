"""The strategy that a DeepSpeed, FSDP or accelerate config of another tool stands for; it does not change the loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runs.mapping_files import read_yaml
from ...topology.strategies import STRATEGIES, EngineKind, find_strategy
from .translation import Translation

FSDP = EngineKind.FSDP.value.lower()  # the key of the other tools


def _deepspeed(t: Translation, value: Any, name: str = "deepspeed") -> None:
    """Read the stage from the JSON, where it is here, or else from its name."""
    config = value if isinstance(value, dict) else _read(t, value)
    if config is None:
        file = Path(str(value)).name.lower()
        stage = re.search(r"(?:zero|z|stage)[_-]?([0-3])", file)
        if not stage:
            t.drop(name, value, "its stage does not show; --strategy chooses one")
            return
        config = {"zero_optimization": {"stage": stage[1], "offload_param": "offload" in file}}
    zero = config.get("zero_optimization", {})
    offload = any(_is_on(zero.get(key)) for key in ("offload_param", "offload_optimizer"))
    _give(t, EngineKind.DEEPSPEED, name, int(zero.get("stage", 0)), offload)


def _fsdp(t: Translation, value: Any) -> None:
    config = t.theirs.get("fsdp_config") or {}
    config = config if isinstance(config, dict) else _read(t, config) or {}
    if not value and not config:
        t.drop(FSDP, value, "off")
        return
    offload = any(config.get(key) for key in ("offload_params", "fsdp_offload_params")) or "offload" in str(value)
    _give(t, EngineKind.FSDP, FSDP if value else "fsdp_config", 0, offload)


def _fsdp_config(t: Translation, value: Any) -> None:
    if FSDP not in t.theirs:
        _fsdp(t, None)


def _accelerate(t: Translation, value: Any) -> None:
    """Read a config of accelerate, or the name of one of TRL's."""
    config = _read(t, value) or {}
    kind = str(config.get("distributed_type", value)).upper()
    if kind == EngineKind.DEEPSPEED.value:
        inner = config.get("deepspeed_config", {})
        offload = any(_is_on(inner.get(f"offload_{part}_device")) for part in ("param", "optimizer"))
        _give(t, EngineKind.DEEPSPEED, "accelerate_config", int(inner.get("zero_stage", 2)), offload)
    elif kind.startswith("ZERO"):
        _deepspeed(t, value, "accelerate_config")
    elif kind.startswith(EngineKind.FSDP.value):
        offload = bool(config.get("fsdp_config", {}).get("fsdp_offload_params"))
        _give(t, EngineKind.FSDP, "accelerate_config", 0, offload)
    else:
        t.drop("accelerate_config", value, "without a strategy a recipe runs on one process, or on several copies")


def _give(t: Translation, engine: EngineKind, name: str, stage: int, offload: bool) -> None:
    """Set the strategy; ZeRO-0 and ZeRO-1 are ZeRO-2, and one that has no offload here goes without."""
    stage = max(stage, 2) if engine is EngineKind.DEEPSPEED else 0
    strategy = find_strategy(engine, zero_stage=stage, offload=offload)
    if strategy.name not in STRATEGIES:
        t.drop(f"{name}, offload", True, f"ZeRO-{stage} keeps its states on the GPUs; the plan has others with offload")
        strategy = find_strategy(engine, zero_stage=stage)
    t.give("strategy", strategy.name, name)


def _read(t: Translation, name: Any) -> dict[str, Any] | None:
    """The content of a JSON or YAML file, here or beside the recipe."""
    file = next((path for path in (Path(str(name)), Path(t.file).parent / str(name)) if path.is_file()), None)
    try:
        content = read_yaml(file) if file else None
    except (OSError, UserError):
        return None
    return content if isinstance(content, dict) else None


def _is_on(section: Any) -> bool:
    device = section.get("device") if isinstance(section, dict) else section
    return device not in (None, False, "none")


HANDLERS = {"deepspeed": _deepspeed, FSDP: _fsdp, "fsdp_config": _fsdp_config, "accelerate_config": _accelerate}
