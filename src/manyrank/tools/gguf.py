"""`manyrank export gguf`: a run as one GGUF file for llama.cpp, Ollama and LM Studio, by llama.cpp's own converter.

    run with an adapter ──> merged, in OUTPUT.partial-xxx/ ──┐
    full run, model's folder ────────────────────────────────┴──> convert_hf_to_gguf.py ────┐
    --adapter: the adapter alone ───────────────────────────────> convert_lora_to_gguf.py ──┴──> checked ──> OUTPUT

The folder beside the output holds all that is not finished, and is removed at the end, also after a failure or a signal.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..config.args import Options, arg, read_options, word
from ..config.peft_config import beyond_plain
from ..errors import EXIT_FAILED, UserError
from ..runs.artifact import ModelSource, find
from ..runs.run_folder import check_writable
from ..signals import die_with_parent
from .merge.main import MergeFailed, merge

OF_MODEL, OF_ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
VARIABLE = "LLAMA_CPP"
LAST_LINES = 8  # of the converter's output, where it fails
HINTS = {  # what it says, and what to do
    r"No module named '(\w+)": r"pip install \1, and type the same again",
    "pre-tokenizer was not recognized": "llama.cpp knows the tokenizers of published models: `git pull` there brings the newest; "
    "that of the embedded model is made here, and is none of them",
}


class GgufOptions(Options):
    """Write a run as a GGUF file, for llama.cpp, Ollama and LM Studio; an adapter is merged into its base first."""

    name: str = word(..., "a run's folder, a checkpoint, an adapter or a model's folder")
    outtype: Literal["bf16", "f16", "f32", "q8_0", "auto"] = arg(
        "bf16", "type of the weights; auto: the 16 bits they are stored in; for 4 bits use llama-quantize on the file"
    )
    output: Path | None = arg(None, "the file to write (default: NAME-OUTTYPE.gguf in the run's folder)")
    adapter: bool = arg(False, "write the adapter alone, for llama-cli --lora; its base is another file")
    base: str | None = arg(None, "another base than the one that the adapter names")
    llama_cpp: Path | None = arg(
        None, f"llama.cpp's folder (default: the variable {VARIABLE}, the PATH, ./llama.cpp or ~/llama.cpp)"
    )
    overwrite: bool = arg(False, "replace the file")
    trust_remote_code: bool = arg(False, "run code that comes with the base")


class ConversionFailed(RuntimeError):
    """The converter has failed, or its file is no GGUF file with tensors."""


def main(argv: Sequence[str]) -> int:
    """Write the file, and print what to type next.

    Raises:
        UserError: a name or file that cannot be, or no converter.
    """
    options = read_options(argv, GgufOptions, prog="manyrank export gguf")
    source = find(options.name, base=options.base)
    output = _output(options, source)
    script = find_converter(OF_ADAPTER if options.adapter else OF_MODEL, options.llama_cpp, argv)
    try:
        with _ended_by_signals():
            tensors = _export(options, source, script, output)
    except (ConversionFailed, MergeFailed, OSError) as error:
        hints = (match.expand(fix) for pattern, fix in HINTS.items() if (match := re.search(pattern, str(error))))
        fix = next(hints, "nothing was written; see the reason")
        print(f"error: {error}\nwhere: {options.name}\nfix:   {fix}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{output}: {tensors} tensors, {output.stat().st_size / 2**30:.3g} GiB\n{_next(options, output)}")
    return 0


def _output(options: GgufOptions, source: ModelSource) -> Path:
    """The file to write; refuse what can be refused before anything is loaded."""
    if options.adapter and not source.adapter:
        raise UserError("there is no adapter", where=options.name, fix="leave --adapter out")
    if options.adapter and (unread := beyond_plain(source.adapter, known="rank_pattern")):
        what = f"llama.cpp does not read {' and '.join(unread)} of this adapter"
        raise UserError(what, where="--adapter", fix="leave --adapter out: the adapter is merged into its base")
    folder = source.run or source.adapter or Path(source.base).expanduser()
    if not folder.is_dir():
        fix = f"hf download {options.name} --local-dir FOLDER, and name the folder"
        raise UserError("a model of the hub, and a folder is needed", where=options.name, fix=fix)
    name = f"{folder.resolve().name}{'-adapter' * options.adapter}-{options.outtype}.gguf"
    output = (options.output or folder / name).expanduser()
    if output.is_dir():
        raise UserError(f"{output} is a folder", where="output", fix="name a file")
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} is there already", where="output", fix="choose another --output, or add --overwrite")
    check_writable(output, where="output", fix="choose another --output")
    return output


def find_converter(script: str, folder: Path | None, argv: Sequence[str]) -> Path:
    """Find a script of llama.cpp.

    Args:
        folder: of llama.cpp, if the user has named it.
        argv: of this command, for the fix.

    Raises:
        UserError: it is not there.
    """
    if named := folder or os.environ.get(VARIABLE):
        if (file := Path(named).expanduser() / script).is_file():
            return file
        where = "--llama-cpp" if folder else f"the variable {VARIABLE}"
        raise UserError(f"there is no {script} in {named}", where=where, fix="name the folder of llama.cpp's source")
    places = [Path(shutil.which(script) or script), Path("llama.cpp", script), Path.home() / "llama.cpp" / script]
    if file := next(filter(Path.is_file, places), None):
        return file
    again = shlex.join(["manyrank", "export", "gguf", *argv])
    raise UserError(
        f"llama.cpp's {script} is not on this machine",
        where=f"--llama-cpp, {VARIABLE}, the PATH, ./llama.cpp, ~/llama.cpp",
        fix=f"git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf sentencepiece && {again}",
    )


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End by an exception at SIGTERM or SIGHUP, as at Ctrl-C, so that nothing is left behind."""
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _export(options: GgufOptions, source: ModelSource, script: Path, output: Path) -> int:
    """Write the file, complete or not at all.

    Returns:
        Its tensors.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.partial-", dir=output.parent) as folder:
        made = Path(folder, "model.gguf")
        if options.adapter:
            argv = [*_base(source, options.trust_remote_code), str(source.adapter)]
        else:
            argv = ["--model-name", output.stem, str(_whole_model(options, source, Path(folder, "merged")))]
        print(f"converting with {script}", flush=True)
        _convert([str(script), "--outfile", str(made), "--outtype", options.outtype, *argv])
        tensors = count_tensors(made)
        made.replace(output)
    return tensors


def _whole_model(options: GgufOptions, source: ModelSource, folder: Path) -> Path:
    """A folder with weights and tokenizer: the model's own, or `folder`, into which it is merged."""
    if not source.adapter and source.own_tokenizer == source.base:
        return Path(source.base)
    report = merge(source, folder, trust_remote_code=options.trust_remote_code)
    print(f"merged {report.adapter or options.name} into {report.base}", flush=True)
    vocabulary = Path(source.base).expanduser() / "tokenizer.model"
    if vocabulary.is_file():  # llama.cpp's converter asks for it for Gemma; transformers 5 does not save it
        shutil.copy(vocabulary, folder)
    return folder


