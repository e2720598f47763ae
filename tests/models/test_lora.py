"""The fast way through LoRA layers against peft's own: values, gradients, saved adapters, and what is left to peft."""

import copy

import pytest
import torch
from peft import PeftModel
from small_models import adapted
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from manyrank.models.lora import AdapterCasts, _Adapted, speed_up

IDS = torch.arange(48).view(2, 24) % 200


@pytest.fixture
def base():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def results(model, bf16=False):
    """Loss, and the gradients of adapters and of the embedded tokens."""
    model.zero_grad()
    torch.manual_seed(7)
    entry = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(inputs_embeds=entry, labels=IDS).loss
    loss.backward()
    return loss.item(), {
        "entry": entry.grad,
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad},
    }


def assert_same(model, *, layers, loss=1e-6, gradient=1e-5, bf16=False):
    fast = copy.deepcopy(model)
    assert speed_up(fast) == layers
    wanted, wanted_grads = results(model, bf16)
    found, grads = results(fast, bf16)
    assert found == pytest.approx(wanted, rel=loss) and set(grads) == set(wanted_grads)
    for name, want in wanted_grads.items():
        assert grads[name].dtype == want.dtype and (grads[name] - want).norm() <= gradient * want.norm(), name
    return fast


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
def test_same_loss_and_gradients_as_peft(base, options):
    assert_same(adapted(base, **options), layers=14)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_under_autocast_within_its_rounding(base, dropout):
    base = base.to(torch.bfloat16)
    model = adapted(base, lora_dropout=dropout)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_same(model, layers=14, loss=1e-3, gradient=0.03, bf16=True)


@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_over_a_quantised_base(embedded_model, options, dropout):
    base = AutoModelForCausalLM.from_pretrained(
        embedded_model, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    assert_same(adapted(base, lora_dropout=dropout), layers=28, gradient=1e-4)


def test_float32_activations_over_a_quantised_base_under_autocast(embedded_model):
    """Some norms give float32 under autocast, and the base answers in it."""
    base = AutoModelForCausalLM.from_pretrained(
        embedded_model, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    layer = adapted(base).get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 192)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        speed_up(layer)
        assert torch.allclose(layer(x).float(), wanted.float(), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [False, True])
def test_to_the_bit_what_separate_multiplications_give(dtype, dropped):
    """For a scaling that is a power of two; others are rounded once less."""
    random = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=random).to(dtype) for shape in ((9, 12), (20, 12), (9, 20)))
    down, up = (torch.randn(*shape, generator=random).requires_grad_() for shape in ((4, 12), (20, 4)))
    x.requires_grad_()
    entry = (x.detach() * 2).requires_grad_() if dropped else None
    y = _Adapted.apply(x, entry, weight, None, None, down, up, None, 0.5)
    y.backward(dy)
    with torch.no_grad():
        given, low, high = x if entry is None else entry, down.to(dtype), up.to(dtype)
        thin, dthin = (given @ low.T) * 0.5, (dy @ high) * 0.5
        assert torch.equal(y, (x @ weight.T).addmm_(thin, high.T))
        assert torch.equal(down.grad, (dthin.T @ given).float()) and torch.equal(up.grad, (dy.T @ thin).float())
        if entry is None:
            assert torch.equal(x.grad, (dthin @ low).addmm_(dy, weight))
        else:
            assert torch.equal(x.grad, dy @ weight) and torch.equal(entry.grad, dthin @ low)


class Casts(TorchDispatchMode):
    """Note the shapes of what is cast from float32 to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, made.dtype) == (torch.float32, torch.bfloat16):
            self.shapes.append(made.shape)
        return made


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_that_are_cast_at_once_give_the_same_to_the_bit(base, dropout):
    model = adapted(base.to(torch.bfloat16), lora_dropout=dropout)
    speed_up(model)
    names, casts = set(model.state_dict()), AdapterCasts(model, torch.bfloat16)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(casts.copies) == len(adapters) == 28 and set(model.state_dict()) == names
    for _ in range(2):
        with Casts() as of_layers:
            wanted, wanted_grads = results(model, bf16=True)
        with casts.used(last=True), Casts() as left:
            found, grads = results(model, bf16=True)
        assert found == wanted and all(torch.equal(grads[name], want) for name, want in wanted_grads.items())
        shapes = {p.shape for p in adapters}
        assert sum(shape in shapes for shape in of_layers.shapes) == 2 * 28  # forward, backward
        assert sum(shape in shapes for shape in left.shapes) == 0
        with torch.no_grad():  # the next casts are of what the adapters are then
            for parameter in adapters:
                parameter.data.mul_(1.5)


def test_adapters_are_cast_once_a_step(base):
    model = adapted(base.to(torch.bfloat16))
    speed_up(model)
    casts = AdapterCasts(model, torch.bfloat16)

    def seen(*, last: bool) -> float:
        with casts.used(last=last):
            return casts.copies[0].float().sum().item()

    def change() -> None:
        with torch.no_grad():
            casts.masters[0].add_(1.0)

    first = seen(last=False)
    change()  # what no step does: shows that the second micro-batch makes none
    assert seen(last=True) == first != seen(last=False)
    with pytest.raises(RuntimeError, match="out of memory"), casts.used(last=False):
        raise RuntimeError("out of memory")
    before = casts.copies[0].clone()
    change()
    assert seen(last=False) != before.float().sum() and not casts.current


def test_variants_stay_with_peft(base):
    model = adapted(base, use_dora=True)
    before = {name: module.forward for name, module in model.named_modules() if name.endswith("q_proj")}
    assert speed_up(model) == 0
    with AdapterCasts(model, torch.bfloat16).used(last=True):  # of none, as of a model that is trained whole
        assert not any(layer.casts for layer in model.modules() if hasattr(layer, "casts"))
    assert all(model.get_submodule(name).forward == forward for name, forward in before.items())


def test_less_is_kept_for_the_backward(base):
    def kept(model):
        held = []  # also keeps an address from being used twice
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor
        ):
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=IDS).logits.sum()
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    model = adapted(base.to(torch.bfloat16))
    fast = copy.deepcopy(model)
    speed_up(fast)
    assert kept(fast) < 0.95 * kept(model)


def test_disabled_merged_and_saved_adapters_are_as_peft_has_them(base, tmp_path):
    plain = copy.deepcopy(base).eval()
    model = adapted(base).eval()
    speed_up(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.allclose(again(IDS).logits, wanted, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model.merge_and_unload()(IDS).logits, wanted, atol=1e-5)
