"""Freeze parts of a base under full fine-tuning: what the recipe names, and what a text does not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..config.patterns import matching
from ..config.resolve import TrainConfig
from ..errors import UserError
from .adapters import Say
from .reach import Reach, within


def freeze(model: torch.nn.Module, config: TrainConfig, reached: Reach | None, say: Say) -> None:
    """Leave only those parameters trained that the recipe wants and that a gradient comes to.

    Args:
        reached: what a text uses; None: all of it.
        say: takes a line on what is frozen.

    Raises:
        UserError: a name or pattern fits no parameter, or nothing is left to be trained.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # a tied lm_head has two
    for key in ("frozen_parameters", "unfrozen_parameters"):
        _check_patterns(key, getattr(config, key), names)
    frozen, unfrozen = (
        {model.get_parameter(name) for name in names if matching(name, patterns, below=True)}
        for patterns in (config.frozen_parameters, config.unfrozen_parameters)
    )
    for parameter in frozen & unfrozen:
        one, *others = [name for name in names if model.get_parameter(name) is parameter]
        if others:
            what = f"{one} and {' and '.join(others)} are one weight, of which one is frozen and the other is not"
            raise UserError(what, where="frozen_parameters", fix="leave one of the names out")
    if config.unfrozen_parameters:
        frozen |= set(model.parameters()) - unfrozen
    _freeze(model, frozen, lambda _: "as the recipe says", say)
    if reached:
        beyond = {p for name, p in model.named_parameters() if name not in reached.parameters and p.requires_grad}
        _freeze(model, beyond, lambda names: f"a text does not reach them: {within(names, model)}", say)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        key = "unfrozen_parameters" if config.unfrozen_parameters else "frozen_parameters"
        raise UserError("no parameter is left to be trained", where=key, fix="freeze fewer of them")


def _check_patterns(key: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(matching(name, [pattern], below=True) for name in names):
            fix = "give the end of a name, as layers.0 or embed_tokens, or a pattern of it"
            raise UserError(f"{key}: no parameter of the model fits {pattern!r}", where=key, fix=fix)


def _freeze(
    model: torch.nn.Module, parameters: set[torch.nn.Parameter], because: Callable[[list[str]], str], say: Say
) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
    if parameters:
        share = _weights(parameters) / _weights(model.parameters())
        names = [name for name, parameter in model.named_parameters() if parameter in parameters]
        say(f"{share:.1%} of the weights are not trained, {because(names)}")


def _weights(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def check_kept_in_bf16(model: torch.nn.Module) -> None:
    """Raise where transformers keeps a trained parameter in float32 whatever it is asked for.

    Raises:
        UserError: there is one.
    """
    wide = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype is not torch.bfloat16]
    if wide:
        what = f"pure_bf16, and the model keeps {wide[0]} in float32"
        raise UserError(what, where="pure_bf16", fix="leave it out, or freeze that parameter")


def cast_frozen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep what is frozen of a base that is trained in the type of the computation; the rest stays in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad or hasattr(parameter, "ds_tensor"):  # DeepSpeed casts what it has partitioned
            continue
        if hasattr(parameter, "part"):  # a stand-in, see `shards`
            parameter.data = torch.zeros((), dtype=dtype, device=parameter.device).expand(parameter.shape)
            parameter.part = parameter.part.to(dtype)
        else:
            parameter.data = parameter.data.to(dtype)
