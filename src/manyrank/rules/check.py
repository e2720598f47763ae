"""Check all rules before a process starts, and report all violations at once. No torch.

    RULES               one table: recipe, adapters, strategy, model, grpo; docs/rules.md is printed from it
    check_rules         errors end the start together; warnings are printed, and `ignore_warnings` switches them off
    check_data, ...     files that the recipe names: rows, templates, models, the output folder

`manyrank rules` prints the table.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ..chat_template.types import BadRow
from ..config.data_source import DataSource
from ..config.resolve import FIELDS, ResolvedConfig, TrainConfig
from ..data.formats import needs_template, to_sample
from ..data.messages import bad_rows_error, usual_fix
from ..data.sources import known_format, read_rows, source_of
from ..errors import UserError, UserErrors
from ..models.model_facts import find_facts
from ..project_files import template_file, template_names
from ..runs import artifact, run_lock
from ..runs.run_folder import LAUNCH, check_writable, is_new, is_removable, others, unsealed
from ..topology.gpus import Hardware
from ..topology.strategies import default_strategy
from .adapters import ADAPTER_RULES
from .context import RunContext
from .grpo import GRPO_RULES
from .model import MODEL_RULES
from .numerics import NUMERICS_RULES
from .recipe import LENGTH_RULES, RECIPE_RULES
from .rows import PARTS, SOURCE_RULES
from .rule import Rule, Violation
from .strategy import STRATEGY_RULES

__all__ = [
    "RULES",
    "check_data",
    "check_new_folder",
    "check_output_dir",
    "check_rules",
    "check_sources",
    "find_violations",
    "rules_as_markdown",
]

LOOKED_AT = 1000  # rows of a source before the launch
NO_TEMPLATE_FIX = "give one: --chat_template chatml, or a file"
# Warnings of earlier versions, which recipes may still ignore.
RETIRED = frozenset(
    {
        "adapters-on-embeddings",
        "compile-on-cpu",
        "fp16-model-in-bf16",
        "never-validated",
        "paged-optimizer-on-cpu",
        "rank-beyond-layers",
        "untried-quantisation",
        "unusual-adapter-scale",
        "wandb-without-login",
        "warmup-of-constant",
    }
)
RULES: tuple[Rule, ...] = (*RECIPE_RULES, *ADAPTER_RULES, *STRATEGY_RULES, *MODEL_RULES, *GRPO_RULES, *NUMERICS_RULES)


def check_sources(resolved: ResolvedConfig) -> None:
    """Check what a recipe says of its sources, wherever it is to run.

    Raises:
        UserError: what is wrong.
    """
    results = ((rule, rule.broken(_anywhere(resolved))) for rule in SOURCE_RULES)
    _raise([Violation(rule, what, resolved.where(*rule.keys_in(what))).error() for rule, what in results if what])


def _anywhere(resolved: ResolvedConfig) -> RunContext:
    """A recipe for rules that look at it alone."""
    return RunContext(resolved, default_strategy(1), 1, 1, Hardware((), cpu_cores=1, cpu_bf16=False))


def find_violations(context: RunContext) -> list[Violation]:
    """Every rule of the table that is broken, in its order.

    Raises:
        UserError: a file that the rules look at cannot be read.
    """
    results = ((rule, rule.broken(context)) for rule in RULES)
    return [Violation(rule, what, context.where(*rule.keys_in(what))) for rule, what in results if what]


def check_rules(context: RunContext, *, warn: bool = True) -> None:
    """Check the table, and the files that the recipe names; print the warnings.

    Args:
        warn: whether to print them; a launched process leaves it to the command that launched it.

    Raises:
        UserError: what is wrong; a UserErrors where it is more than one thing.
    """
    ignored = context.config.ignore_warnings
    problems = list(_unknown_warnings(context.resolved))
    violations: list[Violation] = []
    try:
        violations = find_violations(context)
    except UserError as problem:
        problems.append(problem)
    problems += [violation.error() for violation in violations if violation.rule.severity == "error"]
    _raise([*problems, *_file_problems(context.resolved)])
    for violation in violations if warn else []:
        if violation.rule.severity == "warning" and violation.rule.name not in ignored:
            print(f"{violation.warning()}\n", file=sys.stderr, flush=True)


def warnings_of_length(config: TrainConfig, total_steps: int) -> list[str]:
    """The warnings that wait for the number of steps, where the recipe has no max_steps, as they are printed."""
    if config.max_steps > 0:  # told before the start
        return []
    counted = ResolvedConfig(config.model_copy(update={"max_steps": total_steps}))
    results = (
        (rule, rule.broken(_anywhere(counted))) for rule in LENGTH_RULES if rule.name not in config.ignore_warnings
    )
    return [Violation(rule, what, f"{rule.keys[0]}, num_train_epochs").warning() for rule, what in results if what]


def _raise(problems: Sequence[UserError]) -> None:
    different = list({str(problem): problem for problem in problems}.values())
    if different:
        raise different[0] if len(different) == 1 else UserErrors(different)


def _unknown_warnings(resolved: ResolvedConfig) -> Iterator[UserError]:
    severities, where = {rule.name: rule.severity for rule in RULES}, resolved.where("ignore_warnings")
    for name in resolved.config.ignore_warnings:
        if severities.get(name) == "error":
            yield UserError(f"{name} is an error and cannot be ignored", where=where, fix="fix what it names")
        elif name not in severities and name not in RETIRED:
            known = [warning for warning, severity in severities.items() if severity == "warning"]
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            fix = f"did you mean {close[0]}?" if close else "`manyrank rules` lists all"
            yield UserError(f"there is no warning {name!r}", where=where, fix=fix)


def rules_as_markdown() -> str:
    """The table for people: docs/rules.md."""
    parts = [
        "# Rules\n\n"
        "Checked by `manyrank train` before a process starts, and by the train module. All violations are reported at once, "
        "each with\nits place, its reason and its fix. A warning is switched off by its name, in the recipe or on the "
        "command line:\n\n```yaml\nignore_warnings: [unusual-learning-rate]\n```\n\n"
        "`yaml:` is a key of the strategy's file in `accelerate_configs/`, `json:` one of its file in `ds_configs/`, "
        "`model:` a file of the\nbase model. Rules about the model count where its files are on this machine: a folder, or a "
        "hub name in the cache.\n\n`manyrank rules > docs/rules.md` writes this file.\n"
    ]
    for severity in ("error", "warning"):
        rules = [rule for rule in RULES if rule.severity == severity]
        parts.append(f"\n## {severity.capitalize()}s ({len(rules)})\n")
        parts += [_entry(rule) for rule in rules]
    return "".join(parts)


def _entry(rule: Rule) -> str:
    keys = ", ".join(f"`{key.rstrip(':')}`" for key in rule.keys)
    upstream = f" See <{rule.upstream}>." if rule.upstream else ""
    fix = rule.fix[0].upper() + rule.fix[1:]
    return f"\n### {rule.name}\n\n{keys}\n\n{rule.reason}{upstream}\n\n*{fix}.*\n"


# Files


def _file_problems(resolved: ResolvedConfig) -> list[UserError]:
    problems, formats = [], set()
    for source in [*resolved.config.data_path, *(resolved.config.eval_data_path or [])]:
        try:
            formats.add(check_data(source, resolved.config))
        except UserError as problem:
            problems.append(problem)
    chats = any(map(needs_template, formats)) or bool(resolved.config.sample_questions)
    problems += _unread_problems(resolved, formats)
    return [*problems, *_template_problems(resolved), *_model_problems(resolved, chats=chats)]


def _unread_problems(resolved: ResolvedConfig, formats: set[str]) -> Iterator[UserError]:
    """Options that choose among the turns of conversations, where no source has any."""
    if formats and formats <= {"text", "tokens"}:
        chosen = [key for key in PARTS if getattr(resolved.config, key) != FIELDS[key].default]
        for key in chosen:
            what = f"{key} with rows of {' and '.join(sorted(formats))}, which have no turns"
            yield UserError(what, where=resolved.where(key), fix="leave it out, or give conversations")


def check_data(source: DataSource, config: TrainConfig) -> str:
    """Read the start of a source as the run will; to the first good row of a name on the hub, or where a bad one may pass.

    Returns:
        Its format.

    Raises:
        UserError: it cannot be read, or one of its first LOOKED_AT rows is bad. Later bad rows are found by the run,
            which tells of all of them.
    """
    known = known_format(source_of(source, config))
    stops, rows = config.on_bad_row == "error", 0
    bad: list[tuple[str, BadRow]] = []
    for row in islice(read_rows(known), LOOKED_AT):
        rows += 1
        try:
            to_sample(row.readable(), known.format_type, known.columns)
            if not stops or known.max_rows or not Path(known.path).exists():  # the seed chooses among rows
                return known.format_type
        except BadRow as problem:
            bad.append((row.place, problem))
    if bad and stops:
        reasons = Counter(problem.reason for _, problem in bad)
        first = ((place, str(problem)) for place, problem in bad)
        raise bad_rows_error(first, reasons, out_of=f"the first {rows:,} rows", fix=usual_fix(reasons))
    return known.format_type


def _template_problems(resolved: ResolvedConfig) -> Iterator[UserError]:
    name, where = resolved.config.chat_template, resolved.where("chat_template")
    if not name or template_file(name):
        return
    if "/" in name or "." in name:
        yield UserError(f"there is no file {name}", where=where, fix="name a Jinja file")
        return
    model = find_facts(resolved.config.model_name_or_path)
    if model and not model.has_template_named(name):  # where it is not here, its tokenizer may have it
        fix = f"leave it out for the model's own, or name a file, or one of {', '.join(template_names())}"
        yield UserError(f"there is no chat template {name!r}", where=where, fix=fix)


def _model_problems(resolved: ResolvedConfig, *, chats: bool) -> Iterator[UserError]:
    name, where = resolved.config.model_name_or_path, resolved.where("model_name_or_path")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            yield UserError(f"there is no folder {name}", where=where, fix="check the path")
        return
    if (folder / "adapter_config.json").is_file():  # a rule of the table tells what that is
        return
    if not (folder / "config.json").is_file():
        yield UserError(f"{name} has no config.json", where=where, fix="name the folder of a whole model")
    if not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        yield UserError(
            f"{name} has no weights", where=where, fix="it needs model*.safetensors (or pytorch_model*.bin)"
        )
    try:
        bare = chats and not resolved.config.chat_template and not _has_chat_template(name)
    except UserError as problem:
        yield problem
        return
    if bare:
        yield UserError("the tokenizer has no chat template", where=where, fix=NO_TEMPLATE_FIX)


def _has_chat_template(name: str) -> bool:
    """Return whether a folder's tokenizer has one; where it has no config.json either, that alone is reported."""
    facts = find_facts(name)
    return facts is None or bool(facts.has_template)


