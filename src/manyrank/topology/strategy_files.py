"""A strategy's files, read without torch: its accelerate config, and the DeepSpeed JSON that this names.

    accelerate_configs/fsdp.yaml                  distributed_type, fsdp_config: {...}
    accelerate_configs/zero3.yaml                 distributed_type, deepspeed_config: {deepspeed_config_file}
    ds_configs/zero3.json                         zero_optimization: {stage, offload_param, ...}, bf16, fp16, batch sizes

People edit these files. Under `accelerate launch` the config may be any file; then its variables tell what it says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..project_files import asset
from ..runs.mapping_files import read_json_object, read_yaml
from .strategies import EngineKind, Strategy, find_strategy

DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # of accelerate, in which a worker finds the path


@dataclass(frozen=True)
class StrategyFiles:
    """An accelerate config and its DeepSpeed JSON, as they are written.

    Attributes:
        accelerate, deepspeed: their content; `deepspeed` is empty without such a file.
        accelerate_file, deepspeed_file: what to call them in an error.
    """

    accelerate: dict[str, Any]
    accelerate_file: str
    deepspeed: dict[str, Any] = field(default_factory=dict)
    deepspeed_file: str = ""

    def section(self, name: str) -> dict[str, Any]:
        """A part of the accelerate config, such as fsdp_config; empty where there is none."""
        return _mapping(self.accelerate.get(name))

    def part(self, name: str) -> dict[str, Any]:
        """A part of the DeepSpeed JSON, such as bf16; empty where there is none."""
        return _mapping(self.deepspeed.get(name))

    @property
    def kind(self) -> str:
        """NO, MULTI_GPU, FSDP, DEEPSPEED or whatever else the file says."""
        return str(self.accelerate.get("distributed_type", "NO"))

    @property
    def zero_stage(self) -> int:
        stage = str(self.part("zero_optimization").get("stage", 0))
        return int(stage) if stage.isdecimal() else 0

    @property
    def sharded(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.kind == EngineKind.FSDP or self.zero_stage == 3

    @property
    def offloads_parameters(self) -> bool:
        of_fsdp = is_on(self.section("fsdp_config").get("fsdp_offload_params"))
        return of_fsdp or "offload_param" in self.part("zero_optimization")

    @property
    def offloads_optimizer(self) -> bool:
        return "offload_optimizer" in self.part("zero_optimization")

    @property
    def strategy(self) -> Strategy | None:
        """The strategy that such a config belongs to; None for what no single name says (one process, or DDP)."""
        if self.kind not in (EngineKind.FSDP, EngineKind.DEEPSPEED):
            return None
        offload = self.offloads_parameters or self.offloads_optimizer
        return find_strategy(EngineKind(self.kind), zero_stage=self.zero_stage, offload=offload)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def is_on(value: Any) -> bool:
    """Return whether a value of such a file means yes."""
    return str(value).lower() in ("true", "yes", "1")


def read(strategy: str) -> StrategyFiles:
    """The files of a strategy.

    Raises:
        UserError: one of them is not what its name says.
    """
    file = asset("accelerate_configs", f"{strategy}.yaml")
    if not file.is_file():
        raise UserError(f"there is no file {_shown(file)}", where=f"strategy {strategy}", fix="put it back")
    accelerate = read_yaml(file)
    if not isinstance(accelerate, dict):
        raise UserError("expected a YAML mapping", where=str(file), fix="fix the file")
    named = _mapping(accelerate.get("deepspeed_config")).get("deepspeed_config_file")
    if not named:
        return StrategyFiles(accelerate, _shown(file))
    return StrategyFiles(accelerate, _shown(file), _read_deepspeed(asset(named)), _shown(asset(named)))


def from_environment(environ: MutableMapping[str, str] = os.environ) -> StrategyFiles | None:
    """Read the config that `accelerate launch` has applied; None where it did not start this process.

    A DeepSpeed file is named from the root of the project: from another folder the variable gets its whole path.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ:
        return None
    accelerate: dict[str, Any] = {
        "distributed_type": _kind(environ),
        "mixed_precision": environ["ACCELERATE_MIXED_PRECISION"],
        "use_cpu": environ.get("ACCELERATE_USE_CPU"),
        "dynamo_config": {"dynamo_backend": environ.get("ACCELERATE_DYNAMO_BACKEND")},
        "fsdp_config": {key.lower(): value for key, value in environ.items() if key.startswith("FSDP_")},
        "deepspeed_config": dict.fromkeys(filter(None, environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(","))),
    }
    name, deepspeed = environ.get(DEEPSPEED_FILE), {}
    if name and not Path(name).exists() and asset(name).is_file():
        environ[DEEPSPEED_FILE] = name = str(asset(name))
    if accelerate["distributed_type"] == "DEEPSPEED":
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        deepspeed = _read_deepspeed(Path(name)) if name else {"zero_optimization": {"stage": int(stage)}}
        accelerate["deepspeed_config"]["deepspeed_config_file"] = name
    return StrategyFiles(accelerate, "the accelerate config", deepspeed, name or "")


def _kind(environ: Mapping[str, str]) -> str:
    if is_on(environ.get("ACCELERATE_USE_FSDP")):
        return "FSDP"
    if is_on(environ.get("ACCELERATE_USE_DEEPSPEED")):
        return "DEEPSPEED"
    return "MULTI_GPU" if int(environ.get("WORLD_SIZE", 1)) > 1 else "NO"


def _read_deepspeed(file: Path) -> dict[str, Any]:
    return read_json_object(file, where=_shown(file))


def _shown(file: Path) -> str:
    """The end of the path, which is how the files are called everywhere."""
    return "/".join(file.parts[-2:])
