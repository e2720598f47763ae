"""`manyrank train --via slurm`: launch/slurm.sbatch filled in for one run, as OUTPUT_DIR/launch/job.sbatch.

A machine of the job runs `manyrank train ... --via torchrun`, so signals, exit codes and restarts are those of every
run. `--submit` hands the job to sbatch; its environment variables (SBATCH_QOS, SBATCH_JOB_NAME, ...) overrule the file.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.args import CommandLine, LaunchOptions
from ..config.resolve import ResolvedConfig, Setting, resolve
from ..errors import UserError
from ..project_files import asset
from ..rules.check import check_output_dir, check_rules
from ..rules.context import RunContext
from ..runs.run_folder import LAUNCH_FOLDER, write
from ..topology.gpus import Hardware, planned_hardware
from .command import LaunchPlan, check_elastic, choose_output_dir, choose_strategy, file_text, lay_out, train_arguments

ENDPOINT = "$ENDPOINT"  # the job knows its first machine
BODY = "# From here on every job is the same;"  # in launch/slurm.sbatch


@dataclass(frozen=True)
class Job:
    """The command of a job's machines, and its file."""

    launch: LaunchPlan
    file: Path
    content: str
    note: str | None = None  # for who writes or hands it in

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that hands it in."""
        return ("sbatch", "--parsable", str(self.file))

    def text(self) -> str:
        """Show the job as it will run."""
        shown = self.launch.text().replace(shlex.quote(ENDPOINT), f'"{ENDPOINT}"')
        return "\n".join([shown, file_text(str(self.file), self.content), f"# submit\n{shlex.join(self.argv)}\n"])


def main(line: CommandLine) -> int:
    """Write a job's file; with --submit hand it in; with --print only show it.

    Returns:
        The exit code.

    Raises:
        UserError: an option is wrong, or the job was not taken.
    """
    job = prepare(line)
    if line.options.print or line.options.check:
        print(job.text() if line.options.print else f"{job.launch}\n", end="")
        return 0
    if line.slurm.submit and not shutil.which("sbatch"):
        fix = (
            "run it where the cluster is reached; without --submit the job's file is written, and sbatch takes it there"
        )
        raise UserError("there is no sbatch on this machine", where="submit", fix=fix)
    try:
        job.file.parent.mkdir(parents=True, exist_ok=True)
        write(job.file, job.content)
    except OSError as error:
        what = f"cannot write {job.file}: {error.strerror}"
        raise UserError(what, where="output_dir", fix="choose another --output_dir") from None
    if job.note:
        print(job.note, file=sys.stderr)
    print(f"written: {job.file}")
    print(_submit(job) if line.slurm.submit else f"submit:  {shlex.join(job.argv)}")
    return 0


def prepare(line: CommandLine) -> Job:
    """Decide everything about a job; nothing is written.

    Raises:
        UserError: something is wrong that can be known here.
    """
    options = line.options
    _check_flags(line)
    resolved = resolve(line.recipe, line.overrides)
    if resolved.config.per_device_train_batch_size == "auto":
        what, where = "a micro-batch of auto is decided on a machine with the GPUs", "per_device_train_batch_size"
        raise UserError(what, where=resolved.where(where), fix="give a number; see `manyrank plan`")
    folder = Path(choose_output_dir(resolved.config, line))
    _check_resume(resolved, folder)
    check_output_dir(resolved.config, folder)
    if not resolved.config.resume_from_checkpoint:  # a job that is queued again resumes
        line = replace(line, overrides=[*line.overrides, Setting("resume_from_checkpoint", "auto", "--via slurm")])
    resolved, machine = resolve(line.recipe, line.overrides), _requested(line)
    strategy, nproc = choose_strategy(resolved.config, options, machine)
    check_rules(RunContext(resolved, strategy, nproc, nproc * options.nnodes, machine, output_dir=folder))
    check_elastic(options, elastic=resolved.config.elastic)
    command = [*train_arguments(line, strategy, str(folder)), "--via=torchrun", f"--nproc={nproc}"]
    command += _passed_on(options)
    launch = lay_out(
        replace(line, options=options.model_copy(update={"rdzv_endpoint": ENDPOINT if options.nnodes > 1 else None})),
        "torchrun",
        strategy=strategy,
        nproc=nproc,
        output_dir=str(folder),
        hardware=machine,
        elastic=resolved.config.elastic,
        expandable=resolved.config.expandable_segments,
    )
    files = folder / LAUNCH_FOLDER
    return Job(launch, files / "job.sbatch", _script(line, launch, machine, command, files), _note(resolved, line))


def _note(resolved: ResolvedConfig, line: CommandLine) -> str | None:
    """Note that a strategy of auto is decided on the job's GPUs."""
    if resolved.config.strategy or line.slurm.gpus == 0 or line.options.nproc == line.options.nnodes == 1:
        return None
    advice = "`manyrank plan --gpu KIND` says what fits"
    return f"note: strategy auto is ddp in a job, whose GPUs are not known here; {advice}"


