"""Two hosts that share a folder: the losses of one, what happens when one of them dies, and how the doctor sees them."""

import json
import os
import signal
import sys
import time

import hosts
import pytest
from launches import Run, launch

from manyrank.runs import run_folder

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(hosts.available()), reason=str(hosts.available()))]
STEPS = 14
SLOWLY = """
import time
from transformers import TrainerCallback
class Slowly(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.5)
"""


@pytest.fixture
def pair():
    with hosts.two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def long_run(embedded_model, tmp_path_factory) -> Run:
    run = launch(tmp_path_factory.mktemp("long") / "run", f"--max_steps={STEPS}", "--strategy=single")
    assert run.code == 0, run.stderr
    return run


@pytest.fixture
def slow(tmp_path):
    """Options of a run that takes its time and saves every other step, and the environment for it."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    options = (
        f"--output_dir={tmp_path / 'run'}",
        f"--max_steps={STEPS}",
        "--save_steps=2",
        "--callbacks=slowly:Slowly",
    )
    return [*options, "--strategy=ddp", "--resume_from_checkpoint=auto"], {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    }


def wait_for_steps(folder, count: int) -> None:
    log, end = folder / "logs" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < end, "no steps came"
        time.sleep(0.1)


def finished(process) -> tuple[int, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


@pytest.mark.parametrize(("strategy", "via"), [("ddp", "accelerate"), ("fsdp", "torchrun"), ("zero3", "accelerate")])
def test_the_losses_of_one_host(strategy, via, pair, whole_run, tmp_path):
    folder = tmp_path / "run"
    args = (f"--strategy={strategy}", f"--via={via}", "--max_steps=6", f"--output_dir={folder}")
    running = [host.train(*args) for host in pair]
    for process in running:
        code, said = finished(process)
        assert code == 0, said
    run = Run(0, "", "", folder)
    assert run.facts()["world_size"] == 2
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


@pytest.mark.parametrize("via", ["accelerate", "torchrun"])
def test_hsdp_has_a_copy_of_the_model_on_each_host(via, pair, whole_run, tmp_path):
    folder = tmp_path / "run"
    args = ("--strategy=hsdp", "--nproc=2", f"--via={via}", "--max_steps=6", f"--output_dir={folder}")
    running = [host.train(*args) for host in pair]
    for process in running:
        code, said = finished(process)
        assert code == 0, said
    run = Run(0, "", "", folder)
    assert run.facts()["mesh"] == [2, 2] and max(run.facts()["base_bytes_here"]) == run.facts()["base_bytes"] / 2
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "own disks"])
def test_hosts_write_one_quantised_cache_to_a_disk(shared, pair, embedded_model, tmp_path):
    caches = [tmp_path / ("cache" if shared else f"cache-{host.number}") for host in pair]
    args = ("--strategy=fsdp", "--method=qlora", f"--model_name_or_path={embedded_model}", "--max_steps=2")
    runs = []
    for start in ("first", "second"):
        runs.append(Run(0, "", "", tmp_path / start))
        own = [{"MANYRANK_CACHE": str(cache)} for cache in caches]
        running = [host.train(*args, f"--output_dir={tmp_path / start}", **env) for host, env in zip(pair, own)]
        (code, said), (other_code, other_said) = map(finished, running)
        assert code == other_code == 0, said + other_said
        assert f"the quantised base {'is cached in' if start == 'first' else 'comes from'} {caches[0]}" in said
        for cache in caches:
            (folder,) = (cache / "quantised").iterdir()
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            names = {f"model-{writer:03d}-000.safetensors" for writer in range(2 if shared else 1)}
            assert set(index.values()) == names == {file.name for file in folder.glob("*.safetensors")}
            assert len(index) > 4 * 7 and run_folder.damage(folder, needed=["config.json", *names]) is None
    assert runs[0].metrics() == pytest.approx(runs[1].metrics(), abs=1e-5)


def test_a_host_that_dies_and_comes_back(pair, slow, long_run, tmp_path):
    args, env = slow
    running = [host.train(*args, **env) for host in pair]
    wait_for_steps(tmp_path / "run", 5)
    pair[1].kill()
    running[1].communicate()
    time.sleep(2)
    running[1] = pair[1].train(*args, **env)
    for process in running:
        code, said = finished(process)
        assert code == 0, said
    assert Run(0, "", "", tmp_path / "run").metrics() == pytest.approx(long_run.metrics(), abs=1e-5)


def test_a_host_that_is_gone_for_good(pair, slow, tmp_path):
    args, env = slow
    running = [host.train(*args, "--rdzv_timeout=10", **env) for host in pair]
    wait_for_steps(tmp_path / "run", 5)
    pair[1].kill()
    code, said = finished(running[0])
    assert code == 1
    assert "error: a machine is gone" in said and "--elastic" in said


def test_an_elastic_run_goes_on_alone(pair, slow, long_run, tmp_path):
    args, env = slow
    running = [host.train(*args, "--elastic", **env) for host in pair]
    wait_for_steps(tmp_path / "run", 5)
    pair[1].kill()
    code, said = finished(running[0])
    assert code == 0, said
    run = Run(0, "", "", tmp_path / "run")
    assert run.facts()["world_size"] == 1
    assert run.metrics() == pytest.approx(long_run.metrics(), abs=1e-5)


def test_two_machines_that_are_stopped_and_started_again(pair, slow, long_run, tmp_path):
    """What a cluster does that takes a job's machines away: SIGTERM to all, then the same command on all."""
    args, env = slow
    running = [host.train(*args, "--via=torchrun", **env) for host in pair]
    wait_for_steps(tmp_path / "run", 5)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        code, said = finished(process)
        assert code == 75, said
    again = [host.train(*args, "--via=torchrun", **env) for host in pair]
    ended = [finished(process) for process in again]
    assert [code for code, _ in ended] == [0, 0], ended
    assert "resumed from " in "".join(said for _, said in ended)
    run = Run(0, "", "", tmp_path / "run")
    assert run.facts()["world_size"] == 2
    assert run.metrics() == pytest.approx(long_run.metrics(), abs=1e-5)


