"""tf32 and full_determinism: what torch computes by while a run trains, and that it is given back."""

import json
import os

import pytest
import torch
from launches import launch

from manyrank.api import SFTConfig
from manyrank.models.load import with_adapters
from manyrank.topology.precision import DETERMINISTIC
from manyrank.training import numerics

WRITES = """
import json, os, torch
from pathlib import Path
from transformers import TrainerCallback

class Look(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        names = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
        seen = {name: os.environ.get(name) for name in names}
        seen["algorithms"] = torch.are_deterministic_algorithms_enabled()
        seen["cudnn"] = [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark]
        Path(os.environ["SEEN"]).write_text(json.dumps(seen))

class Put(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
"""
STEPS = ("--max_steps=2", "--lr=3e-3", "--full_determinism")


@pytest.fixture
def looking(tmp_path):
    (tmp_path / "looking.py").write_text(WRITES)
    return {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "SEEN": str(tmp_path / "seen"),
    }


def placed(strategy: str) -> tuple[str, ...]:
    return (f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}")


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero3"])
def test_a_run_computes_by_deterministic_algorithms(tmp_path, looking, strategy):
    runs = [
        launch(tmp_path / f"run{number}", *STEPS, "--callbacks=looking:Look", *placed(strategy), **looking)
        for number in (1, 2)
    ]
    assert [run.code for run in runs] == [0, 0], runs[0].stderr
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "FLASH_ATTENTION_DETERMINISTIC": "1",
        "algorithms": True,
        "cudnn": [True, False],
    }
    adapters = [(run.folder / "final_model" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]


def test_an_operation_without_a_deterministic_version_names_the_option(tmp_path, looking):
    run = launch(tmp_path / "run", *STEPS, "--callbacks=looking:Put", "--strategy=single", **looking)
    assert run.code == 2
    assert "no deterministic version: RuntimeError: put_ does not have a deterministic implementation" in run.stderr
    assert "where: full_determinism" in run.stderr
    assert launch(tmp_path / "free", *STEPS[:2], "--callbacks=looking:Put", "--strategy=single", **looking).code == 0


def config(**options) -> SFTConfig:
    return SFTConfig(model_name_or_path="embedded", data_path="data/sample.jsonl", **options)


def test_what_is_set_is_given_back():
    usual = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    back = numerics.set_up(config(tf32=True, full_determinism=True))
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == ("high", True)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert DETERMINISTIC.items() <= os.environ.items()
    back()
    assert not DETERMINISTIC.keys() & os.environ.keys()
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == usual
    numerics.set_up(config())
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == usual


def test_positions_are_exact_in_tf32(embedded_model):
    from transformers import AutoModelForCausalLM

    model = with_adapters(AutoModelForCausalLM.from_pretrained(embedded_model), config(tf32=True, packing="none"))
    numerics.keep_positions_exact(model)
    seen = {}
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    layer = next(module for name, module in model.named_modules() if name.endswith("mlp"))
    for name, module in {"rotary": rotary, "mlp": layer}.items():
        module.register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: torch.get_float32_matmul_precision()})
        )
    back = numerics.set_up(config(tf32=True))
    try:
        model(torch.tensor([[1, 2, 3]]))
        assert seen == {"rotary": "highest", "mlp": "high"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        back()
