"""Rows that are equal, by hashes of their content. Pure.

any value ──> texts in NFC, single spaces ──> canonical JSON ──> 16 bytes
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any


def same_text(value: Any) -> Any:
    """Bring all texts of a value to Unicode NFC and single spaces, so that equal ones compare equal."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, list):
        return [same_text(item) for item in value]
    return {key: same_text(item) for key, item in value.items()} if isinstance(value, dict) else value


def digest(value: Any) -> bytes:
    """Compute 16 bytes of BLAKE2b over the canonical JSON of a value's `same_text`."""
    text = json.dumps(same_text(value), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
