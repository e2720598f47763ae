"""`manyrank train --via slurm|kubernetes`: a job as plain values, its file, and the command that hands it in.

    OUTPUT_DIR/launch/job.sbatch    for SLURM: #SBATCH lines, and the same body as launch/slurm.sbatch
    OUTPUT_DIR/launch/job.yaml      for Kubernetes, see `kubernetes`
    OUTPUT_DIR/launch/job.txt       what --print shows
    OUTPUT_DIR/launch/submitted     which job it is, once it is handed in

A machine of the job runs `manyrank train ... --via torchrun`, so signals, exit codes and restarts are those of every run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.args import CommandLine, Where
from ..config.resolve import Entry, Resolved, resolve
from ..errors import UserError
from ..project_files import asset
from ..rules import check as rules
from ..rules.context import RunContext
from ..runs.folder import LAUNCH_FOLDER, write
from ..topology.gpus import Gpu, Hardware
from . import command as launcher
from . import kubernetes
from .command import LaunchPlan, file_text

GRACE = 120  # seconds
SLURM_ENDPOINT, TRAINJOB_ENDPOINT = "$ENDPOINT", "$PET_MASTER_ADDR:$PET_MASTER_PORT"  # the cluster knows the machine
BODY = "# From here on every job is the same;"  # in launch/slurm.sbatch


@dataclass(frozen=True)
class Submission:
    """A job: what its machines run, its file, and the command that hands it in."""

    launch: LaunchPlan
    file: Path
    content: str
    argv: tuple[str, ...]

    def text(self) -> str:
        """Everything, as it will run. Variables that only the cluster knows stand as the job's file has them."""
        shown = self.launch.text()
        for endpoint in (SLURM_ENDPOINT, TRAINJOB_ENDPOINT):
            shown = shown.replace(shlex.quote(endpoint), f'"{endpoint}"')
        return "\n".join([shown, file_text(str(self.file), self.content), f"# submit\n{shlex.join(self.argv)}\n"])


def main(line: CommandLine) -> int:
    """Write a job's files; with --submit hand it in; with --print only show them.

    Returns:
        The exit code.

    Raises:
        UserError: an option is wrong, or the job was not taken.
    """
    made = prepare(line)
    if line.where.print:
        print(made.text(), end="")
        return 0
    if line.job.submit and not shutil.which(made.argv[0]):
        raise UserError(
            f"there is no {made.argv[0]} on this machine", where="submit", fix="run it where the cluster can be reached"
        )
    _write(made)
    if note := _undecided(line):
        print(note, file=sys.stderr)
    print(f"written: {made.file}")
    print(_submit(made) if line.job.submit else f"submit:  {shlex.join(made.argv)}")
    return 0


def _undecided(line: CommandLine) -> str | None:
    """What to say of a strategy of auto, which needs the GPUs to be decided."""
    config = resolve(line.recipe, line.overrides).config
    if config.strategy or line.job.gpus == 0 or line.where.nproc * line.where.nnodes == 1:
        return None
    return (
        "note: strategy auto is ddp in a job, whose GPUs are not known here; `manyrank plan --gpu KIND` says what fits"
    )


def prepare(line: CommandLine) -> Submission:
    """Decide everything about a job; nothing is written.

    Raises:
        UserError: something is wrong that can be known here.
    """
    where = line.where
    _check_flags(line)
    given = resolve(line.recipe, line.overrides)
    if given.config.per_device_train_batch_size == "auto":
        what = "a micro-batch of auto is decided on a machine with the GPUs"
        raise UserError(
            what, where=given.where("per_device_train_batch_size"), fix="give a number; see `manyrank plan`"
        )
    folder = Path(launcher.output_dir(given.config, line))
    rules.check_output_dir(given.config, folder)
    _check_free(given, folder)
    if not given.config.resume_from_checkpoint:  # a job that is queued again goes on where it was
        resume = Entry("resume_from_checkpoint", "auto", f"--via {where.via}")
        line = replace(line, overrides=[*line.overrides, resume])
    resolved, machine = resolve(line.recipe, line.overrides), _asked_for(line)
    strategy, nproc = launcher.choose_strategy(resolved.config, where, machine)
    here = folder if where.via == "slurm" else None  # a Kubernetes job's folder is on its volume
    context = RunContext(resolved, strategy, nproc, nproc * where.nnodes, machine, output_dir=here)
    # The files of a Kubernetes job are on its volume; its pods look at them before they start.
    rules.check(context, files=where.via == "slurm")
    launcher.check_elastic(where, elastic=resolved.config.elastic)
    arguments = launcher.train_arguments(line, strategy, str(folder))
    command = [*arguments, "--via=torchrun", f"--nproc={nproc}", *_passed_on(where)]
    name = line.job.job_name or _name(folder)
    line = replace(line, where=replace(where, rdzv_endpoint=_endpoint(line, name)))
    launch = launcher.lay_out(
        line,
        "torchrun",
        strategy=strategy,
        nproc=nproc,
        output_dir=str(folder),
        hardware=machine,
        elastic=resolved.config.elastic,
        expandable=resolved.config.expandable_segments,
    )
    make = _slurm if where.via == "slurm" else _kubernetes
    return make(line, launch, machine, name=name, command=command, folder=folder)


