"""Launch plans, compared word for word with tests/launch/golden/, and read by the launchers' own parsers.

After a change that is meant: `MANYRANK_UPDATE_GOLDEN=1 python -m pytest tests/launch/test_launcher.py`, then read the diff.
"""

import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ROOT

from manyrank import cli
from manyrank.config.args import LaunchOptions, parse
from manyrank.config.resolve import TrainConfig, resolve
from manyrank.errors import UserError
from manyrank.launch.command import (
    CPU_VARIABLES,
    LaunchPlan,
    before_imports,
    choose_output_dir,
    choose_strategy,
    plan_launch,
)
from manyrank.project_files import asset
from manyrank.topology import allocator
from manyrank.topology.gpus import Gpu, Hardware

GOLDEN = ROOT / "tests" / "launch" / "golden"
ROOT = asset()
CPU = Hardware(gpus=(), cpu_cores=16, cpu_bf16=False)
GPUS = Hardware(gpus=(Gpu("H100", 80 << 30, (9, 0)),) * 8, cpu_cores=96, cpu_bf16=False)
STRATEGIES = ("ddp", "fsdp", "fsdp_offload", "hsdp", "zero2", "zero3", "zero3_offload")
LAUNCHERS = ("accelerate", "torchrun")
SECOND_OF_TWO = ("--nproc", "4", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "node0:29500")

HALVES = ("--nproc", "4", "--hsdp-shard-size", "2")

# file, strategy, via, node flags, hardware. There is no `single` on two machines.
ONE = [
    (
        "one_machine.txt",
        strategy,
        via,
        HALVES if strategy == "hsdp" else ("--nproc", "2"),
        GPUS if strategy.endswith("offload") else CPU,
    )
    for strategy in STRATEGIES
    for via in LAUNCHERS
] + [("one_machine.txt", "single", via, ("--nproc", "1"), CPU) for via in ("python", *LAUNCHERS)]
TWO = [("two_machines.txt", strategy, via, SECOND_OF_TWO, GPUS) for strategy in STRATEGIES for via in LAUNCHERS]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The project's root as folder, and none of the variables that a plan would leave as the user has set them."""
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", allocator.NAME, allocator.OLD_NAME, *CPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def make(*argv: str, hardware: Hardware = CPU, folder: str = "output/run") -> LaunchPlan:
    line = parse(argv, prog="manyrank train", launch=True)
    strategy, nproc = choose_strategy(resolve(line.recipe, line.overrides).config, line.options, hardware)
    return plan_launch(line, strategy=strategy, nproc=nproc, output_dir=folder, hardware=hardware)


ALLOCATOR = {allocator.NAME: "expandable_segments:True"}


def test_segments_grow_on_gpus_alone():
    assert make("quickstart", "--nproc=2", hardware=GPUS).env.items() >= ALLOCATOR.items()
    assert allocator.NAME not in make("quickstart", "--nproc=2", hardware=CPU).env


@pytest.mark.parametrize("vllm, colocated", [("colocate", True), ("server", False), ("off", False)])
def test_segments_do_not_grow_beside_vllm(vllm, colocated):
    config = TrainConfig(model_name_or_path="m", data_path="d", task="grpo", use_vllm=vllm)
    assert config.expandable_segments is not colocated
    sft = config.model_copy(update={"task": "sft"})
    assert sft.expandable_segments


def test_the_users_own_allocator_stands(monkeypatch):
    monkeypatch.setenv(allocator.NAME, "max_split_size_mb:64")
    assert make("quickstart", "--nproc=2", hardware=GPUS).env[allocator.NAME] == "max_split_size_mb:64"
    before_imports(GPUS, expandable=True)
    assert os.environ[allocator.NAME] == "max_split_size_mb:64"
    monkeypatch.delenv(allocator.NAME)
    monkeypatch.setenv(allocator.OLD_NAME, "max_split_size_mb:64")
    assert allocator.NAME not in make("quickstart", "--nproc=2", hardware=GPUS).env
    before_imports(GPUS, expandable=True)
    assert allocator.NAME not in os.environ


