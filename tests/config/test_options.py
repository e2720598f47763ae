"""The command line: yes/no options, lists, node flags, and what the train module is given."""

import pytest

from manyrank.config.args import LaunchOptions, parse
from manyrank.config.resolve import FIELDS, KNOWN, SWITCHES, resolve
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


def test_help_describes_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        read("my.yaml", "--lr", "1e-4", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for key, field in FIELDS.items():
        assert f" --{key} " in text
        assert " ".join(field.description.split()[:3]) in text