def _check_flags(line: CommandLine) -> None:
    options = line.options
    if options.print and line.slurm.submit:
        raise UserError("--print and --submit", where="command line", fix="--print starts nothing: leave one out")
    if options.node_rank or options.rdzv_endpoint:
        what = "node_rank or rdzv_endpoint with --via slurm"
        raise UserError(what, where="command line", fix="leave them out: the job has them")
    if not options.nproc:
        fix = "say how many processes (GPUs) each has: --nproc 8"
        raise UserError("--via slurm does not know the machines of the job", where="nproc", fix=fix)


def _check_resume(resolved: ResolvedConfig, folder: Path) -> None:
    resume = resolved.config.resume_from_checkpoint
    if resume not in (None, "auto"):
        raise UserError(
            f"a job resumes by itself, and not from {resume}: queued again it would lose what it has trained since",
            where=resolved.where("resume_from_checkpoint"),
            fix="give the run's --output_dir and --resume_from_checkpoint auto",
        )
    submitted = folder / LAUNCH_FOLDER / "submitted"
    if submitted.is_file() and not resume:
        raise UserError(
            f"the output folder {folder} belongs to {submitted.read_text(encoding='utf-8').strip()}",
            where="output_dir",
            fix="choose another --output_dir, or, if that has ended, continue it with --resume_from_checkpoint auto",
        )


def _requested(line: CommandLine) -> Hardware:
    """A machine as the job asks for it. The kind of its GPUs is checked again when it runs there."""
    job, nproc = line.slurm, line.options.nproc or 1
    machine = planned_hardware(nproc if job.gpus is None else job.gpus)
    return replace(machine, cpu_cores=job.cpus or nproc)


def _passed_on(options: LaunchOptions) -> list[str]:
    """The flags of the launch that a machine cannot know from its job."""
    restarts = [f"--max_restarts={options.max_restarts}"] if options.max_restarts is not None else []
    timeout = [f"--rdzv_timeout={options.rdzv_timeout}"] if options.rdzv_timeout != LaunchOptions().rdzv_timeout else []
    return restarts + timeout


def _script(line: CommandLine, launch: LaunchPlan, machine: Hardware, command: list[str], files: Path) -> str:
    options = {
        "job-name": re.sub("[^a-z0-9]+", "-", files.parent.name.lower()).strip("-")[:40] or "manyrank",
        "chdir": str(Path.cwd()),
        "nodes": line.options.nnodes,
        "ntasks-per-node": 1,
        "cpus-per-task": machine.cpu_cores,
        "gpus-per-node": len(machine.gpus) or None,
        "time": line.slurm.time,
        "partition": line.slurm.partition,
        "account": line.slurm.account,
        "output": str(files).replace("%", "%%") + "/job-%j.log",
        "open-mode": "append",
        "signal": "USR1@120",  # seconds before the time limit: the run saves and ends with 75
    }
    head = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in launch.env.items()]
    start = f"set -- {shlex.join([sys.executable, '-m', 'manyrank.cli', 'train', *command])}"
    body = asset("launch", "slurm.sbatch").read_text(encoding="utf-8").partition(BODY)[2]
    return "\n".join(["#!/usr/bin/env bash", *head, "#SBATCH --requeue", *exports, start, "", BODY + body])


def _submit(job: Job) -> str:
    """Hand the job in; returns which job it is."""
    done = subprocess.run(job.argv, capture_output=True, text=True)
    if done.returncode:
        output = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        fix = "change the options of the job"
        raise UserError(f"the job was not taken: {output}", where=shlex.join(job.argv), fix=fix)
    name = f"SLURM job {done.stdout.strip().partition(';')[0]}"
    write(job.file.with_name("submitted"), name + "\n")
    return name