def check_output_dir(config: TrainConfig, output_dir: Path) -> None:
    """Refuse a folder that this run cannot have.

    Raises:
        UserError: it cannot be written to, a run works in the folder, or it has files and this run does not resume;
            or there is no such checkpoint to resume from.
    """
    above = next(parent for parent in (output_dir, *output_dir.parents) if parent.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file", where="output_dir", fix="choose another --output_dir")
    check_writable(output_dir, where="output_dir", fix="choose another --output_dir")
    _check_checkpoint(config.resume_from_checkpoint)
    if config.dry_run:
        return
    run_lock.refuse_if_held(output_dir)
    check_new_folder(config, output_dir)


def _check_checkpoint(name: str | None) -> None:
    """Refuse a name that is no checkpoint; the run itself finds out whether each of its files is whole."""
    if not name or name == "auto":
        return
    folder = Path(name)
    if problem := unsealed(folder) if folder.is_dir() else f"there is no folder {name}":
        fix = "name the folder of a complete checkpoint, or auto"
        raise UserError(problem, where="resume_from_checkpoint", fix=fix)


def check_new_folder(config: TrainConfig, output_dir: Path) -> None:
    """Refuse to write among another run's files.

    Raises:
        UserError: the folder has files, and this run does not resume.
    """
    if config.resume_from_checkpoint or is_new(output_dir):
        return
    if config.overwrite_output_dir and is_removable(output_dir):
        return
    what, fix = f"the output folder {output_dir} is not empty", "choose another --output_dir"
    if not artifact.is_run(output_dir) and (foreign := others(output_dir)):
        raise UserError(f"{what}, and holds no run: {', '.join(foreign[:3])}", where="output_dir", fix=fix)
    if config.overwrite_output_dir:
        what = f"{what}, and has no {LAUNCH}, by which a run is known that may be removed"
        raise UserError(what, where="output_dir", fix=f"{fix}, or remove the folder")
    fix += ", continue that run with --resume_from_checkpoint auto, or replace it with --overwrite_output_dir"
    raise UserError(what, where="output_dir", fix=fix)
