"""What the rules look at, a recipe and where it is to run, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..config.resolve import Resolved, TrainConfig, asset
from ..data.formats import needs_template
from ..data.sources import known_format, source_of
from ..errors import UserError
from ..models.model_facts import ModelFacts, find_facts
from ..runs import artifact
from ..runs import folder as run_folder
from ..topology import strategies as strategy_files
from ..topology.gpus import Hardware, computes_in_bf16
from ..topology.strategies import StrategyFiles


@dataclass(frozen=True)
class Situation:
    """A resolved recipe and where it is to run.

    Attributes:
        nproc: processes on this machine.
        output_dir: the run's folder, where it is known.
        launched: what `accelerate launch` was given, in a process that it started; else the strategy's own files count.
    """

    resolved: Resolved
    strategy: str
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
    def shards(self) -> int:
        """Processes that share one copy of the model under hsdp."""
        return self.config.hsdp_shard_size or self.nproc

    @property
    def nnodes(self) -> int:
        return self.world_size // self.nproc

    @property
    def bf16(self) -> bool:
        """Whether the run computes in bf16."""
        return computes_in_bf16(self.config.bf16, self.hardware)

    @property
    def goes_on_from_adapter(self) -> bool:
        """Whether what SFT has made is an adapter, not a whole model."""
        return bool(self.config.sft_model and artifact.find(self.config.sft_model).adapter)

    @cached_property
    def files(self) -> StrategyFiles:
        return self.launched or strategy_files.read(self.strategy)

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
        files = (Path(name), asset("data", "templates", f"{name}.jinja"))
        return next((file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()), None)

    @cached_property
    def chats(self) -> bool:
        """Whether a source has conversations, which a template renders."""
        try:
            found = [known_format(source_of(source, self.config)) for source in self.config.data_path]
        except UserError:  # told by who checks the data
            return False
        return any(needs_template(source.format_type) for source in found)

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


@dataclass(frozen=True)
class Rule:
    """A combination that is known to be bad, or doubtful.

    Attributes:
        name: short words with dashes; a warning is switched off by it.
        keys: what the user set or may set, as `Situation.where` takes it.
        broken: says what is wrong here, or None.
        reason: why it is wrong, whatever the values are.
        fix: what to do about it.
        upstream: the issue or page of the library that it comes from.
    """

    name: str
    severity: Literal["error", "warning"]
    keys: tuple[str, ...]
    broken: Callable[[Situation], str | None]
    reason: str
    fix: str
    upstream: str | None = None


@dataclass(frozen=True)
class Violation:
    """A broken rule: what is wrong here, and where."""

    rule: Rule
    what: str
    where: str

    @property
    def why(self) -> str:
        return self.rule.reason + (f" ({self.rule.upstream})" if self.rule.upstream else "")

    def error(self) -> UserError:
        return UserError(self.what, where=self.where, fix=self.rule.fix, why=self.why)

    def warning(self) -> str:
        """As it is printed."""
        off = f"or, if it is meant so, ignore_warnings: [{self.rule.name}]"
        return f"warning: {self.what}\nwhere: {self.where}\nwhy:   {self.why}\nfix:   {self.rule.fix}; {off}"


def unless(wrong: Callable[[Situation], bool], what: str) -> Callable[[Situation], str | None]:
    """A rule's `broken` in one line: `what` is formatted with the situation `s` and its recipe `c`."""
    return lambda s: what.format(s=s, c=s.config) if wrong(s) else None