def test_a_worker_of_any_launcher_sets_it_before_torch(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv(allocator.NAME, "")  # so that it is taken away again
    monkeypatch.delenv(allocator.NAME)
    before_imports(GPUS)
    assert allocator.NAME not in os.environ
    before_imports(GPUS, expandable=True)
    assert os.environ[allocator.NAME] == "expandable_segments:True"


def planned(case) -> LaunchPlan:
    _, strategy, via, flags, hardware = case
    return make(
        "quickstart", f"--strategy={strategy}", "--via", via, *flags, "--lr=1e-3", "--dry-run", hardware=hardware
    )


def title(case) -> str:
    _, strategy, via, _, hardware = case
    return f"{strategy}, {via}, {len(hardware.gpus)} GPUs and {hardware.cpu_cores} CPU cores on each machine"


def shown(case) -> str:
    made = planned(case)
    commands = "\n".join(f"# node {node}\n{made.command(node)}" for node in range(len(made.nodes)))
    text = commands.replace(shlex.quote(sys.executable), "python")
    return f"# {title(case)}\n# reads {', '.join(made.files)}\n{text}\n"


# Golden text


@pytest.mark.parametrize("cases", [ONE, TWO], ids=["one_machine", "two_machines"])
def test_golden(cases):
    file, text = GOLDEN / cases[0][0], "\n".join(shown(case) for case in cases)
    if os.environ.get("MANYRANK_UPDATE_GOLDEN") == "1":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["one_machine.txt", "two_machines.txt"])
def test_golden_files_name_no_folder_of_this_machine(file):
    text = (GOLDEN / file).read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert sys.prefix not in text


def golden(case, node: int | None = None) -> list[str]:
    """The command of a case (on its last machine), read back from its golden file, without the variables in front of it."""
    text = (GOLDEN / case[0]).read_text(encoding="utf-8")
    last = processes(case)[1] - 1 if node is None else node
    block = text.split(f"# {title(case)}\n")[1].split("\n\n")[0].split(f"# node {last}\n")[1].split("# node")[0]
    words = shlex.split(block.replace("\\\n", " "), comments=True)
    return words[next(index for index, word in enumerate(words) if "=" not in word) :]


def processes(case) -> tuple[int, int]:
    """Processes of a machine, and machines."""
    if case[0] == "two_machines.txt":
        return 4, 2
    return {"single": 1, "hsdp": 4}.get(case[1], 2), 1


@functools.cache
def accelerate_parser():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


@pytest.mark.parametrize("case", [case for case in ONE + TWO if case[2] == "accelerate"], ids=title)
def test_accelerate_understands_the_golden_commands(case):
    argv = golden(case)
    assert argv[:2] == ["accelerate", "launch"]
    args = accelerate_parser().parse_args(argv[2:])
    nproc, nnodes = processes(case)
    assert (args.num_processes, args.num_machines) == (nproc * nnodes, nnodes)
    assert args.config_file == f"accelerate_configs/{case[1]}.yaml"
    assert Path(args.config_file).is_file()
    assert args.deepspeed_config_file == (f"ds_configs/{case[1]}.json" if case[1].startswith("zero") else None)
    assert (args.module, args.training_script) == (True, "manyrank.train")
    assert args.training_script_args[0] == "quickstart"
    if nnodes == 2:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "node0", 29500)
        assert (args.rdzv_backend, args.rdzv_conf) == ("c10d", "join_timeout=600,is_host=false")


@pytest.mark.parametrize("case", [case for case in ONE + TWO if case[2] == "torchrun"], ids=title)
def test_torchrun_understands_the_golden_commands(case):
    from torch.distributed.run import get_args_parser

    argv = golden(case)
    assert argv[0] == "torchrun"
    args = get_args_parser().parse_args(argv[1:])
    nproc, nnodes = processes(case)
    assert (args.nproc_per_node, args.nnodes) == (str(nproc), str(nnodes))
    assert (args.module, args.training_script) == (True, "manyrank.train")
    assert f"--strategy={case[1]}" in args.training_script_args
    assert args.standalone is (nnodes == 1)
    if nnodes == 2:
        assert (args.node_rank, args.rdzv_backend, args.rdzv_endpoint) == (1, "c10d", "node0:29500")


@pytest.mark.parametrize("case", [case for case in TWO if case[2] == "torchrun"], ids=title)
def test_torch_takes_machine_0_as_the_one_with_the_store(case):
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
    from torch.distributed.run import get_args_parser

    def hosts(node: int) -> bool:
        args = get_args_parser().parse_args(golden(case, node)[1:])
        conf = _parse_rendezvous_config(args.rdzv_conf)
        found = RendezvousParameters("c10d", args.rdzv_endpoint, args.rdzv_id, 1, 2, **conf)
        assert found.get_as_int("join_timeout") == 600
        return found.get_as_bool("is_host")

    assert [hosts(0), hosts(1)] == [True, False]