def _base(source: ModelSource, trust_remote_code: bool) -> list[str]:
    from ..models.load import resolve_name

    base = resolve_name(source.base)
    code = ["--trust-remote-code"] if trust_remote_code else []
    return ["--base" if Path(base).is_dir() else "--base-model-id", base, *code]


def _convert(argv: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        lines = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-LAST_LINES:])
        raise ConversionFailed(f"the converter has ended with {done.returncode}\n{lines}")


def count_tensors(file: Path) -> int:
    """Count the tensors of a GGUF file, by its header: magic, version, and their number in 64 bits.

    Raises:
        ConversionFailed: it is no GGUF file, or has no tensors.
    """
    header = b""
    if file.is_file():
        with file.open("rb") as stream:
            header = stream.read(16)
    magic, _, tensors = struct.unpack("<4sIQ", header.ljust(16, b"\0"))
    if magic != b"GGUF" or not tensors:
        raise ConversionFailed("the converter has written no GGUF file with tensors")
    return tensors


def _next(options: GgufOptions, output: Path) -> str:
    file = shlex.quote(str(output))
    if options.adapter:
        return f"llama-cli -m BASE.gguf --lora {file}\nOllama's Modelfile: FROM BASE, and ADAPTER {output.absolute()}"
    return f"llama-cli -m {file}\nOllama's Modelfile: FROM {output.absolute()}"
