"""Rules about trackers, callbacks, and logins to W&B and the hub."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import netrc
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from .context import RunContext
from .rule import error, unless

# The trackers of transformers; each needs the package of its name.
TRACKERS = [
    "wandb",
    "tensorboard",
    "mlflow",
    "comet_ml",
    "neptune",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
    "codecarbon",
]


def _tracker(s: RunContext) -> str | None:
    for name in s.config.report_to:
        if name not in TRACKERS:
            return f"there is no tracker {name!r}; known: none, {', '.join(TRACKERS)}"
        package = importlib.util.find_spec(name)
        # Without an origin it is a folder of that name, such as W&B's own wandb/.
        if package is None or package.origin is None:
            return f"tracker {name} needs the package {name}, which is not installed"
    return None


def _callback(s: RunContext) -> str | None:
    """Object to a callback whose module is not here; the module itself is not imported."""
    for path in s.config.callbacks:
        module, _, name = path.partition(":")
        if not (module and name):
            return f"callback {path!r}"
        if PathFinder.find_spec(module.partition(".")[0], [str(Path.cwd()), *sys.path]) is None:
            return f"callback {path}: there is no module {module.partition('.')[0]!r} here, nor among the installed packages"
    return None


def _no_login(s: RunContext) -> bool:
    """Return whether W&B would ask for a key; only the first rank reports."""
    if "wandb" not in s.config.report_to or s.config.dry_run or os.environ.get("RANK", "0") != "0":
        return False
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _wandb("api_key"):
        return False
    if _wandb("mode") in ("offline", "disabled", "dryrun"):
        return False
    host = _wandb("base_url", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    return not any(_has_login(Path(file).expanduser(), host) for file in files)


def _no_hub_login(s: RunContext) -> bool:
    """Return whether the push at the end would fail for want of a login; the first rank pushes."""
    if not s.config.push_to_hub or s.config.dry_run or os.environ.get("RANK", "0") != "0":
        return False
    from huggingface_hub import get_token

    return get_token() is None


def _has_login(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(name: str, default: str = "") -> str:
    """A setting of W&B: of the environment, or of its file for this folder (`wandb offline`) or this user (`wandb login`)."""
    settings = configparser.ConfigParser(default_section="none")
    user = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    with contextlib.suppress(configparser.Error):
        settings.read([Path(user).expanduser() / "settings", Path("wandb", "settings")])
    return os.environ.get(f"WANDB_{name.upper()}") or settings.get("default", name, fallback=default)


REPORTING_RULES = (
    error(
        "unknown-tracker",
        ("report_to",),
        _tracker,
        reason="The run would fail when it begins to report.",
        fix="install the package, or choose another tracker",
    ),
    error(
        "unknown-callback",
        ("callbacks",),
        _callback,
        reason="The run would fail when it imports the callback.",
        fix="write module:Class, of a module in the folder where you are, or in PYTHONPATH",
    ),
    error(
        "wandb-without-login",
        ("report_to", "environment:WANDB_API_KEY"),
        unless(_no_login, "report_to wandb, and no login for it was found"),
        reason="W&B would ask for a key at the first step, and end the run where nobody can answer.",
        fix="run `wandb login`, set WANDB_API_KEY, or keep the run on this machine with WANDB_MODE=offline",
    ),
    error(
        "hub-without-login",
        ("push_to_hub", "environment:HF_TOKEN"),
        unless(_no_hub_login, "push_to_hub, and nobody is logged in to the hub"),
        reason="The model would not be uploaded when the run has ended.",
        fix="run `hf auth login`, set HF_TOKEN, or leave push_to_hub out and type `manyrank push` afterwards",
    ),
)
