"""Hosts on one machine: network namespaces with a name, an address and a hosts file of their own. Needs root."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import warm
from launches import ROOT

BRIDGE, NETWORK = "manyrank0", "10.231.7"


def available() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        return "hosts need root, ip and unshare"
    tried = subprocess.run(["ip", "netns", "add", "manyrank-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "manyrank-try"], capture_output=True)
    return tried.stderr.strip() or None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """One namespace; the first has the address that the others meet at."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.name = number, f"manyrank-h{number}"
        self.remove()  # what a killed test left
        ip("netns", "add", self.name)
        ip("link", "add", f"mrv{number}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", f"mrv{number}", "master", BRIDGE, "up")
        ip("-n", self.name, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", self.name, "link", "set", device, "up")
        own = Path("/etc/netns") / self.name
        own.mkdir(parents=True, exist_ok=True)
        names = [f"{NETWORK}.{other + 1} manyrank-h{other}" for other in range(count)]
        (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def start(self, *argv: str, **env: str) -> warm.Process | subprocess.Popen:
        if warm.program(argv):
            return warm.start(argv, cwd=ROOT, env={**os.environ, **env}, namespace=self.name)
        inside = ["unshare", "-u", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *argv]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *inside],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, *args: str, nnodes: int = 2, **env: str) -> warm.Process:
        """`manyrank train` as machine `number` of `nnodes`, one process on each."""
        where = [f"--nnodes={nnodes}", f"--node_rank={self.number}", "--nproc=1", "--rdzv_endpoint=manyrank-h0:29500"]
        argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", *where, "--logging_steps=1", *args]
        return self.start(*argv, GLOO_SOCKET_IFNAME="eth0", **env)

    def kill(self) -> None:
        """As a power cut does: every process at once, without a word."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def remove(self) -> None:
        self.kill()
        # The kernel takes a namespace's devices down in its own time, and the next host needs the name.
        subprocess.run(["ip", "link", "del", f"mrv{self.number}"], capture_output=True)
        for _ in range(50):  # the dead keep it for a moment
            done = subprocess.run(["ip", "netns", "del", self.name], capture_output=True, text=True)
            if not done.returncode or "No such file" in done.stderr:
                break
            time.sleep(0.1)
        shutil.rmtree(Path("/etc/netns") / self.name, ignore_errors=True)


@contextmanager
def two_hosts():
    """Two hosts that reach each other."""
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    made: list[Host] = []
    try:
        for number in range(2):
            made.append(Host(number, 2))
        yield made
    finally:
        for host in made:
            host.remove()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
