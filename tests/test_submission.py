"""Jobs for SLURM and Kubernetes: their files word for word, and what a machine of them does when it runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from conftest import ROOT, Run

from manyrank import cli
from manyrank.config.args import parse
from manyrank.launch import kubernetes, submission
from manyrank.launch.command import CPU_VARIABLES
from manyrank.project_files import asset

GOLDEN = Path(__file__).parent / "golden"
SLURM = ("--via=slurm", "--time=1-12:00:00", "--partition=gpu", "--account=lab", "--grace=300")
POD = ("--via=kubernetes", "--image=example.org/manyrank:1", "--pvc=shared", "--namespace=lab")
TWO = ("--strategy=zero3", "--nproc=4", "--nnodes=2", "--cpus=32", "--lr=1e-3", "--output_dir=output/My_run.1")
CPU_RUN = ("--gpus=0", "--max_steps=6", "--logging_steps=1", "--save_steps=3")
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", *CPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def prepare(*argv: str, recipe: str = "quickstart") -> submission.Submission:
    return submission.prepare(parse([recipe, *argv], prog="", launch=True))


def documents(made: submission.Submission) -> list[dict]:
    return list(yaml.safe_load_all(made.content))


def train(*argv: str, recipe: str = "verify", cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "manyrank.cli", "train", recipe, *argv]
    return warm.run(command, cwd=cwd, env={**os.environ, **env})


# Golden text


@pytest.mark.parametrize(
    "file, flags", [("slurm.txt", SLURM), ("kubernetes.txt", POD), ("trainjob.txt", (*POD, "--k8s_kind=trainjob"))]
)
def test_golden(file, flags):
    text = prepare(*TWO, *flags).text().replace(shlex.quote(sys.executable), "python").replace(str(ROOT), "/project")
    if os.environ.get("MANYRANK_UPDATE_GOLDEN") == "1":
        (GOLDEN / file).write_text(text, encoding="utf-8")
    assert text == (GOLDEN / file).read_text(encoding="utf-8")
    assert sys.prefix not in text


@pytest.mark.parametrize("flags", [SLURM, POD])
def test_what_is_shown_is_what_is_written(tmp_path, capsys, flags):
    folder = tmp_path / "run"
    argv = [
        "train",
        "quickstart",
        "--nproc=2",
        f"--output_dir={folder}",
        "--mount_path=/" if flags == POD else "",
        *flags,
    ]
    argv = [word for word in argv if word]
    assert cli.main([*argv, "--print"]) == 0
    shown = capsys.readouterr().out
    assert not folder.exists()
    assert cli.main(argv) == 0
    (job,) = (folder / "launch").glob("job.[sy]*")
    assert (folder / "launch" / "job.txt").read_text() == shown
    assert shown.split(f"# file {job}\n")[1].split("\n# submit\n")[0] == job.read_text()
    assert capsys.readouterr().out.splitlines()[1] == "submit:  " + shown.rstrip().splitlines()[-1]
    assert cli.main(argv) == 0, "what was written is no other run"


# SLURM


def test_the_body_is_that_of_the_script_by_hand():
    made, by_hand = prepare(*TWO, *SLURM).content, (ROOT / "launch" / "slurm.sbatch").read_text()
    assert by_hand.count(submission.BODY) == 1
    body = by_hand[by_hand.index(submission.BODY) :]
    assert "scontrol requeue" in body and made.endswith("\n\n" + body)


def launch_of(made: submission.Submission, endpoint: str = "") -> str:
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
    assert found["signal"] == "USR1@120" and found["job-name"] == "run-50-off" and "requeue" in found
    assert "time" not in found and "gpus-per-node" not in options(prepare("--via=slurm", *CPU_RUN, "--nproc=2").content)


# Kubernetes


def expanded(text: str, env: dict[str, str]) -> str:
    """Kubernetes' replacement of variables: $(NAME) where there is one, $$ by one $."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text)


