"""NEFTune: noise on the embeddings of a text while a model trains (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

Documents = list[tuple[int, int, int]]


class EmbeddingNoise:
    """Adds uniform noise of up to alpha / sqrt(length x width) to the embeddings of each document.

    A document's noise is from a generator of its own: it is the same wherever the document lies, on any rank.
    """

    def __init__(self, embedding: torch.nn.Module, alpha: float) -> None:
        self.alpha, self.documents = alpha, None
        self.hook = embedding.register_forward_hook(self._add)

    @contextlib.contextmanager
    def on(self, documents: Documents) -> Iterator[None]:
        """Add noise in the forwards inside; outside of it there is none.

        Args:
            documents: of each its first token (row * tokens + token), its length and its seed.
        """
        self.documents = documents
        try:
            yield
        finally:
            self.documents = None

    def _add(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.documents is None:
            return None
        noise, generator = torch.zeros_like(output), torch.Generator(output.device)
        tokens = noise.flatten(0, 1)
        for start, length, seed in self.documents:
            most = self.alpha / (length * output.shape[-1]) ** 0.5
            tokens[start : start + length].uniform_(-most, most, generator=generator.manual_seed(seed))
        return output + noise

    def release(self) -> None:
        """Take the hook away."""
        self.hook.remove()
