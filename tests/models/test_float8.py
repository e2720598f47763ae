"""A base in float8: its products against exact ones of the same codes and against float32, and what stays as it is."""

import pytest
import torch
from peft import PeftModel
from small_models import adapted
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from manyrank.models import float8
from manyrank.models.float8 import E4M3, Float8Linear, rows_to_float8, to_float8
from manyrank.models.lora import speed_up
from manyrank.models.reach import reach

IDS = torch.arange(48).view(2, 24) % 200
HALF_STEP = 2**-4  # of e4m3: three bits of mantissa
CPU = torch.device("cpu")


def base(dtype=torch.bfloat16):
    torch.manual_seed(1)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    return LlamaForCausalLM(config).to(dtype)


def exact(x: torch.Tensor) -> torch.Tensor:
    """Rows as float8 holds them, in float64, by arithmetic of our own: e4m3 rounds to multiples of 2**(exponent - 3)."""
    x = x.double()
    scale = 2.0 ** (torch.floor(torch.log2(x.abs().amax(-1, keepdim=True))) - 7)
    step = 2.0 ** (torch.floor(torch.log2((x / scale).abs().clamp(min=2.0**-6))) - 3)
    return torch.round(x / scale / step) * step * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_keep_three_bits_whatever_their_size(dtype):
    torch.manual_seed(0)
    x = (torch.randn(6, 64) * torch.tensor([1e-30, 1e-5, 1.0, 3.0, 1e4, 1e30])[:, None]).to(dtype)
    rows, scale = rows_to_float8(x)
    assert rows.dtype == E4M3 and torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert torch.equal(rows.double() * scale, exact(x))
    normal = x.abs() > x.abs().amax(-1, keepdim=True) * 2**-13
    assert ((rows.float() * scale - x).abs() <= HALF_STEP * x.abs())[normal].all() and normal.float().mean() > 0.95
    zero, _ = rows_to_float8(torch.zeros(1, 16, dtype=dtype))
    assert not zero.float().any()
    broken, _ = rows_to_float8(torch.tensor([[float("inf")] * 8 + [float("nan")] * 8], dtype=dtype))
    assert broken.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_is_the_exact_product_of_its_codes_forward_and_backward(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96).to(dtype)
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 2, 96)[:, None]  # rows of scales of their own
    layer = Float8Linear(linear, CPU)
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight, rounding = exact(linear.weight), 2e-2 if dtype == torch.bfloat16 else 1e-5

    def close(found, wanted, limit):
        return (found.double() - wanted).norm() <= limit * wanted.norm()

    assert close(y, exact(x) @ weight.T + linear.bias.double(), rounding / 5)
    scale = layer.scale.double().T
    assert close(x.grad, exact(dy * scale.to(dtype)) @ (weight / scale.T), rounding / 5)
    # Rounding errors of a product's terms are independent: together they are about as large as one.
    assert close(y, (x.double() @ linear.weight.double().T + linear.bias.double()), HALF_STEP)
    assert close(x.grad, dy.double() @ linear.weight.double(), HALF_STEP)


@pytest.mark.skipif(not float8.CPUS_SCALE_ROWS, reason="this torch has the other way alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpus_without_a_scale_for_each_row_have_the_same_bits(dtype, monkeypatch):
    torch.manual_seed(0)
    x, (weight, scale) = torch.randn(40, 64, dtype=dtype), rows_to_float8(torch.randn(32, 64))
    product = float8._product(x, weight.T, scale.T.contiguous())
    monkeypatch.setattr(float8, "CPUS_SCALE_ROWS", False)
    assert torch.equal(float8._product(x, weight.T, scale.T.contiguous()), product) and product.dtype == dtype


def test_a_row_does_not_depend_on_what_lies_beside_it():
    layer, x = Float8Linear(torch.nn.Linear(64, 32), CPU), torch.randn(9, 64)
    beside = torch.cat([x, 1000 * torch.randn(4, 64)])
    assert torch.equal(layer(beside)[:9], layer(x))


def test_a_model_in_float8_trains_its_adapters_alone():
    """With half the bytes in its layers, a loss and gradients near those in bf16, and scales that survive bfloat16()."""
    plain, model = adapted(base()), base()
    to_float8(model, CPU)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    assert {p.dtype for layer in layers for p in [layer.weight]} == {torch.uint8}
    assert len(reach(model).parameters) == len(list(model.parameters()))
    model = adapted(model)
    assert speed_up(model) == 14
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    results = []
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in one.named_parameters() if p.requires_grad}))
    (wanted, wanted_gradients), (loss, gradients) = results
    assert 0 < abs(loss - wanted) < 0.02 and gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert ".lora_" in name and (gradient - wanted_gradients[name]).norm() < 0.2 * wanted_gradients[name].norm()


def test_peft_computes_the_same_on_it():
    model = base(torch.float32)
    to_float8(model, CPU)
    model = adapted(model, lora_dropout=0.0)
    own = model(input_ids=IDS, labels=IDS).loss
    own.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert speed_up(model) == 14
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() == pytest.approx(own.item(), rel=1e-3)
    for name, gradient in gradients.items():
        assert (model.get_parameter(name).grad - gradient).norm() < 0.05 * gradient.norm(), name


def test_a_layer_of_an_odd_size_stays():
    model = torch.nn.ModuleDict({"odd": torch.nn.Linear(24, 32), "even": torch.nn.Linear(32, 32)})
    model.get_output_embeddings = lambda: None
    to_float8(model, CPU)
    assert type(model["odd"]) is torch.nn.Linear and type(model["even"]) is Float8Linear


def test_the_saved_adapter_loads_with_plain_peft(tmp_path):
    base(torch.float32).save_pretrained(tmp_path / "base")
    model = base(torch.float32)
    to_float8(model, CPU)
    model = adapted(model)
    speed_up(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        here, there = model.eval()(input_ids=IDS).logits, loaded.eval()(input_ids=IDS).logits
    assert 0 < (here - there).norm() < 0.1 * there.norm()
