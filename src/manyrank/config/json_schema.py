"""`manyrank schema`: a JSON schema of recipes, by which editors complete keys, show descriptions and mark slips.

It is made of the recipe's own schema, with the other spellings of keys, and is a little more generous: what is wrong
in the end, `manyrank train --check` says.
"""

from __future__ import annotations

from typing import Any

from ..topology.strategies import STRATEGIES
from .recipe_file import SECTIONS
from .resolve import SWITCHES
from .schema import TrainConfig
from .spellings import ALIASES, DATA_ALIASES, METHOD_VALUES, OPPOSITES, OTHER_TOOLS, VALUES, WHEN

TEXT = {"type": "string"}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file."""
    schema = TrainConfig.model_json_schema()
    properties = {key: _written(value) for key, value in schema["properties"].items()}
    properties["strategy"] |= {"anyOf": [{"enum": ["auto", *STRATEGIES]}, {"type": "null"}]}
    for key, theirs in VALUES.items():
        words = [word for word in theirs if word not in ("true", "false")]
        more = [{"enum": [*words, *([True, False] if "true" in theirs else [])]}]
        properties[key] = properties[key] | {"anyOf": [*properties[key]["anyOf"], *more]}
    properties["save_steps"]["anyOf"].append({"enum": [None, 0, False]})
    for alias, key in (ALIASES | OTHER_TOOLS).items():
        relation = "the opposite of" if alias in OPPOSITES else "the same as"
        properties[alias] = properties[key] | {"description": f"{relation} {key}"}
    for alias, values in WHEN.items():
        properties[alias] = {"enum": [*values, "steps", False], "description": f"says {OTHER_TOOLS[alias]} in words"}
    for alias, values in METHOD_VALUES.items():
        written = [int(value) if value.isdecimal() else value for value in values]
        other = {"enum": [*written, None], "description": "another name of method"}
        properties[alias] = {"anyOf": [properties[alias], other]} if alias in TrainConfig.model_fields else other
    for switch in sorted(SWITCHES):
        properties.setdefault(switch, {"type": "boolean"})
    properties["base"] = TEXT | {"description": "a preset, or another file, whose values this one overrules"}
    for alias, key in DATA_ALIASES.items():
        properties[alias] = {
            "anyOf": [*properties[key]["anyOf"], {"type": "object"}],
            "description": f"{key}, or a section",
        }
    for section in SECTIONS:
        properties.setdefault(
            section, {"type": "object", "description": "a section; its keys may stand at the top, too"}
        )
    del schema["required"]  # a base or the command line may have them
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "manyrank recipe"}
    return schema | {"properties": properties}


def _written(value: dict[str, Any]) -> dict[str, Any]:
    """A key's schema, for how its values may be written: a list or mapping as text, yes/no for a choice."""
    described = {key: value[key] for key in ("description", "default") if key in value}
    accepted = value.get("anyOf") or [{key: part for key, part in value.items() if key not in (*described, "title")}]
    accepted = [kind | {"items": {"anyOf": [kind["items"], TEXT]}} if "items" in kind else kind for kind in accepted]
    kinds = {kind.get("type") for kind in accepted}
    more = [TEXT] if kinds & {"array", "object"} and "string" not in kinds else []
    more += [{"type": "boolean"}] if any("off" in kind.get("enum", ()) for kind in accepted) else []
    return described | {"anyOf": [*accepted, *more]}
