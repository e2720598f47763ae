"""RMSNorm by torch's function against the modules of transformers: which of them it is, values, gradients."""

import copy

import pytest
import torch
from small_models import MODELS, SHAPE, SMALL, recipe
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from manyrank.models import fused_norm, spec
from manyrank.models.fused_norm import fuse_norms, is_plain_rms
from manyrank.models.load import with_adapters

IDS = torch.arange(48).view(2, 24)


@pytest.fixture
def anywhere(monkeypatch):
    """Take the function on CPUs, too."""
    monkeypatch.setattr(fused_norm, "takes", lambda x, weight: x.dtype == weight.dtype)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_norms_that_the_plan_takes_for_fused_are(kind):
    values = {key: value for key, value in {**SHAPE, **MODELS[kind]}.items() if value is not None}
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms = {type(module) for module in model.modules() if "RMSNorm" in type(module).__name__}
    if spec.from_config(config.to_dict(), name=kind).norm == "rms":
        assert norms and all(map(is_plain_rms, norms))
    if kind.startswith("gemma"):
        assert norms and not any(map(is_plain_rms, norms))


def test_a_norm_without_a_weight_stays():
    """Gemma 4 has plain ones with a weight and such without, of one class."""
    norms = torch.nn.Sequential(Gemma4RMSNorm(8), Gemma4RMSNorm(8, with_scale=False))
    x = torch.randn(2, 8)
    before = norms(x)
    assert fuse_norms(norms) == 1
    assert torch.equal(norms(x), before)


def test_what_is_no_plain_norm_stays():
    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden, gate):
            return super().forward(hidden) * gate

    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, hidden):
            return super().forward(hidden) / 2

    class OtherRMSNorm(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

    assert is_plain_rms(LlamaRMSNorm)
    kinds = (GemmaRMSNorm, GatedRMSNorm, HalfRMSNorm, OtherRMSNorm, torch.nn.RMSNorm, torch.nn.LayerNorm)
    assert not any(map(is_plain_rms, kinds))


def test_loss_and_gradients_in_float32_are_the_same(anywhere, monkeypatch):
    model, calls, inner = llama(), [], fused_norm.F.rms_norm
    fused = copy.deepcopy(model)
    assert fuse_norms(fused) == 2 * 4 + 1 and fuse_norms(fused) == 0
    monkeypatch.setattr(fused_norm.F, "rms_norm", lambda *args: calls.append(args) or inner(*args))
    for each in (model, fused):
        each(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 9 and fused.state_dict().keys() == model.state_dict().keys()
    for (name, parameter), want in zip(fused.named_parameters(), model.parameters()):
        assert (parameter.grad - want.grad).norm() <= 1e-5 * want.grad.norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_it_is_no_further_from_the_exact_values(anywhere, autocast):
    torch.manual_seed(0)
    norm, exact = LlamaRMSNorm(256).bfloat16(), LlamaRMSNorm(256).double()
    torch.nn.init.normal_(norm.weight)
    exact.weight.data = norm.weight.double()
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    x, dy = (torch.randn(5, 256).bfloat16() for _ in range(2))
    off = []
    for each, dtype in ((norm, torch.bfloat16), (fused, torch.bfloat16)):
        entry = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(entry)
        y.backward(dy)
        double = x.double().requires_grad_()
        root = (double.pow(2).mean(-1, keepdim=True) + exact.variance_epsilon).rsqrt()
        wanted = double * root * exact.weight
        wanted.backward(dy.double())
        assert y.dtype == entry.grad.dtype == dtype
        off.append([(y.double() - wanted).norm().item(), (entry.grad.double() - double.grad).norm().item()])
    assert all(fused_off <= 1.05 * plain_off for plain_off, fused_off in zip(*off))


def test_on_a_cpu_and_for_other_types_norms_are_the_modules_own():
    norm = LlamaRMSNorm(64)
    fused = copy.deepcopy(norm)
    assert fuse_norms(fused) == 1 and type(fused).__name__ == "LlamaRMSNorm" and isinstance(fused, LlamaRMSNorm)
    for x in (torch.randn(3, 64), torch.randn(3, 64).bfloat16()):
        assert torch.equal(fused(x), norm(x))


@pytest.mark.parametrize("argv", [(), ("--torch_compile",), ("--disable_fused=norm",)], ids=str)
def test_the_recipe_decides(argv):
    line = ("--method=lora", *argv)
    config = (
        recipe(*line)
        if argv != ("--disable_fused=norm",)
        else recipe(line[0]).model_copy(update={"disable_fused": ["norm"]})
    )
    model = with_adapters(llama(), config)
    norms = {type(module) for module in model.modules() if "RMSNorm" in type(module).__name__}
    assert (norms == {LlamaRMSNorm}) == bool(argv)
