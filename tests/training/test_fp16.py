"""fp16: a loss scale that overflows loses no step, on any strategy; checkpoints keep it."""

import json

import pytest
from launches import launch, nightly
from safetensors.torch import load_file

from manyrank.parallel.loss_scale import FIRST, LEAST, WINDOW, LossScale

# Sets a scale at the start, and writes down the scale of each step and how often it was lowered.
SCALES = """
import gc, json, os
from transformers import TrainerCallback
from manyrank.parallel import loss_scale

class Scales(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        (self.scale,) = [each for each in gc.get_objects() if isinstance(each, loss_scale.LossScale)]
        self.scale.value = float(os.environ.get("FIRST_SCALE", self.scale.value))
        self.seen = [self.scale.value]

    def on_step_end(self, args, state, control, **_):
        self.seen.append(self.scale.value)

    def on_train_end(self, args, state, control, **_):
        if os.environ.get("RANK", "0") == "0":
            with open(os.environ["SCALES"], "w") as file:
                json.dump(self.seen, file)
"""


@pytest.fixture
def fp16(tmp_path):
    """Launch a run in fp16; returns it and the scales, at the start and after each step."""
    (tmp_path / "scales.py").write_text(SCALES)

    def run(name: str, *args: str, **env: str):
        seen = tmp_path / f"{name}.json"
        env = {"PYTHONPATH": str(tmp_path), "SCALES": str(seen)} | env
        run = launch(tmp_path / name, "--fp16", "--bf16=false", "--callbacks=scales:Scales", *args, **env)
        assert run.code == 0, run.stderr
        return run, json.loads(seen.read_text())

    return run


@pytest.mark.parametrize(
    "strategy, method",
    [
        ("single", "lora"),
        ("fsdp", "lora"),
        ("zero2", "lora"),
        ("single", "full"),
        *nightly(("ddp", "lora"), ("zero3", "lora"), ("fsdp", "full"), ("zero3", "full"), ("single", "qlora")),
    ],
)
def test_a_step_whose_gradients_overflow_is_taken_again(strategy, method, fp16, whole_run, tmp_path):
    nproc = 1 if strategy == "single" else 2
    args = (f"--strategy={strategy}", f"--nproc={nproc}", f"--method={method}", "--max_steps=6", "--save_steps=6")
    run, scales = fp16("run", *args)
    assert run.facts()["precision"] == "fp16" and scales == [FIRST] * 7
    if method == "lora":
        assert run.metrics() == pytest.approx(whole_run.metrics(), abs=0.01)
    high, lowered = fp16("high", *args, FIRST_SCALE=str(2.0**60))
    assert lowered[0] == 2.0**60 and 1 < lowered[-1] < 2.0**40 and lowered[1:] == sorted(lowered[1:], reverse=True)
    assert high.metrics() == pytest.approx(run.metrics(), abs=0.01)
    assert high.metrics("grad_norm") == pytest.approx(run.metrics("grad_norm"), rel=0.05)
    assert len(high.metrics()) == 6
    states = load_file(high.folder / "checkpoint-6" / "optimizer-00001.safetensors")
    assert {state.item() for name, state in states.items() if name.endswith("|step")} == {6.0}


def test_a_checkpoint_keeps_the_scale_and_a_resume_is_exact(fp16, tmp_path):
    args = ("--strategy=single", "--max_steps=4", "--save_steps=2")
    whole, scales = fp16("whole", *args, FIRST_SCALE=str(2.0**10))
    state = json.loads((whole.folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["loss_scale"] == {"value": 2.0**10, "steps": 2} and scales == [2.0**10] * 5
    resumed, scales = fp16("resumed", *args, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert scales == [2.0**10] * 3
    assert resumed.metrics() == whole.metrics()[2:]


def test_a_resume_does_not_change_the_precision_unasked(fp16, tmp_path):
    args = ("--strategy=single", "--max_steps=2", "--save_steps=1")
    run, _ = fp16("run", *args)
    other = launch(tmp_path / "other", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-1'}")
    assert other.code == 2 and "fp16: True -> None" in other.stderr, other.stderr
    more = (f"--resume_from_checkpoint={run.folder / 'checkpoint-1'}", "--resume_changes=[fp16]")
    changed = launch(tmp_path / "changed", *args, *more)
    assert changed.code == 0, changed.stderr
    assert changed.metrics() == pytest.approx(run.metrics()[1:], abs=0.01)


def test_what_no_scale_helps_ends_the_run(tmp_path):
    """A weight that is not finite, or a loss beyond fp16, is no overflow of the scale."""
    (tmp_path / "poison.py").write_text(
        "import torch\nfrom transformers import TrainerCallback\n\n"
        "class Poison(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, model=None, **_):\n"
        "        with torch.no_grad():\n"
        "            next(p for p in model.parameters() if p.requires_grad).fill_(1e30)\n"
    )
    args = ("--fp16", "--bf16=false", "--strategy=single", "--max_steps=3", "--callbacks=poison:Poison")
    run = launch(tmp_path / "run", *args, PYTHONPATH=str(tmp_path))
    assert run.code == 1 and "in step 2" in run.stderr, run.stderr
    assert json.loads((run.folder / "logs" / "non_finite.json").read_text())["step"] == 2


def test_the_scale_doubles_and_halves():
    scale = LossScale()
    for _ in range(WINDOW):
        scale.count()
    assert scale.state() == {"value": 2 * FIRST, "steps": 0}
    scale.count()
    halvings = 0
    while scale.halve():
        halvings += 1
    assert scale.state() == {"value": LEAST, "steps": 0} and halvings == 17
