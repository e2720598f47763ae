"""`manyrank generate`: completions of all prompts of a file, in batches; a stopped command resumes where it was.

    OUTPUT.partial    {"settings": {...}}     first line: what must be the same to resume
                      {"row": 7, ...}         rows in the order in which they were completed
                      {"row": 3, ...          half a line of a killed command: dropped
         └── all rows are there ──> OUTPUT    the rows in the order of the input, without the first line

Batches follow from the prompts and the batch size alone, and draws from the seed and the row: a command that was stopped
and resumed ends with the completions of one that was not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from ..chat_template.types import BadRow
from ..config.args import arg, read_options, word
from ..config.model_options import Count, ModelOptions, OptionalCount, SamplingOptions
from ..data.prompts import Prompt, read_prompts
from ..data.sources import Source
from ..errors import EXIT_FAILED, EXIT_PREEMPTED, UserError
from ..runs import hub
from ..runs.artifact import ModelSource, find
from ..runs.logs import read_lines
from ..runs.run_folder import check_writable, sync, write_atomically
from ..signals import StopRequest

if TYPE_CHECKING:
    from ..models.generation import Sampling

SHOWN = 10  # problems in an error
COMPLETIONS = "completions.jsonl"  # in a folder that is named as the output
NOT_SETTINGS = {"output", "overwrite", "trust_remote_code"}  # options that change no completion


def _file(output: Path) -> Path:
    return output / COMPLETIONS if output.is_dir() or not output.suffix else output


class GenerateOptions(ModelOptions, SamplingOptions):
    """Complete all prompts of a file."""

    name: str = word(..., "a run's folder, a checkpoint, an adapter, a model's folder or a hub name")
    input: str = word(..., "a data file in any format, a folder or hub name, or a .txt of one question a line")
    output: Annotated[Path, AfterValidator(_file)] = word(
        ..., "a .jsonl file, or a folder for completions.jsonl", also=["output_dir"]
    )
    batch_size: Count = arg(8, "completions at a time")
    num_samples: Count = arg(1, "completions of each prompt")
    system: str = arg("", "system message of rows that have none")
    limit: OptionalCount = arg(None, "only the first rows")
    split: str | None = arg(None, "split of a folder or hub name")
    format_type: str = arg("auto", "how rows are read (default: by the first format that fits)")
    on_bad_row: Literal["error", "skip"] = arg("error", "what cannot be completed: stop, or say so in OUTPUT")
    overwrite: bool = arg(False, "start over, and replace OUTPUT")


def main(argv: Sequence[str]) -> int:
    """Complete all prompts, and print what was written.

    Raises:
        UserError: an option, a name or a row that cannot be.
    """
    options = read_options(argv, GenerateOptions, prog="manyrank generate")
    _check(options)
    model = find(options.name)
    hub.check_model(model.base)
    source = Source(options.input, split=options.split, format_type=options.format_type)
    prompts = read_prompts(source, system=options.system, limit=options.limit)
    from ..models.generation import Sampling

    try:
        return _run(options, model, prompts, Sampling(**options.sampling))
    except OSError as error:
        what, fix = f"cannot write: {error}", "make room, and run the same command again to resume"
        print(UserError(what, where=str(options.output), fix=fix), file=sys.stderr)
        return EXIT_FAILED


def _check(options: GenerateOptions) -> None:
    if options.num_samples > 1 and not options.temperature:
        what = f"{options.num_samples} samples at temperature 0 would be the same"
        raise UserError(what, where="--num-samples", fix="give a --temperature, such as 0.8")
    output = options.output
    folder = output.parent if output.parent.exists() or output.name != COMPLETIONS else output.parent.parent
    fix = "name a file in a folder that is there"
    if not folder.is_dir():
        raise UserError(f"{output} cannot be written: there is no folder {folder}", where="OUTPUT", fix=fix)
    check_writable(output, where="OUTPUT", fix=fix)
    if output.suffix != ".jsonl":
        raise UserError(f"{output} is not named as JSONL", where="OUTPUT", fix="end it with .jsonl")
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} is there already", where="OUTPUT", fix="choose another name, or add --overwrite")


def _run(options: GenerateOptions, model_source: ModelSource, prompts: list[Prompt], sampling: Sampling) -> int:
    """Complete what is not completed yet, until all is done or a signal comes.

    Returns:
        The exit code.
    """
    from tqdm import tqdm

    from ..chat_template.render import stop_tokens
    from ..models.inference import context_of, load_model, quiet, rendering_of, tokenizer_of

    quiet()
    trusted, rendering = options.trust_remote_code, rendering_of(model_source)
    tokenizer = tokenizer_of(model_source, chat_template=options.chat_template, trust_remote_code=trusted)
    stops = stop_tokens(tokenizer, rendering, where=model_source.name)
    context = context_of(model_source, trust_remote_code=trusted)
    requests = [GenerationRequest.of(prompt, tokenizer, rendering, context) for prompt in prompts]
    if options.on_bad_row == "error":
        _refuse_problems(requests)
    file = CompletionFile(options.output, _settings(options, model_source), overwrite=options.overwrite)
    file.add(request.record([]) for request in requests if request.problem)
    if len(file.rows) < len(requests):
        if file.rows:
            print(f"{len(file.rows):,} of {len(requests):,} rows are there already", file=sys.stderr)
        model, _ = load_model(model_source, **options.loading)
        batches = _completed(model, tokenizer, requests, options, sampling, stops, skip=file.rows)
        stop = StopRequest()
        progress = tqdm(total=len(requests), initial=len(file.rows), unit="row")
        with stop.listening(remember=True), progress:
            while not stop.requested and (records := next(batches, None)):
                file.add(records)
                progress.update(len(file.rows) - progress.n)
    if len(file.rows) < len(requests):
        state = f"{len(file.rows):,} of {len(requests):,} rows are written"
        print(f"stopped; {state}: run the same command again to resume", file=sys.stderr)
        return EXIT_PREEMPTED
    file.finish()
    print(f"{len(requests):,} row{'s' * (len(requests) != 1)} written to {options.output}")
    return 0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and its tokens; or why it cannot be completed, without tokens."""

    prompt: Prompt
    ids: list[int]
    problem: str

    @classmethod
    def of(cls, prompt: Prompt, tokenizer, rendering, context: int | None) -> GenerationRequest:
        """Render a prompt for a model whose context has so many tokens."""
        from ..chat_template.render import prompt_ids

        ids, problem = [], prompt.problem
        if not problem:
            try:
                more = {"tools": prompt.tools, "documents": prompt.documents, "options": rendering}
                ids = prompt_ids(tokenizer, prompt.messages, **more)
            except BadRow as error:
                problem = str(error)
        if context and len(ids) >= context:
            problem = f"a prompt of {len(ids):,} tokens leaves no room in the model's context of {context:,}"
        return cls(prompt, ids, problem)

    def record(self, completions: list[dict[str, Any]]) -> dict[str, Any]:
        """The row of OUTPUT."""
        row = {"row": self.prompt.number}
        if self.problem:
            return row | {"error": self.problem}
        tools = {"tools": self.prompt.tools} if self.prompt.tools else {}
        numbers = {"prompt_tokens": len(self.ids), "answers": completions}
        return row | {"messages": self.prompt.messages} | tools | numbers


