"""One recipe of another tool on its way to a recipe of this project. No torch.

    their keys ──> handlers of the dialect ──┬──> settings ──> `resolve` ──> recipe
                   names that are read here ─┤
                   no effect on the loss ────┼──> dropped, with the reason
                   any other ────────────────┴──> open: changes the loss, and nothing here does it

What a key means stands in `config.spellings`; whether there is one is asked of the schema. A dialect holds what is special
to its tool. A default of the tool that differs from the one here is a setting, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from ...config.resolve import FIELDS, KNOWN, ResolvedConfig, Setting, canonical, normal, resolve
from ...config.schema import OutputKeys, PlaceKeys, SpeedKeys
from ...config.spellings import INSTEAD, METHOD_FLAGS, OTHER_TOOLS, WHEN
from ...errors import UserError, UserErrors
from ...rules.recipe import DEPENDENT

# Keys of these groups do not change the loss, so that a value that is not known here is left out.
WITHOUT_EFFECT = frozenset(key for group in (OutputKeys, SpeedKeys, PlaceKeys) for key in group.model_fields)
# Of the names in INSTEAD, those that change the loss where they are on.
_CHANGES_LOSS = (
    "auto_find_batch_size dataset_text_field freeze_trainable_layers freeze_trainable_modules interleave_probs "
    "max_tokens max_train_samples mix_strategy probabilities prompt_template quantization rope_scaling s2_attention "
    "shuffle special_tokens stage system_prompt template text_column tokenizer tokenizer_name tokenizer_name_or_path "
    "train_batch_size freeze_extra_modules"
)
CHANGES_LOSS = frozenset(_CHANGES_LOSS.split())
_DROPPED = {
    "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers": "a thread reads the next step",
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp ddp_static_graph": "the engine sets it",
    "save_only_model": "checkpoints can always be resumed from",
    "save_safetensors save_on_each_node save_first_step": "checkpoints are safetensors, complete or absent",
    "log_level log_level_replica log_on_each_node disable_tqdm debug": "logs are the same on every machine",
    "gradient_checkpointing_kwargs use_reentrant_gc": "layers are recomputed without reentrance",
    "torch_compile_backend torch_compile_mode": "torch_compile has one way",
    "average_tokens_across_devices": "losses are normalised over all tokens of a step",
    "low_cpu_mem_usage device_map max_memory": "the strategy decides where weights are",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only "
    "eval_packing eval_sample_packing": "validation keeps sums of losses alone",
    "bf16_full_eval fp16_full_eval": "validation computes as training does",
    "ignore_data_skip restore_callback_states_from_checkpoint": "a resumed run continues where it was",
    "torch_empty_cache_steps gc_steps skip_memory_metrics": "memory is the allocator's",
    "buffer_size preprocessing_batch_size": "rows are read as they are needed",
    "include_for_metrics label_names length_column_name": "there is no other metric",
}
DROPPED = {name: why for names, why in _DROPPED.items() for name in names.split()}
UNKNOWN = "nothing here does this"


@dataclass(frozen=True)
class Left:
    """A key that is not in the recipe, and why."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{flow({self.key: self.value})}  # {self.why}"


@dataclass(frozen=True)
class Dialect:
    """What is special to a tool.

    Attributes:
        marks: keys by which a file is known as the tool's.
        handlers: what is done with a key; one may look at other keys of `theirs`, and `with_another` leaves them to it.
        renamed: keys that are read where the schema has them under the other name.
        dropped: keys without an effect on the loss, and why.
        differs: what is done otherwise here, whatever the recipe says.
        finish: adds what the tool does where the recipe is silent.
    """

    name: str
    title: str
    marks: frozenset[str]
    handlers: Mapping[str, Callable[[Translation, Any], None]]
    finish: Callable[[Translation], None]
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    differs: tuple[str, ...] = ()