@pytest.mark.parametrize("case", ONE + TWO, ids=title)
def test_the_train_module_understands_the_golden_commands(case):
    argv = golden(case)
    line = parse(argv[argv.index("manyrank.train") + 1 :], prog="manyrank.train", launch=False)
    config = resolve(line.recipe, line.overrides).config
    assert (line.recipe, config.strategy, config.output_dir) == ("quickstart", case[1], "output/run")
    assert (config.learning_rate, config.dry_run) == (1e-3, True)


# What is chosen


@pytest.mark.parametrize(
    "strategy, where, hardware, chosen",
    [
        (None, {}, CPU, ("single", 1)),
        (None, {}, Hardware(GPUS.gpus[:1], 4, False), ("single", 1)),
        (None, {}, GPUS, ("ddp", 8)),
        (None, {"nproc": 1}, GPUS, ("single", 1)),
        (None, {"nproc": 2}, CPU, ("ddp", 2)),
        (None, {"nnodes": 2}, CPU, ("ddp", 1)),
        ("single", {}, GPUS, ("single", 1)),
        ("single", {"nproc": 2}, GPUS, ("single", 2)),
        ("fsdp", {}, GPUS, ("fsdp", 8)),
        ("zero3", {"nproc": 2}, CPU, ("zero3", 2)),
        ("zero2", {"nproc": 1}, CPU, ("zero2", 1)),
    ],
)
def test_strategy_and_processes(strategy, where, hardware, chosen):
    line = parse(["quickstart", *([f"--strategy={strategy}"] if strategy else [])], prog="", launch=True)
    config = resolve(line.recipe, line.overrides).config
    strategy, nproc = choose_strategy(config, LaunchOptions(**where), hardware)
    assert (strategy.name, nproc) == chosen


def test_several_processes_without_gpus_need_a_number():
    with pytest.raises(UserError) as caught:
        make("quickstart", "--strategy", "fsdp")
    assert caught.value.fix == "say how many processes: --nproc 2"


@pytest.mark.parametrize(
    "argv, launcher",
    [
        ([], sys.executable),
        (["--nproc=2"], "accelerate"),
        (["--via=accelerate"], "accelerate"),
        (["--via=torchrun"], "torchrun"),
        (["--strategy=zero2", "--nproc=1"], "accelerate"),
    ],
)
def test_the_launcher_that_is_used(argv, launcher):
    assert make("quickstart", *argv).argv[0] == launcher


@pytest.mark.parametrize("argv", [["--nproc=2"], ["--strategy=ddp", "--nproc=1"]])
def test_python_starts_one_process(argv):
    with pytest.raises(UserError, match="one process"):
        make("quickstart", "--via=python", *argv)


def test_several_machines_need_an_endpoint():
    with pytest.raises(UserError) as caught:
        make("quickstart", "--nproc=2", "--nnodes=2")
    assert caught.value.fix == "give HOST:PORT of machine 0, as in --rdzv_endpoint first:29500"


# Environment and files


