"""Which CPUs a process is bound to, on machines whose nodes are files in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyrank.topology import numa

ALL = set(range(8))


def machine(folder: Path, nodes: list[str], gpus: dict[str, int]) -> Path:
    """A /sys with NUMA nodes by their CPUs, and with the nodes of GPUs."""
    for number, cpus in enumerate(nodes):
        node = folder / "devices" / "system" / "node" / f"node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(cpus + "\n")
    for address, number in gpus.items():
        device = folder / "bus" / "pci" / "devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{number}\n")
    return folder


FIRST, SECOND, UNTOLD = "0000:17:00.0", "0001:c8:00.0", "0000:99:00.0"
GPUS = {FIRST: 0, SECOND: 1, UNTOLD: -1}


@pytest.mark.parametrize(
    ("nodes", "gpu", "allowed", "expected"),
    [
        (["0-1,4-5", "2-3,6-7"], FIRST, ALL, {0, 1, 4, 5}),
        (["0-1,4-5", "2-3,6-7"], SECOND, ALL, {2, 3, 6, 7}),
        (["0-3", "4-7", ""], SECOND, ALL, {4, 5, 6, 7}),  # a node of memory alone
        (["0-3", "4-7"], SECOND, {2, 3, 4, 5}, {4, 5}),  # never wider than now
        (["0-3", "4-7"], SECOND, {1, 2}, None),  # a binding to one node stays
        (["0-3", "4-7", "8-9"], FIRST, {4, 8}, None),  # nothing of the node is allowed
        (["0-7"], FIRST, ALL, None),
        (["0-3", "4-7"], UNTOLD, ALL, None),
        (["0-3", "4-7"], "0000:00:00.0", ALL, None),
    ],
)
def test_cpus_near_a_gpu(nodes, gpu, allowed, expected, tmp_path):
    assert numa.cpus_near(gpu, allowed, sys=machine(tmp_path, nodes, GPUS)) == expected


BIND = """
import json, os, sys, threading
from pathlib import Path
from manyrank.topology import numa
end = threading.Event()
early = threading.Thread(target=end.wait)
early.start()
line = numa.bind("0001:c8:00.0", sys=Path(sys.argv[1]))
threads = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
end.set()
print(json.dumps([line, threads]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU cannot be two nodes")
@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_a_process_and_its_threads_are_bound_unless_accelerate_is_told(variable, tmp_path):
    first, *rest = sorted(os.sched_getaffinity(0))
    fake = machine(tmp_path, [str(first), ",".join(map(str, rest))], GPUS)
    env = {key: value for key, value in os.environ.items() if key != numa.VARIABLE}
    env |= {numa.VARIABLE: variable} if variable else {}
    done = subprocess.run([sys.executable, "-c", BIND, fake], capture_output=True, text=True, env=env, check=True)
    if variable:
        assert done.stdout == f"[null, [{[first, *rest]}, {[first, *rest]}]]\n"
    else:
        assert done.stdout.endswith(f'leaves all)", [{rest}, {rest}]]\n') and f"{len(rest)} of" in done.stdout
