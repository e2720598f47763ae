"""A SLURM of two nodes on this machine, with its own munge, ports and folders. Needs root and Debian's slurm-wlm."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

NODES = ("manyrank-n1", "manyrank-n2")
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
CONF = """
ClusterName=manyrank
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26817
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


def available() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid():
        return "a SLURM needs root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"there is no {', '.join(missing)}: make test-slurm installs them" if missing else None


@contextmanager
def cluster():
    """The environment in which SLURM's commands find the cluster."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a short name: it holds sockets
        yield from _cluster(Path(folder))


def _cluster(folder: Path):
    host = socket.gethostname()
    nodes = "".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={27001 + number} CPUs=1\n"
        for number, name in enumerate(NODES)
    )
    partition = f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder) + nodes + partition)
    (folder / "cgroup.conf").write_text(CGROUP)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    running: list[subprocess.Popen] = []

    def start(*argv: str) -> None:
        log = (folder / f"{Path(argv[0]).name}-{len(running)}.log").open("w")
        running.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))

    with _names(NODES):
        try:
            files = {"key": "key-file", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
            options = [f"--{option}={folder}/munge.{name}" for name, option in files.items()]
            start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *options)
            _wait(lambda: (folder / "munge.socket").exists(), "munge")
            start("slurmctld", "-D")
            for name in NODES:
                start("slurmd", "-D", "-N", name)
            _wait(lambda: _output(env, "sinfo", "-h", "-o", "%T %D") == "idle 2", "the nodes")
            yield env
        finally:
            subprocess.run(["scancel", "--user=root"], env=env, capture_output=True)
            for process in reversed(running):
                process.terminate()
            for process in running:
                process.wait(30)


@contextmanager
def _names(names: tuple[str, ...]):
    """Names of this machine, as long as the cluster is there."""
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    hosts.write_text(before + "".join(f"127.0.0.1 {name}\n" for name in names))
    try:
        yield
    finally:
        hosts.write_text(before)


def _output(env: dict, *argv: str) -> str:
    return subprocess.run(argv, env=env, capture_output=True, text=True).stdout.strip()


def _wait(true, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come up")
        time.sleep(0.2)
