"""What `manyrank doctor` finds of a recipe on one machine: its data and weights, the hub, W&B. `checks` judges it.

Nothing is downloaded here, and nothing waits for a network longer than HUB_SECONDS. No torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...config.resolve import TrainConfig
from ...config.schema import DataSource
from ...data.sources import HUB_NAME
from ...errors import UserError
from ...models.tiny import EMBEDDED, default_folder
from ...rules import check as rules

T = TypeVar("T")

HUB_SECONDS = 3.0  # that one question to the hub may take
HEAD_BYTES = 1 << 20  # of a data file that are compared between machines


@dataclass(frozen=True)
class Data:
    """One source of rows as this machine sees it.

    Attributes:
        format_type: of its first good row; None where it was not read: `problem`, or on the hub.
        size: bytes; digest: of the first HEAD_BYTES, or of the names and sizes of a folder's files.
    """

    path: str
    format_type: str | None = None
    size: int = 0
    digest: str = ""
    on_hub: bool = False
    problem: str = ""
    fix: str = ""


def data(config: TrainConfig) -> list[Data]:
    """Every source of the recipe; the first rows of what is on this machine are read as the training reads them."""
    return [_data(source, config) for source in (*config.data_path, *(config.eval_data_path or ()))]


def _data(source: DataSource, config: TrainConfig) -> Data:
    path = Path(source.path)
    if not path.exists() and _may_be_on_hub(path):
        return Data(source.path, on_hub=True)
    try:
        format_type = rules.check_data(source, config)
        return Data(source.path, format_type, *_size_and_digest(path))
    except (UserError, OSError) as error:
        known = isinstance(error, UserError)
        return Data(source.path, problem=str(error.what if known else error), fix=error.fix if known else "")


def _may_be_on_hub(path: Path) -> bool:
    return bool(HUB_NAME.fullmatch(str(path))) and not path.suffix


def _size_and_digest(path: Path) -> tuple[int, str]:
    if path.is_file():
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    inside = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return sum(inside.values()), hashlib.sha256(repr(sorted(inside.items())).encode()).hexdigest()


# Weights


def weights(config: TrainConfig) -> dict[str, tuple[int, ...]] | None:
    """The shape of each tensor of the model, by name; None where it is not in a folder of safetensors here."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    name = config.model_name_or_path
    folder = default_folder() if name == EMBEDDED else Path(name).expanduser()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(file, "np") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except (OSError, SafetensorError):
            return None
    return shapes or None


def loaded_bytes(shapes: dict[str, tuple[int, ...]] | None, *, bf16: bool) -> int | None:
    """What the base takes in memory, in 16 or 32 bits."""
    return None if shapes is None else (2 if bf16 else 4) * sum(map(math.prod, shapes.values()))


def checkpoint_bytes(config: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """About what one checkpoint takes: of each trained number its float32 value and the two moments of AdamW."""
    if config.method == "full":
        return 12 * sum(map(math.prod, shapes.values()))
    adapted = [shape for name, shape in shapes.items() if _gets_adapter(name, shape, config)]
    return 12 * config.lora_r * sum(map(sum, adapted))


def run_bytes(config: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """About what a whole run takes: the checkpoints that it keeps, the one that it writes, and final_model."""
    one = checkpoint_bytes(config, shapes)
    return one * ((config.save_total_limit or 1) + 1 if config.save_steps else 0) + one // 3


def _gets_adapter(name: str, shape: tuple[int, ...], config: TrainConfig) -> bool:
    module = name.removesuffix(".weight")
    if len(shape) != 2 or module == name:
        return False
    if config.lora_target_modules == "all-linear":
        return not any(part in module for part in ("embed", "lm_head"))
    return module.rpartition(".")[2] in config.lora_target_modules


# The hub


@dataclass(frozen=True)
class HubAnswer:
    """What the hub said of one name. `problem`: refused or unknown; without one and not `reached`: no answer."""

    name: str
    kind: str  # "model" or "dataset"
    reached: bool
    cached: bool = False  # its config is in the cache; of data sets not known
    size: int | None = None  # bytes of the files
    problem: str = ""


@dataclass(frozen=True)
class Hub:
    """The login on the hub, and its answers for the names that the recipe needs from there."""

    has_token: bool
    user: str | None
    offline: bool  # HF_HUB_OFFLINE
    answers: tuple[HubAnswer, ...]


def hub_names(config: TrainConfig, found: list[Data]) -> list[tuple[str, str]]:
    """What the recipe needs from the hub, as (name, kind)."""
    model = config.model_name_or_path
    local = model == EMBEDDED or Path(model).expanduser().is_dir() or model.startswith((".", "/", "~"))
    return ([] if local else [(model, "model")]) + [(entry.path, "dataset") for entry in found if entry.on_hub]


def hub(names: list[tuple[str, str]]) -> Hub:
    """Ask for all names at once; nothing is asked when there are none."""
    from huggingface_hub import constants, get_token

    token, offline = get_token(), constants.HF_HUB_OFFLINE
    if not names or offline:
        answers = (HubAnswer(name, kind, reached=False, cached=_is_cached(name)) for name, kind in names)
        return Hub(bool(token), None, offline, tuple(answers))
    asked = [_asked(lambda name=name, kind=kind: _ask_hub(name, kind)) for name, kind in names]
    who = _asked(_user) if token else None
    silent = (HubAnswer(name, kind, reached=False, cached=_is_cached(name)) for name, kind in names)
    answers = tuple(answer(otherwise) for answer, otherwise in zip(asked, silent))
    return Hub(bool(token), who(None) if who else None, offline, answers)


def _user() -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().whoami()["name"]
    except Exception:  # no network, or a token that the hub does not know; the names' own answers tell which
        return None


def _ask_hub(name: str, kind: str) -> HubAnswer:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    cached = _is_cached(name)
    try:
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        found = ask(name, timeout=HUB_SECONDS, files_metadata=True)
    except (HfHubHTTPError, HFValidationError) as error:  # it answered; a gated or unknown name is among these
        return HubAnswer(name, kind, reached=True, cached=cached, problem=" ".join(str(error).split()))
    except Exception:  # what its client raises without a network: of httpx, of the system
        return HubAnswer(name, kind, reached=False, cached=cached)
    return HubAnswer(name, kind, reached=True, cached=cached, size=sum(file.size or 0 for file in found.siblings))


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _asked(work: Callable[[], T]) -> Callable[[T], T]:
    """Start `work` in a thread. The result waits for it, and gives its argument instead when that takes too long."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def result(otherwise: T) -> T:
        thread.join(HUB_SECONDS + 0.5)
        return results[0] if results else otherwise

    return result


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# W&B


@dataclass(frozen=True)
class Wandb:
    """Where the key for W&B is (an environment variable or a file), the server it is for, and WANDB_MODE."""

    key_in: str | None
    server: str
    mode: str


def wandb() -> Wandb:
    """Look for a key where the wandb package looks; it is not tried."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    places = [name for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") if os.environ.get(name)]
    return Wandb(next(iter([*places, *_netrc(server)]), None), server, os.environ.get("WANDB_MODE", "online"))


def _netrc(server: str) -> Iterator[str]:
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    try:
        if read_netrc_auth(host=server):
            yield "netrc"
    except AuthenticationError:  # a key of a wrong form
        return
