"""Which models are evaluated, on which rows, read as which recipe says. Decided from names and files alone: no torch.

output/run, an adapter   -> its base, and the same weights with the adapter on
output/run, trained whole -> its base, and the run's own weights
a model                  -> itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config.resolve import Entry, Resolved, recipe_of, resolve
from ...errors import UserError
from ...models.tiny import EMBEDDED, default_folder
from ...runs.artifact import Artifact, find

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
class Contestant:
    """A model of the table.

    Attributes:
        against: the label of the model that it is compared with; None: it is the baseline.
        adapter: whether the adapter of what is loaded is on.
    """

    label: str
    against: str | None
    adapter: bool


@dataclass(frozen=True)
class Load:
    """Weights to load once, and the models that they are."""

    artifact: Artifact
    models: tuple[Contestant, ...]


def line_up(names: Sequence[str], *, bases: bool) -> list[Load]:
    """What is loaded, in order; the base of the first run or adapter comes first.

    Args:
        bases: evaluate the base of each run and adapter, too.

    Raises:
        UserError: a name stands for nothing, or is there twice.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is named twice", where="command line", fix="name each model once")
    for name in names:
        if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
            fix = "name a folder that is there, or a model of the hub as org/name"
            raise UserError(f"there is no folder {name}", where="command line", fix=fix)
    found = {name: find(name) for name in names}
    roots = {name: _root(artifact) for name, artifact in found.items()}
    labels = {roots[name]: name for name in names if roots[name] == _same(name)}  # bases that are named themselves
    loads: list[Load] = []
    for name, artifact in found.items():
        root, models = roots[name], []
        if bases and root != _same(name) and root not in labels:
            labels[root] = root
            base = Contestant(root, None, adapter=False)
            if artifact.adapter:
                models.append(base)
            else:
                loads.append(Load(find(root), (base,)))
        models.append(Contestant(name, labels.get(root), adapter=bool(artifact.adapter)))
        loads.append(Load(artifact, tuple(models)))
    return _compared(loads)


def _compared(loads: list[Load]) -> list[Load]:
    """Each model against its base where that is there, else against the first; the first against none."""
    everyone = [model for load in loads for model in load.models]
    first = next((model.against for model in everyone if model.against), everyone[0].label)
    first = first if first in {model.label for model in everyone} else everyone[0].label

    def against(model: Contestant) -> str | None:
        own = model.against if model.against != model.label else None
        return own or (first if model.label != first else None)

    return [
        Load(load.artifact, tuple(Contestant(model.label, against(model), model.adapter) for model in load.models))
        for load in loads
    ]


def _root(artifact: Artifact) -> str:
    """The model that training began with; of a base itself."""
    if artifact.adapter:
        return _same(artifact.base)
    config = recipe_of(artifact)
    return _same(config.model_name_or_path if config else artifact.name)


def _same(name: str) -> str:
    """One name for one model."""
    folder = Path(name).expanduser()
    if folder.is_dir() and folder.resolve() == default_folder().resolve():
        return EMBEDDED
    return str(folder.resolve()) if folder.is_dir() else name


def has_data(loads: Sequence[Load]) -> bool:
    """Whether the first run has validation data of its own."""
    recipes = [recipe for load in loads if (recipe := recipe_of(load.artifact))]
    return bool(recipes and recipes[0].eval_data_path)


def reading(loads: Sequence[Load], data: str | None, given: Mapping[str, str], *, max_rows: int | None) -> Resolved:
    """How the rows are read: as the first run's recipe says, and the command line.

    Args:
        data: a source as `data_path` takes it; None: the run's validation data.
        given: values of DATA_KEYS, seed and the like from the command line.
        max_rows: of each source.

    Raises:
        UserError: a wrong value, no data, or runs that read rows in other ways.
    """
    runs = [(load.artifact, recipe) for load in loads if (recipe := recipe_of(load.artifact))]
    for artifact, recipe in runs[1:]:
        _refuse_difference(runs[0], (artifact, recipe), given)
    first = runs[0] if runs else None
    if data is None and not (first and first[1].eval_data_path):
        fix = "give --data; only a run with an eval_data_path has data of its own"
        raise UserError("there is no data to evaluate on", where="--data", fix=fix)
    entries = [Entry(f"--{key}", value, f"command line, --{key}") for key, value in given.items()]
    entries += [Entry("data_path", data, "--data")] if data is not None else []
    entries += [Entry("model_name_or_path", loads[0].artifact.tokenizer, "command line")]
    entries += _of_new_data(given) if data is not None else []
    resolved = resolve(str(first[0].run / "config.yaml") if first else None, entries, finished=True)
    sources = resolved.config.data_path if data is not None else resolved.config.eval_data_path
    paths = [source.path for source in sources]
    if twice := [path for path in paths if paths.count(path) > 1]:
        fix = "evaluate on its splits one by one"
        raise UserError(f"{twice[0]} is there twice", where="--data", fix=fix)
    if data is not None and any(source.weight != 1 for source in sources):
        raise UserError("a weight says how often a row is learned", where="--data", fix="leave the weight out")
    if max_rows:
        sources = [source.model_copy(update={"max_rows": max_rows}) for source in sources]
    return Resolved(resolved.config.model_copy(update={"data_path": sources}), resolved.origin)


def _of_new_data(given: Mapping[str, str]) -> list[Entry]:
    """What a run's own data is called and looks like says nothing of another file."""
    own = {"format_type": "auto", "columns": "none"}
    return [Entry(key, value, "evaluate") for key, value in own.items() if key not in given]


def _refuse_difference(one: tuple, other: tuple, given: Mapping[str, str]) -> None:
    for key in DATA_KEYS:
        mine, its = getattr(one[1], key), getattr(other[1], key)
        if key not in OWN_KEYS and key not in given and mine != its:
            what = f"{one[0].name} was trained with {key} {mine}, {other[0].name} with {its}"
            raise UserError(what, where=key, fix=f"say which: --{key}; or evaluate them one by one")
