"""Two hosts that share a folder: the losses of one, and what happens when one of them dies."""

import time

import hosts
import pytest
from conftest import Run, launch

pytestmark = pytest.mark.skipif(bool(hosts.available()), reason=str(hosts.available()))
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
    return [*options, "--strategy=ddp", "--resume_from_checkpoint=auto"], {"PYTHONPATH": str(tmp_path)}


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
