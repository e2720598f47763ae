"""`manyrank merge`: merge an adapter into its base, write a model that transformers loads, and compare the two.

    base, in the type it is stored in ──> + adapter ──> logits ──┐
                                            │                    ├── compared
         module by module (see `merging`) <─┘                    │
                 └──> OUTPUT.partial-xxx/ ──> loaded ──> logits ─┘──> OUTPUT/

The weights are in memory once. Logits are computed in float32 (see `logits`), so that what is compared is what
rounding to the output's type changed, and nothing of how it computes.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator

from ...config.args import Options, arg, read_options, word
from ...config.value_types import Float
from ...errors import EXIT_FAILED, UserError
from ...models.model_facts import find_facts, read_header
from ...runs.artifact import ModelSource, find
from ...runs.run_folder import atomic_directory, check_output

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

MARK = "merge.json"  # the report; marks the folder as written by this command
# Of the largest logit: about four times what rounding was measured to change in a model of 28 layers.
TOLERANCES = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-4}


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*\s*[KMG]i?B", text.strip(), re.IGNORECASE):
        raise ValueError("not a size like 5GB or 500MB")
    return text


class MergeOptions(Options):
    """Merge an adapter into its base, and check that the logits stay the same."""

    name: str = word(..., "a run's folder, a checkpoint or an adapter")
    output: Path | None = arg(None, "the folder to write (default: merged in the run's folder)", also=["output_dir"])
    dtype: Literal["bfloat16", "float16", "float32"] | None = arg(
        None, "type of the weights (default: what the base is stored in)"
    )
    base: str | None = arg(None, "another base than the one that the adapter names")
    max_shard_size: Annotated[str, AfterValidator(_size)] = arg("5GB", "largest file of weights")
    tolerance: Float | None = arg(
        None,
        f"largest difference, as a part of the largest logit ({', '.join((f'{dtype} {tolerance:g}' for dtype, tolerance in TOLERANCES.items()))})",
        ge=0,
    )
    overwrite: bool = arg(False, "replace an output of this command")
    trust_remote_code: bool = arg(False, "run code that comes with the base")
    as_json: bool = arg(False, "print the report as JSON")


class MergeFailed(RuntimeError):
    """The result is not the model with its adapter; it is not kept."""


@dataclass(frozen=True)
class Report:
    """The result of a merge.

    Attributes:
        bytes: of the weights. files: that hold them.
        largest_difference: of a logit between the result and the base with its adapter.
        largest_logit: of the base with its adapter.
        tolerance: what the first may be of the second.
        adapter_effect: the largest difference of a logit that the adapter makes; None without one.
        peak_memory: most bytes of host memory that the process held.
    """

    output: str
    base: str
    adapter: str | None
    dtype: str
    bytes: int
    files: int
    largest_difference: float
    largest_logit: float
    tolerance: float
    adapter_effect: float | None
    peak_memory: int

    @property
    def relative_difference(self) -> float:
        return self.largest_difference / (self.largest_logit or 1.0)


def main(argv: Sequence[str]) -> int:
    """Merge, and print the report.

    Raises:
        UserError: a name, folder or type that cannot be.
    """
    options = read_options(argv, MergeOptions, prog="manyrank merge")
    model_source, output = _checked(options)
    try:
        report = merge(
            model_source,
            output,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            tolerance=options.tolerance,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
        )
    except (MergeFailed, OSError) as error:
        print(f"error: {error}\nwhere: {output}\nfix:   nothing was written; see the reason", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(asdict(report), indent=1) if options.as_json else _summary(report))
    return 0


def _checked(options: MergeOptions) -> tuple[ModelSource, Path]:
    """Find what to merge and where to write it; refuse what can be refused before anything is loaded."""
    model_source = find(options.name, base=options.base)
    if not model_source.adapter and not model_source.run:
        raise UserError(
            "there is no adapter to merge", where=options.name, fix="name a run, a checkpoint or an adapter"
        )
    if not options.output and not model_source.run:
        raise UserError(
            "no output directory", where=f"{options.name} is not in a run's folder", fix="give --output DIR"
        )
    output = (options.output or model_source.run / "merged").expanduser()
    check_output(output, overwrite=options.overwrite, mark=MARK, option="--output")
    return model_source, output


def merge(
    model_source: ModelSource,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tolerance: float | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Write the model with its adapter in its weights; without an adapter, the whole model that a run has trained.

    Args:
        dtype: of DTYPES; None: what the base is stored in.
        tolerance: the largest difference of a logit, as a part of the largest one; None: TOLERANCES.

    Raises:
        UserError: it cannot be loaded or merged, or the disk has no room.
        MergeFailed: the result differs by more than the tolerance.
        OSError: it cannot be written. In all cases nothing is left.
    """
    from ...models.inference import DTYPES, load_stored, quiet, rendering_of
    from ...runs import logs
    from . import logits, merging

    _check_biases(model_source)
    quiet()
    model, tokenizer = load_stored(model_source, trust_remote_code=trust_remote_code)
    own = merging.stored_in(model.get_base_model() if model_source.adapter else model)
    wanted = DTYPES[dtype] if dtype else own
    name = str(wanted).removeprefix("torch.")
    before = logits.logits(model, ids := logits.sample_ids(tokenizer))
    effect = _effect(model, before, ids) if model_source.adapter else None
    model = merging.merged(model, own, wanted) if model_source.adapter else merging.in_dtype(model, own, wanted)
    size = sum(tensor.nbytes for tensor in model.parameters())
    _check_room(output, size)
    with atomic_directory(output, overwrite=overwrite, mark=MARK, option="--output") as partial:
        merging.save(model, tokenizer, partial, max_shard_size=max_shard_size, rendering=rendering_of(model_source))
        del model  # so that the weights are never in memory twice
        gc.collect()
        model = _load_result(partial, trust_remote_code)
        report = Report(
            output=str(output),
            base=model_source.base,
            adapter=str(model_source.adapter) if model_source.adapter else None,
            dtype=name,
            bytes=size,
            files=len(list(partial.glob("*.safetensors"))),
            largest_difference=logits.difference(before, logits.logits(model, ids)),
            largest_logit=before.abs().max().item(),
            tolerance=TOLERANCES[name] if tolerance is None else tolerance,
            adapter_effect=effect,
            peak_memory=logs.peak_memory("cpu"),
        )
        (partial / MARK).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if not report.relative_difference <= report.tolerance:
            raise MergeFailed(f"the result is not the model with its adapter: {_difference(report)}")
    return report


