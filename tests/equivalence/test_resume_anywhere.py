"""Any adapter checkpoint resumes on any strategy, exactly: what one saves, each other one continues."""

import json
import sys
from functools import lru_cache

import pytest
import torch
import warm
from launches import ROOT, Run, launch, nightly
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from manyrank.runs import run_folder

STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "zero2", "zero3")
SHARDED = ("single", "hsdp", "zero2", "zero3")  # what saves by day; each engine saves and resumes in some test by day
STEPS, SAVED = 6, 3


FULL = ("--method=full", "--learning_rate=1e-4")


def processes(strategy: str) -> int:
    return {"single": 1, "hsdp": 4}.get(strategy, 2)


def chosen(strategy: str) -> list[str]:
    """The strategy, hsdp with two copies of the model on this machine."""
    return [f"--strategy={strategy}", *(["--hsdp_shard_size=2"] if strategy == "hsdp" else [])]


def followed(strategy: str, folders: list, tmp_path, *args: str, nproc: int) -> dict[str, list]:
    """Losses and gradient norms after each checkpoint, resumed on this strategy."""
    out = tmp_path / f"{strategy}.json"
    head = (
        [sys.executable]
        if strategy == "single"
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    )
    argv = [
        *head,
        str(ROOT / "tests" / "support" / "resume_worker.py"),
        str(out),
        str(tmp_path / strategy),
        *map(str, folders),
    ]
    argv += ["--", "verify", *chosen(strategy), f"--max_steps={STEPS}", "--logging_steps=1", *args]
    done = warm.run(argv, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / strategy / "logs" / "strategy.json").read_text())
    assert facts["world_size"] == nproc
    assert strategy != "hsdp" or facts["mesh"] == [2, 2]
    return json.loads(out.read_text())


class Sources(dict[str, Run]):
    """Runs with checkpoints by strategy, each launched when a test first asks for it."""

    def __init__(self, folder, *args: str) -> None:
        super().__init__()
        self.folder, self.args = folder, args

    def __missing__(self, strategy: str) -> Run:
        common = (*chosen(strategy), f"--nproc={processes(strategy)}", f"--max_steps={STEPS}")
        run = self[strategy] = launch(self.folder / strategy, *common, f"--save_steps={SAVED}", *self.args)
        assert run.code == 0, run.stderr
        return run


@pytest.fixture(scope="module")
def lora(embedded_model, tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def qlora(embedded_model, tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("qlora"), "--method=qlora")


@pytest.fixture(scope="module")
def full(embedded_model, tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("full"), *FULL)


def check(
    made: Sources,
    saved: tuple[str, ...],
    target: str,
    tmp_path,
    *args: str,
    nproc: int | None = None,
    close: float = 1e-5,
) -> None:
    folders = {name: made[name].folder / f"checkpoint-{SAVED}" for name in saved}
    found = followed(target, list(folders.values()), tmp_path, *args, nproc=nproc or processes(target))
    whole = made["single"]
    expected = list(zip(whole.metrics()[SAVED:], whole.metrics("grad_norm")[SAVED:]))
    for name, folder in folders.items():
        after = found[str(folder)]
        assert len(after) == STEPS - SAVED, name
        for (loss, norm), (loss_then, norm_then) in zip(after, expected):
            assert abs(loss - loss_then) < close and abs(norm - norm_then) < close * max(1, norm_then), (name, target)


@pytest.mark.parametrize(
    ("saved", "target"),
    [(SHARDED, "fsdp"), (SHARDED, "zero3"), *nightly(*((STRATEGIES, target) for target in STRATEGIES))],
)
def test_lora_continues_from_every_strategy_on_this_one(lora, saved, target, tmp_path):
    check(lora, saved, target, tmp_path)


@pytest.mark.parametrize("target", ["fsdp", *nightly("ddp", "hsdp", "zero3")])
def test_qlora_continues_from_every_strategy_on_this_one(qlora, target, tmp_path):
    check(qlora, ("single", "fsdp", "zero3"), target, tmp_path, "--method=qlora")


@pytest.mark.parametrize(("target", "nproc"), [("hsdp", 4), *nightly(("zero3", 2), ("single", 1), ("fsdp", 3))])
def test_full_fine_tuning_continues_from_every_strategy_on_this_one(full, target, nproc, tmp_path):
    saved = ("single", "fsdp", "zero3") if target == "hsdp" else ("single", "fsdp", "hsdp", "zero3")
    check(full, saved, target, tmp_path, *FULL, nproc=nproc)


def test_weights_of_a_checkpoint_load_as_they_are(full, lora, embedded_model):
    """Whole weights as a model, an adapter with its base; nothing has to be put together first."""
    for name, run in ((name, full[name]) for name in ("single", "fsdp", "zero3")):
        loaded = AutoModelForCausalLM.from_pretrained(run.folder / "checkpoint-6", dtype="float32")
        final = AutoModelForCausalLM.from_pretrained(run.folder / "final_model", dtype="float32")
        assert same(loaded.state_dict(), final.state_dict()), name
    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype="float32")
    adapted = PeftModel.from_pretrained(base, str(lora["hsdp"].folder / "checkpoint-6")).merge_and_unload()
    moved = [n for n, t in adapted.state_dict().items() if not torch.equal(t, embedded(embedded_model)[n])]
    assert moved and all("proj" in name for name in moved)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@lru_cache
