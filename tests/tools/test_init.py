"""`manyrank init` writes a recipe that says what it has stated, and that trains; or an error, and no file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manyrank import cli
from manyrank.config.resolve import FIELDS, resolve
from manyrank.data.survey import survey
from manyrank.errors import UserError
from manyrank.plan.memory import GiB
from manyrank.project_files import asset
from manyrank.tools import init

SAMPLE = str(asset("data", "sample.jsonl"))
MODEL_7B = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory of its own, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def write(name: str, *rows: dict | str) -> str:
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


def made(*argv: str, model: str = MODEL_7B, data: str = SAMPLE):
    """The config of the recipe that a command line writes."""
    assert init.main(["my.yaml", "--model", model, "--data", data, *argv]) == 0
    return resolve("my.yaml").config


def refused(*argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        init.main(argv)
    return caught.value


# What fits


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        (["--gpu", "RTX4090"], "qlora"),  # 24 GB
        (["--gpu", "A100-80GB"], "lora"),
        (["--gpu", "H100-80GB", "--nproc", "8"], "lora"),
        (["--gpu", "RTX4090", "--method", "lora"], "lora"),
        (["--gpu", "A100-80GB", "--method", "qlora"], "qlora"),
    ],
)
def test_the_method_is_the_plans_unless_it_is_named(capsys, argv, method):
    config = made(*argv)
    assert config.method == method
    shown = capsys.readouterr().out
    assert re.search(rf"^plan +{method}: ", shown, re.MULTILINE)
    peak, memory = re.search(r"planned: ([\d.]+) of ([\d.]+) GiB a GPU \(fits\)", shown).groups()
    assert float(peak) < float(memory)


def test_the_base_decides_between_lora_and_qlora(capsys):
    made("--gpu", "RTX4090")
    weights = 7.62e9 * 2 / (24564 * 2**20)
    assert f"qlora: the base in 16 bits takes {weights:.0%} of a GPU's memory" in capsys.readouterr().out


def test_a_micro_batch_is_no_larger_than_a_process_needs():
    assert made("--gpu", "H100-80GB", "--nproc", "8").per_device_train_batch_size == 2
    Path("my.yaml").unlink()
    wide = made("--gpu", "H100-80GB", "--nproc", "32")
    assert (wide.per_device_train_batch_size, wide.global_batch_size) == (1, 32)


def test_what_does_not_fit_is_no_recipe():
    error = refused("--model", "llama-3.1-70b", "--data", SAMPLE, "--gpu", "RTX3060", "--method", "full")
    assert error.what.startswith("llama-3.1-70b does not run on 1 x RTX3060 of 12 GiB: full needs ")
    assert "--nproc" in error.fix and "--method qlora" in error.fix
    float8 = refused("--model", "qwen3-8b", "--data", SAMPLE, "--gpu", "T4", "--method", "fp8")
    assert "fp8 is refused: " in float8.what
    assert "no GPU 'Z80' is known" in refused("--model", MODEL_7B, "--data", SAMPLE, "--gpu", "Z80").what
    assert list(Path().iterdir()) == []


# The file


def stated(options: init.InitOptions, values: dict) -> list[init.Line]:
    rows = init._rows(options.model, options.data)
    return init.recipe(values, init._choice(options, values, init._shape(options.model)), rows)


@pytest.mark.parametrize("argv", [{"gpu": "RTX4090"}, {"gpu": "A100-80GB", "nproc": 4}, {}, {"method": "full"}])
def test_the_file_resolves_to_what_is_stated(argv):
    words = [word for key, value in argv.items() for word in (f"--{key}", str(value))]
    config = made(*words)
    values = {"model_name_or_path": MODEL_7B, "data_path": SAMPLE, "max_length": 256}
    lines = stated(init.InitOptions(model=MODEL_7B, data=SAMPLE, **argv), values)
    plain = config.plain()
    assert {line.key: plain[line.key] for line in lines} == {
        line.key: None if line.value == "auto" and line.key == "strategy" else line.value for line in lines
    }
    others = {key for key, field in FIELDS.items() if not field.is_required() and plain[key] != field.default}
    assert others <= {line.key for line in lines}
    written = [line for line in Path("my.yaml").read_text().splitlines() if not line.startswith("# ")]
    assert len(written) == len(lines) and all(re.search(r"\S {2,}# \S", line) for line in written)
    assert ("lora_r" in yaml.safe_load(Path("my.yaml").read_text())) == (config.method != "full")


def test_values_follow_the_data(capsys):
    few = write("few.jsonl", {"text": "a b c"}, {"text": "x" * 3000}, "not json")
    config = made(data=few)
    assert (config.max_length, config.eval_split) == (1024, 0.0)
    assert "few.jsonl: 3 rows of text; bad: 1 not JSON" in capsys.readouterr().out
    assert "the longest row has about 1,000" in Path("my.yaml").read_text()
    Path("my.yaml").unlink()
    many = made(data=write("many.jsonl", *({"text": f"number {number}"} for number in range(200))))
    assert (many.max_length, many.eval_split) == (256, 0.05)
    assert survey(many)[0].usable == 200
    Path("my.yaml").unlink()
    long = made(data=write("long.jsonl", {"text": "x" * 10**6}), model="llama-2-7b")
    assert long.max_length == 4096  # the model has no more positions


def test_a_model_may_be_a_folder_or_its_config():
    shape = json.loads(asset("data", "architectures.json").read_text())["qwen2.5-0.5b"]
    Path("model").mkdir()
    Path("model", "config.json").write_text(json.dumps(shape))
    assert made(model="./model").model_name_or_path == "./model"
    Path("my.yaml").unlink()
    assert made(model="model/config.json").model_name_or_path == "model"


def test_a_short_name_is_said_to_be_one(capsys):
    made(model="qwen3-8b")
    assert "its hub name with the owner" in capsys.readouterr().out and "with the owner" in Path("my.yaml").read_text()
    Path("my.yaml").unlink()
    made()
    assert "owner" not in capsys.readouterr().out


def test_a_path_that_yaml_would_misread():
    name = write("a: b #c.jsonl", {"text": "good"})
    assert [source.path for source in made(data=name).data_path] == [name]


@pytest.mark.parametrize("argv", [[], ["--gpu", "RTX4090"], ["--gpu", "H100-80GB", "--nproc", "8"]])
def test_the_recipe_is_checked_by_train(embedded_model, capsys, argv):
    config = made(*argv, model="embedded")
    capsys.readouterr()
    assert cli.main(["train", "my.yaml", "--check"]) == 0
    micro = config.per_device_train_batch_size
    assert (
        f"a step: 16 examples (micro-batch {micro} x accumulation {16 // micro} x world 1)" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("argv", "batch"), [([], 16), (["--gpu", "H100-80GB", "--nproc", "3"], 24)])
@pytest.mark.parametrize(("answer", "reward"), [("2 + 2\n#### 4", "numeric"), ("$1,218.00", "numeric"), ("four", "f1")])
def test_a_recipe_of_grpo_is_one_that_train_takes(embedded_model, capsys, argv, batch, answer, reward):
    name = write("my.jsonl", *[{"question": f"q{number}", "answer": answer} for number in range(300)])
    config = made("--task", "grpo", *argv, model="embedded", data=name)
    assert config.is_grpo and config.rewards == {reward: 1.0} and config.learning_rate == 5e-6
    assert (config.global_batch_size, config.num_generations, config.packing) == (batch, 4, "none")
    assert config.max_length >= 256 and config.metric_for_best_model == "eval_reward"
    assert batch % config.per_device_train_batch_size == 0
    if not argv:
        assert cli.main(["train", "my.yaml", "--check"]) == 0
        assert f"a step: {batch} examples" in capsys.readouterr().out


# Errors


def test_nothing_is_overwritten():
    Path("recipe.yaml").write_text("mine")
    error = refused("--model", MODEL_7B, "--data", SAMPLE)
    assert error.what == "recipe.yaml is already there"
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("", "--model and --data must be given", "manyrank init --model "),
        ("--model embedded", "--data must be given", "--data data/sample.jsonl"),
        ("my.jsonl --model embedded --data my.jsonl", "my.jsonl is not named as a recipe", "my.yaml"),
        ("no/my.yaml --model embedded --data my.jsonl", "no/my.yaml cannot be written", "folder"),
        ("--model nothing-like-it --data my.jsonl", "nothing is known here of the model nothing-like-it", "folder"),
        ("--model ./gone --data my.jsonl", "nothing is known here of the model ./gone", "folder"),
        ("--model embedded --data gone.jsonl", "there is no file gone.jsonl", "check the path"),
        ("--model embedded --data bad.jsonl", "no row is left to train on: 1 of 1 rows cannot be used", "rows"),
        ("--model embedded --data shapes.jsonl", "no format has the keys ['colour']", "known formats"),
        ("--model embedded --data my.jsonl --task grpo", "rows of text have no prompt to complete", "--task grpo"),
        ("--model embedded --data my.jsonl --method lorra", "method: 'lorra' is invalid", "write lora"),
    ],
)
def test_errors_have_three_lines_and_leave_no_file(embedded_model, capsys, line, what, fix):
    write("my.jsonl", {"text": "good"})
    write("bad.jsonl", {"question": "q", "answer": ""})
    write("shapes.jsonl", {"colour": 1})
    assert cli.main(["init", *line.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"error: {what}") and lines[2].startswith("fix: ") and fix in lines[2]
    assert not list(Path().glob("**/*.yaml"))


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    program = f"import sys\nfrom manyrank import cli\nsys.exit(cli.main(['init', '--model', 'no/such', '--data', {SAMPLE!r}]))"
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path.cwd() / "nothing")}
    for name, value in away.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and not Path("recipe.yaml").exists()
    assert "the model no/such cannot be downloaded" in done.stderr.splitlines()[0]


def test_it_imports_no_torch():
    program = (
        "import sys\nfrom manyrank import cli\n"
        f"assert cli.main(['init', '--model', {MODEL_7B!r}, '--data', {SAMPLE!r}, '--gpu', 'L4']) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resolve("recipe.yaml").config.model_name_or_path == MODEL_7B
    assert f"1 x L4 of {23034 * 2**20 / GiB:.0f} GiB" in Path("recipe.yaml").read_text()
