"""The commands, recipes and Python of the documents, as they stand there, on a small model in a folder of their own."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
import warm
import yaml
from launches import ROOT
from nbclient import NotebookClient

from manyrank.project_files import asset

QUESTION = "What is the variance of a Bernoulli variable with p = 0.3?"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str, *words: str) -> list[list[str]]:
    """The `manyrank` commands of a page that have one of the words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("manyrank ")]
    chosen = [argv[1:] for argv in found if any(word in argv for word in words)]
    assert chosen, (page, words)
    return chosen


@pytest.fixture(scope="module")
def folder(embedded_model, tmp_path_factory):
    """Where the documents' names are: models, data, and a recipe."""
    made = tmp_path_factory.mktemp("docs")
    for name in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).symlink_to(embedded_model)
    rows = asset("data", "sample.jsonl").read_text().splitlines()[:12]
    (made / "my.jsonl").write_text("\n".join(rows))
    shutil.copy(asset("data", "validation.jsonl"), made / "my-validation.jsonl")
    (made / "data").mkdir()
    shutil.copy(asset("data", "formats", "alpaca.json"), made / "data" / "alpaca.json")
    (made / "questions.jsonl").write_text(json.dumps({"question": QUESTION}))
    recipe = {"model_name_or_path": "Qwen/Qwen2.5-1.5B", "data_path": "my.jsonl", "num_train_epochs": 1}
    (made / "my.yaml").write_text(yaml.safe_dump(recipe | {"max_length": 256, "bf16": False}))
    return made


@pytest.fixture(scope="module")
def manyrank(folder):
    def run(*argv: str) -> str:
        done = warm.run([sys.executable, "-m", "manyrank.cli", *argv], cwd=folder)
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    return run


@pytest.fixture(scope="module")
def trained(folder, manyrank):
    """What docs/resume.md does: a run in output/my, and a second start of it."""
    first, second = ([word.replace("50", "1") for word in argv] for argv in commands("docs/resume.md", "train"))
    manyrank(*first)
    assert "resumed from output/my/checkpoint-" in manyrank(*second)
    return folder / "output" / "my"


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_recipes_of_the_documents_are_right(page, folder, manyrank):
    (recipe,) = blocks(page, "yaml")
    named = yaml.safe_load(recipe)
    named.pop("callbacks", None)  # of a module that is not here
    (folder / "shown.yaml").write_text(yaml.safe_dump(named | {"report_to": []}))
    assert "strategy single" in manyrank("train", "shown.yaml", "--check")


def test_a_launch_is_checked_and_shown(manyrank):
    checked, shown = commands("docs/launch.md", "--check", "--print")
    assert "strategy zero3, 8 processes" in manyrank(*checked)
    assert "ds_configs/zero3.json" in manyrank(*shown)


def test_the_schema_is_printed(manyrank):
    (argv,) = commands("docs/recipes.md", "schema")
    assert "learning_rate" in json.loads(manyrank(*argv[:1]))["properties"]


def test_data_is_inspected(folder, manyrank):
    (argv,) = commands("docs/data.md", "inspect")
    manyrank(*argv)
    assert "<html" in (folder / "data.html").read_text()


def test_a_run_has_a_report_and_is_evaluated(trained, folder, manyrank):
    one, _ = commands("docs/report.md", "report")
    manyrank(*one)
    assert (trained / "report.html").is_file()
    manyrank("evaluate", "output/my", "--data", "my-validation.jsonl", "--metrics", "loss", "--max-rows", "4")
    assert (folder / "output" / "evaluation" / "eval_results.json").is_file()


def test_python_trains_and_loads(folder):
    program, _ = blocks("docs/python.md", "python")
    program += (
        "\nassert list(dataset[0].keys()) == ['input_ids', 'attention_mask', 'labels']\nprint(result.final_model)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / done.stdout.splitlines()[-1] / "adapter_model.safetensors").is_file()


def test_the_script_for_torchrun_trains(folder):
    _, script = blocks("docs/python.md", "python")
    (folder / "train.py").write_text(script.replace("output/my", "output/ranks"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = warm.run(command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'loss': ") == 1 and "fsdp, 2 processes" in done.stdout
    assert (folder / "output" / "ranks" / "final_model" / "adapter_model.safetensors").is_file()


def test_the_merged_folder_answers_in_plain_transformers(trained, folder, manyrank):
    plain = next(block for block in blocks("docs/use.md", "python") if "from_pretrained" in block)
    manyrank("merge", "output/my")
    program = (
        f"import sys\n{plain}\n"
        "assert not {'manyrank', 'peft'} & {name.split('.')[0] for name in sys.modules if name == 'manyrank' or 'peft.tuners' in name}\n"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    first = said.stdout.strip()
    assert first and "<|im_end|>" not in first
    manyrank("generate", "output/my", "questions.jsonl", "out.jsonl", "--max-new-tokens", "64", "--dtype", "float32")
    assert json.loads((folder / "out.jsonl").read_text())["answers"][0]["text"] == first


@pytest.mark.parametrize("name", ["other_tools", "first_hour"])
def test_a_page_is_what_its_script_makes(name):
    made = runpy.run_path(str(ROOT / "docs" / f"make_{name}.py"))
    assert made["FILE"].read_text() == made["page"]()


def test_the_recorded_session_has_each_command_and_an_answer():
    made = runpy.run_path(str(ROOT / "docs" / "record_first_hour.py"))
    session = made["FILE"].read_text(encoding="utf-8")
    codes = dict(re.findall(r"^\$ (.*)\n[^$]*?^\[exit code (\d+), ", session, re.MULTILINE))
    assert list(codes) == list(dict.fromkeys(made["COMMANDS"])) and set(codes.values()) == {"0", "2"}
    assert "Traceback" not in session and str(ROOT) not in session


def test_the_notebook_runs_in_a_kernel(embedded_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    written = nbformat.read(ROOT / "docs" / "first_run.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in written.cells)
    client = NotebookClient(written, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    cells = client.execute().cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"learned 'It is 0\.21\..*<\|im_end\|>", said)
    before, after = (re.search(rf"^{name} +(.*)", said, re.MULTILINE)[1] for name in ("before", "after"))
    assert after.startswith("It is 0.21") and after != before
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "output" / "run" / "final_model" / "adapter_model.safetensors").is_file()