def examined(pair, tmp_path, *more: str) -> list[tuple[int, dict]]:
    """`manyrank doctor` on both hosts, host 1 with `more` arguments and then without the shared folder.

    Returns:
        The exit code and the report of each.
    """
    running = []
    for host in pair:
        where = [f"--node_rank={host.number}", "--nnodes=2", "--nproc=1", "--rdzv_endpoint=manyrank-h0:29500"]
        argv = ["doctor", "verify", "--json", "--limit=150", f"--output_dir={tmp_path / 'shared' / 'run'}", *where]
        argv = [sys.executable, "-m", "manyrank.cli", *argv, *(more if host.number else ())]
        hide = f'mount -t tmpfs none {tmp_path / "shared"} && exec "$@"'  # in this host's own view of the files
        argv = ["sh", "-c", hide, "sh", *argv] if host.number and more else argv
        running.append(host.start(*argv, GLOO_SOCKET_IFNAME="eth0"))
    ended = [(*process.communicate(timeout=300), process.returncode) for process in running]
    return [(code, json.loads(out)) for out, err, code in ended]


def by_name(document: dict) -> dict[str, dict]:
    return {check["name"]: check for check in document["checks"]}


def test_the_doctor_of_two_hosts(pair, tmp_path):
    """Each has a report of its own, of its machine and of what the ranks do together."""
    (tmp_path / "shared").mkdir()
    for host, (code, document) in zip(pair, examined(pair, tmp_path)):
        found = by_name(document)
        assert code == 0, document
        assert document["machine"] == f"manyrank-h{host.number}"
        assert found["same on all"]["figures"]["machines"] == ["manyrank-h0", "manyrank-h1"]
        assert found["network"]["figures"]["device"] == "eth0"
        assert found["all-reduce"]["figures"]["sizes"][1]["wrong"] == 0
        assert found["save and load"]["figures"]["loss"] == pytest.approx(found["step"]["figures"]["losses"][1])
        assert found["step"]["figures"]["world_size"] == 2
        assert ("output folder" in found) == (host.number == 0)
    assert list((tmp_path / "shared").iterdir()) == []


def test_the_doctor_of_two_hosts_that_differ(pair, tmp_path):
    """In the recipe, and in the folder that they should share."""
    (tmp_path / "shared").mkdir()
    for code, document in examined(pair, tmp_path, "--learning_rate=0.5"):
        found = by_name(document)
        assert (code, [name for name in found if found[name]["state"] == "failed"]) == (1, ["same on all", "step"])
        assert "learning_rate is 0.001 on manyrank-h0 and 0.5 on manyrank-h1" in found["same on all"]["seen"]
        assert "manyrank-h1 cannot see" in found["step"]["seen"] and "all machines share" in found["step"]["fix"]
    assert list((tmp_path / "shared").iterdir()) == []
