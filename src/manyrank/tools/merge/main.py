"""`manyrank merge`: an adapter into its base, written as a model that transformers loads, and proven.

    base, in the type it is stored in ──> + adapter ──> logits ──┐
                                            │                    ├── compared
         module by module (see `merging`) <─┘                    │
                 └──> OUTPUT.partial-xxx/ ──> loaded ──> logits ─┘──> OUTPUT/

The weights are in memory once. Logits are computed in float32 (see `logits`), so that what is compared is what
rounding to the output's type changed, and nothing of how it computes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.args import Parser
from ...errors import EXIT_FAILED, UserError
from ...runs.artifact import Artifact, find
from ...runs.folder import check_output, written_beside
from . import hub

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

MARK = "merge.json"  # what was merged; tells that the folder was written by this command
DTYPES = ("bfloat16", "float16", "float32")
# Of the largest logit: about four times what rounding was measured to change in a model of 28 layers.
TOLERANCES = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-4}


class MergeFailed(RuntimeError):
    """The result is not the model with its adapter; it is not kept."""


@dataclass(frozen=True)
class Report:
    """What was merged, and how well.

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
    pushed_to: str | None = None


def main(argv: Sequence[str]) -> int:
    """Merge, and print what came of it.

    Raises:
        UserError: a name, folder, type or hub name that cannot be.
    """
    asked = _options().parse_args(argv)
    found, output = _checked(asked)
    try:
        report = merge(
            found,
            output,
            dtype=asked.dtype,
            max_shard_size=asked.max_shard_size,
            tolerance=asked.tolerance,
            overwrite=asked.overwrite,
            trust_remote_code=asked.trust_remote_code,
        )
    except (MergeFailed, OSError) as error:
        print(f"error: {error}\nwhere: {output}\nfix:   nothing was written; see the reason", file=sys.stderr)
        return EXIT_FAILED
    if asked.push_to_hub:
        hub.push(output, asked.push_to_hub, leave_out=[MARK])
        report = Report(**(asdict(report) | {"pushed_to": asked.push_to_hub}))
    print(json.dumps(asdict(report), indent=1) if asked.json else _told(report))
    return 0


def _options() -> argparse.ArgumentParser:
    made = Parser(
        prog="manyrank merge",
        allow_abbrev=False,
        description="Put an adapter into its base, and prove that the result answers as the two did.",
    )
    add = made.add_argument
    add("name", metavar="NAME", help="a run's folder, a checkpoint or an adapter")
    add("--output", type=Path, metavar="DIR", help="the folder to write (default: merged in the run's folder)")
    add("--dtype", choices=DTYPES, help="of the weights (default: what the base is stored in)")
    add("--base", metavar="NAME", help="another base than the one that the adapter names")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights (default: 5GB)")
    add("--tolerance", type=float, metavar="X", help=f"largest difference, as a part of the largest logit ({_known()})")
    add("--overwrite", action="store_true", help="replace an output of this command")
    add("--push-to-hub", metavar="REPO", help="upload the result")
    add("--trust-remote-code", action="store_true", help="run code that comes with the base")
    add("--json", action="store_true", help="print the report as JSON")
    return made


def _known() -> str:
    return ", ".join(f"{dtype} {tolerance:g}" for dtype, tolerance in TOLERANCES.items())


def _checked(asked: argparse.Namespace) -> tuple[Artifact, Path]:
    """What to merge and where to, with all that can be refused before anything is loaded."""
    if asked.tolerance is not None and not (0 <= asked.tolerance < math.inf):
        raise UserError(f"a tolerance of {asked.tolerance}", where="--tolerance", fix="give a number from 0")
    hub.shard_bytes(asked.max_shard_size)
    found = find(asked.name, base=asked.base)
    if not found.adapter and not found.run:
        raise UserError("there is no adapter to merge", where=asked.name, fix="name a run, a checkpoint or an adapter")
    if not asked.output and not found.run:
        raise UserError("where shall it go?", where=f"{asked.name} is not in a run's folder", fix="say --output DIR")
    output = (asked.output or found.run / "merged").expanduser()
    check_output(output, overwrite=asked.overwrite, mark=MARK, option="--output")
    if asked.push_to_hub:
        hub.check_login(asked.push_to_hub)
    return found, output