def _check_flags(line: CommandLine) -> None:
    where = line.where
    if where.print and line.job.submit:
        raise UserError("--print and --submit", where="command line", fix="--print starts nothing: leave one out")
    if where.node_rank or where.rdzv_endpoint:
        raise UserError(
            f"node_rank or rdzv_endpoint with --via {where.via}",
            where="command line",
            fix="leave them out: the job has them",
        )
    if not where.nproc:
        raise UserError(
            f"--via {where.via} does not know the machines of the job",
            where="nproc",
            fix="say how many processes (GPUs) each has: --nproc 8",
        )


def _check_free(given: Resolved, folder: Path) -> None:
    resume = given.config.resume_from_checkpoint
    if resume not in (None, "auto"):
        raise UserError(
            f"a job resumes by itself, and not from {resume}: queued again it would lose what it has trained since",
            where=given.where("resume_from_checkpoint"),
            fix="give the run's --output_dir and --resume_from_checkpoint auto",
        )
    submitted = folder / LAUNCH_FOLDER / "submitted"
    if submitted.is_file() and not resume:
        raise UserError(
            f"the output folder {folder} belongs to {submitted.read_text(encoding='utf-8').strip()}",
            where="output_dir",
            fix="choose another --output_dir, or, if that has ended, continue it with --resume_from_checkpoint auto",
        )


def _asked_for(line: CommandLine) -> Hardware:
    """A machine as the job asks for it. What kind its GPUs are is checked again when it runs there."""
    job, nproc = line.job, line.where.nproc
    gpu = Gpu("of the cluster", memory=0, compute_capability=(9, 0))
    gpus = nproc if job.gpus is None else job.gpus
    return Hardware(gpus=(gpu,) * gpus, cpu_cores=job.cpus or nproc, cpu_bf16=True)


def _passed_on(where: Where) -> list[str]:
    """The flags of the launch that a machine cannot know from its job."""
    restarts = [f"--max_restarts={where.max_restarts}"] if where.max_restarts is not None else []
    timeout = [f"--rdzv_timeout={where.rdzv_timeout}"] if where.rdzv_timeout != Where.rdzv_timeout else []
    return restarts + timeout


def _name(folder: Path) -> str:
    """A job's name, after the run's folder, that Kubernetes takes as well."""
    words = re.sub("[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    return (words if words[:1].isalpha() else f"run-{words}")[:40].rstrip("-")


def _endpoint(line: CommandLine, name: str) -> str | None:
    if line.where.nnodes == 1:
        return None
    if line.where.via == "slurm":
        return SLURM_ENDPOINT
    return TRAINJOB_ENDPOINT if line.job.k8s_kind == "trainjob" else f"{name}-0.{name}:{kubernetes.PORT}"


def _slurm(
    line: CommandLine, launch: LaunchPlan, machine: Hardware, *, name: str, command: list[str], folder: Path
) -> Submission:
    job, files = line.job, folder / LAUNCH_FOLDER
    options = {
        "job-name": name,
        "chdir": str(Path.cwd()),
        "nodes": line.where.nnodes,
        "ntasks-per-node": 1,
        "cpus-per-task": machine.cpu_cores,
        "gpus-per-node": len(machine.gpus) or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": str(files).replace("%", "%%") + "/job-%j.log",
        "open-mode": "append",
        "signal": f"USR1@{job.grace or GRACE}",
    }
    given = {key: value for key, value in options.items() if value is not None}
    head = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in given.items()]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in launch.env.items()]
    start = f"set -- {shlex.join([sys.executable, '-m', 'manyrank.cli', 'train', *command])}"
    body = asset("launch", "slurm.sbatch").read_text(encoding="utf-8").partition(BODY)
    content = "\n".join(
        ["#!/usr/bin/env bash", *head, "#SBATCH --requeue", *exports, start, "", BODY + body[2]],
    )
    file = files / "job.sbatch"
    return Submission(launch, file, content, ("sbatch", "--parsable", str(file)))


