"""Uploads to the hub, and its names and sizes; no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_bytes(size: str) -> int:
    """Bytes of "5GB" or "500MB".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]i?B)", size.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise UserError(f"{size!r} is no size", where="--max-shard-size", fix="write it like 5GB or 500MB")
    return int(found[1]) * UNITS[found[2].upper()]


def check_login(repository: str) -> None:
    """See that the hub can be reached and knows who we are, before the work.

    Raises:
        UserError: no such name can be, nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(str(error).splitlines()[0], where="--push-to-hub", fix="write it like name/model") from None
    with _errors(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, *, leave_out: Sequence[str] = ()) -> None:
    """Upload a folder as a private model; one that is there gets a new commit.

    Raises:
        UserError: the hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    with _errors(repository):
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=list(leave_out))


class _errors:
    """What the hub's client raises, as the user's error."""

    def __init__(self, repository: str) -> None:
        self.where = f"--push-to-hub {repository}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if error is None or not isinstance(error, Exception):
            return
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, LocalTokenNotFoundError):
            raise UserError(
                "nobody is logged in to the hub", where=self.where, fix="run: hf auth login; or set HF_TOKEN"
            ) from None
        if isinstance(error, HfHubHTTPError):
            raise UserError(
                f"the hub refuses: {text}", where=self.where, fix="check the token's rights and the name"
            ) from None
        if isinstance(error, OSError) or "httpx" in type(error).__module__ or "httpcore" in type(error).__module__:
            raise UserError(
                f"the hub cannot be reached: {text}", where=self.where, fix="check the connection, or leave it out"
            ) from None
