"""A recipe's YAML file as flat entries, each with its place.

    training:                        learning_rate  2e-4   recipe.yaml, training.lr
      lr: 2e-4             ->        lora_r         8      recipe.yaml, lora.r
    lora: {r: 8}

A recipe is flat. Sections by the names in SECTIONS are read as well, where each of their keys can mean one thing only; any
other mapping, in a key that takes none, is an error, also where the command line gives that key again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.mapping_files import read_yaml
from .spellings import INSTEAD

# What these group is not changed by their names; `eval: {batch_size: 1}` would be something else than batch_size.
SECTIONS = (
    "model",
    "data",
    "dataset",
    "lora",
    "training",
    "training_args",
    "training_arguments",
    "optimization",
    "wandb",
)


DATA_FILE = re.compile(r"\.(jsonl|csv|tsv|parquet|arrow|txt)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One value as it was given, with its place."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class Known:
    """The keys of a recipe: every spelling with its canonical key, and the canonical keys that take mappings."""

    spellings: Mapping[str, str]
    mappings: frozenset[str]

    def takes_mappings(self, key: str) -> bool:
        return self.spellings.get(normal(key)) in self.mappings

    def inside(self, section: str, key: str) -> set[str]:
        """Return what a key of a section can stand for: itself, or with the section's name in front."""
        names = (normal(key), f"{normal(section)}_{normal(key)}")
        return {self.spellings[name] for name in names if name in self.spellings}


def normal(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def refuse_data(name: str, *, fix: str) -> None:
    """Refuse a file of rows that is given in place of a YAML file; JSON may be either.

    Raises:
        UserError: by its name it is one, whether it is there or not.
    """
    if DATA_FILE.search(name):
        what = f"{name} is a file of data, not a recipe" if Path(name).is_file() else f"there is no file {name}"
        raise UserError(what, where="command line", fix=fix)


def read_entries(path: Path, known: Known) -> list[Setting]:
    """The entries of a recipe.

    Raises:
        UserError: no YAML, no mapping, or a section that cannot be read.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        fix = f"give rows of data by --data_path {path}; a recipe looks like launch/recipes/default.yaml"
        raise UserError("expected a YAML mapping of `key: value` lines", where=str(path), fix=fix)
    settings = []
    for key, value in content.items():
        entry = Setting(str(key), value, f"{path}, {key}")
        empty = value is None and normal(entry.key) in SECTIONS and normal(entry.key) not in known.spellings
        if empty:
            raise _refused(replace(entry, value={}), {}, known)
        if known.takes_mappings(entry.key) or not _has_mapping(value):
            settings.append(entry)
        elif isinstance(value, dict):
            settings += _of_section(entry, known)
        elif normal(entry.key) in known.spellings:  # else told as an unknown key
            fix = f"write {entry.key}: and its value"
            raise UserError(f"{entry.key} takes no list of mappings", where=entry.where, fix=fix)
        else:
            settings.append(entry)
    return settings


def _has_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_mapping, value)))


def _of_section(section: Setting, known: Known) -> list[Setting]:
    """The entries of a section, under keys of a recipe."""
    _refuse_others(section)
    meant = {str(key): known.inside(section.key, str(key)) for key in section.value}
    readable = (
        normal(section.key) in SECTIONS and bool(section.value) and all(len(keys) == 1 for keys in meant.values())
    )
    if not readable:
        raise _refused(section, meant, known)
    entries = []
    for (key, value), keys in zip(section.value.items(), meant.values()):
        if _has_mapping(value) and not keys <= known.mappings:
            raise _refused(section, meant, known)
        (canonical,) = keys
        name = str(key) if normal(str(key)) in known.spellings else canonical  # some spellings have values of their own
        entries.append(Setting(name, value, f"{section.where}.{key}"))
    return entries


def _refuse_others(section: Setting) -> None:
    """Refuse what other tools have alone, as where it stands without a section: the section itself, or a key of it."""
    head, keys = normal(section.key), [str(key) for key in section.value]
    names = [(head, section.where)]
    names += [(name, f"{section.where}.{key}") for key in keys for name in (normal(key), f"{head}_{normal(key)}")]
    for name, where in names:
        if name in INSTEAD and name not in SECTIONS:  # `lora: {r: 8}` is a section, and lora alone no key
            raise UserError(f"there is no option {name!r}", where=where, fix=INSTEAD[name])


def _refused(section: Setting, meant: Mapping[str, set[str]], known: Known) -> UserError:
    inside = ", ".join(meant) or "nothing"
    lines = [
        line
        for (key, keys), value in zip(meant.items(), section.value.values())
        for line in (_inner(key, value, known) or [_flat(section.key, key, keys, known)])
    ]
    what = f"{section.key} is a section (with {inside}), and a recipe is flat"
    fix = f"write at the left margin: {', '.join(lines)}" if lines else "leave it out"
    return UserError(what, where=section.where, fix=fix)


def _inner(section: str, value: Any, known: Known) -> list[str]:
    """Name the keys of a section inside a section."""
    if not isinstance(value, dict) or known.takes_mappings(section):
        return []
    return [_flat(section, str(key), known.inside(section, str(key)), known) for key in value]


def _flat(section: str, key: str, keys: set[str], known: Known) -> str:
    """Name a key of a section without the section."""
    if keys:
        return " or ".join(sorted(keys))
    close = difflib.get_close_matches(f"{normal(section)}_{normal(key)}", known.spellings, 1, cutoff=0.6)
    close = close or difflib.get_close_matches(normal(key), known.spellings, 1, cutoff=0.6)
    return known.spellings[close[0]] if close else f"(there is no option {key!r})"
