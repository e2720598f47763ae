"""Embeddings of some tokens that are trained, faster than in peft: the rows are looked up apart.

    ids --> frozen embedding --> hidden;    where an id is trained: its row of trainable_tokens_delta

peft copies the whole matrix with the rows put in for each forward. Names and saved tensors stay peft's.
"""

from __future__ import annotations

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer


def trained_ids(layer: TrainableTokensLayer, device: torch.device) -> torch.Tensor:
    """The ids of a layer's trained rows on a device, copied there once: a copy in each forward would wait for a GPU."""
    ids = vars(layer).get("own_ids")
    if ids is None or ids.device != device:
        ids = layer.own_ids = torch.tensor(layer.token_indices["default"], device=device)
    return ids


class TokenRows(TrainableTokensLayer):
    """A frozen embedding with some rows that are trained."""

    def forward_adapters(self, x: torch.Tensor, active_adapters, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or list(active_adapters) != ["default"]:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        hidden = self.base_layer(x)
        ids, order = trained_ids(self, x.device).sort()
        rows = self.trainable_tokens_delta["default"][order].to(hidden.dtype)
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        # Gemma's embeddings are scaled in their forward.
        own = rows[place] * getattr(self.base_layer, "embed_scale", 1)
        return torch.where((ids[place] == x)[..., None], own.to(hidden.dtype), hidden)


def speed_up_tokens(model: torch.nn.Module) -> None:
    """Let trained rows of embeddings run faster."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer and isinstance(module.base_layer, torch.nn.Embedding):
            module.__class__ = TokenRows
