"""A resolved recipe and where it runs, with what its files say. No torch.

It stands here and not in `topology`, since the rules look at the model's and the data's files, which other packages read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..config.resolve import ResolvedConfig, TrainConfig
from ..data.formats import needs_template
from ..data.sources import known_format, source_of
from ..errors import UserError
from ..models.model_facts import ModelFacts, find_facts
from ..project_files import template_file
from ..runs import artifact, run_folder
from ..topology import strategy_files
from ..topology.gpus import GpuKind, Hardware
from ..topology.precision import Precision, find_precision
from ..topology.strategies import Strategy
from ..topology.strategy_files import StrategyFiles


@dataclass(frozen=True)
class RunContext:
    """A resolved recipe and where it runs. Rules, plan, launch and doctor all take this.

    Attributes:
        nproc: processes on this machine. world_size: on all of them; machines need not have as many.
        hardware: of one machine; may be a planned one.
        output_dir: the run's folder, where it is known.
        launched: what `accelerate launch` was given, in a process that it started; else the strategy's own files count.
    """

    resolved: ResolvedConfig
    strategy: Strategy
    nproc: int
    world_size: int
    hardware: Hardware
    output_dir: Path | None = None
    launched: StrategyFiles | None = None

    @property
    def config(self) -> TrainConfig:
        return self.resolved.config

    @property
    def gpus(self) -> int:
        return len(self.hardware.gpus)

    @property
    def nnodes(self) -> int:
        return self.world_size // self.nproc

    @property
    def shards(self) -> int:
        """Processes over which weights and states are spread; replicas are several copies of them."""
        return (self.config.hsdp_shard_size or self.nproc) if self.strategy.replicas else self.world_size

    @cached_property
    def precision(self) -> Precision:
        """The type in which the run computes."""
        return find_precision(self.config.bf16, self.config.fp16, self.hardware)

    @cached_property
    def kind(self) -> GpuKind | None:
        """The kind of the GPUs; without one no speeds are known."""
        gpu = self.hardware.smallest_gpu
        return gpu.kind if gpu else None

    @property
    def memory(self) -> int | None:
        """Bytes that one process may take: of its GPU, or its part of the host's memory on CPUs; None: not known."""
        gpu, host = self.hardware.smallest_gpu, self.hardware.memory
        return gpu.memory or None if gpu else host and host // self.nproc

    @property
    def host_memory(self) -> int | None:
        """Bytes of a machine beside its GPUs; None: not known, or it is what the processes compute in."""
        return self.hardware.memory if self.hardware.gpus else None

    def with_options(self, **values) -> RunContext:
        """The same with other values in the recipe."""
        config = self.config.model_copy(update=values)
        return replace(self, resolved=replace(self.resolved, config=config))

    def on(self, strategy: Strategy) -> RunContext:
        """The same on another strategy."""
        return replace(self, strategy=strategy)

    @property
    def goes_on_from_adapter(self) -> bool:
        """Whether what SFT has made is an adapter, not a whole model."""
        return self.adapter is not None

    @cached_property
    def adapter(self) -> Path | None:
        """The folder of the adapter that the run starts from."""
        return artifact.find(self.config.start_model).adapter if self.config.start_model else None

    @property
    def adapter_bytes(self) -> int:
        """Bytes of its weights as they are stored."""
        file = self.adapter and self.adapter / "adapter_model.safetensors"
        return file.stat().st_size if file and file.is_file() else 0

    @cached_property
    def files(self) -> StrategyFiles:
        return self.launched or strategy_files.read(self.strategy.name)

    @cached_property
    def model(self) -> ModelFacts | None:
        """None for a hub name that is not in the local cache."""
        return find_facts(self.config.model_name_or_path)

    @cached_property
    def template(self) -> str | None:
        """The text of the chat template; None where there is none, or where it cannot be told yet."""
        name, own = self.config.chat_template, self.model.template if self.model else None
        if not name:
            return own
        file = template_file(name)
        return file.read_text(encoding="utf-8", errors="replace") if file else None

    @cached_property
    def chats(self) -> bool:
        """Whether a source has conversations, which a template renders."""
        try:
            sources = [known_format(source_of(source, self.config)) for source in self.config.data_path]
        except UserError:  # told by who checks the data
            return False
        return any(needs_template(source.format_type) for source in sources)

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint that a resumed run would go on from; whether it is whole is for the run to find out."""
        wanted = self.config.resume_from_checkpoint
        if not wanted:
            return None
        here = run_folder.checkpoints(self.output_dir) if self.output_dir else []
        folders = reversed(here) if wanted == "auto" else [Path(wanted)]
        needed = (*run_folder.NEEDED, run_folder.MANIFEST)
        return next((folder for folder in folders if all((folder / name).is_file() for name in needed)), None)

    def where(self, *keys: str) -> str:
        """Where these were given, for an error: options of the recipe; `yaml:KEY` and `json:KEY` of the strategy's
        files, `model:FILE` of the base model, `environment:NAME`, and `checkpoint:`."""
        return ", ".join(self._place(*key.partition(":")) for key in keys)

    def _place(self, kind: str, colon: str, name: str) -> str:
        if not colon:
            return self.resolved.where(kind)
        places: dict[str, Callable[[], str]] = {
            "yaml": lambda: f"{self.files.accelerate_file}, {name}",
            "json": lambda: f"{self.files.deepspeed_file}, {name}",
            "model": lambda: f"{self.config.model_name_or_path}, {name}",
            "environment": lambda: f"the environment, {name}",
            "checkpoint": lambda: str(self.checkpoint),
        }
        return places[kind]()
