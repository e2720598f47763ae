"""FlashAttention 3 and 4, where their packages are installed, in place of torch's own flash attention (2) over packs.

    torch's name   package        GPUs
    FA3            flash-attn-3   Hopper
    FA4            flash-attn-4   Blackwell (10.x), and Hopper where there is no FA3

Activating one replaces the operators under `varlen_attn`, and under sdpa, on CUDA, of the whole process. So it is active
for a packed model alone, whose attention it takes in all layers, and only after a trial on the card; `suspended` gives
sdpa its own kernels back. torch 2.13 calls this a prototype, and none of it has run on a GPU here (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.attention as registry
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..errors import UserError, in_one_line
from . import spec, varlen

logger = logging.get_logger(__name__)

PACKAGES = {"FA3": "flash-attn-3", "FA4": "flash-attn-4"}
GPUS = {
    "FA3": (9,),
    "FA4": (9, 10),
}  # major compute capabilities, as torch checks them; the first name that fits is taken
DOCUMENTS, WINDOW = (1, 70, 3, 200), 40  # tokens of the trial
ROUNDING = 0.02  # relative error in bf16, whose steps are 0.004

_own: list[str] = []  # what is activated here; what a script has activated stays as it is


@dataclass(frozen=True)
class Heads:
    """Attention of some layers: query heads for each key head, width of a head of queries and values, window."""

    share: int
    query_width: int
    value_width: int
    window: int | None


def choose(*, capability: tuple[int, int] | None, installed: Collection[str], known: Collection[str]) -> str | None:
    """Choose an implementation; None: torch's own.

    Args:
        capability: of the GPU; None without one, and on ROCm.
        installed: names of packages. known: what this torch can activate.
    """
    return next(
        (
            name
            for name, package in PACKAGES.items()
            if capability and capability[0] in GPUS[name] and package in installed and name in known
        ),
        None,
    )


def chosen_here() -> str | None:
    """`choose`, for the current GPU of this process."""
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    capability = torch.cuda.get_device_capability() if nvidia else None
    return choose(capability=capability, installed=_installed(), known=registry.list_flash_attention_impls())


def _installed() -> set[str]:
    """By the names of packages: flash-attn (2) brings a folder flash_attn/cute, too."""
    names = set()
    for package in PACKAGES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            names.add(package)
    return names


def use_for(config: PreTrainedConfig, *, only: str | None = None) -> None:
    """Activate what `chosen_here` says where it takes a model's attention, else torch's own, with a line in the log.

    With deterministic algorithms it is torch's own, which has them.

    Args:
        config: of the model's text.
        only: the one that is asked for.

    Raises:
        UserError: that one does not take the model's attention.
    """
    restore()
    name = None if torch.are_deterministic_algorithms_enabled() else chosen_here()
    if only and name != only:
        raise _unusable(only, f"{PACKAGES[only]} is not installed, or this GPU has another")
    if name is None or registry.current_flash_attention_impl():
        return
    try:
        heads, why = heads_of(config), None
    except UserError as error:
        heads, why = frozenset(), error.what
    why = why or _obstacle(config, heads) or try_out(name, heads, torch.device("cuda", torch.cuda.current_device()))
    if why and only:
        raise _unusable(only, why)
    if why:
        logger.warning("packed attention runs by torch's own flash attention (slower), not by %s: %s", name, why)


def _unusable(name: str, why: str) -> UserError:
    return UserError(f"{name} does not compute here: {why}", where="attn_implementation", fix="leave it out")


def heads_of(config: PreTrainedConfig) -> frozenset[Heads]:
    """Read the kinds of attention of a model's layers.

    Raises:
        UserError: its type is not one whose widths are known.
    """
    kind = config.model_type
    shape = spec.from_config(config.to_dict(), name=kind)
    if shape.guessed:
        raise UserError(f"the heads of a {kind} model are not known", where="config.json", fix="use torch's own")
    each = {layer.attention for layer in shape.layers}
    widths = {attention: attention.query // attention.heads for attention in each}
    keys = {attention: attention.key // widths[attention] for attention in each}
    return frozenset(Heads(one.heads // keys[one], widths[one], one.value // keys[one], one.window) for one in each)


def _obstacle(config: PreTrainedConfig, heads: Collection[Heads]) -> str | None:
    """Say what of a model's attention no kernel for packs takes: it would go by sdpa, a document at a time."""
    features = {
        "dropout": getattr(config, "attention_dropout", 0.0) or 0.0,
        "softcap": getattr(config, "attn_logit_softcapping", None),
        "sinks": config.model_type == "gpt_oss",
    }
    widths = {(one.query_width, one.value_width) for one in heads}
    reasons = (
        varlen.obstacle(device="cuda", dtype=torch.bfloat16, query_width=query, value_width=value, **features)
        for query, value in sorted(widths)
    )
    return next(filter(None, reasons), None)