def _kubernetes(
    line: CommandLine, launch: LaunchPlan, machine: Hardware, *, name: str, command: list[str], folder: Path
) -> Submission:
    job, where = line.job, line.where
    _check_kubernetes(line, name, folder)
    start = shlex.join(["manyrank", "train", *command])
    if where.nnodes > 1:
        endpoint = f'"{where.rdzv_endpoint}"'
        place = f' --nnodes={where.nnodes} --node_rank="$JOB_COMPLETION_INDEX" --rdzv_endpoint={endpoint}'
    else:
        place = ""
    script = kubernetes.escaped(f"cd {shlex.quote(job.mount_path)} && exec {start}") + place
    pods = kubernetes.Pods(
        name=name,
        count=where.nnodes,
        image=job.image,
        pvc=job.pvc,
        mount_path=job.mount_path,
        gpus=len(machine.gpus),
        cpus=machine.cpu_cores,
        grace=job.grace or GRACE,
        env=launch.env,
        script=script,
        namespace=job.namespace,
    )
    make = {"job": kubernetes.indexed_job, "trainjob": kubernetes.train_job}[job.k8s_kind]
    file = folder / LAUNCH_FOLDER / "job.yaml"
    return Submission(launch, file, kubernetes.as_yaml(make(pods)), ("kubectl", "apply", "-f", str(file)))


def _check_kubernetes(line: CommandLine, name: str, folder: Path) -> None:
    job = line.job
    missing = [key for key in ("image", "pvc") if getattr(job, key) is None]
    if missing:
        raise UserError(
            f"--via kubernetes needs {' and '.join(f'--{key}' for key in missing)}",
            where="command line",
            fix="`manyrank train --help` says what they are",
        )
    if not kubernetes.NAME.fullmatch(name):
        raise UserError(
            f"--job_name {name!r} is no name for Kubernetes",
            where="command line",
            fix="small letters, digits and dashes, a letter first, at most 50",
        )
    if job.k8s_kind == "trainjob" and job.grace:
        raise UserError("--grace with a TrainJob", where="command line", fix="leave it out: its runtime says it")
    mount = Path(job.mount_path)
    if not mount.is_absolute():
        raise UserError(f"--mount_path {job.mount_path!r} is relative", where="command line", fix="give a whole path")
    if folder.is_absolute() and not folder.is_relative_to(mount):
        raise UserError(
            f"the output folder {folder} is not on the volume, which is at {mount}",
            where="output_dir",
            fix="give a relative --output_dir, or set --mount_path",
        )


def _write(made: Submission) -> None:
    try:
        made.file.parent.mkdir(parents=True, exist_ok=True)
        write(made.file, made.content)
        write(made.file.with_name("job.txt"), made.text())
    except OSError as error:
        raise UserError(
            f"cannot write {made.file}: {error.strerror}", where="output_dir", fix="choose another --output_dir"
        ) from None


def _submit(made: Submission) -> str:
    """Hand the job in.

    Returns:
        Which job it is.
    """
    done = subprocess.run(made.argv, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(
            f"the job was not taken: {said}", where=shlex.join(made.argv), fix="change the options of the job"
        )
    job = _slurm_job(done.stdout) if made.argv[0] == "sbatch" else _kubernetes_job(made, done.stdout)
    write(made.file.with_name("submitted"), job + "\n")
    return job


def _slurm_job(said: str) -> str:
    return f"SLURM job {said.strip().partition(';')[0]}"


def _kubernetes_job(made: Submission, said: str) -> str:
    """kubectl names each object with what it did: a job that was there already was not started."""
    objects = dict(line.rsplit(" ", 1) for line in said.splitlines() if " " in line)
    name = next((key for key in objects if key.startswith(("job", "trainjob"))), None)
    if name is None or objects[name] != "created":
        raise UserError(
            f"nothing was started: {' '.join(said.split())}",
            where=shlex.join(made.argv),
            fix=f"kubectl delete -f {shlex.quote(str(made.file))}, if it has ended; or give another --job_name",
        )
    return f"Kubernetes {name}"
