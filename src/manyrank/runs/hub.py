"""Ask the hub for a model or a data set before the libraries do, which retry for a minute. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from ..project_files import EMBEDDED

NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of the files of an adapter: it, its tokenizer and template, and no checkpoints.
OF_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "*token*.json", "vocab.json", "merges.txt", "*.jinja"]
SECONDS = 10.0  # that the hub may take


@lru_cache
def check_model(name: str) -> None:
    """Refuse a model that is neither in the local cache nor on the hub.

    Args:
        name: a name on the hub; a folder, and anything that is no such name, is left to who loads it.

    Raises:
        UserError: it is not in the local cache, and the hub cannot be reached, does not have it, or does not give it.
    """
    if name == EMBEDDED or Path(name).exists() or not NAME.fullmatch(name):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if any(Path(constants.HF_HUB_CACHE).glob(f"models--{name.replace('/', '--')}/snapshots/*/*.json")):
        return
    _ask(
        lambda: get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS),
        f"the model {name}",
        where=f"model_name_or_path {name}",
        fix="give a folder with config.json, weights and tokenizer; or `embedded`, a small model that is made here",
    )


def cached_adapter(name: str) -> Path | None:
    """The folder of an adapter of the hub in the local cache; None where it is not there, or is no adapter."""
    if Path(name).exists() or not NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "adapter_config.json")
    return Path(file).parent if isinstance(file, str) else None


def fetch_adapter(name: str) -> Path | None:
    """Download an adapter with its tokenizer into the local cache; None where the hub does not give one of this name."""
    if Path(name).exists() or not NAME.fullmatch(name):
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    try:  # asked first, since a download is tried again for a minute
        get_hf_file_metadata(hf_hub_url(name, "adapter_config.json"), timeout=SECONDS)
        snapshot_download(name, allow_patterns=OF_ADAPTER, etag_timeout=SECONDS)
    except Exception:  # of the hub's client, its transport and the network; what is in the cache counts
        return cached_adapter(name)
    return cached_adapter(name)


def fetch_config(name: str) -> None:
    """Download a model's config.json into the local cache.

    Raises:
        UserError: the hub cannot be reached, does not have it, or does not give it.
    """
    from huggingface_hub import hf_hub_download

    check_model(name)
    try:
        hf_hub_download(name, "config.json", etag_timeout=SECONDS)
    except Exception as error:  # of the hub's client, its transport and the network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"config.json of the model {name} cannot be downloaded: {reason}"
        raise UserError(what, where=f"model_name_or_path {name}", fix="give a folder with config.json") from None


@lru_cache
def check_data(name: str) -> None:
    """Refuse a data set that is not on the hub.

    Raises:
        UserError: the hub cannot be reached, does not have it, or does not give it.
    """
    from huggingface_hub import HfApi

    fix = "give a file or folder; for a name on the hub check the name and the connection"
    _ask(
        lambda: HfApi().dataset_info(name, timeout=SECONDS), f"the data set {name}", where=f"data_path {name}", fix=fix
    )


def _ask(question: Callable[[], object], what: str, *, where: str, fix: str) -> None:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    here = f"there is no such folder here, and {what} "
    try:
        question()
    except EntryNotFoundError:  # an adapter, or a model whose files have other names
        return
    except GatedRepoError:
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{where.split()[-1]}"
        fix = f"accept the terms at {page}, and set HF_TOKEN, or run `hf auth login`"
        raise UserError(f"{what} is only given to those who have accepted its terms", where=where, fix=fix) from None
    except RepositoryNotFoundError:
        fix = "check the name; for a private one set HF_TOKEN, or run `hf auth login`"
        raise UserError(f"{here}is not on the hub", where=where, fix=fix) from None
    except HfHubHTTPError:  # it is busy, say: the libraries ask again
        return
    except Exception as error:  # of the hub's client, its transport and the network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{here}cannot be downloaded: no answer of the hub ({reason})", where=where, fix=fix) from None
