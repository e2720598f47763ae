"""Shared pieces of the tests: the embedded model, real launches, and the runs that several tests look at."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from launches import ROOT, Run, launch

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported; spinning threads starve the launched runs
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a machine may be busy
settings.load_profile("untimed")

SLOW = (  # the slowest first, as measured
    "launchers/test_hosts.py",
    "equivalence/test_resume_anywhere.py",
    "tasks/test_grpo.py",
    "training/test_train.py",
    "launchers/test_start.py",
    "launchers/test_slurm.py",
    "launchers/test_launch_scripts.py",
    "test_api.py",
    "checkpoint/test_resume.py",
    "plan/test_memory.py",
    "tools/test_doctor.py",
    "topology/test_strategy.py",
    "test_first_hour.py",
    "models/test_model_recipes.py",
    "equivalence/test_verify.py",
    "equivalence/test_combinations.py",
    "test_counts.py",
    "tools/test_serve.py",
    "tools/test_merge.py",
    "test_warm.py",
    "launchers/test_preemption.py",
    "parallel/test_hsdp.py",
    "data/test_data.py",
    "plan/test_activations.py",
    "checkpoint/test_faults.py",
    "tools/test_report.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files where several processes share them; one that comes last leaves the others idle."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {ROOT / "tests" / name: place for place, name in enumerate(SLOW)}
        items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="module", autouse=True)
def accelerate_as_it_was():
    """accelerate keeps the precision of a process's first Accelerator; the next file of tests may want another."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded model's folder."""
    from manyrank.models.tiny import ensure

    return ensure()


@pytest.fixture(scope="session")
def tokenizer(embedded_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model)


@pytest.fixture(scope="session")
def whole_run(embedded_model, tmp_path_factory) -> Run:
    """Six uninterrupted steps of one process with a checkpoint after three; many tests compare with it."""
    run = launch(tmp_path_factory.mktemp("whole") / "run", "--max_steps=6", "--save_steps=3", "--strategy=single")
    assert run.code == 0, run.stderr
    return run