def try_out(name: str, heads: Collection[Heads], device: torch.device) -> str | None:
    """Activate an implementation and compare a small attention of each kind of heads with float32.

    Returns:
        None, and it is active; or why it is not.
    """
    try:
        registry.activate_flash_attention_impl(name)
        wrong = _largest(deviation(each, device) for each in heads)
        why = f"its values or gradients are off by {wrong:.1e}" if not wrong <= ROUNDING else None
    except Exception as error:  # whatever a package raises: no kernel for such heads or GPUs, a library that is missing
        why = in_one_line(error)
    if registry.current_flash_attention_impl():
        _own.append(name)
    if why:
        restore()
    return why


@torch.enable_grad()
def deviation(heads: Heads, device: torch.device) -> float:
    """The largest relative error of packed attention in bf16, of values and gradients, against sdpa in float32."""
    random, tokens = torch.Generator().manual_seed(0), sum(DOCUMENTS)
    window = heads.window and min(heads.window, WINDOW)
    shapes = [(1, number, tokens, heads.query_width) for number in (2 * heads.share, 2, 2)]
    inputs = [torch.randn(shape, generator=random).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    copies = [tensor.detach().float().requires_grad_() for tensor in inputs]
    bounds = torch.tensor([0, *itertools.accumulate(DOCUMENTS)], dtype=torch.int32, device=device)
    y = varlen.attend(*inputs, bounds, max(DOCUMENTS), scaling=None, window=window)
    grouped = {"attn_mask": _mask(window, device), "enable_gqa": heads.share > 1}
    reference = F.scaled_dot_product_attention(*copies, **grouped).transpose(1, 2)
    dy = torch.randn(y.shape, generator=random).to(device, torch.bfloat16)
    pairs = zip(
        (y, *torch.autograd.grad(y, inputs, dy)), (reference, *torch.autograd.grad(reference, copies, dy.float()))
    )
    return _largest(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def _largest(errors: Iterable[float]) -> float:
    """The largest of some errors; NaN if one is, which `max` may pass over."""
    return torch.tensor(list(errors)).max().item()


def _mask(window: int | None, device: torch.device) -> torch.Tensor:
    """(tokens, tokens) of all documents, which keys a query sees."""
    document = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).to(device)
    place = torch.arange(len(document), device=device)
    distance = place[:, None] - place
    return (document[:, None] == document) & (distance >= 0) & (distance < (window or len(document)))


def active() -> str | None:
    """The implementation that packed attention runs by; None: torch's own."""
    return registry.current_flash_attention_impl()


def restore() -> str | None:
    """Give torch its own flash attention back.

    Returns:
        What was activated here.
    """
    if not _own:
        return None
    if registry.current_flash_attention_impl() == _own[-1]:
        registry.restore_flash_attention_impl()
    return _own.pop()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Let sdpa, which generation and trials use, run by torch's own kernels."""
    name = restore()
    try:
        yield
    finally:
        if name:
            registry.activate_flash_attention_impl(name)
            _own.append(name)