def test_variables_that_the_user_has_set_stand(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert make("quickstart", "--nproc=2").env["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert make("quickstart", "--nproc=2").env["OMP_NUM_THREADS"] == "8"


def test_more_processes_than_cores_have_one_thread_each():
    assert make("quickstart", "--nproc=32").env["OMP_NUM_THREADS"] == "1"


def test_cpu_variables_are_set_where_there_is_no_gpu():
    assert set(make("quickstart").env) == {"OMP_NUM_THREADS", *CPU_VARIABLES}
    assert set(make("quickstart", hardware=GPUS).env) == {"OMP_NUM_THREADS", allocator.NAME}


def test_files_are_whole_paths_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = make("quickstart", "--strategy=zero3", "--nproc=2").files
    assert [Path(file).name for file in files] == ["zero3.yaml", "zero3.json"]
    assert all(Path(file).is_file() for file in files)


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_every_strategy_has_its_file(strategy):
    files = make("quickstart", f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}").files
    assert len(files) == (2 if strategy.startswith("zero") else 1)
    assert all(Path(file).is_file() for file in files)


# What --print shows


def test_every_machine_and_every_file_is_shown():
    launch = make("quickstart", "--strategy=zero3", *SECOND_OF_TWO, hardware=GPUS)
    first, second, *files = launch.text().split("\n# ")
    assert first.startswith("# node 0\n") and " --machine_rank 0 " in first
    assert second.startswith("node 1\n") and " --machine_rank 1 " in second
    assert second.split("\n", 1)[1] == launch.command(1) + "\n" and launch.command(1).endswith(f"\n{launch}")
    names = ["accelerate_configs/zero3.yaml", "ds_configs/zero3.json"]
    assert "\n# ".join(files) == "\n".join(f"# file {n}\n{(ROOT / n).read_text()}" for n in names).removeprefix("# ")


def test_a_plan_for_hundreds_of_machines_fits_into_a_variable():
    launch = make("quickstart", "--nnodes=1000", "--nproc=8", "--rdzv-endpoint=node0:29500", hardware=GPUS)
    assert len(launch.packed()) < 128 << 10
    assert LaunchPlan.unpacked(launch.packed()) == launch


# The run's folder


@pytest.mark.parametrize(
    "argv, folder",
    [
        (["quickstart"], "output/quickstart-3"),
        (["--model=embedded", "--train-data=data/sample.jsonl"], "output/run"),
        (["quickstart", "--output-dir=mine"], "mine"),
        (["quickstart", "--overwrite_output_dir"], "output/quickstart"),
        (["quickstart", "--resume-from=output/other/checkpoint-5"], "output/other"),
        (["quickstart", "--resume-from=auto"], "output/quickstart-2"),
        (["quickstart", "--nnodes=2"], "output/quickstart"),
        (["quickstart", "--resume-from=latest"], "output/other"),
    ],
)
def test_output_dir(tmp_path, monkeypatch, argv, folder):
    monkeypatch.chdir(tmp_path)
    for taken in ("quickstart", "quickstart-2"):
        (tmp_path / "output" / taken).mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "output" / "other" / "checkpoint-5")
    line = parse(argv, prog="", launch=True)
    assert choose_output_dir(resolve(line.recipe, line.overrides).config, line) in (folder, str(tmp_path / folder))


def test_a_folder_that_is_taken_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    assert cli.main(["train", "quickstart", "--check"]) == 0
    shown = capsys.readouterr().out
    assert "output/quickstart is taken: this run goes to output/quickstart-2 (--resume_from_checkpoint auto" in shown
    assert shown.endswith("without --check it starts\n")
    for argv in (["--output_dir", "mine"], ["--resume_from_checkpoint", "auto"], ["--run_name", "x", "--nnodes=1"]):
        assert cli.main(["train", "quickstart", "--check", *argv]) == 0
        assert ("is taken" in capsys.readouterr().out) == (argv[0] == "--run_name")


# What is shown is what runs


def launched(launch: LaunchPlan) -> subprocess.CompletedProcess:
    program = (
        f"import sys\nfrom manyrank.launch.command import LaunchPlan, run_launch\nsys.exit(run_launch({launch!r}))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def worker(folder: Path, end: str) -> str:
    """A train module that writes what it was given, and ends as it is told."""
    script = folder / "worker.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "given = {'argv': sys.argv[1:], 'omp': os.environ['OMP_NUM_THREADS'], 'plan': os.environ['MANYRANK_LAUNCH']}\n"
        f"open({str(folder / 'given.json')!r}, 'w').write(json.dumps(given))\n"
        f"{end}\n"
    )
    return str(script)


@pytest.mark.parametrize(
    "head, end, code",
    [
        ([sys.executable], "sys.exit(75)", 75),
        ([sys.executable], "", 0),
        (["torchrun", "--standalone", "--nproc_per_node", "1"], "sys.exit(75)", 75),
        (["torchrun", "--standalone", "--nproc_per_node", "1"], "os.kill(os.getpid(), signal.SIGKILL)", 137),
        (
            ["accelerate", "launch", "--config_file", "accelerate_configs/single.yaml", "--num_processes", "1"],
            "sys.exit(2)",
            2,
        ),
    ],
)
def test_the_worker_s_exit_code_is_ours(tmp_path, head, end, code):
    nodes = ((*head, worker(tmp_path, end), "--seed=1"),)
    launch = LaunchPlan(nodes=nodes, env={"OMP_NUM_THREADS": "3"}, files={"f": "content\n"})
    done = launched(launch)
    given = json.loads((tmp_path / "given.json").read_text())
    assert (given["argv"], given["omp"]) == (["--seed=1"], "3")
    assert LaunchPlan.unpacked(given["plan"]) == launch
    assert done.returncode == code, done.stderr
