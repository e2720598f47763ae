"""YAML files in which no key is given twice, and JSON files of one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError


def read_yaml(path: Path) -> Any:
    """A file's content; a UserError where it is no YAML, or has a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _OneKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"not valid YAML: {problem}", where=str(path), fix="fix the file") from None


def read_json_object(path: Path, *, where: str = "", fix: str = "fix the file") -> dict[str, Any]:
    """A file's content; a UserError, with `where` for the path, if it cannot be read or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not a JSON file: {error}", where=where or str(path), fix=fix) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=where or str(path), fix=fix)
    return content


class _OneKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML would take the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)
