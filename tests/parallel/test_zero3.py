"""ZeRO-3 gathers whole layers: how often, with which sizes, and with the losses of one process."""

import json
from types import SimpleNamespace

import pytest
import torch
from launches import ROOT, Run, launch, nightly
from peft import LoraConfig, get_peft_model
from small_models import LAUNCHED, save_for_launch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from manyrank.errors import UserError
from manyrank.parallel import zero3_preparation

LAYERS = 4  # of the embedded model
MICRO_BATCHES = ("--global_batch_size=8", "--per_device_train_batch_size=1", "--max_length=96", "--max_steps=3")
ZERO3 = ("--strategy=zero3", "--nproc=2")

# Gathers of a step's forward and backward, and of its optimizer.
COUNTER = """
import importlib, json, os, sys
from manyrank.parallel.sharded_engines import DeepSpeedEngine
from manyrank.tasks.sft import SFT
from transformers import TrainerCallback

importlib.import_module("deepspeed.comm.torch")
backend, gathers = sys.modules["deepspeed.comm.torch"].TorchBackend, []

def counted(name):
    real = getattr(backend, name)
    def gather(*args, **kwargs):
        gathers.append(name)
        return real(*args, **kwargs)
    setattr(backend, name, gather)

for name in ("all_gather_into_tensor", "all_gather", "all_gather_coalesced"):
    counted(name)

def noted(owner, name):
    real = getattr(owner, name)
    def method(self, *args, **kwargs):
        gathers.clear()
        result = real(self, *args, **kwargs)
        micro = len(args[0].micro_batches) if args else 0
        with open(os.environ["COUNTED"], "a") as file:
            file.write(json.dumps({"what": name, "gathers": len(gathers), "micro_batches": micro}) + chr(10))
        return result
    setattr(owner, name, method)

if os.environ.get("RANK") == "1":
    noted(SFT, "forward_backward")
    noted(DeepSpeedEngine, "step")

class Count(TrainerCallback):
    pass
"""


def counted(tmp_path, *args: str) -> tuple[Run, list[float], list[int]]:
    """A run under zero3, the gathers of its steps for each micro-batch, and those of its optimizer."""
    (tmp_path / "counting.py").write_text(COUNTER)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "COUNTED": str(tmp_path / "counted")}
    run = launch(tmp_path / "zero3", *args, *ZERO3, "--callbacks=counting:Count", **env)
    assert run.code == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "counted").read_text().splitlines()]
    steps = [line for line in lines if line["what"] == "forward_backward"]
    assert min(step["micro_batches"] for step in steps) == 4
    return (
        run,
        [step["gathers"] / step["micro_batches"] for step in steps],
        [line["gathers"] for line in lines if line["what"] == "step"],
    )


@pytest.mark.parametrize("args", [(), ("--gradient_checkpointing=full",), *nightly((("--method=full",),))])
def test_a_layer_is_gathered_for_its_forward_and_its_backward(args, embedded_model, tmp_path):
    """With DeepSpeed's own modules and accelerate's sizes there were 55 gathers in a micro-batch, and 17 in a step."""
    single = launch(tmp_path / "single", *MICRO_BATCHES, *args, "--strategy=single")
    run, gathers, of_optimizer = counted(tmp_path, *MICRO_BATCHES, *args)
    assert run.metrics() == pytest.approx(single.metrics(), abs=1e-5) and len(run.metrics()) == 3
    assert "Warning" not in run.stderr  # of names that the libraries call old
    assert run.metrics("grad_norm") == pytest.approx(single.metrics("grad_norm"), rel=1e-5, abs=1e-5)
    assert len(gathers) == 3 and max(gathers[1:]) <= 2 * LAYERS + 4  # the embedding and lm_head, too
    assert of_optimizer == [1, 1, 1]


def test_experts_train_with_the_losses_of_one_process(embedded_model, tmp_path):
    """Ranks whose tokens take different experts gather the same: the layer."""
    torch.manual_seed(0)
    shape = {**LAUNCHED, "num_local_experts": 4, "num_experts_per_tok": 1}
    save_for_launch(MixtralForCausalLM(MixtralConfig(**shape)), tmp_path / "model", embedded_model)
    given = [f"--model_name_or_path={tmp_path}/model", "--method=full", *MICRO_BATCHES]
    single = launch(tmp_path / "single", *given, "--strategy=single")
    assert single.code == 0, single.stderr
    run, gathers, _ = counted(tmp_path, *given)
    assert run.metrics() == pytest.approx(single.metrics(), abs=1e-5) and len(run.metrics()) == 3
    assert max(gathers[1:]) <= 2 * LAUNCHED["num_hidden_layers"] + 4


def adapted() -> torch.nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**LAUNCHED))
    return get_peft_model(model, LoraConfig(r=12, target_modules="all-linear"))


def plugin(**settings) -> SimpleNamespace:
    return SimpleNamespace(deepspeed_config={"zero_optimization": settings})


def test_sizes_follow_from_the_model():
    model = adapted()
    sizes = zero3_preparation.sizes(model, ["LlamaDecoderLayer"])
    assert sizes["stage3_param_persistence_threshold"] == 12 * 48 > 10 * 32
    layer = model.get_base_model().model.layers[0]
    frozen = sum(p.numel() for name, p in layer.named_parameters() if "lora_" not in name and "norm" not in name)
    small = 2 * 16 * 32  # of k and v: no larger than an adapter
    assert sizes["stage3_prefetch_bucket_size"] == frozen - (small if 16 * 32 <= 12 * 48 else 0)
    assert sizes["stage3_max_live_parameters"] == 10**9
    given = plugin(stage3_param_persistence_threshold=7, stage3_prefetch_bucket_size="auto")
    zero3_preparation.gather_by_layer(given, model)
    assert given.deepspeed_config["zero_optimization"] == {
        "stage3_param_persistence_threshold": 7,
        "stage3_prefetch_bucket_size": sizes["stage3_prefetch_bucket_size"],
    }


def test_a_layer_without_a_gradient_at_its_input_is_refused():
    """DeepSpeed would take its gradients for zeros."""
    model = adapted()
    zero3_preparation.gather_by_layer(plugin(), model)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    layer = model.get_base_model().model.layers[0]
    with pytest.raises(UserError, match="LlamaDecoderLayer has no input with a gradient"):
        layer(hidden_states=torch.ones(1, 3, 32))
