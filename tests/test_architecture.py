"""The house rules, read from the source: levels, imports without torch, sizes, and a loop that names no backend."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import manyrank

SOURCE = Path(manyrank.__file__).parent
FILES = {path.stem: path for path in sorted(SOURCE.glob("*.py"))}

# A module imports only modules of strictly lower levels. The decimals order modules of one level in DESIGN.md.
LEVEL = {
    "__init__": 0, "errors": 0,
    "schema": 0.5, "recipe_file": 0.5, "turns": 0.5, "json_array": 0.5, "files": 0.7,
    "run_folder": 0.5, "run_lock": 0.7, "compile_locks": 1, "artifact": 0.7, "config": 1, "topology": 1, "interrupts": 1, "hardware": 1, "allocator": 1.2, "watchdog": 1, "formats": 1, "sources": 1.2, "packing": 1, "numeric": 1, "sandbox": 1, "dedup": 1,
    "strategy_files": 1.2, "shapes": 1.2, "catalogue": 1.3, "setup": 1.4, "options": 1.5, "embedded": 1.5, "run_identity": 1.5,
    "activations": 1.6, "model_facts": 1.6, "situation": 1.7, "recipe_rules": 1.8, "strategy_rules": 1.8, "model_rules": 1.8,
    "pages": 1, "tables": 1, "svg": 1, "memory": 2, "speed": 2.1, "planner": 2.2, "plan_view": 2.3, "plan_html": 2.4, "planning": 2.5,
    "scores": 1.4, "comparison": 1, "harness": 1, "contestants": 2, "eval_report": 2.2, "rules": 2, "launcher": 2, "kubernetes": 2, "submission": 2.3, "decision": 2.6, "filters": 1.3, "marks": 1.3, "rewards": 1.5, "grpo_rules": 1.9, "endings": 2, "export": 2,
    "doctor_probe": 2.2, "doctor_recipe": 3.1, "doctor_checks": 3.3, "doctor_launch": 3.35, "doctor_rank_checks": 3.4,
    "spans": 2.5, "templates": 2.7, "render": 3, "stages": 3, "head": 2.9, "loss": 3, "lora": 3, "reach": 3, "coverage": 3.2, "first_look": 3.2, "adapters": 3.5, "varlen": 2.9, "attention": 3, "optim": 3, "metrics": 3, "callbacks": 3, "non_finite": 3, "fsdp_on_cpu": 3, "fsdp_preparation": 3,
    "workload": 3.2, "trackers": 3, "run_record": 3.2, "report_parts": 3.4, "report_html": 3.6, "report": 3.8,
    "strategy": 3.5, "runtime": 3.5, "tokenise": 3.5,
    "questions": 4, "evaluation": 5, "eval_process": 6, "evaluate": 7.5,
    "hub": 1, "host_memory": 3, "logits": 3.5, "merging": 4, "merge": 5, "conversation": 4.5, "chat": 5, "prompts": 1.5, "answer_file": 1.5, "answering": 5,
    "data": 4, "batches": 4.5, "packing_trial": 4.6, "curate": 4, "model": 4, "positions": 4.2, "loaded": 4.5, "checkpoint": 4, "saver": 4.5, "resume": 4, "generate": 4, "generation": 4,
    "foresight": 4.7, "meter": 4.7, "trainer": 5, "reward_model": 4.5, "policy": 4.7, "grpo": 5.5, "survey": 5, "inspection_tables": 5.2, "inspection_html": 5.5, "inspection": 5.7,
    "record": 5.8, "session": 6, "opening": 6.1, "verify": 6, "contenders": 6.2, "gpu_bench": 6.2, "bench": 6.5,
    "doctor_exchange": 6, "doctor_step": 6.5,
    "train": 7, "api": 7.2, "doctor_ranks": 7.5, "doctor": 7.5,
    "cli": 8,
}  # fmt: skip
LIGHT = [name for name, level in LEVEL.items() if level <= 2.5]
LIGHT += [
    "trackers",
    "report",
    "decision",
    "merge",
    "chat",
    "answering",
    "train",
    "evaluate",
    "cli",
    "doctor",
    "doctor_ranks",
]
BACKENDS = re.compile(r"deepspeed|fsdp|zero-?[123]|\bddp\b|DistributedType", re.IGNORECASE)


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def own_imports(name: str) -> Iterator[str]:
    """The modules of this package that a module imports, also inside functions."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["manyrank" if node.level else "", node.module]))
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (text.split(".") for text in dotted):
            if parts[0] == "manyrank":
                yield parts[1] if len(parts) > 1 and parts[1] in FILES else "__init__"


def test_every_module_has_a_level():
    assert set(LEVEL) == set(FILES)


@pytest.mark.parametrize(
    "name", sorted(set(FILES) - {"__init__"})
)  # the front door, which imports when something is asked for
def test_imports_only_lower_levels(name):
    wrong = {other for other in own_imports(name) if LEVEL.get(other, 99) >= LEVEL.get(name, 99)}
    assert not wrong, f"{name} (level {LEVEL.get(name)}) imports {wrong}"


def test_the_import_reader_sees_lazy_and_relative_imports():
    assert {"decision", "submission", "options", "verify", "__init__"} <= set(own_imports("cli"))
    assert "opening" in set(own_imports("train"))


def test_light_modules_import_without_torch():
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(f'manyrank.{name}' if name != '__init__' else 'manyrank')\n"
        "    assert 'torch' not in sys.modules, name\n"
        "    print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == LIGHT, done.stderr


def test_the_loop_names_no_backend():
    lines = FILES["trainer"].read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if BACKENDS.search(line)] == []


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name for node in functions if node.end_lineno - node.lineno + 1 >= 60} == set()


@pytest.mark.parametrize("name", FILES)
def test_modules_say_what_they_are_for(name):
    assert ast.get_docstring(tree(name))
