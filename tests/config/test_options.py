"""The command line: yes/no options, lists, node flags, and what the train module is given."""

import re
import shlex
import subprocess
import sys

import pytest

from manyrank.config.args import GrpoOptions, LaunchOptions, Options, TrainOptions, parse, recipe_options
from manyrank.config.resolve import FIELDS, KNOWN, SWITCHES, resolve
from manyrank.config.schema import Keys, TrainConfig
from manyrank.errors import UserError


def read(*argv: str, launch: bool = True):
    return parse(argv, prog="manyrank train", launch=launch)


def given(line) -> dict[str, str]:
    return {entry.key: entry.value for entry in line.overrides}


def error(*argv: str, launch: bool = True) -> UserError:
    with pytest.raises(UserError) as caught:
        read(*argv, launch=launch)
    return caught.value


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--dry-run", "quickstart"], "true"),
        (["--dry_run", "quickstart"], "true"),
        (["--dry-run", "no", "quickstart"], "no"),
        (["--dry-run=false", "quickstart"], "false"),
        (["--dry-run", "FALSE", "quickstart"], "FALSE"),
        (["quickstart", "--dry-run"], "true"),
        (["quickstart", "--dry-run", "1"], "1"),
    ],
)
def test_yes_no_options_around_the_recipe(argv, value):
    line = read(*argv)
    assert line.recipe == "quickstart"
    assert given(line) == {"--dry_run": value}


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_switches_need_no_value(name):
    line = read("--" + name.replace("_", "-"), "quickstart")
    assert line.recipe == "quickstart"
    assert given(line) == {f"--{name}": "true"}


def test_two_yes_no_options_in_a_row():
    line = read("--no-lora", "--bf16", "auto", "--gradient-checkpointing", "quickstart")
    assert line.recipe == "quickstart"
    assert given(line) == {"--no_lora": "true", "--bf16": "auto", "--gradient_checkpointing": "true"}


def test_every_option_is_accepted():
    for name in KNOWN.spellings:
        assert given(read(f"--{name}=1", "quickstart")) == {f"--{name}": "1"}


def test_a_list_without_commas():
    assert (
        error("verify", "--target_modules", "q_proj", "v_proj", "o_proj").fix
        == "write --target_modules=q_proj,v_proj,o_proj"
    )


def test_values_with_dashes_and_equals_signs():
    line = read("--run-name", "a-b", "--max-steps", "-1", "--output-dir=x=y-z")
    assert given(line) == {"--run_name": "a-b", "--max_steps": "-1", "--output_dir": "x=y-z"}


@pytest.mark.parametrize("text", ["wandb,mlflow", "[wandb, mlflow]"])
def test_lists(text):
    line = read("quickstart", "--report-to", text)
    assert resolve(line.recipe, line.overrides).config.report_to == ["wandb", "mlflow"]


def test_questions_with_commas_in_brackets():
    line = read("quickstart", "--sample-questions", '["One, two?", "Three?"]')
    assert resolve(line.recipe, line.overrides).config.sample_questions == ["One, two?", "Three?"]


def test_origins_name_the_option():
    line = read("quickstart", "--lr", "1e-4")
    resolved = resolve(line.recipe, line.overrides)
    assert resolved.config.learning_rate == 1e-4
    assert resolved.provenance["learning_rate"] == "command line, --lr"


def test_the_train_module_gets_the_same_recipe_and_overrides():
    line = read("--dry-run", "quickstart", "--lr", "1e-4", "--nproc", "2", "--no-4bit", "--run-name", "a b=c")
    again = read(*line.argv, launch=False)
    assert line.argv == ["quickstart", "--dry_run=true", "--lr=1e-4", "--no_4bit=true", "--run_name=a b=c"]
    assert again.argv == line.argv
    assert resolve(again.recipe, again.overrides) == resolve(line.recipe, line.overrides)


# Recipes


def test_no_recipe():
    assert read("--lr", "1").recipe is None


def test_config_is_another_name_for_the_recipe():
    assert read("--config", "quickstart").recipe == "quickstart"
    assert read("quickstart", "--config", "quickstart").recipe == "quickstart"


def test_two_recipes(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("seed: 1\n")
    caught = error(str(other), "--config", "quickstart")
    assert caught.what == f"RECIPE is given twice: {other} and quickstart"


def test_two_recipes_in_a_row():
    caught = error("quickstart", "verify")
    assert "verify" in caught.what


# Errors


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--learnin-rate", "learning_rate"),
        ("--learning_rat=1", "learning_rate"),
        ("--nprocs", "nproc"),
        ("--no-4bits", "no_4bit"),
        ("-lr", "lr"),
    ],
)
def test_an_unknown_option_names_the_nearest(option, nearest):
    caught = error("quickstart", option, "1")
    assert caught.where == "command line"
    assert caught.fix == f"did you mean --{nearest}?"


def test_options_are_not_abbreviated():
    assert error("quickstart", "--learning", "1").what == "there is no option '--learning'"


