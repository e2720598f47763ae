"""Look after the first backward which trained parameters got no gradient, and say so before more is spent."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
from accelerate.utils import gather_object

from ..errors import UserError
from ..models.reach import kinds


class Arrivals:
    """Notes which parameters a backward brings a gradient to: an engine may take gradients away as they come."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.parameters = parameters
        self.names: set[str] = set()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        hooks = [p.register_hook(partial(self._note, name)) for name, p in self.parameters.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        self.names.add(name)


def look(missing: Collection[str], trained: Mapping[str, torch.Tensor], *, waits: bool) -> str | None:
    """Say which parameters have no gradient; all ranks together, unless the strategy waits for each.

    Args:
        missing: names of those on this rank. trained: all trained parameters.
        waits: whether the strategy waits for a gradient of every parameter on every rank, as DDP does.

    Returns:
        A note on those that no rank has a gradient for.

    Raises:
        UserError: the others wait for this rank in vain. This rank does not ask them: they may hear nothing by now.
    """
    if waits:
        if missing:
            what = f"{_share(missing, trained)} get no gradient in the first step, and ddp waits for it: {_layers(missing)}"
            raise UserError(what, where="strategy ddp", fix=_fix(missing, trained))
        return None
    nowhere = set.intersection(*(set(names) for names in gather_object([sorted(missing)])))
    if not nowhere:
        return None
    return f"{_share(nowhere, trained)} get no gradient in the first step: {_layers(nowhere)}"


def _share(names: Collection[str], trained: Mapping[str, torch.Tensor]) -> str:
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trained.items()}
    return f"{sum(sizes[name] for name in names) / sum(sizes.values()):.1%} of the trained weights"


def _layers(names: Collection[str]) -> str:
    return kinds(_layer(name) for name in sorted(names))


def _layer(name: str) -> str:
    return name.partition(".lora_")[0].removeprefix("base_model.model.")


def _fix(names: Collection[str], trained: Mapping[str, torch.Tensor]) -> str:
    """The targets that all get one, where the names of layers can say it; and a strategy that does not wait."""
    last = {name: _layer(name).rpartition(".")[2] for name in trained if ".lora_" in name}
    targets = sorted(set(last.values()) - {last.get(name) for name in names})
    instead = "use one process: --strategy single --nproc 1"
    return f"give --lora_target_modules '[{','.join(targets)}]', or {instead}" if targets else instead
