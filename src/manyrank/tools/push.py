"""`manyrank push`: upload a final model to the hub, and nothing else of its run.

    final_model/  adapter or weights, tokenizer, chat template, card ──> links, with hub names in place of folders ──> hub

A model that others cannot use is not published: an adapter whose base is a folder of this machine needs the base's name on
the hub, and a card or config that names a folder is refused.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config.args import Options, arg, read_options, word
from ..errors import UserError, in_one_line
from ..runs import hub
from ..runs.artifact import ModelSource, find
from ..runs.run_folder import NAME as CHECKPOINT
from ..training.model_card import THIS_MODEL

# What else may be in the folder, such as optimizer states, logs and merge.json, is not uploaded.
FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "README.md", "LICENSE*")
FILES += ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
FILES += ("chat_template.*", "additional_chat_templates/*.jinja", "*processor*.json")
FILES += ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
LOCAL_PATH = re.compile(r"(?<![^\s\"'`(=:\[])~?/[\w.+-]+/[\w./+-]*\w")
LOGIN = "type `hf auth login`, or set HF_TOKEN to a token that may write"


class PushOptions(Options):
    """Upload a final model, a merged model or an adapter to the hub: weights, tokenizer, chat template and card."""

    name: str = word(..., "a run's folder, an adapter or a model's folder, such as output/my/merged")
    repo: str = word(..., "the repository on the hub, as USER/NAME; made where it is not there")
    private: bool = arg(False, "make the repository private")
    base: str | None = arg(None, "name on the hub of an adapter's base, which is a folder here")


def main(argv: Sequence[str]) -> int:
    """Upload, and print the address.

    Raises:
        UserError: see `push`.
    """
    options = read_options(argv, PushOptions, prog="manyrank push")
    print(push(options.name, options.repo, private=options.private, base=options.base))
    return 0


def push(name: str, repo: str, *, private: bool = False, base: str | None = None) -> str:
    """Upload what a name stands for.

    Args:
        private: of a repository that is not there yet; one that is public is refused.
        base: name on the hub of an adapter's base.

    Returns:
        The repository's address.

    Raises:
        UserError: it is no final model, names folders of this machine, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    source, api = find(name, base=base), HfApi()
    folder = _final_model(source)
    with _of_the_hub(repo):
        user = api.whoami()["name"]
    repo_id = repo if "/" in repo else f"{user}/{repo}"
    with tempfile.TemporaryDirectory(prefix="manyrank-push-") as staged:
        _stage(source, folder, Path(staged), repo_id, base)
        with _of_the_hub(repo_id):
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                fix = "choose another name, make it private in its settings, or leave --private out"
                raise UserError(f"{repo_id} is there already, and public", where="--private", fix=fix)
            api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message="Upload from manyrank")
    return str(url)


def push_at_end(folder: Path, repo: str | None, *, private: bool) -> None:
    """Upload the final model of a run that has ended; a failure is a warning with the command to type."""
    repo = repo or folder.absolute().name
    try:
        print(f"pushed to {push(str(folder), repo, private=private)}", flush=True)
    except Exception as error:  # the run has ended well, whatever the hub and its client do
        command = shlex.join(["manyrank", "push", str(folder), repo, *(["--private"] if private else [])])
        fix = f" ({error.fix})" if isinstance(error, UserError) else ""
        print(f"warning: not pushed: {in_one_line(error)}{fix}\nto push it, type: {command}", file=sys.stderr)


def _final_model(source: ModelSource) -> Path:
    """The folder to upload; refuse what is no final model."""
    folder = source.adapter or Path(source.base).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such folder", where=source.name, fix="name a run, an adapter or a model's folder")
    if CHECKPOINT.fullmatch(folder.name):
        fix = "let the run end, or merge the checkpoint and push the merged model"
        raise UserError("a checkpoint is not published", where=str(folder), fix=fix)
    if not any(folder.glob("*.safetensors")):
        raise UserError("there are no weights in safetensors", where=str(folder), fix="push a final_model")
    return folder


def _stage(source: ModelSource, folder: Path, staged: Path, repo_id: str, base: str | None) -> None:
    """Put links to the files into a folder, and changed files in place of those that name this machine."""
    for file in (file for pattern in FILES for file in folder.glob(pattern)):
        link = staged / file.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file.absolute())
    adapter, card = staged / "adapter_config.json", staged / "README.md"
    if adapter.exists():
        _name_base(adapter, source)
    if card.exists():
        _name_model(card, repo_id, base)
    for file in (card, *staged.glob("*config.json")):
        if file.exists() and (path := LOCAL_PATH.search(file.read_text(encoding="utf-8"))):
            fix = "write a name that others know in its place"
            raise UserError(f"names a folder of this machine: {path[0]}", where=str(folder / file.name), fix=fix)


def _name_base(file: Path, source: ModelSource) -> None:
    """Write the base's name on the hub, if it has one; a name that is a folder where the run was trained is none."""
    if not hub.NAME.fullmatch(source.base):
        fix = "add --base ORG/NAME, its name on the hub; or push what `manyrank merge` makes, which needs no base"
        what = f"the adapter's base is a folder of this machine: {source.base}"
        raise UserError(what, where=str(source.adapter), fix=fix)
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("base_model_name_or_path") != source.base:
        _rewrite(file, json.dumps(values | {"base_model_name_or_path": source.base}, indent=2))


def _name_model(card: Path, repo_id: str, base: str | None) -> None:
    """Write the repository's name into the card's example, and the base into its header."""
    from huggingface_hub import metadata_load, metadata_save

    _rewrite(card, card.read_text(encoding="utf-8").replace(THIS_MODEL, repo_id))
    if base:
        metadata_save(card, (metadata_load(card) or {}) | {"base_model": base})


def _rewrite(link: Path, text: str) -> None:
    link.unlink()
    link.write_text(text, encoding="utf-8")


@contextmanager
def _of_the_hub(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client, its transport and the network into one of the user."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError("nobody is logged in to the hub", where=f"push to {repo}", fix=LOGIN) from None
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fix = LOGIN if refused else "check the name and the connection, and type the same again"
        raise UserError(f"the hub does not take it: {reason}", where=f"push to {repo}", fix=fix) from None
