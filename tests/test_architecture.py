"""The house rules, read from the source: the order of packages, imports without torch, sizes, a loop that names no backend."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import manyrank
from manyrank.topology.strategies import STRATEGIES

SOURCE = Path(manyrank.__file__).parent
# A package imports only what stands before it.
ORDER = [
    "errors",
    "signals",
    "sandbox",
    "project_files",
    "runs",
    "topology",
    "config",
    "chat_template",
    "models",
    "data",
    "rules",
    "plan",
    "launch",
    "parallel",
    "checkpoint",
    "training",
    "tasks",
    "tools",
    "train",
    "api",
    "cli",
]
LIGHT = [
    "errors",
    "signals",
    "sandbox",
    "project_files",
    "runs",
    "config",
    "topology",
    "rules",
    "plan",
    "launch",
    "train",
    "cli",
]
LIGHT += [
    "models.spec",
    "models.catalog",
    "tools.report",
    "tools.doctor.main",
    "tools.doctor.ranks",
    "tools.evaluate.main",
]
LIGHT += [
    "data.files",
    "data.formats",
    "data.messages",
    "data.sources",
    "data.survey",
    "tools.init",
    "tools.inspect_data",
]
LIGHT += [
    "tools.chat",
    "tools.files",
    "tools.generate",
    "tools.gguf",
    "tools.importer",
    "tools.merge.main",
    "tools.push",
    "tools.serve",
    "tools.watch",
    "training.trackers",
]
LINES = {  # at most; a feature that needs more raises its package's number and says why
    "root": 1400,
    "runs": 1600,  # with the watchdog, which the launch starts too, the boards of machines, the hub, what a new run replaces, links to the adapter, adapters of the hub
    "config": 2800,  # with kernels of the attention, keywords of Python, names that say the opposite, the names and values that other tools have and people guess, and keys and help texts in groups, and all that is not known at once
    "topology": 900,  # with the CUDA driver, TF32, what torch is built for, and NUMA nodes
    "chat_template": 1600,  # with messages, roles and ends of turns that are learned or not
    "models": 5950,  # with loading in shards, the quantised cache, casts of bases stored in 4 bits and of adapters, fused norms, SwiGLU and RoPE, flash attention, float8, text in final pieces, what adapters start from, frozen ones below, rows of tokens, skeletons, rows that were never learned, directions of inputs
    "data": 3800,  # with weights of messages, data for classifiers, shares of sources, other names of questions and answers, and rows that are looked at before any tokenizer
    "rules": 2980,  # with TF32, determinism and kinds of attention, options that choose among turns, templates, callbacks and targets that are not there, what a new run replaces, and the arguments of schedules
    "plan": 2240,  # with the host's time, micro-batches that nobody gave, what else is assumed, and times in words, what is trained beside A and B, and rows of tokens
    "parallel": 1440,  # with counts of parameters, what ZeRO-3 gathers, time-outs, NUMA nodes and the loss scale of fp16, tied embeddings with trained tokens
    "checkpoint": 480,
    "training": 2900,  # with TF32 and determinism, lines of progress, the model card, a start in words, and Lion and Muon
    "tasks": 960,
    "launch": 860,
    "tools": 9900,  # with an OpenAI-compatible endpoint, recipes written and imported from four tools, GRPO among them, files copied, runs watched, GGUF files, and pushes to the hub
}
BACKENDS = re.compile(r"deepspeed|fsdp|zero-?[123]|\bddp\b|DistributedType", re.IGNORECASE)


def dotted(path: Path) -> str:
    """The module's name below manyrank; of a package that of its __init__.py."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def package(name: str) -> str:
    return name.partition(".")[0]


def imports(name: str) -> Iterator[str]:
    """The modules of manyrank that a module imports, also inside functions."""
    here = FILES[name].relative_to(SOURCE).parent.parts
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and package(node.module) == "manyrank":
            base = node.module.split(".")[1:]
        else:
            assert not isinstance(node, ast.Import) or "manyrank" not in {package(alias.name) for alias in node.names}
            continue
        module = ".".join(filter(None, base))
        for alias in node.names:
            inner = f"{module}.{alias.name}".lstrip(".")
            yield inner if inner in FILES else module or "__init__"


IMPORTS = {name: set(imports(name)) - {"__init__"} for name in FILES if name != "__init__"}


def test_the_import_reader_sees_lazy_and_relative_imports():
    assert {"launch.main", "launch.slurm", "rules.check", "config.args"} <= IMPORTS["cli"]
    assert {"training.build", "topology.gpus", "tasks"} <= IMPORTS["train"]
    assert "training.task" in IMPORTS["tasks.grpo.task"]


def test_a_package_imports_only_those_before_it():
    place = {name: number for number, name in enumerate(ORDER)}
    assert {package(name) for name in FILES} - {"__init__"} == set(ORDER)
    pairs = [(name, other) for name in IMPORTS for other in IMPORTS[name]]
    assert [(name, other) for name, other in pairs if place[package(other)] > place[package(name)]] == []
    workers = ("parallel", "checkpoint", "training", "tasks")  # what runs in them knows nothing of who started them
    assert [(name, other) for name, other in pairs if package(name) in workers and package(other) == "launch"] == []


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError


def test_a_tool_imports_no_other_tool():
    """But for the building of pages, the reading of a run for them, and the merge that a GGUF file begins with."""

    def tool(name: str) -> str:
        return name.split(".")[1]

    pairs = [(name, other) for name in IMPORTS for other in IMPORTS[name] if package(name) == package(other) == "tools"]
    wrong = [(name, other) for name, other in pairs if tool(name) != tool(other)]
    pages = ("blocks", "curves", "data_tables", "oddities", "pages", "run_record", "summary", "terminal")
    allowed = {*(f"tools.report.{name}" for name in pages), "tools.merge.main"}
    assert {other for _, other in wrong} <= allowed


def test_light_packages_import_without_torch():
    names = [name for name in FILES if name in LIGHT or package(name) in LIGHT or name.rpartition(".")[0] in LIGHT]
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(f'manyrank.{name}')\n"
        "    assert 'torch' not in sys.modules, name\n"
        "    print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == names, done.stderr


def test_the_loop_names_no_backend_and_no_task():
    """What trains, saves and shows a run knows tasks by their interface."""
    lines = FILES["training.trainer"].read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if BACKENDS.search(line)] == []
    names = [name for name in FILES if re.match(r"(training|checkpoint|runs|parallel|tools\.report)\b", name)]
    text = {name: FILES[name].read_text(encoding="utf-8") for name in names}
    assert [name for name in names if re.search(r"\b(sft|grpo)\b", text[name], re.IGNORECASE)] == []


def test_names_of_strategies_stand_in_one_file():
    """Everything else asks the row, so that a new strategy is a row and a YAML."""
    named = {
        (name, node.lineno)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in STRATEGIES
    }
    assert {name for name, _ in named} == {"topology.strategies"}, named


def test_packages_files_and_functions_are_short():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    sizes = dict.fromkeys(LINES, 0)
    for name, count in lines.items():
        sizes[package(name) if package(name) in LINES else "root"] += count
    assert {name: size for name, size in sizes.items() if size > LINES[name]} == {}
    assert {name: count for name, count in lines.items() if count > 500} == {}
    functions = [
        (name, node.name, node.end_lineno - node.lineno + 1)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [entry for entry in functions if entry[2] >= 60] == []