def merge(
    found: Artifact,
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
    from ...runs import logs as metrics
    from . import host_memory, logits, merging

    quiet()
    model, tokenizer = load_stored(found, trust_remote_code=trust_remote_code)
    own = merging.stored_in(model.get_base_model() if found.adapter else model)
    wanted = DTYPES[dtype] if dtype else own
    name = str(wanted).removeprefix("torch.")
    before = logits.logits(model, ids := logits.sample_ids(tokenizer))
    effect = _effect(model, before, ids) if found.adapter else None
    model = merging.merged(model, own, wanted) if found.adapter else merging.in_dtype(model, own, wanted)
    size, sums = sum(tensor.nbytes for tensor in model.parameters()), merging.checksums(model)
    _check_room(output, size)
    with written_beside(output, overwrite=overwrite, mark=MARK, option="--output") as partial:
        merging.save(model, tokenizer, partial, max_shard_size=max_shard_size, rendering=rendering_of(found))
        del model  # so that the weights are never in memory twice
        gc.collect()
        host_memory.trim()
        model = _read_back(partial, sums, trust_remote_code)
        off = logits.difference(before, logits.logits(model, ids))
        report = Report(
            output=str(output),
            base=found.base,
            adapter=str(found.adapter) if found.adapter else None,
            dtype=name,
            bytes=size,
            files=len(list(partial.glob("*.safetensors"))),
            largest_difference=off.largest,
            largest_logit=off.scale,
            tolerance=TOLERANCES[name] if tolerance is None else tolerance,
            adapter_effect=effect,
            peak_memory=metrics.peak_memory("cpu"),
        )
        (partial / MARK).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if not off.relative <= report.tolerance:
            raise MergeFailed(f"the result is not the model with its adapter: {_difference(report)}")
    return report


def _effect(model: PeftModel, before: torch.Tensor, ids: torch.Tensor) -> float:
    """By how much the adapter changes a logit, at most."""
    from . import logits

    with model.disable_adapter():
        return logits.difference(before, logits.logits(model, ids)).largest


def _read_back(folder: Path, sums: dict[str, int], trust_remote_code: bool) -> PreTrainedModel:
    """The model on the disk, which is to have the very weights that were written."""
    from ...models.inference import load_stored
    from . import merging

    model, _ = load_stored(Artifact(str(folder), str(folder)), trust_remote_code=trust_remote_code)
    found = merging.checksums(model)
    if wrong := [name for name in sums | found if sums.get(name) != found.get(name)]:
        raise MergeFailed(f"{len(wrong)} tensors are not read back as they were written, {wrong[0]} the first")
    return model


def _check_room(output: Path, size: int) -> None:
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        what = f"{size / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of disk"
        raise UserError(what, where=str(there), fix="choose another --output, or a smaller --dtype")


def _difference(report: Report) -> str:
    part = report.largest_difference / report.largest_logit
    return (
        f"largest difference of a logit {report.largest_difference:.3g}, "
        f"{part:.2g} of the largest logit (tolerance {report.tolerance:g})"
    )


def _told(report: Report) -> str:
    lines = [f"{report.base}" + (f" with {report.adapter}" if report.adapter else ""), _difference(report)]
    if report.adapter_effect is not None:
        lines.append(f"the adapter itself moves logits by up to {report.adapter_effect:.3g}")
        if report.largest_difference > report.adapter_effect / 2:
            lines.append(f"warning: {report.dtype} is too coarse for so small a change; try --dtype float32")
    lines.append(
        f"written to {report.output}: {report.bytes / 2**30:.3g} GiB of {report.dtype} in {report.files} file(s); "
        f"peak memory {report.peak_memory / 2**30:.2f} GiB"
    )
    return "\n".join([*lines, *([f"uploaded to {report.pushed_to}"] if report.pushed_to else [])])