def _refuse_problems(requests: Sequence[GenerationRequest]) -> None:
    problems = [f"{request.prompt.place}: {request.problem}" for request in requests if request.problem]
    if problems:
        more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        what = f"{len(problems):,} of {len(requests):,} rows cannot be used"
        where = "\n       ".join([*problems[:SHOWN], *more])
        raise UserError(what, where=where, fix="fix them, or add --on-bad-row skip")


def _settings(options: GenerateOptions, model_source: ModelSource) -> dict[str, Any]:
    """Collect all that decides the completions: the options, and when the files that they name were changed."""
    settings = options.model_dump(exclude=NOT_SETTINGS)
    files = {
        "base": model_source.base,
        "adapter": model_source.adapter,
        "input": options.input,
        "template": options.chat_template,
    }
    versions = {name: _version(Path(file)) for name, file in files.items() if file and Path(file).exists()}
    return settings | {"base": model_source.base, "adapter": str(model_source.adapter), "changed": versions}


def _version(path: Path) -> list[Any]:
    """A value that changes with the files of a folder: how many, how large, the newest time of change."""
    states = [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]
    return [len(states), sum(state.st_size for state in states), max((s.st_mtime_ns for s in states), default=0)]


def _completed(model, tokenizer, requests, options, sampling, stops, *, skip: dict) -> Iterator[list[dict]]:
    """The records of batch after batch, longest prompts first, in the same batches whenever it is called.

    Args:
        skip: the rows that are there; a batch of these alone is not computed again.
    """
    from ..models.generation import generate

    possible = (index for index, request in enumerate(requests) if not request.problem)
    order = sorted(possible, key=lambda index: (-len(requests[index].ids), index))
    samples = options.num_samples
    size = max(1, options.batch_size // samples)
    for batch in (order[at : at + size] for at in range(0, len(order), size)):
        if {requests[index].prompt.number for index in batch} <= skip.keys():
            continue
        units = [index * samples + sample for index in batch for sample in range(samples)]
        parts = generate(
            model,
            [requests[unit // samples].ids for unit in units],
            sampling=sampling,
            stops=stops,
            pad_token=tokenizer.pad_token_id,
            batch_size=options.batch_size,
            numbers=units,
        )
        completions = {answer.number: _completion(tokenizer, answer) for part in parts for answer in part}
        yield [
            requests[index].record([completions[index * samples + sample] for sample in range(samples)])
            for index in batch
        ]


def _completion(tokenizer, answer) -> dict[str, Any]:
    text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return {"text": text, "finish": answer.finish, "tokens": len(answer.tokens)}


class CompletionFile:
    """Completions that grow batch by batch and survive a kill.

    Args:
        settings: JSON values that decide the completions.
        overwrite: start over where the settings have changed.

    Attributes:
        rows: what is written, by row.

    Raises:
        UserError: OUTPUT.partial has other settings.
        OSError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output, self.partial = output, output.with_name(output.name + ".partial")
        output.parent.mkdir(exist_ok=True)  # of --output_dir
        settings = json.loads(json.dumps(settings))
        content = self.partial.read_bytes() if self.partial.exists() else b""
        begun = b"\n" in content  # else it is new, or was killed with the first line
        header, *records = (read_lines(self.partial) or [{}]) if begun else [{"settings": settings}]
        resumed = header.get("settings") == settings
        if not resumed and not overwrite:
            self._refuse(header.get("settings"), settings)
        self.rows = {record["row"]: record for record in records} if resumed else {}
        whole = content.rfind(b"\n") + 1 if resumed else 0
        with self.partial.open("ab") as file:
            file.truncate(whole)  # half a line of a killed command goes
        if not whole:
            self._append([{"settings": settings}])

    def _refuse(self, before: dict[str, Any] | None, settings: dict[str, Any]) -> None:
        if before is None:
            what = f"{self.partial} is not a file that this command began"
            raise UserError(what, where="OUTPUT", fix="choose another name")
        keys = [key for key in before | settings if before.get(key) != settings.get(key)]
        changed = "; ".join(f"{key}: {before.get(key)} -> {settings.get(key)}" for key in keys)
        what = f"{self.partial} was begun with other settings: {changed}"
        raise UserError(what, where="OUTPUT", fix="give the same settings, another name, or --overwrite")

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Write rows that are not there yet, to the disk."""
        records = [record for record in records if record["row"] not in self.rows]
        self._append(records)
        self.rows |= {record["row"]: record for record in records}

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        with self.partial.open("ab") as file:
            file.write(_lines(records).encode())
        sync(self.partial)

    def finish(self) -> None:
        """Write the rows in order under the file's name."""
        write_atomically(self.output, _lines(self.rows[row] for row in sorted(self.rows)))
        self.partial.unlink()


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
