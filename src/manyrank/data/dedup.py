"""Rows that are equal, or nearly: hashes of their content. Pure.

exact    any value ──> texts in NFC, single spaces ──> canonical JSON ──> 16 bytes
near     text ──> its word 5-shingles ──> 128 smallest hashes ──> bands, each a place in a table
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np


def same_text(value: Any) -> Any:
    """A value with all its texts in Unicode NFC and with single spaces, so that equal ones compare equal."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, list):
        return [same_text(item) for item in value]
    return {key: same_text(item) for key, item in value.items()} if isinstance(value, dict) else value


def digest(value: Any) -> bytes:
    """16 bytes of BLAKE2b over the canonical JSON of a value's `same_text`."""
    text = json.dumps(same_text(value), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)
    else:
        yield str(value)


class MinHash:
    """Finds texts with nearly the same word 5-shingles (Broder 1997), by banded signatures.

    Two texts agree in one place of their signatures with the probability of their Jaccard similarity. Texts that
    share a whole band are compared; the bands are as long as they can be for a pair at the threshold to share one in
    99 of 100 cases. A kept text costs about 3 KB, below a threshold of 0.6 up to 10 KB.

    Args:
        threshold: Jaccard similarity from which two texts are near, estimated with an error of about 0.03.
    """

    PLACES, PRIME, SHINGLE = 128, 2**31 - 1, 5

    def __init__(self, threshold: float) -> None:
        numbers = np.random.default_rng(0)  # any fixed numbers: the same rows are kept every time
        self.factors, self.offsets = numbers.integers(1, self.PRIME, (2, self.PLACES, 1), dtype=np.uint64)
        self.threshold = threshold
        lengths = range(self.PLACES, 0, -1)
        self.length = next((r for r in lengths if 1 - (1 - threshold**r) ** (self.PLACES // r) >= 0.99), 1)
        self.bands: dict[bytes, list[int]] = {}  # a band to the kept texts that have it, by their row below
        self.kept, self.signatures = 0, np.empty((1024, self.PLACES), dtype=np.uint32)

    def seen(self, text: str) -> bool:
        """Whether an earlier text is near this one; if none is, this one is remembered."""
        signature = self._signature(same_text(text).split())
        starts = range(0, self.PLACES - self.length + 1, self.length)
        keys = [b"%d:" % start + _short(signature[start : start + self.length]) for start in starts]
        others = np.unique([other for key in keys for other in self.bands.get(key, ())]).astype(int)
        if len(others) and (self.signatures[others] == signature).mean(axis=1).max() >= self.threshold:
            return True
        if self.kept == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.empty_like(self.signatures)])
        self.signatures[self.kept] = signature
        for key in keys:
            self.bands.setdefault(key, []).append(self.kept)
        self.kept += 1
        return False

    def _signature(self, words: list[str]) -> np.ndarray:
        """[PLACES] smallest value of each of the hash functions over the shingles (Carter and Wegman 1979)."""
        ends = range(self.SHINGLE, max(self.SHINGLE, len(words)) + 1)
        shingles = {" ".join(words[end - self.SHINGLE : end]).encode("utf-8", "surrogatepass") for end in ends}
        hashes = [int.from_bytes(hashlib.blake2b(one, digest_size=4).digest()) % self.PRIME for one in shingles]
        values = (self.factors * np.array(hashes, dtype=np.uint64) + self.offsets) % np.uint64(self.PRIME)
        return values.min(axis=1).astype(np.uint32)


def _short(values: np.ndarray) -> bytes:
    return hashlib.blake2b(values.tobytes(), digest_size=8).digest()
