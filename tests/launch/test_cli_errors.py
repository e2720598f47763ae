"""Bad input ends with exit code 2 and three lines, before anything starts or is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from manyrank import __version__, cli
from manyrank.project_files import asset
from manyrank.topology import gpus
from manyrank.topology.gpus import Gpu, Hardware
from manyrank.topology.ranks import Topology
from manyrank.training.exits import run_with_exit_codes

DATA = str(asset("data", "sample.jsonl"))
CPU = Hardware(gpus=(), cpu_cores=4, cpu_bf16=False)
GPUS = Hardware(gpus=(Gpu("V100", 32 << 30, (7, 0)),) * 2, cpu_cores=8, cpu_bf16=False)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty folder on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpus, "probe", lambda: CPU)


@pytest.fixture
def refused(capsys, tmp_path):
    """Run `manyrank train` on bad input; returns its lines as (error, where, fix), without the reason."""

    def run(*argv: str) -> tuple[str, str, str]:
        before = sorted(tmp_path.rglob("*"))
        code = cli.main(["train", "--print", *argv])  # a plan that passes by mistake must not start
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        error = printed.err[printed.err.index("error: ") :]  # warnings come first
        lines = [line for line in error.splitlines() if not line.startswith("why: ")]
        assert [line.split(" ")[0] for line in lines] == ["error:", "where:", "fix:"], printed.err
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
        return tuple(line.split(" ", 1)[1].strip() for line in lines)

    return run


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def model_folder(*names: str) -> str:
    Path("model").mkdir()
    for name in names:
        write(f"model/{name}", "{}")
    return "model"


# Options


@pytest.mark.parametrize(
    "argv, error, fix",
    [
        (["--learnin-rate", "1"], "there is no option '--learnin_rate'", "did you mean --learning_rate?"),
        (["--use-4bits"], "there is no option '--use_4bits'", "did you mean --use_4bit?"),
        (["--zzzzqqqq=1"], "there is no option '--zzzzqqqq'", "`--help all` lists every option"),
        (["--lr"], "--lr needs a value", "--learning_rate X: peak learning rate"),
    ],
)
def test_options(refused, argv, error, fix):
    assert refused("quickstart", *argv) == (error, "command line", fix)


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", "fast"),
        ("lora_r", "0"),
        ("strategy", "zero4"),
        ("format_type", "csv"),
        ("method", "lorra"),
        ("nproc", "two"),
        ("via", "mpirun"),
    ],
)
def test_values(refused, key, value):
    error, where, fix = refused("quickstart", f"--{key}={value}")
    assert error.startswith(f"{key}: {value!r} is invalid: ")
    assert where == f"command line, --{key}"
    assert fix.startswith("write lora, the default" if key == "method" else f"{key} is: ")


def test_choices_are_listed(refused):
    assert " fsdp, " in refused("quickstart", "--strategy", "fsdpp")[0]
    assert "alpaca," in refused("quickstart", "--format-type", "alpacca")[0]


def test_contradicting_options(refused):
    error, where, _ = refused("quickstart", "--use-4bit", "--no-lora")
    assert error == "these contradict each other: --use_4bit=true against --no_lora=true"
    assert where == "command line, --use_4bit; command line, --no_lora"


def test_nothing_given(refused):
    assert refused()[0] == "model_name_or_path and data_path must be given"


# Recipes


@pytest.mark.parametrize("argv", [["quikstart"], ["--config", "quikstart"]])
def test_a_preset_that_is_not_there(refused, argv):
    error, _, fix = refused(*argv)
    assert error == "there is no recipe 'quikstart'"
    assert fix.startswith("did you mean quickstart?")


def test_a_recipe_file_that_is_not_there(refused):
    assert refused("mine.yaml")[0] == "there is no file mine.yaml"


@pytest.mark.parametrize(
    "text, error, where",
    [
        ("a: [1", "not valid YAML: ", "mine.yaml"),
        ("", "expected a YAML mapping of `key: value` lines", "mine.yaml"),
        ("lora_rnk: 4", "there is no option 'lora_rnk'", "mine.yaml, lora_rnk"),
        ("lora_r: four\nmodel: embedded\ndata_path: x", "lora_r: 'four' is invalid: ", "mine.yaml, lora_r"),
    ],
)
def test_recipes(refused, text, error, where):
    found = refused(write("mine.yaml", text))
    assert found[0].startswith(error)
    assert found[1] == where


# Data


def test_a_data_file_that_is_not_there(refused):
    error, where, _ = refused("quickstart", "--data-path", "nowhere.jsonl")
    assert (error, where) == ("there is no file nowhere.jsonl", "data_path or eval_data_path")


@pytest.mark.parametrize(
    "text, error, where",
    [
        (
            '\n{"question" "q"}\n',
            "1 of the first 1",
            "rows.jsonl, line 2: broken JSON: Expecting ':' delimiter (column 13)",
        ),
        ('[\n{"question": "q",\n "answer"}]', "broken JSON: ", "rows.jsonl, line 3, column 10"),
        ('{"question": "q", "answer": ""}\n', "1 of the first 1", "rows.jsonl, line 1: 'answer' is empty"),
        ('{"question": "q"}\n', "no format has the keys ['question']", "rows.jsonl, line 1"),
        ("", "there are no rows in it", "rows.jsonl"),
        ("7\n", "1 of the first 1", "rows.jsonl, line 1: a row is int, not an object"),
    ],
)
def test_data(refused, text, error, where):
    found = refused("quickstart", "--data-path", write("rows.jsonl", text))
    assert found[0].startswith(error)
    assert found[1] == where


def test_a_first_row_without_its_answer(refused):
    path = write("rows.jsonl", '{"question": "q"}\n')
    error, where, _ = refused("quickstart", "--data-path", path, "--format-type", "question_answer")
    assert error == "1 of the first 1 rows cannot be used (1 missing field)"
    assert where == "rows.jsonl, line 1: 'answer' is missing"


# Where it runs


def test_a_batch_that_does_not_divide(refused):
    error, where, fix = refused("quickstart", "--nproc=2", "--global-batch-size=5", "--packing=none")
    assert error == "a global batch of 5 examples does not divide into 2 processes x 8 padded rows"
    assert where.startswith("global_batch_size (command line, --global_batch_size), per_device_train_batch_size (")
    assert fix == "choose a multiple"


def test_more_processes_than_gpus(refused, monkeypatch):
    monkeypatch.setattr(gpus, "probe", lambda: GPUS)
    error, _, fix = refused("quickstart", "--nproc=3")
    assert error == "3 processes on a machine with 2 GPUs"
    assert "--nproc" in fix


@pytest.mark.parametrize("found", [CPU, GPUS], ids=["CPU", "GPU"])
def test_bf16_where_it_is_not_supported(refused, monkeypatch, found):
    monkeypatch.setattr(gpus, "probe", lambda: found)
    error, where, fix = refused("quickstart", "--bf16")
    assert (error, where) == ("bf16 is not supported by this machine", "bf16 (command line, --bf16)")
    assert fix == "set bf16: false, or fp16: true on GPUs"


def test_several_processes_without_gpus_need_a_number(refused):
    assert refused("quickstart", "--strategy=fsdp")[2] == "say how many processes: --nproc 2"


def test_single_with_two_processes(refused):
    assert refused("quickstart", "--strategy=single", "--nproc=2")[0] == "strategy single with 2 processes"


def test_two_machines_without_an_endpoint(refused):
    assert refused("quickstart", "--nproc=2", "--nnodes=2")[1] == "command line, --rdzv_endpoint"


def test_an_output_folder_that_is_not_empty(refused):
    Path("mine").mkdir()
    write("mine/notes.txt", "")
    error, where, fix = refused("quickstart", "--output-dir", "mine")
    assert (error, where) == ("the output folder mine is not empty, and holds no run: notes.txt", "output_dir")
    assert fix == "choose another --output_dir"


# Models


@pytest.mark.parametrize(
    "names, error",
    [
        (["config.json", "tokenizer_config.json", "model.safetensors"], "the tokenizer has no chat template"),
        (["config.json", "chat_template.jinja"], "model has no weights"),
        (["chat_template.jinja", "model.safetensors"], "model has no config.json"),
    ],
)
def test_model_folders(refused, names, error):
    found = refused("--data-path", DATA, "--model", model_folder(*names))
    assert found[0] == error
    assert found[1] == "model_name_or_path (command line, --model)"


# Whole processes


def command(*argv: str, module: str = "manyrank.cli") -> subprocess.CompletedProcess:
    return warm.run([sys.executable, "-m", module, *argv])


@pytest.mark.parametrize("module, first", [("manyrank.cli", ["train"]), ("manyrank.train", [])])
def test_a_process_ends_with_2_and_three_lines(module, first):
    done = command(*first, "quickstart", "--learnin-rate=1", "--output-dir=mine", module=module)
    assert done.returncode == 2
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == ["error:", "where:", "fix:"]
    assert "Traceback" not in done.stderr + done.stdout
    assert not Path("mine").exists()


def test_data_errors_come_before_the_launch():
    path = write("rows.jsonl", '{"question": "q", "answer": ""}\n')
    done = command("train", "quickstart", "--data-path", path, "--nproc=1", "--output-dir=mine")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: 1 of the first 1 rows cannot be used (1 empty field)"
    assert done.stdout == ""
    assert not Path("mine").exists()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--version"]])
def test_help_imports_nothing_slow(argv):
    program = (
        "import json, sys\nfrom manyrank import cli\n"
        f"code = cli.main({argv})\n"
        "print(json.dumps([code, [name for name in ('torch', 'pydantic', 'yaml') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *text, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []]
    if argv == ["--version"]:
        assert text == [f"manyrank {__version__}"]
    else:
        assert all(any(name in line for line in text) for name in cli.COMMANDS)


def test_an_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.splitlines()[2] == "fix:   did you mean train?"


@pytest.mark.parametrize("argv", [["quickstart"], ["quickstart", "--nproc=2", "--via=torchrun"]])
def test_print_shows_the_plan_and_starts_nothing(capsys, tmp_path, argv):
    assert cli.main(["train", "--print", *argv]) == 0
    printed = capsys.readouterr()
    assert "-m manyrank.train quickstart" in printed.out
    assert "--output_dir=output/quickstart" in printed.out
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []


# What people type first


@pytest.mark.parametrize(
    "line, shown",
    [
        ("my.yaml --check --lr 1e-4", "manyrank.train my.yaml --lr=1e-4"),
        ("train --model embedded --data my.jsonl --check", "manyrank.train --model=embedded --data_path=my.jsonl"),
        ("plan Qwen2.5-7B --gpu L4", "Qwen2.5-7B: 7.62 B parameters"),
        ("plan ./model/config.json --gpu L4", "./model/config.json: "),
    ],
)
def test_first_words_that_work(capsys, line, shown):
    write("my.jsonl", '{"question": "q", "answer": "a"}\n')
    write("my.yaml", "model: embedded\ndata_path: my.jsonl\n")
    config = json.loads(asset("data", "architectures.json").read_text())["qwen2.5-0.5b"]
    write(f"{model_folder()}/config.json", json.dumps(config))
    assert cli.main(line.split()) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, error, fix",
    [
        ("plan", "there is nothing to plan", "manyrank plan Qwen2.5-7B"),
        ("nope.yaml", "there is no file nope.yaml", "presets: "),
        ("train --model my/model", "data_path must be given", "--model_name_or_path=my/model --data_path="),
        ("plan quikstart", "there is no recipe or model 'quikstart'", "did you mean quickstart?"),
        ("plan qwen2.5-8b", "there is no recipe or model 'qwen2.5-8b'", "qwen2.5-7b"),
        ("data inspect nope.jsonl", "there is no file nope.jsonl", "check the path"),
        ("merge org/name --output_dir X", "there is no adapter to merge", "name a run"),
        ("merge", "NAME must be given", "usage: manyrank merge NAME"),
        ("merge a b", "one word too many: 'b' in 'a b'", "usage: manyrank merge NAME"),
        ("generate a in.txt a.jsonl --output_dir b", "OUTPUT is given twice: a.jsonl and b", "keep one of them"),
    ],
)
def test_first_words_that_are_answered(capsys, line, error, fix):
    assert cli.main(line.split()) == 2
    what, _, last = capsys.readouterr().err.splitlines()[-3:]
    assert what == f"error: {error}" and fix in last


@pytest.mark.parametrize(
    ("line", "error", "fix"),
    [
        ("plan quickstart --check", "a plan starts nothing", "leave --check out"),
        ("data inspect", "there is nothing to inspect", "manyrank data inspect data/sample.jsonl"),
        ("my.jsonl", "my.jsonl is a file of data, not a recipe", "manyrank train --model NAME --data my.jsonl"),
        ("train my.jsonl", "my.jsonl is a file of data, not a recipe", "manyrank data inspect my.jsonl"),
        ("data prepare my.jsonl", "my.jsonl is a file of data, not a recipe", "--data_path my.jsonl"),
        ("plan my.jsonl", "my.jsonl is a file of data, not a recipe", "--data_path my.jsonl"),
        ("none.csv.gz", "there is no file none.csv.gz", "--data none.csv.gz"),
        ("none.yaml", "there is no file none.yaml", "presets: "),
        (f"train {'a' * 5000}", "a name is too long for a file", "give a shorter name"),
        ("train quickstart --resume_from_checkpoint nowhere", "there is no folder nowhere", "or auto"),
        ("train quickstart --resume_from_checkpoint .", ". is not a complete checkpoint", "or auto"),
        ("train rows.json", "expected a YAML mapping of `key: value` lines", "--data_path rows.json"),
        ("train quickstart --strategy fspd", "did you mean fsdp?", "one of auto, single"),
        ("train -lr 1e-4", "there is no option '-lr'", "did you mean --lr?"),
        ("train quickstart --run_name -my", "--run_name needs a value", "write --run_name=-my"),
        ("verify --methods=", "--methods is empty", "give a value"),
        ("verify --methods []", "methods: '[]' is invalid", "methods"),
        ("generate embedded in.txt --output_dir=", "--output_dir is empty", "give a value"),
        ("evaluate embedded --metrics=", "--metrics is empty", "give a value"),
        ("merge run --output a --output_dir b", "--output PATH is given twice: a and b", "keep one of them"),
        ("report run --output a.html --output_dir b", "--output and --output_dir name two pages", "keep one of them"),
        ("doctor quickstart --check", "--check", "leave it out"),
        ("train quickstart --save_steps often", "save_steps: 'often' is invalid", "steps between checkpoints"),
        ("train --save_steps often", "save_steps: 'often' is invalid", "steps between checkpoints"),
        ("train quickstart --save_steps -3", "save_steps: '-3' is invalid", "steps between checkpoints"),
        ("train quickstart --save_steps", "--save_steps needs a value", "steps between checkpoints"),
        (
            "train quickstart --gradient_checkpointing -3",
            "gradient_checkpointing: '-3' is invalid",
            "the first N layers",
        ),
        ("train quickstart --gradient_checkpointing 0.5", "gradient_checkpointing: '0.5' is invalid", "first N layers"),
        ("train quickstart --use_vllm some", "--use_vllm: 'some' is none of its values", "off|colocate|server"),
        ("train quickstart --dry_run maybe", "--dry_run: 'maybe' is none of its values", "one step forward"),
        ("train quickstart --dry_run no more", "one word too many: 'more'", "usage: manyrank train"),
    ],
)
def test_slips_are_answered(capsys, line, error, fix):
    write("my.jsonl", '{"question": "q", "answer": "a"}\n')
    write("rows.json", '[{"question": "q", "answer": "a"}]')
    assert cli.main(line.split()) == 2
    what, _, last = capsys.readouterr().err.splitlines()[-3:]
    assert error in what and fix in last


@pytest.mark.parametrize(
    "line",
    [
        "train quickstart --output_dir /proc/out",
        "generate embedded in.txt /proc/out",
        "generate embedded in.txt /proc/out.jsonl",
        "evaluate embedded --data my.jsonl --output /proc/out",
        "merge adapter --output /proc/out",
        "data inspect my.jsonl --html /proc/out.html",
        "init /proc/out.yaml --model embedded --data my.jsonl",
        "files copy launch /proc/out",
        "train quickstart --nproc 1 --via slurm --output_dir /proc/out",
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(capsys, line):
    """In /proc nobody can make a file, whatever its mode says."""
    write("my.jsonl", '{"question": "q", "answer": "a"}\n')
    Path("adapter").mkdir()
    write("adapter/adapter_config.json", '{"base_model_name_or_path": "embedded"}')
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr()
    what, where, fix = printed.err.splitlines()[-3:]
    assert what.startswith("error: /proc/out") and " cannot be written: " in what and not printed.out
    assert where.startswith("where: ") and fix.startswith("fix:   ")


def test_a_worker_answers_a_long_name_too_and_no_other_error_of_the_system(capsys):
    place = Topology(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert run_with_exit_codes(Path("a" * 5000).stat, place) == 2
    assert "a name is too long for a file: aaa" in capsys.readouterr().err
    assert run_with_exit_codes(Path("nothing-here").stat, place) == 1
    assert "FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS, *cli.MODULES}))
def test_every_command_has_a_help(capsys, name):
    if name in cli.GROUPS:
        assert cli.main([name, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*name.split(), "--help"])
        assert capsys.readouterr().out.startswith(f"usage: manyrank {name}")