class Translation:
    """The keys of a file, and what becomes of each.

    Attributes:
        theirs: what the file says; a key without a value is one that is not there.
        settings: values of a recipe, each with its place.
        notes: more to say of a key of the recipe.
        dropped: keys without an effect on the loss.
        open: keys that change the loss and that nothing here does.
    """

    def __init__(self, dialect: Dialect, file: str, theirs: Mapping[str, Any]) -> None:
        self.dialect, self.file = dialect, file
        self.theirs = {normal(str(key)): value for key, value in theirs.items() if value is not None}
        self.settings: list[Setting] = []
        self.notes: dict[str, str] = {}
        self.dropped: list[Left] = []
        self.open: list[Left] = []

    # For handlers

    def has(self, key: str) -> bool:
        return any(canonical(entry.key) == key for entry in self.settings)

    def give(self, key: str, value: Any, name: str, note: str = "") -> None:
        """Set a key of the recipe to a value that stands under another name."""
        self.settings.append(Setting(key, value, f"{self.file}, {name}"))
        if note:
            self.notes[key] = note

    def replace(self, key: str, value: Any, where: str) -> None:
        """Set a key of the recipe, whatever the file says of it."""
        self.settings = [entry for entry in self.settings if canonical(entry.key) != key]
        self.settings.append(Setting(key, value, where))

    def default(self, key: str, value: Any, note: str = "") -> None:
        """Set what the tool does where its recipe is silent and this project does something else."""
        if key in FIELDS and not self.has(key) and value != FIELDS[key].default:
            self.settings.append(Setting(key, value, f"{self.dialect.title}'s default"))
            if note:
                self.notes[key] = note

    def drop(self, key: str, value: Any, why: str) -> None:
        self.dropped.append(Left(key, value, why))

    def decide(self, key: str, value: Any, why: str = UNKNOWN) -> None:
        """Leave a key to the user: it changes the loss."""
        self.open.append(Left(key, value, why))

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        """Refuse a recipe that is not one of supervised fine-tuning.

        Raises:
            UserError: always.
        """
        fix = "import a recipe of supervised fine-tuning; `manyrank grpo` trains by rewards, from a recipe of its own"
        raise UserError(f"{key}: {value} {why}, which is not imported", where=f"{self.file}, {key}", fix=fix)

    # The whole

    def read(self) -> None:
        """Translate all keys, and add the tool's defaults."""
        for strategy in WHEN.keys() & self.theirs.keys():
            steps = OTHER_TOOLS[strategy]
            if self.theirs[strategy] != "steps" and steps in self.theirs:
                self.drop(steps, self.theirs.pop(steps), f"{strategy} counts")
        for key, value in self.theirs.items():
            self._translate(key, value)
        self.dialect.finish(self)

    def resolve(self) -> ResolvedConfig:
        """Resolve the settings, without those that nothing reads.

        Raises:
            UserError: they contradict each other.
        """
        config = self._resolved().config
        if not config.has_validation:
            self.remove(
                ("eval_steps", "load_best_model_at_end", "early_stopping_patience"), "there is no validation data"
            )
            config = self._resolved().config
        for keys, counts, because in DEPENDENT:
            if not counts(config):
                self.remove(keys, f"not read with {because}")
        return self._resolved()

    def _translate(self, key: str, value: Any) -> None:
        new = self.dialect.renamed.get(key)
        if handler := self.dialect.handlers.get(key):
            try:
                handler(self, value)
            except (AttributeError, KeyError, TypeError, ValueError):  # of another type, or without what it needs
                what, fix = (
                    f"{key} is nothing that {self.dialect.title} reads: {value!r}",
                    "write it as its page has it",
                )
                raise UserError(what, where=f"{self.file}, {key}", fix=fix) from None
        elif why := self.dialect.dropped.get(key, DROPPED.get(key)):
            self.drop(key, value, why)
        elif new and new in KNOWN.spellings:
            self.give(new, value, key)
        elif key in KNOWN.spellings and key not in METHOD_FLAGS:
            self.give(key, value, key)
        elif key in METHOD_FLAGS:
            self._method_flag(key, value)
        elif value in (False, "", [], {}, "false"):
            self.drop(key, value, "off")
        elif key in INSTEAD and key not in CHANGES_LOSS:
            self.drop(key, value, INSTEAD[key].removeprefix("leave it out: "))
        else:
            self.decide(key, value, INSTEAD.get(key, UNKNOWN))

    def _method_flag(self, key: str, value: Any) -> None:
        if key == "fp8" and value:
            self.decide(key, value, "products of all weights in float8; here method fp8 has adapters on such a base")
        elif value is False:
            self.drop(key, value, "off")
        else:
            self.give(key, value, key)

    def _resolved(self) -> ResolvedConfig:
        """Resolve the settings; a value that is not known is dropped or left to the user by what its key does."""
        while True:
            try:
                return resolve(None, self.settings)
            except UserError as error:
                for problem in error.problems if isinstance(error, UserErrors) else (error,):
                    self._refused(problem)

    def _refused(self, problem: UserError) -> None:
        wrong = [entry for entry in self.settings if entry.where == problem.where]
        if len(wrong) != 1:
            raise problem
        self.settings.remove(wrong[0])
        leave = self.drop if canonical(wrong[0].key) in WITHOUT_EFFECT else self.decide
        leave(*self._named(wrong[0]), f"{problem.what}; {problem.fix}")
        if canonical(wrong[0].key) == "optim":
            self.remove(("optim_args",), "they are of that optimizer")

    def remove(self, keys: Iterable[str], why: str) -> None:
        """Take settings out of the recipe; those of the file are listed as dropped."""
        for entry in [entry for entry in self.settings if canonical(entry.key) in keys]:
            self.settings.remove(entry)
            if entry.where.startswith(self.file):
                self.drop(*self._named(entry), why)

    def _named(self, entry: Setting) -> tuple[str, Any]:
        """The name and value of a setting in the file."""
        name = self._name(entry.where)
        return name, self.theirs.get(name, entry.value)

    def _name(self, where: str) -> str:
        return where.removeprefix(f"{self.file}, ")

    def text(self, resolved: ResolvedConfig, allowed: Iterable[Left]) -> str:
        """The recipe as YAML, with what is not in it at its end."""
        given = {canonical(entry.key): entry.value for entry in self.settings}
        values = resolved.config.plain()
        lines = [f"# Made by `manyrank import` from {self.file}, a recipe of {self.dialect.title}."]
        for key in (key for key in FIELDS if key in resolved.provenance):
            value = given[key] if key in ("data_path", "eval_data_path") else values[key]
            comment = self._comment(key, resolved.provenance[key])
            lines.append(f"{flow({key: value}):<46}  # {comment}" if comment else flow({key: value}))
        parts = {
            "Left out, though it changes the loss, as --allow says:": map(str, allowed),
            "Left out, without an effect on the loss:": map(str, self.dropped),
            "Done otherwise here:": self.dialect.differs,
        }
        for title, entries in parts.items():
            if shown := list(entries):
                lines += ["#", f"# {title}", *(f"#   {entry}" for entry in shown)]
        return "\n".join(lines) + "\n"

    def _comment(self, key: str, provenance: str) -> str:
        names = ", ".join(self._name(part) for part in provenance.split("; "))
        return "; ".join(part for part in (names if names != key else "", self.notes.get(key, "")) if part)


def with_another(t: Translation, value: Any) -> None:
    """Leave a key to the handler of another one."""


def usual(key: str, *values: Any, why: str) -> Callable[[Translation, Any], None]:
    """Make the handler of a key that has one meaning here: another value than these is left to the user."""

    def handler(t: Translation, value: Any) -> None:
        if value not in values:
            t.decide(key, value, why)

    return handler


def flow(values: dict[str, Any]) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(values, allow_unicode=True, default_flow_style=True, width=100_000, sort_keys=False)
    return text.strip()[1:-1]
