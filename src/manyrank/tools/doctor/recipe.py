"""Check a recipe on this machine: its rules, plan, data, what it needs of the hub, and the disk that its run fills. No torch.

Nothing is downloaded here, and nothing waits for a network longer than HUB_SECONDS.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from ...config.data_source import DataSource
from ...errors import UserError, UserErrors
from ...models.model_facts import find_facts
from ...models.spec import ModelSpec
from ...plan.command import read_model
from ...plan.planned_run import PlannedRun
from ...plan.planner import Plan, Verdict, shortage
from ...plan.view import summary
from ...project_files import EMBEDDED
from ...rules.check import check_rules, find_violations
from ...rules.context import RunContext
from ...runs.hub import NAME
from . import machine
from .checks import Check, failed, ok, warning

HUB_SECONDS = 4.0


def rules_and_files(context: RunContext) -> list[Check]:
    """Check what `manyrank train` checks before it starts: the rules, template, model, and the data of this machine."""
    problems: tuple[UserError, ...] = ()
    context = _without_hub_data(context)
    try:
        check_rules(context, warn=False)
    except UserError as error:
        problems = error.problems if isinstance(error, UserErrors) else (error,)
    checks = [failed("recipe", f"{problem.where}: {problem.what}", problem.fix) for problem in problems]
    with contextlib.suppress(UserError):  # is among the problems
        for broken in find_violations(context):
            if broken.rule.severity == "warning" and broken.rule.name not in context.config.ignore_warnings:
                checks.append(warning("recipe", f"{broken.where}: {broken.what}", broken.rule.fix))
    return checks or [ok("recipe", "no rule is against it, and the files that it names can be read")]


def _without_hub_data(context: RunContext) -> RunContext:
    config = context.config
    local = {
        key: [source for source in getattr(config, key) or () if not _is_on_hub(source)]
        for key in ("data_path", "eval_data_path")
    }
    return context.with_options(**local)


def planned(plan: Plan | None) -> Check:
    """Check whether the recipe fits on the GPUs, by the plan."""
    if plan is None:
        return ok("memory plan", "made for GPUs alone, and for models that are known here")
    seen, needed = summary(plan), plan.chosen.memory.needed
    if plan.chosen.verdict == Verdict.FITS:
        return ok("memory plan", seen, needed=needed)
    fix = "see `manyrank plan` for what fits: fewer tokens, gradient_checkpointing, qlora, more GPUs"
    if (short := shortage(plan.chosen, plan.context)) and short.memory == "host memory":
        fix = "see `manyrank plan` for what fits: a strategy without offload, method lora, or more machines"
    make = failed if plan.chosen.verdict == Verdict.TOO_BIG else warning
    return make("memory plan", seen, fix, needed=needed)


def _sources(context: RunContext) -> list[DataSource]:
    return [*context.config.data_path, *(context.config.eval_data_path or ())]


# The hub


def hub_names(context: RunContext) -> list[tuple[str, str]]:
    """List what the recipe needs from the hub, as (name, kind)."""
    model = context.config.model_name_or_path
    local = model == EMBEDDED or Path(model).expanduser().is_dir() or model.startswith((".", "/", "~"))
    data = [(source.path, "dataset") for source in _sources(context) if _is_on_hub(source)]
    return ([] if local else [(model, "model")]) + data


def _is_on_hub(source: DataSource) -> bool:
    path = Path(source.path)
    return not path.exists() and bool(NAME.fullmatch(source.path)) and not path.suffix


def hub(names: list[tuple[str, str]]) -> Check:
    """Ask the hub for every name; a gated or unknown one is refused."""
    from huggingface_hub import constants, get_token

    answers: list[str | None] = []
    if not constants.HF_HUB_OFFLINE:
        asking = threading.Thread(target=lambda: answers.extend(_ask_hub(*name) for name in names), daemon=True)
        asking.start()
        asking.join(HUB_SECONDS)
    token = "with a token" if get_token() else "without a token"
    refused = [f"{name}: {answer}" for (name, _), answer in zip(names, answers) if answer]
    if refused:
        fix = "check the name, accept the terms on its page, and run: hf auth login"
        return failed("hub", "; ".join(refused), fix, reached=True)
    if len(answers) < len(names) or None in answers:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
        missing = [name for name, kind in names if kind == "dataset" or not find_facts(name)]
        needed = f"needed from it: {', '.join(missing)}" if missing else "the model is in the cache"
        fix = "connect, or load it before: hf download" if missing else "set HF_HUB_OFFLINE=1 to not wait for it"
        return warning("hub", f"{why}; {needed}", fix, reached=False)
    return ok("hub", f"answers {token}: {', '.join(name for name, _ in names)}", reached=True)


def _ask_hub(name: str, kind: str) -> str | None:
    """Ask the hub about a name: empty where it is there, None where the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        (HfApi().model_info if kind == "model" else HfApi().dataset_info)(name, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError) as error:
        return " ".join(str(error).split())
    except Exception:  # what its client raises without a network: of httpx, of the system
        return None
    return ""


# Memory and disks


def memory_and_disks(context: RunContext, names: list[tuple[str, str]]) -> list[Check]:
    """Check host memory, the run's disk, and the disk of the hub's cache where something is to come."""
    from huggingface_hub import constants

    shape, gpus = _shape(context), context.gpus
    weights = (2 if context.precision.half else 4) * shape.parameters if shape else 0
    run, cache = machine.existing(context.output_dir), machine.existing(Path(constants.HF_HUB_CACHE))
    one = checkpoint_bytes(context, shape) if shape else 0
    fix = "free some, or choose another --output_dir, or lower save_total_limit"
    checks = [
        machine.memory(machine.host_memory(), processes=context.nproc, weights=weights, gpus=gpus),
        machine.disk(
            "disk", run, machine.space_at(run), fix, need=run_bytes(context, one) if shape else None, least=one
        ),
    ]
    if gpus and context.nproc > 1:
        checks.append(machine.shared_memory(machine.space_at(Path("/dev/shm")), processes=context.nproc))
    if any(kind == "dataset" or not find_facts(name) for name, kind in names):
        fix = "free some, or set HF_HOME to a larger disk"
        need = 2 * shape.parameters if shape and names[0][1] == "model" else None
        checks.append(machine.disk("hub cache", cache, machine.space_at(cache), fix, need=need))
    return checks


def _shape(context: RunContext) -> ModelSpec | None:
    with contextlib.suppress(UserError):
        return read_model(context.config.model_name_or_path)
    return None


def checkpoint_bytes(context: RunContext, shape: ModelSpec) -> int:
    """About what one checkpoint takes: of each trained number its float32 value and the two moments of AdamW."""
    return 12 * PlannedRun(context, shape).trainable


def run_bytes(context: RunContext, one: int) -> int:
    """About what a run takes: the checkpoints that it keeps, the one that it writes, and final_model."""
    config = context.config
    return one * ((config.save_total_limit or 1) + 1 if config.save_steps != "off" else 0) + one // 3
