"""`manyrank serve`: an OpenAI-compatible endpoint for a trained model.

vLLM serves where it is installed. Where it is not, or with --backend transformers, `server` does, with the loading, the
rendering and the generation of `manyrank chat`. (`transformers serve` 5.23 does not read an adapter's folder, leaves stop
strings in the text, knows no API key, and answers a wrong request with a bare 500.)
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...config.args import read_options
from ...config.peft_config import beyond_plain
from ...config.resolve import recipe_of
from ...errors import UserError
from ...runs import hub
from ...runs.artifact import ModelSource, find
from . import vllm
from .options import ServeOptions
from .server import Server


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: an option or a name that cannot be, or an address that is taken.
    """
    options = read_options(argv, ServeOptions, prog="manyrank serve")
    model_source = find(options.name)
    hub.check_model(model_source.base)
    with Server(options.host, options.port, api_key=options.key) as server:
        if not _takes_vllm(options, model_source):
            _serve(server, options, model_source)
            return 0
    return vllm.serve(options, model_source, name=_served_name(options, model_source))


def _takes_vllm(options: ServeOptions, model_source: ModelSource) -> bool:
    here, recipe = bool(find_spec("vllm")), recipe_of(model_source)
    problem = fix = ""
    if options.quantization == "8bit":
        problem, fix = "vLLM quantises no model to 8 bits", "leave --quantization out, give 4bit, or "
    elif not here:
        problem, fix = "vLLM is not installed", "install vllm, or "
    elif unread := beyond_plain(model_source.adapter, known="use_rslora"):
        problem = f"vLLM does not read {' and '.join(unread)} of this adapter"
        fix = "merge it first (manyrank merge), or "
    elif recipe and recipe.thinking == "strip":  # its template sees what a client sends
        problem = "vLLM keeps the thinking of earlier turns, which the run was trained without (thinking: strip)"
    if options.backend == "vllm" and problem:
        raise UserError(problem, where="--backend vllm", fix=f"{fix}leave --backend out")
    if options.backend == "auto" and problem and here:
        print(f"{problem}: transformers generates", flush=True)
    return options.backend != "transformers" and not problem


def _served_name(options: ServeOptions, model_source: ModelSource) -> str:
    folder = model_source.run or Path(model_source.name).expanduser()
    return options.served_model_name or (folder.resolve().name if folder.is_dir() else model_source.name)


def _serve(server: Server, options: ServeOptions, model_source: ModelSource) -> None:
    from ...models.inference import load_model, quiet, rendering_of
    from .model import ServedModel

    quiet()
    model, tokenizer = load_model(model_source, **options.loading)
    served = ServedModel(
        _served_name(options, model_source),
        model,
        tokenizer,
        rendering_of(model_source),
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
    )
    print(f"{served.name} is served at {server.url}; Ctrl-C ends", flush=True)
    server.run(served)