def _check_biases(source: ModelSource) -> None:
    """Refuse trained biases where the base has none, before anything is loaded.

    Raises:
        UserError: there is one.
    """
    file = source.adapter and source.adapter / "adapter_model.safetensors"
    biases = read_header(file) if file and file.is_file() else {}
    facts = find_facts(source.base)
    weights = facts.weights if facts else frozenset()
    for name in sorted(biases):
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_B\.(?:default\.)?bias", name)
        if match and f"{match[1]}.weight" in weights and f"{match[1]}.bias" not in weights:
            what = f"the adapter cannot be merged: it has biases (lora_bias), and the base's {match[1]} has none"
            raise UserError(
                what, where=str(source.adapter), fix="use it beside its base, as peft and manyrank serve do"
            )


def _effect(model: PeftModel, before: torch.Tensor, ids: torch.Tensor) -> float:
    """The largest difference that the adapter makes to a logit."""
    from . import logits

    with model.disable_adapter():
        return logits.difference(before, logits.logits(model, ids))


def _load_result(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    from ...models.inference import load_stored

    try:
        model, _ = load_stored(ModelSource(str(folder), str(folder)), trust_remote_code=trust_remote_code)
    except UserError as error:
        raise MergeFailed(f"the result cannot be loaded: {error.what}") from None
    return model


def _check_room(output: Path, size: int) -> None:
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        what = f"{size / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of disk"
        raise UserError(what, where=str(there), fix="choose another --output, or a smaller --dtype")


def _difference(report: Report) -> str:
    return (
        f"largest difference of a logit {report.largest_difference:.3g}, "
        f"{report.relative_difference:.2g} of the largest logit (tolerance {report.tolerance:g})"
    )


def _summary(report: Report) -> str:
    lines = [f"{report.base}" + (f" with {report.adapter}" if report.adapter else ""), _difference(report)]
    if report.adapter_effect is not None:
        lines.append(f"the adapter itself moves logits by up to {report.adapter_effect:.3g}")
        if report.largest_difference > report.adapter_effect / 2:
            lines.append(f"warning: {report.dtype} is too coarse for so small a change; try --dtype float32")
    lines.append(
        f"written to {report.output}: {report.bytes / 2**30:.3g} GiB of {report.dtype} in {report.files} file(s); "
        f"peak memory {report.peak_memory / 2**30:.2f} GiB"
    )
    return "\n".join(lines)
