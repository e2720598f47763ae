"""Names and patterns of modules and parameters in a recipe. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable


def matching(name: str, patterns: Iterable[str], *, below: bool = False) -> str | None:
    """Return the first pattern that fits the end of a name, by whole parts: `layers.1` fits `model.layers.1` alone.

    Args:
        below: also those that fit a module around it.
    """
    more = r"(?:\..*)?" if below else ""
    return next((pattern for pattern in patterns if re.fullmatch(rf"(?:.*\.)?(?:{pattern}){more}", name)), None)
