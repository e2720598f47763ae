"""Directions in which the inputs of layers vary most: where adapters start by EVA (Paischer et al. 2024, arXiv 2410.07170).

    inputs X (tokens, in) of a layer, over some rows of the data --> A (rank, in): the first principal components of X

They come by block power iteration: a pass forwards all rows once and multiplies a basis (in, rank and some) by the
covariance of X, which itself is never there. peft 0.21 takes the same components from incremental decompositions, and
hashes every input to see which are equal. Each process forwards the same rows, so any number of them finds the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper

from ..errors import UserError
from .adapters import adapted_layers

PASSES = 8
BESIDE = 8  # directions beside those of the rank, with which these come faster


class _Inputs:
    """The inputs of one layer, or of several that read the same tensor: sums over a pass, and the basis until now."""

    def __init__(self, width: int, count: int, seed: int, device: torch.device) -> None:
        start = torch.randn(width, min(count, width), generator=torch.Generator().manual_seed(seed))
        self.basis = torch.linalg.qr(start)[0].to(device)
        self.clear()

    def clear(self) -> None:
        self.product, self.total = torch.zeros_like(self.basis), self.basis.new_zeros(len(self.basis))
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take inputs (tokens, in), float32."""
        with torch.autocast(x.device.type, enabled=False):
            self.product.addmm_(x.T, x @ self.basis)
        self.total += x.sum(0)
        self.tokens += len(x)

    def turn(self) -> torch.Tensor:
        """End a pass: the components (directions, in) of the basis, largest first; the next basis is C times this one."""
        product, basis = self.product.double(), self.basis.double()
        product -= torch.outer(self.total.double(), self.total.double() @ basis / max(1, self.tokens))  # centred
        _, vectors = torch.linalg.eigh(basis.T @ product)
        self.basis = torch.linalg.qr(product @ vectors.flip(1))[0].float()
        self.clear()
        components = (basis @ vectors.flip(1)).T
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return (components * largest.sign()).float()  # the sign of a component is nobody's choice


def input_directions(
    model: torch.nn.Module, batches: Sequence[torch.Tensor], forward: Callable[[int], object], *, seed: int
) -> dict[str, torch.Tensor]:
    """Find the components of the inputs of all layers with adapters, (rank, in), float32, by names of the base's layers.

    Args:
        batches: of each batch the tokens that count, as flat indices into its input_ids.
        forward: forwards the batch of a number, without gradients.

    Raises:
        UserError: a layer is no linear one, or has seen too few tokens for its rank.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, Embedding | ParamWrapper):
            what = f"init_lora_weights eva on {name}, which is no linear layer"
            raise UserError(what, where="init_lora_weights", fix="set init_lora_weights: true")
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    if wide := [name for name, rank in ranks.items() if rank > layers[name].in_features]:
        what = f"init_lora_weights eva at rank {ranks[wide[0]]}, and {wide[0]} has {layers[wide[0]].in_features} inputs"
        raise UserError(what, where="init_lora_weights", fix=f"lower lora_r to {layers[wide[0]].in_features} or less")
    inputs: dict[str, _Inputs] = {}
    for _ in range(PASSES):
        source: dict[str, str] = {}  # of a layer, the first one with its input
        for number, tokens in enumerate(batches):
            with _hooks_on_inputs(layers, inputs, source, tokens, max(ranks.values()) + BESIDE, seed):
                forward(number)
        counts = {name: inputs[source[name]].tokens for name in layers if name in source}
        if short := [name for name, rank in ranks.items() if counts.get(name, 0) <= rank]:
            what = f"init_lora_weights eva, and {short[0]} has seen {counts.get(short[0], 0)} learned tokens"
            raise UserError(
                what, where="init_lora_weights", fix=f"lower lora_r ({ranks[short[0]]}), or give longer rows"
            )
        components = {name: each.turn() for name, each in inputs.items()}
    return {name: components[source[name]][:rank] for name, rank in ranks.items()}


@contextlib.contextmanager
def _hooks_on_inputs(
    layers: dict[str, LoraLayer],
    inputs: dict[str, _Inputs],
    source: dict[str, str],
    tokens: torch.Tensor,
    count: int,
    seed: int,
) -> Iterator[None]:
    """Add the inputs of layers to their sums while a batch is forwarded."""
    last: list = [None, ""]
    needed = int(tokens.max()) + 1

    def note(name: str, x: torch.Tensor) -> None:
        if x is last[0]:
            source[name] = last[1]
            return
        last[:], source[name] = (x, name), name
        if name not in inputs:
            inputs[name] = _Inputs(x.shape[-1], count, seed + len(inputs), x.device)
        flat = x.flatten(0, -2)
        # Experts read some of the tokens, which are all counted.
        inputs[name].add((flat[tokens] if len(flat) >= needed else flat).float())

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
