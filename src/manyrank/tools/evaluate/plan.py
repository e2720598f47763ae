"""Which models are evaluated, on which rows, read as which recipe says. Decided from names and files alone: no torch.

output/run, an adapter    -> its base, and the same weights with the adapter on
output/run, trained whole -> its base, and the run's own weights
a model                   -> itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config.resolve import ResolvedConfig, Setting, recipe_of, resolve
from ...config.schema import TrainConfig
from ...errors import UserError
from ...models.tiny import default_folder
from ...project_files import EMBEDDED
from ...runs import hub
from ...runs.artifact import ModelSource, find

# The keys of a recipe that say how rows are read and what is learned of them.
DATA_KEYS = (
    "format_type",
    "columns",
    "on_bad_row",
    "duplicates",
    "max_length",
    "overlong",
    "chat_template",
    "chat_template_kwargs",
    "stop_tokens",
    "thinking",
    "train_on_last_turn",
    "train_on_prompt",
    "train_on_opening",
)
OWN_KEYS = ("on_bad_row", "duplicates", "format_type", "columns")  # of the training's data, not of the model


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of the table.

    Attributes:
        against: the label of the model that it is compared with; None: it is the baseline.
        adapter: whether the adapter of the loaded weights is on.
    """

    label: str
    against: str | None
    adapter: bool


@dataclass(frozen=True)
class Weights:
    """Weights to load once, and the models that they are."""

    artifact: ModelSource
    models: tuple[EvaluatedModel, ...]


def plan_evaluation(names: Sequence[str], *, bases: bool) -> list[Weights]:
    """Decide what is loaded, in order, and what each model is compared with.

    A model is compared with its base where that is there, else with the first base; the base of the first run or adapter
    comes first.

    Args:
        bases: evaluate the base of each run and adapter, too.

    Raises:
        UserError: a name stands for nothing, or is there twice.
    """
    _check_names(names)
    artifacts = {name: find(name) for name in names}
    for artifact in artifacts.values():
        hub.check_model(artifact.base)
    roots = {name: _root(artifact) for name, artifact in artifacts.items()}
    labels = {roots[name]: name for name in names if roots[name] == _canonical(name)}  # bases that are named themselves
    base_of: dict[str, str | None] = {}
    plan: list[tuple[ModelSource, list[tuple[str, bool]]]] = []  # weights, and of each model its label and adapter
    for name, artifact in artifacts.items():
        root, models = roots[name], [(name, bool(artifact.adapter))]
        if bases and root not in labels:
            labels[root] = root
            if artifact.adapter:
                models.insert(0, (root, False))
            else:
                plan.append((find(root), [(root, False)]))
        base_of[name] = labels.get(root)
        plan.append((artifact, models))
    first = next(filter(None, base_of.values()), plan[0][1][0][0])

    def against(label: str) -> str | None:  # the first base is the baseline
        return next((base for base in (base_of.get(label), first) if base not in (None, label)), None)

    return [
        Weights(artifact, tuple(EvaluatedModel(label, against(label), adapter) for label, adapter in models))
        for artifact, models in plan
    ]


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is named twice", where="command line", fix="name each model once")
    for name in names:
        if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
            fix = "name a folder that is there, or a model of the hub as org/name"
            raise UserError(f"there is no folder {name}", where="command line", fix=fix)


def _root(artifact: ModelSource) -> str:
    """Name the model that training began with; a base is its own."""
    if artifact.adapter:
        return _canonical(artifact.base)
    config = recipe_of(artifact)
    return _canonical(config.model_name_or_path if config else artifact.name)


def _canonical(name: str) -> str:
    """Give each model one name."""
    folder = Path(name).expanduser()
    if folder.is_dir() and folder.resolve() == default_folder().resolve():
        return EMBEDDED
    return str(folder.resolve()) if folder.is_dir() else name


def recipes_of(plan: Sequence[Weights]) -> list[tuple[ModelSource, TrainConfig]]:
    """The runs among the models, each with its recipe."""
    return [(weights.artifact, recipe) for weights in plan if (recipe := recipe_of(weights.artifact))]


def resolve_data(
    plan: Sequence[Weights], data: str | None, overrides: Mapping[str, str], *, max_rows: int | None
) -> ResolvedConfig:
    """Resolve how the rows are read: as the first run's recipe and the command line say.

    Args:
        data: a source as `data_path` takes it; None: the run's validation data.
        overrides: values of DATA_KEYS, seed and the like from the command line.
        max_rows: of each source.

    Raises:
        UserError: a wrong value, no data, or runs that read rows in other ways.
    """
    runs = recipes_of(plan)
    for run in runs[1:]:
        _refuse_difference(runs[0], run, overrides)
    if data is None and not (runs and runs[0][1].eval_data_path):
        fix = "give --data; only a run with an eval_data_path has data of its own"
        raise UserError("there is no data to evaluate on", where="--data", fix=fix)
    entries = [Setting(f"--{key}", value, f"command line, --{key}") for key, value in overrides.items()]
    entries += [Setting("model_name_or_path", plan[0].artifact.tokenizer, "command line")]
    if data is not None:  # the format and columns of the run's own data say nothing of another file
        defaults = {"data_path": data, "format_type": "auto", "columns": "none", "max_rows": "none"}
        entries += [Setting(key, value, "--data") for key, value in defaults.items() if key not in overrides]
    resolved = resolve(str(runs[0][0].run / "config.yaml") if runs else None, entries, finished=True)
    sources = resolved.config.data_path if data is not None else resolved.config.eval_data_path
    paths = [source.path for source in sources]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is there twice", where="--data", fix="evaluate on its splits one by one")
    if data is not None and any(source.weight != 1 for source in sources):
        raise UserError("a weight says how often a row is learned", where="--data", fix="leave the weight out")
    if max_rows:
        sources = [source.model_copy(update={"max_rows": max_rows}) for source in sources]
    return ResolvedConfig(resolved.config.model_copy(update={"data_path": sources}), resolved.provenance)


def _refuse_difference(
    first: tuple[ModelSource, TrainConfig], second: tuple[ModelSource, TrainConfig], overrides: Mapping[str, str]
) -> None:
    for key in DATA_KEYS:
        before, now = getattr(first[1], key), getattr(second[1], key)
        if key not in OWN_KEYS and key not in overrides and before != now:
            what = f"{first[0].name} was trained with {key} {before}, {second[0].name} with {now}"
            raise UserError(what, where=key, fix=f"say which: --{key}; or evaluate them one by one")
