"""`manyrank generate`: answers to all prompts of a file, in batches; a run that is killed goes on where it was.

Batches follow from the prompts and the batch size alone, and draws from the seed and the row: the answers of a run that
was killed and continued are those of one that was not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...chat_template.types import BadRow
from ...config.args import Parser
from ...data.prompts import Prompt, read_prompts
from ...data.sources import Source, digest, fingerprint
from ...errors import EXIT_FAILED, EXIT_PREEMPTED, UserError
from ...runs.artifact import Artifact, find
from ...signals import StopRequest
from .answer_file import AnswerFile, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...models.generation import Answer, Sampling

SHOWN = 10  # problems in an error
REPORT_EVERY = 10.0  # seconds


def main(argv: Sequence[str]) -> int:
    """Answer, and print what was written.

    Raises:
        UserError: an option, a name or a row that cannot be.
    """
    asked = _options().parse_args(argv)
    _check(asked)
    found = find(asked.name)
    check_output(asked.output, overwrite=asked.overwrite)
    source = Source(asked.input, split=asked.split, format_type=asked.format_type)
    prompts = read_prompts(source, system=asked.system, limit=asked.limit)
    from ...models.generation import Sampling

    sampling = Sampling(
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
    )
    try:
        return Answering(asked, found, source, prompts, sampling).run()
    except OSError as error:
        print(
            f"error: cannot write: {error}\nwhere: {asked.output}\nfix:   make room; the same command goes on",
            file=sys.stderr,
        )
        return EXIT_FAILED


def _options() -> argparse.ArgumentParser:
    made = Parser(prog="manyrank generate", allow_abbrev=False, description="Answer all prompts of a file.")
    add = made.add_argument
    add("name", metavar="NAME", help="a run's folder, a checkpoint, an adapter, a model's folder or a hub name")
    add(
        "input",
        metavar="INPUT",
        help="a data file in any format, a folder or hub name, or a .txt of one question a line",
    )
    add("output", metavar="OUTPUT", type=Path, help="a .jsonl file")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)")
    add("--batch-size", type=int, default=8, metavar="B", help="answers at a time (default: 8)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the most likely token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the tokens that have this much probability")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens")
    add("--seed", type=int, default=0, help="of the draws, with the number of the row")
    add("--num-samples", type=int, default=1, metavar="K", help="answers to each prompt")
    add("--system", default="", metavar="TEXT", help="system message of rows that have none")
    add("--limit", type=int, metavar="N", help="only the first rows")
    add("--split", help="of a folder or hub name")
    add("--format-type", default="auto", metavar="X", help="how rows are read (default: by the first that fits)")
    add(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="what cannot be answered: stop, or say so in OUTPUT",
    )
    add("--quantization", choices=("4bit", "8bit"), help="of the base")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the computation")
    add("--chat-template", metavar="X", help="a Jinja file, or a name such as chatml (default: the model's own)")
    add("--overwrite", action="store_true", help="begin anew, and replace OUTPUT")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return made


def _check(asked: argparse.Namespace) -> None:
    for name in ("batch_size", "num_samples", "limit"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {value}", where="command line", fix="give a whole number from 1")
    if asked.num_samples > 1 and not asked.temperature:
        what = f"{asked.num_samples} samples at temperature 0 would be the same"
        raise UserError(what, where="--num-samples", fix="give a --temperature, such as 0.8")


class Answering:
    """Answers what is not answered yet, and writes it."""

    def __init__(
        self, asked: argparse.Namespace, found: Artifact, source: Source, prompts: list[Prompt], sampling: Sampling
    ) -> None:
        self.asked, self.found, self.source, self.sampling = asked, found, source, sampling
        self.prompts = prompts
        self.ids: list[list[int]] = []
        self.stop = StopRequest()

    def run(self) -> int:
        """Until all is answered or a signal comes.

        Returns:
            The exit code.
        """
        from ...chat_template.render import stop_ids
        from ...models.inference import load_model, quiet, rendering_of, tokenizer_of

        quiet()
        asked, options = (
            self.asked,
            {"chat_template": self.asked.chat_template, "trust_remote_code": self.asked.trust_remote_code},
        )
        tokenizer, rendering = tokenizer_of(self.found, **options), rendering_of(self.found)
        try:
            stops = stop_ids(tokenizer, rendering) - {None}
        except BadRow as error:
            raise UserError(
                str(error), where=self.found.name, fix="give one: --chat-template chatml, or a Jinja file"
            ) from None
        self._render(tokenizer, rendering)
        file = AnswerFile(asked.output, self._settings(rendering, stops), overwrite=asked.overwrite)
        try:
            file.add(self._entry(index, []) for index, prompt in enumerate(self.prompts) if prompt.problem)
            if len(file.done) < len(self.prompts):
                if again := len(file.done):
                    print(f"{again:,} of {len(self.prompts):,} rows are there already", file=sys.stderr)
                model, _ = load_model(self.found, quantization=asked.quantization, dtype=asked.dtype, **options)
                with self.stop.listening(remember=True):
                    finished = self._answer(model, tokenizer, stops, file)
                if not finished:
                    print(
                        f"stopped; {len(file.done):,} of {len(self.prompts):,} rows are written, and the same command goes on",
                        file=sys.stderr,
                    )
                    return EXIT_PREEMPTED
            file.finish()
        finally:
            file.close()
        print(f"{len(self.prompts):,} rows written to {asked.output}")
        return 0

    def _render(self, tokenizer, rendering) -> None:
        """The token ids of all prompts; those that cannot be answered get their problem."""
        from ...chat_template.render import prompt_ids
        from ...models.inference import context_of

        context = context_of(self.found, trust_remote_code=self.asked.trust_remote_code)
        for index, prompt in enumerate(self.prompts):
            ids, problem = [], prompt.problem
            if not problem:
                try:
                    ids = prompt_ids(
                        tokenizer, prompt.messages, tools=prompt.tools, documents=prompt.documents, options=rendering
                    )
                except BadRow as error:
                    problem = str(error)
            if context and len(ids) >= context:
                problem = f"a prompt of {len(ids):,} tokens leaves no room in the model's context of {context:,}"
            self.ids.append(ids)
            self.prompts[index] = replace(prompt, problem=problem)
        if (bad := [prompt for prompt in self.prompts if prompt.problem]) and self.asked.on_bad_row == "error":
            shown = [f"{prompt.place}: {prompt.problem}" for prompt in bad[:SHOWN]]
            more = [f"and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
            what = f"{len(bad):,} of {len(self.prompts):,} rows cannot be answered"
            raise UserError(what, where="\n       ".join(shown + more), fix="mend them, or add --on-bad-row skip")

    def _settings(self, rendering, stops) -> dict[str, Any]:
        """What decides the answers."""
        from ...checkpoint.resume import base_fingerprint
        from ...models.load import resolve_name

        asked, model = self.asked, {"base": base_fingerprint(resolve_name(self.found.base), None)}
        if self.found.adapter:
            weights = sorted(self.found.adapter.glob("adapter_model.*"))
            model["adapter"] = [digest(file) for file in (self.found.adapter / "adapter_config.json", *weights)]
        return {
            "model": model,
            "input": fingerprint(self.source),
            **asdict(self.sampling),
            "stops": sorted(stops),
            "chat_template": asked.chat_template,
            "variables": rendering.template_kwargs,
            "batch_size": asked.batch_size,
            "num_samples": asked.num_samples,
            "system": asked.system,
            "limit": asked.limit,
            "format_type": asked.format_type,
            "on_bad_row": asked.on_bad_row,
            "quantization": asked.quantization,
            "dtype": asked.dtype,
        }

    def _answer(self, model, tokenizer, stops, file: AnswerFile) -> bool:
        """Answer batch by batch; whether it came to the end."""
        from ...models.generation import generate

        samples, started, told, tokens = self.asked.num_samples, time.monotonic(), time.monotonic(), 0
        for batch in self._batches():
            if {self.prompts[index].number for index in batch} <= file.done:
                continue
            if self.stop.requested:
                return False
            units = [index * samples + sample for index in batch for sample in range(samples)]
            said = generate(
                model,
                [self.ids[unit // samples] for unit in units],
                sampling=self.sampling,
                stops=stops,
                pad_token=tokenizer.pad_token_id,
                batch_size=self.asked.batch_size,
                numbers=units,
            )
            answers = {answer.number: answer for part in said for answer in part}
            tokens += sum(len(answer.tokens) for answer in answers.values())
            said = {unit: _said(tokenizer, answers[unit]) for unit in units}
            file.add(self._entry(index, [said[index * samples + k] for k in range(samples)]) for index in batch)
            if time.monotonic() - told > REPORT_EVERY:
                told = time.monotonic()
                print(
                    f"{len(file.done):,} of {len(self.prompts):,} rows, {tokens / (told - started):,.0f} tokens/s",
                    file=sys.stderr,
                )
        return True

    def _batches(self) -> Iterator[list[int]]:
        """All that can be answered, longest first, in the same batches whenever it is asked."""
        order = sorted(
            (index for index, prompt in enumerate(self.prompts) if not prompt.problem),
            key=lambda index: (-len(self.ids[index]), index),
        )
        size = max(1, self.asked.batch_size // self.asked.num_samples)
        for at in range(0, len(order), size):
            yield order[at : at + size]

    def _entry(self, index: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
        prompt = self.prompts[index]
        if prompt.problem:
            return {"row": prompt.number, "error": prompt.problem}
        tools = {"tools": prompt.tools} if prompt.tools else {}
        return {
            "row": prompt.number,
            "messages": prompt.messages,
            **tools,
            "prompt_tokens": len(self.ids[index]),
            "answers": answers,
        }


def _said(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> dict[str, Any]:
    text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return {"text": text, "finish": answer.finish, "tokens": len(answer.tokens)}
