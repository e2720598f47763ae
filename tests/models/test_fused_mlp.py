"""SwiGLU that keeps gate and up alone: which modules it is, values and gradients, bytes that are kept, its CUDA kernels."""

import copy
import ctypes
import shutil
import subprocess

import pytest
import torch
from small_models import MODELS, SHAPE, SMALL, recipe
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from manyrank.models import fused_mlp, spec
from manyrank.models.fused_mlp import OPERATIONS, ROUNDING, Kernels, deviation, fuse_mlps, is_swiglu, silu_mul
from manyrank.models.load import with_adapters

IDS = torch.arange(48).view(2, 24)


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **more)).train()


def mlp(**more) -> LlamaMLP:
    return LlamaMLP(LlamaConfig(**SMALL, **more))


@pytest.mark.parametrize("kind", MODELS)
def test_the_mlps_that_the_plan_takes_for_fused_are(kind):
    values = {key: value for key, value in {**SHAPE, **MODELS[kind]}.items() if value is not None}
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = spec.from_config(config.to_dict(), name=kind)
    gated = [layer for layer in shape.each() if "down_proj" in layer.linears]
    assert fuse_mlps(model) == (len(gated) if shape.swiglu else 0)
    assert shape.swiglu == (not kind.startswith("gemma") and kind != "starcoder2")


def test_the_activation_of_each_module_counts_not_its_class():
    assert is_swiglu(mlp()) and is_swiglu(mlp(mlp_bias=True)) and is_swiglu(mlp(hidden_act="swish"))
    assert not any(is_swiglu(mlp(hidden_act=other)) for other in ("gelu", "quick_gelu", "relu", "sigmoid"))


def test_what_is_no_plain_swiglu_stays():
    class Clamped(LlamaMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
            return self.down_proj(self.act_fn(gate) * up)

    class Doubled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Dropped(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(super().forward(x))

    class Routed(LlamaMLP):
        def forward(self, x, weights):
            return super().forward(x) * weights

    for kind in (Clamped, Doubled, Dropped, Routed):
        module = kind(LlamaConfig(**SMALL)).eval()
        assert not is_swiglu(module) and fuse_mlps(module) == 0 and type(module) is kind
        assert all(type(child) is not fused_mlp._Diagonal for child in module.children()) and not module.training


def test_recognition_draws_no_random_numbers():
    model, before = llama(), torch.random.get_rng_state()
    assert fuse_mlps(model) == 4 and fuse_mlps(model) == 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "phi3"])  # with two matrices, and with one of both halves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_a_cpu_losses_and_gradients_are_the_modules_own_to_the_bit(kind, dtype, checkpointing, method):
    values = {key: value for key, value in {**SHAPE, **MODELS[kind]}.items() if value is not None}
    config = recipe(f"--method={method}", f"--gradient_checkpointing={checkpointing}", "--packing=none")
    found = []
    for parts in (["attention"], ["attention", "mlp"]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=dtype)
        model = with_adapters(base, config.model_copy(update={"disable_fused": parts})).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        kinds = {type(module) for module in model.modules() if type(module).__name__ in ("LlamaMLP", "Phi3MLP")}
        assert [hasattr(mlp, "plain_forward") for mlp in kinds] == ["mlp" not in parts]
        found.append((loss, gradients))
    (loss, gradients), (plain_loss, plain) = found
    assert torch.equal(loss, plain_loss) and gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


def test_gate_and_up_alone_are_kept():
    def kept(module: torch.nn.Module) -> int:
        storages: dict[int, int] = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(torch.ones(7, SMALL["hidden_size"], requires_grad=True))
        y.sum().backward()
        return sum(storages.values())

    plain = mlp()
    fused = copy.deepcopy(plain)
    fuse_mlps(fused)
    assert kept(plain) - kept(fused) == 7 * SMALL["intermediate_size"] * 4


def test_factors_of_two_types_are_multiplied_as_torch_does():
    gate, up = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(3, 8, requires_grad=True)
    y = silu_mul(gate, up)
    y.sum().backward()
    assert torch.equal(y, torch.nn.functional.silu(gate) * up) and y.dtype == up.grad.dtype == torch.float32
    assert gate.grad.dtype == torch.bfloat16


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_source_of_the_cuda_kernels_computes_them(tmp_path):
    """Compiled for the CPU, in float32 as torch compiles it for 16-bit tensors, whose results it rounds once."""
    source = f"""#include <math.h>
    {fused_mlp.FORWARD}
    {fused_mlp.BACKWARD}
    extern "C" void forward(int n, float* gate, float* up, float* y) {{
      for (int i = 0; i < n; i++) y[i] = silu_mul(gate[i], up[i]);
    }}
    extern "C" void backward(int n, float* dy, float* gate, float* up, float* dgate, float* dup) {{
      for (int i = 0; i < n; i++) silu_mul_backward(dy[i], gate[i], up[i], dgate[i], dup[i]);
    }}"""
    (tmp_path / "kernels.cc").write_text(source)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "kernels.cc", "-o", "kernels.so"], cwd=tmp_path, check=True)
    library = ctypes.CDLL(tmp_path / "kernels.so")

    def call(name: str, results: int, *given: torch.Tensor) -> list[torch.Tensor]:
        tensors = [tensor.float() for tensor in given] + [torch.empty(given[0].shape) for _ in range(results)]
        getattr(library, name)(given[0].numel(), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))
        return [tensor.to(given[0].dtype) for tensor in tensors[len(given) :]]

    compiled = Kernels(lambda *given: call("forward", 1, *given)[0], lambda *given: tuple(call("backward", 2, *given)))
    assert deviation(compiled, torch.device("cpu")) <= ROUNDING
    dy, gate, up = (torch.randn(999, generator=torch.Generator().manual_seed(n)) for n in range(3))
    exact = [tensor.double() * 4 for tensor in (dy, gate, up)]
    wanted = (OPERATIONS.forward(*exact[1:]), *OPERATIONS.backward(*exact))
    for found, want in zip((compiled.forward(gate * 4, up * 4), *compiled.backward(dy * 4, gate * 4, up * 4)), wanted):
        assert (found - want).abs().max() <= 1e-6 * want.abs().max()


def test_kernels_that_compute_something_else_are_not_taken():
    """The trial on the card: a gradient without its second term, a product without the gate, nothing at all."""
    device = torch.device("cpu")
    half = Kernels(
        OPERATIONS.forward, lambda dy, gate, up: (dy * up * gate.sigmoid(), OPERATIONS.backward(dy, gate, up)[1])
    )
    ungated = Kernels(lambda gate, up: up.clone(), OPERATIONS.backward)
    nothing = Kernels(lambda gate, up: torch.zeros_like(up), OPERATIONS.backward)
    assert all(deviation(wrong, device) > 10 * ROUNDING for wrong in (half, ungated, nothing))
    assert fused_mlp.kernels("cpu") is OPERATIONS


@pytest.mark.parametrize("changed", [{}, {"torch_compile": True}, {"disable_fused": ["mlp"]}], ids=str)
def test_the_recipe_decides(changed):
    model = with_adapters(llama(), recipe("--method=lora").model_copy(update=changed))
    mlps = {type(module) for module in model.modules() if type(module).__name__ == "LlamaMLP"}
    assert (mlps == {LlamaMLP}) == bool(changed)