def test_an_option_without_its_value():
    caught = error("quickstart", "--lr")
    assert caught.what == "--lr needs a value"
    assert caught.fix == "--learning_rate X: peak learning rate"


def test_node_flags_are_not_options_of_the_train_module():
    assert "--nproc" in error("quickstart", "--nproc", "2", launch=False).what


# Node flags


def test_node_flags_are_typed():
    line = read("--nproc=4", "--nnodes", "2", "--node-rank=0", "--rdzv-endpoint", "h:1", "--via=torchrun", "--print")
    assert line.options == LaunchOptions(
        nproc=4, nnodes=2, node_rank=0, rdzv_endpoint="h:1", via="torchrun", print=True
    )
    assert line.overrides == []


def test_node_flags_have_defaults():
    assert read().options == LaunchOptions(nproc=None, nnodes=1, node_rank=0, rdzv_endpoint=None, via=None, print=False)


@pytest.mark.parametrize(
    "flag, value", [("nproc", "0"), ("nproc", "two"), ("nproc", "1.5"), ("nnodes", "0"), ("node_rank", "first")]
)
def test_counts(flag, value):
    caught = error(f"--{flag}={value}")
    assert caught.what.startswith(f"{flag}: {value!r} is invalid: input should be ")
    assert (caught.where, caught.fix.split(": ")[0]) == (f"command line, --{flag}", f"{flag} is")


def test_via():
    assert "'python', 'accelerate', 'torchrun' or 'slurm'" in error("--via", "mpirun").what


# Help


def help_of(capsys, monkeypatch, *argv: str, model: type[Options] = TrainOptions, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        parse(argv, prog="manyrank train", launch=True, model=model)
    return capsys.readouterr().out


def sections(text: str) -> dict[str, list[str]]:
    """The names of the options of a help text by the titles of their groups."""
    parts = [part.splitlines() for part in text.split("\n\n")]
    return {
        part[0][:-1]: re.findall(r"^  --(\w+)", "\n".join(part), re.MULTILINE) for part in parts if part[0][-1] == ":"
    }


def test_every_key_stands_in_a_group():
    """A key is declared in one of the groups that TrainConfig is made of, and in no other place."""
    titles = {str(group.__doc__).split(":")[0].removesuffix(".") for group in TrainConfig.__bases__}
    assert all(issubclass(group, Keys) for group in TrainConfig.__bases__)
    assert len(titles) == len(TrainConfig.__bases__) == 9
    groups = {option.field: option.group for option in recipe_options()}
    assert {key: groups[key] for key in FIELDS if groups[key] not in titles} == {}
    assert {groups[key] for key in SWITCHES} == {"Short forms"}


@pytest.mark.parametrize(("model", "lines"), [(TrainOptions, 63), (GrpoOptions, 69)])
def test_help_begins_with_twenty_keys(capsys, monkeypatch, model, lines):
    text = help_of(capsys, monkeypatch, "my.yaml", "--help", model=model)
    shown = sections(text)
    assert sorted(sum(shown.values(), [])) == sorted([*model.first, "help"])
    assert len(model.first) == len(set(model.first)) == 20
    assert len(text.splitlines()) <= lines
    assert "--method full|lora|qlora|int8|fp8" in text and "(default: lora)" in " ".join(text.split())
    assert "(also --lr)" in text and "--help all " in text
    *_, last = text.split("\n\n")
    assert last == "\n".join(["Examples:", *(f"  {line}" for line in model.examples)]) + "\n"


@pytest.mark.parametrize("model", [TrainOptions, GrpoOptions])
def test_examples_of_the_help_are_read(model):
    for line in model.examples:
        _, command, *argv = shlex.split(line)
        assert command == model.__name__.removesuffix("Options").lower()
        assert read(*argv).recipe or given(read(*argv))


def test_a_help_is_in_groups(capsys, monkeypatch):
    shown = sections(help_of(capsys, monkeypatch, "--help", "all"))
    assert list(shown) == [
        *("The recipe", "Model and method", "Adapters", "Data", "What is learned", "Rewards and completions (GRPO)"),
        *("Batch and optimisation", "Precision, memory and speed", "Validation, saving and logging", "Where to run"),
        *("Short forms", "The job (--via slurm)", "Options", "Examples"),
    ]
    assert {"strategy", "nproc", "via"} <= set(shown["Where to run"]) and "beta" not in shown["Data"]
    assert sorted(shown["Short forms"]) == sorted(SWITCHES)


def test_help_is_without_what_is_slow():
    program = "import sys\nfrom manyrank import cli\ntry:\n    cli.main(['train', '--help'])\nfinally:\n"
    program += "    assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: manyrank train")


def test_the_whole_help_describes_every_key(capsys, monkeypatch):
    text = " ".join(help_of(capsys, monkeypatch, "my.yaml", "--lr", "1e-4", "--help", "all").split())
    for key, field in FIELDS.items():
        assert f" --{key} " in text
        assert " ".join(field.description.split()[:3]) in text