def pod(made: submission.Submission, number: int, **more: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a pod, as Kubernetes gives them to it."""
    job = documents(made)[-1]["spec"]
    trainer = job.get("trainer") or job["template"]["spec"]["containers"][0]
    env = {entry["name"]: expanded(entry["value"], {}) for entry in trainer["env"]}
    env |= {"JOB_COMPLETION_INDEX": str(number), **more}
    path = f"{BIN}:{os.environ['PATH']}"
    return [expanded(word, env) for word in trainer["command"]], {**os.environ, "PATH": path, **env}


def test_the_objects_of_a_job():
    service, job = documents(prepare(*TWO, *POD, "--grace=300"))
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == (
        "v1",
        "Service",
        "batch/v1",
        "Job",
    )
    assert service["metadata"] == job["metadata"] == {"name": "my-run-1", "namespace": "lab"}
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": "my-run-1"},
    }
    spec, template = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 6
    actions = [
        (rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert actions == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]
    assert template["subdomain"] == service["metadata"]["name"], "or pods have no names"
    assert (template["restartPolicy"], template["terminationGracePeriodSeconds"]) == ("Never", 300)
    (container,) = template["containers"]
    assert container["resources"] == {"requests": {"cpu": 32}, "limits": {"nvidia.com/gpu": 4}}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/workspace", "shm": "/dev/shm"}
    data, shm = template["volumes"]
    assert data["persistentVolumeClaim"] == {"claimName": "shared"} and shm["emptyDir"] == {"medium": "Memory"}
    assert container["command"][2].endswith(
        '--node_rank="$JOB_COMPLETION_INDEX" --rdzv_endpoint="my-run-1-0.my-run-1:29500"'
    )


def test_a_train_job():
    (job,) = documents(prepare(*TWO, *POD, "--k8s_kind=trainjob"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 4}
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pods = node["template"]["spec"]["template"]["spec"]
    assert node["name"] == pods["containers"][0]["name"] == "node"
    assert {volume["name"] for volume in pods["volumes"]} == {"data", "shm"}


def kept(ours, theirs) -> bool:
    """Whether all of ours is in theirs, with the types that YAML and Go have for it."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(key in theirs and kept(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(ours) == len(theirs) and all(map(kept, ours, theirs))
    return ours == theirs or (isinstance(ours, int) and str(ours) == theirs)  # quantities are text there


def as_kubectl_reads(document: dict) -> dict:
    """An object as Go's types of the Kubernetes API hold it: what they do not know is not in it."""
    # It prints only what it has changed.
    change = {"Job": ["image", "node=changed"], "Service": ["selector", "changed=yes"]}[document["kind"]]
    argv = ["kubectl", "set", change[0], "--local", "-f", "-", change[1], "-o", "json"]
    text, env = kubernetes.as_yaml([document]), {**os.environ, "KUBECONFIG": os.devnull}
    done = subprocess.run(argv, input=text, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
def test_kubectl_knows_every_field_of_a_job():
    service, job = documents(prepare(*TWO, *POD, "--job_name=y"))  # which YAML 1.1 takes for true
    pods = job["spec"]["template"]["spec"]
    del service["spec"]["selector"], pods["containers"][0]["image"]
    assert kept(service, as_kubectl_reads(service))
    assert kept(job, as_kubectl_reads(job))
    pods["subDomains"] = "y"
    assert not kept(job, as_kubectl_reads(job))


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_a_pod_runs_what_is_shown(tmp_path, kind):
    endpoint = "run-node-0-0.run:29400" if kind == "trainjob" else "run-0.run:29500"
    asked = ("--nproc=2", "--nnodes=2", "--gpus=0", "--cpus=4", f"--mount_path={tmp_path}", f"--k8s_kind={kind}")
    made = prepare(*POD, *asked, "--output_dir=run", "--run_name=it's $(HOME) $$ $x")
    shown = launch_of(made).replace('"$PET_MASTER_ADDR:$PET_MASTER_PORT"', endpoint)
    for number in (0, 1):
        address, _, port = endpoint.partition(":")
        argv, env = pod(made, number, PET_MASTER_ADDR=address, PET_MASTER_PORT=port)
        argv[2] = argv[2].replace(" train ", " train --print ")
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.replace(str(asset()) + "/", "") == shown
    assert shlex.quote("--run_name=it's $(HOME) $$ $x") in shown


def test_a_pod_trains(whole_run, tmp_path):
    made = prepare(*POD, *CPU_RUN, "--nproc=2", f"--mount_path={tmp_path}", "--output_dir=run", recipe="verify")
    argv, env = pod(made, 0)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    run = Run(0, done.stdout, done.stderr, tmp_path / "run")
    assert run.facts()["wrapper"] == "DistributedDataParallel" and run.facts()["world_size"] == 2
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    assert (run.folder / "launch" / "plan.txt").read_text().replace(str(asset()) + "/", "") == launch_of(made)
    assert (run.folder / "final_model" / "adapter_model.safetensors").is_file()


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


def test_kubectl_is_called_and_must_have_started_a_job(tmp_path):
    argv = (*POD, "--nproc=2", "--output_dir=run", f"--mount_path={tmp_path}", "--submit")
    done = train(
        *argv, cwd=tmp_path, **tool(tmp_path, "kubectl", "echo service/run created; echo job.batch/run created")
    )
    assert done.stdout.splitlines()[-1] == "Kubernetes job.batch/run", done.stderr
    assert (tmp_path / "argv").read_text().splitlines() == ["apply", "-f", "run/launch/job.yaml"]
    (tmp_path / "run" / "launch" / "submitted").unlink()
    done = train(
        *argv, cwd=tmp_path, **tool(tmp_path, "kubectl", "echo service/run unchanged; echo job.batch/run unchanged")
    )
    assert done.returncode == 2 and "error: nothing was started" in done.stderr
    assert not (tmp_path / "run" / "launch" / "submitted").exists()


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
def test_without_a_cluster_kubectl_s_own_words_are_the_error(tmp_path):
    argv = (*POD, "--nproc=2", "--output_dir=run", "--submit")
    done = train(*argv, cwd=tmp_path, KUBECONFIG=os.devnull)
    said = done.stderr[done.stderr.index("error:") :]  # warnings of the recipe stand before it
    assert done.returncode == 2 and said.startswith("error: the job was not taken: "), done.stderr
    assert len(said.splitlines()) == 3 and not (tmp_path / "run" / "launch" / "submitted").exists()


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
        (["--via=slurm", "--nproc=2", "--image=i"], "--image is for --via kubernetes"),
        (["--nproc=2", "--partition=p"], "--partition is for --via slurm"),
        (["--via=torchrun", "--submit"], "--submit is for --via slurm and --via kubernetes"),
        (["--via=slurm", "--nproc=2", "--partition="], "--partition '' is not a name"),
        (["--via=slurm", "--nproc=2", "--account=a\nb"], "--account 'a\\nb' is not a name"),
        (["--via=slurm", "--nproc=2", "--grace=0"], "--grace '0' is not a count"),
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
        (["--via=kubernetes", "--nproc=2"], "--via kubernetes needs --image and --pvc"),
        ([*POD, "--nproc=2", "--job_name=My_job"], "--job_name 'My_job' is no name for Kubernetes"),
        ([*POD, "--nproc=2", "--k8s_kind=pod"], "--k8s_kind 'pod' is none of job, trainjob"),
        ([*POD, "--nproc=2", "--k8s_kind=trainjob", "--grace=9"], "--grace with a TrainJob"),
        ([*POD, "--nproc=2", "--mount_path=data"], "--mount_path 'data' is relative"),
        (
            [*POD, "--nproc=2", "--output_dir=/else/run"],
            "the output folder /else/run is not on the volume, which is at /workspace",
        ),
    ],
)
def test_refused(refused, flags, error):
    assert refused(*flags) == error


@pytest.mark.parametrize("flags, name", [(("--via=slurm",), "sbatch"), (POD, "kubectl")])
def test_without_the_tool_nothing_is_written(refused, monkeypatch, tmp_path, flags, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(*flags, "--nproc=2", "--submit") == f"there is no {name} on this machine"


def test_a_job_does_not_write_among_another_run_s_files(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert cli.main(["train", "quickstart", "--via=slurm", "--nproc=2", f"--output_dir={tmp_path}"]) == 2
    assert f"the output folder {tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_data_of_a_kubernetes_job_is_looked_for_where_it_runs():
    made = prepare(*POD, "--nproc=2", "--data_path=/workspace/mine.jsonl")
    assert "--data_path=/workspace/mine.jsonl" in made.content