def embedded(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


@pytest.mark.parametrize("strategies", [SHARDED, *nightly((STRATEGIES,))])
def test_all_strategies_write_the_same_names_and_shapes(lora, strategies):
    """And nearly the same numbers: one format, not six."""
    folders = [lora[strategy].folder / f"checkpoint-{SAVED}" for strategy in strategies]
    for file in ("adapter_model.safetensors", "optimizer-00001.safetensors"):
        first, *others = [load_file(folder / file) for folder in folders]
        for other in others:
            assert {name: tensor.shape for name, tensor in other.items()} == {n: t.shape for n, t in first.items()}
            assert all((other[name] - tensor).abs().max() < 1e-4 for name, tensor in first.items())


WHERE = {  # Muon's products are in bf16: in shards they are summed in another order
    "lion_32bit": (("single", "fsdp", "zero2", "zero3"), ("fsdp", "zero3"), 1e-5),
    "sgd --optim_args=momentum=0.9": (("single", "fsdp", "zero2", "zero3"), ("zero2",), 1e-5),
    "sgd": (("single",), ("zero2",), 1e-5),
    "muon": (("single", "ddp", "fsdp", "hsdp"), ("fsdp",), 2e-3),
}
BY_NIGHT = [(optim, target) for optim, (saved, _, _) in WHERE.items() for target in saved]


@pytest.mark.parametrize(
    ("optim", "target"),
    [*((optim, target) for optim, (_, targets, _) in WHERE.items() for target in targets), *nightly(*BY_NIGHT)],
)
def test_a_moment_continues_from_every_strategy_on_this_one(optim, target, embedded_model, tmp_path):
    args, (saved, _, close) = f"--optim={optim}".split(), WHERE[optim]
    check(Sources(tmp_path / "saved", *args), saved, target, tmp_path, *args, close=close)


@pytest.mark.parametrize(
    "optim",
    [
        *("adamw_8bit", "sgd", "adafactor", "lion_8bit", "muon"),
        *nightly("paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    ],
)
def test_other_optimizers_resume_to_the_bit(optim, embedded_model, tmp_path):
    """With their quantisation state: the losses after it are those of the uninterrupted run."""
    common = (f"--optim={optim}", "--max_steps=4", "--lora_r=64", "--strategy=single")
    whole = launch(tmp_path / "a", *common, "--save_steps=2")
    assert whole.code == 0, whole.stderr
    saved = load_file(whole.folder / "checkpoint-2" / "optimizer-00001.safetensors") if optim != "sgd" else {}
    if "8bit" in optim:
        assert {name.rpartition("|")[2] for name in saved} >= {"state1", "absmax1", "qmap1", "step"}
    if optim == "adafactor":
        assert {name.rpartition("|")[2] for name in saved} == {"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"}
    part = launch(tmp_path / "b", *common, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert part.code == 0, part.stderr
    assert part.metrics() == whole.metrics()[2:]
    resume = f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}"
    elsewhere = launch(
        tmp_path / "c", f"--optim={optim}", "--max_steps=4", "--lora_r=64", "--strategy=ddp", "--nproc=2", resume
    )
    assert elsewhere.code == 0, elsewhere.stderr
    # A difference in the last bit of a gradient can move a moment to the next of 256 values.
    assert elsewhere.metrics() == pytest.approx(whole.metrics()[2:], abs=1e-3 if "8bit" in optim else 1e-5)
    ends = [load_file(run.folder / "final_model" / "adapter_model.safetensors") for run in (whole, part)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_rows_are_seen_once_over_three_topologies(embedded_model, tmp_path):
    """An epoch of 160 rows in steps of 16, with interruptions: each row is seen once, whoever trains."""
    (tmp_path / "counting.py").write_text(COUNTER)
    env = {"PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path / "seen")}
    common = ("--data_path=data/sample.jsonl", "--num_train_epochs=1", "--max_steps=-1", "--save_steps=1")
    common += ("--callbacks=counting:Count", "--global_batch_size=16", "--gradient_accumulation_steps=none")
    stages = [("ddp", 2, 3), ("single", 1, 5), ("fsdp", 2, 8), ("ddp", 3, 99)]
    for strategy, nproc, last in stages:
        where = (f"--strategy={strategy}", f"--nproc={nproc}", "--resume_from_checkpoint=auto")
        run = launch(tmp_path / "run", *common, *where, STOP_AT=str(last), **env)
        assert run.code == (0 if last == 99 else 75), run.stderr
    seen = [json.loads(line) for file in tmp_path.glob("seen-*") for line in file.read_text().splitlines()]
    rows = sorted(row for entry in seen for row in entry["rows"])
    assert rows == list(range(1, 161))
    assert sorted({entry["step"] for entry in seen}) == list(range(10))
    assert [path.name for path in run_folder.checkpoints(tmp_path / "run")][-1] == "checkpoint-10"


COUNTER = """
import json, os, signal
from manyrank.training.trainer import Trainer
from transformers import TrainerCallback

original = Trainer.train_step
def train_step(self, step):
    rows = [row for micro in step.micro_batches if len(micro.targets) for _, row in micro.rows]
    with open(f"{os.environ['SEEN']}-{self.world}-{self.engine.accelerator.process_index}", "a") as file:
        file.write(json.dumps({"step": self.state.global_step, "rows": rows}) + chr(10))
    return original(self, step)
Trainer.train_step = train_step

class Count(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), signal.SIGTERM)
"""
