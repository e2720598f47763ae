"""`vllm serve` with what a run was trained with: its base, adapter, tokenizer, chat template and stop tokens.

FOLDER/tokenizer.json, tokenizer_config.json, chat_template.jinja    those of the run
       generation_config.json                                       the tokens that end a turn
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ...runs.artifact import ModelSource
from .options import ServeOptions


def serve(options: ServeOptions, model_source: ModelSource, *, name: str) -> int:
    """Run vLLM until it ends, by itself or by a signal to this process.

    Returns:
        The exit code.
    """
    with tempfile.TemporaryDirectory(prefix="manyrank-serve-") as folder:
        argv = prepare(options, model_source, Path(folder), name=name)
        print(f"{name} is served by: {shlex.join(argv)}", flush=True)
        key = {"VLLM_API_KEY": options.key} if options.key else {}  # not in the list of processes
        process = subprocess.Popen(argv, env={**os.environ, **key})
        signals: list[int] = []

        def end(number: int, frame: object) -> None:
            signals.append(number)
            process.terminate()

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        code = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if signals else code if code >= 0 else 128 - code


def prepare(options: ServeOptions, model_source: ModelSource, folder: Path, *, name: str) -> list[str]:
    """Write the tokenizer and the stop tokens into a folder, and return the command.

    Raises:
        UserError: there is no chat template.
    """
    from ...chat_template.render import stop_tokens
    from ...models.inference import quiet, rendering_of, tokenizer_of
    from ...models.load import resolve_name

    quiet()
    rendering = rendering_of(model_source)
    tokenizer = tokenizer_of(
        model_source, chat_template=options.chat_template, trust_remote_code=options.trust_remote_code
    )
    stops = stop_tokens(tokenizer, rendering, where=model_source.name)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(stops)}))
    values = {
        "host": options.host,
        "port": options.port,
        "dtype": options.dtype,
        "tokenizer": folder,
        "chat-template": folder / "chat_template.jinja",
        "generation-config": folder,
        "override-generation-config": json.dumps(_defaults(options)),
        **_adapter(model_source, name),
    }
    values |= {"quantization": "bitsandbytes"} if options.quantization else {}
    if rendering.template_kwargs:
        values["default-chat-template-kwargs"] = json.dumps(rendering.template_kwargs)
    switches = [
        *(["--enable-lora"] if model_source.adapter else []),
        *(["--trust-remote-code"] if options.trust_remote_code else []),
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", resolve_name(model_source.base)]
    return [*command, *switches, *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def _defaults(options: ServeOptions) -> dict[str, float]:
    """The sampling of requests that say nothing; max_new_tokens is vLLM's limit of every request."""
    limit = {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
    return {"temperature": options.temperature, **limit}


def _adapter(model_source: ModelSource, name: str) -> dict[str, str | int]:
    """The options that name the model, or put the adapter beside its base."""
    if not model_source.adapter:
        return {"served-model-name": name}
    config = json.loads((model_source.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    module = {"name": name, "path": str(model_source.adapter.absolute())}
    return {"max-lora-rank": max(8, 1 << (rank - 1).bit_length()), "lora-modules": json.dumps(module)}
