"""Jobs for SLURM and Kubernetes: the script word for word, and what a machine of a job does when it runs it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from launches import ROOT

from manyrank import cli
from manyrank.config.args import parse
from manyrank.errors import EXIT_PREEMPTED, EXIT_USER
from manyrank.launch import slurm
from manyrank.launch.command import CPU_VARIABLES

GOLDEN = ROOT / "tests" / "launch" / "golden"
SLURM = ("--via=slurm", "--time=1-12:00:00", "--partition=gpu", "--account=lab")
TWO = ("--strategy=zero3", "--nproc=4", "--nnodes=2", "--cpus=32", "--lr=1e-3", "--output_dir=output/My_run.1")
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", *CPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def prepare(*argv: str, recipe: str = "quickstart") -> slurm.Job:
    return slurm.prepare(parse([recipe, *argv], prog="", launch=True))


def train(*argv: str, recipe: str = "verify", cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "manyrank.cli", "train", recipe, *argv]
    return warm.run(command, cwd=cwd, env={**os.environ, **env})


# SLURM


def test_golden():
    text = prepare(*TWO, *SLURM).text().replace(shlex.quote(sys.executable), "python").replace(str(ROOT), "/project")
    if os.environ.get("MANYRANK_UPDATE_GOLDEN") == "1":
        (GOLDEN / "slurm.txt").write_text(text, encoding="utf-8")
    assert text == (GOLDEN / "slurm.txt").read_text(encoding="utf-8")
    assert sys.prefix not in text


def test_what_is_shown_is_what_is_written(tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["train", "quickstart", "--nproc=2", f"--output_dir={folder}", *SLURM]
    assert cli.main([*argv, "--print"]) == 0
    shown = capsys.readouterr().out
    assert cli.main([*argv, "--check"]) == 0 and not folder.exists()
    capsys.readouterr()
    assert cli.main(argv) == 0
    (job,) = (folder / "launch").iterdir()
    assert shown.split(f"# file {job}\n")[1].split("\n# submit\n")[0] == job.read_text()
    assert capsys.readouterr().out.splitlines()[1] == "submit:  " + shown.rstrip().splitlines()[-1]
    assert cli.main(argv) == 0, "what was written is no other run"


def test_the_body_is_that_of_the_script_by_hand():
    made, by_hand = prepare(*TWO, *SLURM).content, (ROOT / "launch" / "slurm.sbatch").read_text()
    assert by_hand.count(slurm.BODY) == 1
    body = by_hand[by_hand.index(slurm.BODY) :]
    assert "scontrol requeue" in body and made.endswith("\n\n" + body)


def launch_of(made: slurm.Job, endpoint: str = "") -> str:
    """What a job shows of its machines, where the cluster has said at which endpoint they meet."""
    return made.text().split(f"\n# file {made.file}\n")[0].replace('"$ENDPOINT"', endpoint)


def test_a_machine_of_a_slurm_job_runs_what_is_shown(tmp_path):
    """The script itself, with an srun for two machines, on which `manyrank train` only shows what it would run."""
    tools = {
        "scontrol": "echo first; echo second",
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    asked = ("--nproc=2", "--nnodes=2", "--gpus=0", "--cpus=6", "--max_restarts=1", "--run_name=a $(b) c")
    made = prepare("--via=slurm", f"--output_dir={tmp_path / 'the run'}", *asked)
    place = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **place}
    script = made.content.replace(" train quickstart ", " train quickstart --print ")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 2 * launch_of(made, "first:29542")
    assert "OMP_NUM_THREADS=3 " in done.stdout and "--max_restarts 1" in done.stdout


def options(script: str) -> dict[str, str]:
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def test_what_a_slurm_job_asks_for():
    found = options(prepare("--via=slurm", "--nproc=4", "--gpus=8", "--output_dir=output/50% off").content)
    assert found["nodes"] == "1" and found["gpus-per-node"] == "8" and found["cpus-per-task"] == "4"
    assert found["output"] == "output/50%% off/launch/job-%j.log" and found["chdir"] == str(ROOT)
    assert found["signal"] == "USR1@120" and found["job-name"] == "50-off" and "requeue" in found
    assert "time" not in found and "gpus-per-node" not in options(
        prepare("--via=slurm", "--gpus=0", "--nproc=2", "--output_dir=output/no-gpu").content
    )


# Kubernetes


def pod(number: int) -> list[str]:
    """The command of a pod of launch/kubernetes.yaml, edited as its comments say; Kubernetes makes one $ of two."""
    text = (ROOT / "launch" / "kubernetes.yaml").read_text()
    for name, value in (("RUN", "a-run"), ("RECIPE.yaml", "verify"), ("IMAGE", "example.org/a:1"), ("CLAIM", "data")):
        text = re.sub(rf"\b{re.escape(name)}\b", value, text)
    service, job = yaml.safe_load_all(text)
    spec, template = job["spec"], job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == service["spec"]["selector"]["job-name"] == template["subdomain"] == "a-run"
    assert spec["completions"] == spec["parallelism"] == 2 and spec["completionMode"] == "Indexed"
    (container,) = template["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in template["volumes"]}
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [EXIT_USER]), ("Ignore", [EXIT_PREEMPTED]), ("Ignore", None)]
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_pod_runs_one_machine_of_the_run(number, tmp_path):
    argv = [word.replace("/workspace", str(tmp_path)) for word in pod(number)]
    argv[2] = argv[2].replace("--nproc 8", "--nproc 2 --print")
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(number)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = done.stdout.split(f"# node {number}\n")[1]
    assert f"--node_rank {number} " in command and "--rdzv_endpoint a-run-0.a-run:29500" in command
    assert "--strategy=fsdp --output_dir=output/a-run --save_steps=50 --resume_from_checkpoint=auto" in command


# Handing it in


def tool(folder: Path, name: str, body: str) -> dict[str, str]:
    """A program called `name` that notes its arguments; the environment that finds it."""
    (folder / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {folder}/argv\n{body}\n')
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_sbatch_is_called_and_the_job_remembered(tmp_path):
    folder = tmp_path / "run"
    argv = ("--via=slurm", "--nproc=2", f"--output_dir={folder}", "--submit")
    env = tool(tmp_path, "sbatch", "echo '42;cluster'")
    done = train(*argv, **env)
    assert done.stdout.splitlines()[-1] == "SLURM job 42", done.stderr
    assert (tmp_path / "argv").read_text().splitlines() == ["--parsable", str(folder / "launch" / "job.sbatch")]
    again = train(*argv, **env)
    assert again.returncode == 2 and f"the output folder {folder} belongs to SLURM job 42" in again.stderr
    assert train(*argv, "--resume_from_checkpoint=auto", **env).returncode == 0
    refused = train(
        *argv[:-2],
        f"--output_dir={tmp_path / 'other'}",
        "--submit",
        **tool(tmp_path, "sbatch", "echo no such partition >&2; exit 1"),
    )
    assert refused.returncode == 2 and "error: the job was not taken: no such partition" in refused.stderr
    assert not (tmp_path / "other" / "launch" / "submitted").exists()


# What is wrong


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run `manyrank train` on bad input in an empty folder; returns what is wrong."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        assert cli.main(["train", "quickstart", *argv]) == 2
        printed = capsys.readouterr()
        kinds = [line.partition(":")[0] for line in printed.err.splitlines()]
        assert [kind for kind in kinds if kind != "why"] == ["error", "where", "fix"] and printed.out == ""
        assert list(tmp_path.iterdir()) == [], "nothing is written"
        return printed.err.splitlines()[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--via=slurm"], "--via slurm does not know the machines of the job"),
        (
            ["--via=kubernetes", "--nproc=2"],
            "via: 'kubernetes' is invalid: input should be 'python', 'accelerate', 'torchrun' or 'slurm'",
        ),
        (["--nproc=2", "--partition=p"], "--partition is for --via slurm"),
        (["--via=torchrun", "--submit"], "--submit is for --via slurm"),
        (["--via=slurm", "--nproc=2", "--partition="], "partition: '' is invalid: not a name"),
        (["--via=slurm", "--nproc=2", "--account=a\nb"], "account: 'a\\nb' is invalid: not a name"),
        (["--via=slurm", "--nproc=2", "--cpus=0"], "cpus: '0' is invalid: input should be greater than 0"),
        (["--via=slurm", "--nproc=2", "--print", "--submit"], "--print and --submit"),
        (["--via=slurm", "--nproc=2", "--nnodes=2", "--node_rank=1"], "node_rank or rdzv_endpoint with --via slurm"),
        (["--via=slurm", "--nproc=4", "--gpus=2"], "4 processes on a machine with 2 GPUs"),
        (["--via=slurm", "--nproc=2", "--strategy=single"], "strategy single with 2 processes"),
        (["--via=slurm", "--nproc=2", "--data_path=none.jsonl"], "there is no file none.jsonl"),
        (
            ["--via=slurm", "--nproc=2", "--resume_from=output/a/checkpoint-5"],
            "a job resumes by itself, and not from output/a/checkpoint-5: queued again it would lose what it has trained since",
        ),
        (["--via=slurm", "--nproc=2", "--elastic", "--global_batch_size=8"], "elastic on one machine"),
    ],
)
def test_refused(refused, flags, error):
    assert refused(*flags) == error


def test_without_sbatch_a_job_can_be_shown_and_written_but_not_submitted(refused, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("--via=slurm", "--nproc=2", "--submit") == "there is no sbatch on this machine"
    job = tmp_path / "output" / "quickstart" / "launch" / "job.sbatch"
    argv = ["train", "quickstart", "--via=slurm", "--nproc=2"]
    assert cli.main([*argv, "--print"]) == 0 and not job.exists()
    shown = capsys.readouterr().out
    assert cli.main(argv) == 0 and job.read_text() in shown


def test_a_job_does_not_write_among_another_run_s_files(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert cli.main(["train", "quickstart", "--via=slurm", "--nproc=2", f"--output_dir={tmp_path}"]) == 2
    assert f"the output folder {tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
