"""Load a model's tokenizer, with the recipe's chat template and new tokens."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..project_files import template_file, template_names
from .load import loading, resolve_name
from .new_tokens import add_new_tokens


def load_tokenizer(config: TrainConfig, own: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's chat template if it names one.

    Args:
        own: take this one instead.

    Raises:
        UserError: it cannot be loaded, is not a fast one, or there is no such template.
    """
    name = resolve_name(config.model_name_or_path)
    if own:
        tokenizer = copy.deepcopy(own)
    else:
        with loading(name):
            tokenizer = _stored_tokenizer(name, config.trust_remote_code)
    if config.chat_template:
        tokenizer.chat_template = _template(config.chat_template, tokenizer)
    add_new_tokens(tokenizer, config)
    _check_template(tokenizer, where=config.chat_template or name)
    _check_variables(config.chat_template_kwargs, tokenizer)
    if not tokenizer.is_fast:
        raise UserError("the tokenizer has no fast version", where=name, fix="convert it to a tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stored_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, StrictDataclassError):
        raise  # told as what is wrong with the model
    except Exception as error:  # a damaged tokenizer.json: a KeyError, or an Exception of the tokenizers library
        what = f"cannot load the tokenizer: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(what, where=name, fix="give a folder with a whole tokenizer.json") from error


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a template given as a file, as one of the project's, or as one of the tokenizer's."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in own:
        return own[name]
    if file := template_file(name):
        return _text(file)
    known = sorted({*own, *template_names()})
    raise UserError(
        f"there is no chat template {name!r}", where="chat_template", fix=f"a file, or one of {', '.join(known)}"
    )


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("not text in UTF-8", where=str(file), fix="give a Jinja template") from None
    if not text.strip():
        raise UserError("an empty template", where=str(file), fix="give a Jinja template")
    return text


def _check_template(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """A template that is no Jinja would make every row a bad one."""
    if not tokenizer.chat_template:
        return
    with contextlib.suppress(TemplateError, ValueError, TypeError):  # it may well refuse this conversation
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            place = f"{where}, line {error.lineno}"
            raise UserError(
                f"the chat template is not valid Jinja: {error}", where=place, fix="fix the template"
            ) from None


def _check_variables(variables: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A template ignores a variable that it does not know, and so would a misspelt one be."""
    own = tokenizer.chat_template or ""
    text = "\n".join(own.values()) if isinstance(own, dict) else own
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in variables:
        if name in taken:
            what = f"{name!r} is not the recipe's to set"
            raise UserError(what, where="chat_template_kwargs", fix="leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            what = f"the chat template knows no variable {name!r}"
            raise UserError(what, where="chat_template_kwargs", fix="give one that the template uses")
