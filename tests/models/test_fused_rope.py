"""The rotary embedding in few passes: which modules have it, values and gradients, what is kept, its CUDA kernel."""

import copy
import ctypes
import functools
import importlib
import shutil
import subprocess

import pytest
import torch
from small_models import MODELS, SHAPE, SMALL, made, packs, recipe
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from manyrank.models import fused_rope
from manyrank.models.fused_mlp import ROUNDING
from manyrank.models.fused_rope import by_operations, by_words, deviation, fuse_ropes, in_words, is_rotation
from manyrank.models.load import with_adapters

ROTATED = ("llama", "qwen3", "gemma", "olmo2", "phi", "phi3", "gpt_neox", "glm4_moe", "stablelm", "falcon")
OTHERS = ("glm", "cohere", "helium", "ernie4_5", "gpt_oss", "gemma4", "gptj")  # interleaved, of halves, of one tensor
PARTIAL = {"phi3", "gpt_neox", "glm4_moe"}  # phi and stablelm cut the heads themselves
MORE = {  # architectures beside MODELS
    "phi": {"head_dim": None},
    "gpt_neox": {"head_dim": None},
    "glm": {},
    "cohere": {"head_dim": None},
    "gpt_oss": {"num_local_experts": 4},
    "smollm3": {"head_dim": None},
}
IDS = torch.arange(48).view(2, 24)


def function(kind: str):
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **more))


def tensors(dtype: torch.dtype, rotary: int = 32) -> list[torch.Tensor]:
    """Queries and keys as projections give them, cosines and sines, and gradients of both."""
    random = torch.Generator().manual_seed(1)
    wide = [torch.randn(2, 7, heads * 32, generator=random).to(dtype) for heads in (6, 2, 6, 2)]
    query, key, dquery, dkey = (x.view(2, 7, -1, 32).transpose(1, 2) for x in wide)
    cos, sin = (torch.randn(2, 7, rotary, generator=random).to(dtype) for _ in range(2))
    return [query.requires_grad_(), key.requires_grad_(), cos, sin, dquery, dkey]


def results(rotate, inputs: list[torch.Tensor], **more) -> list[torch.Tensor]:
    """Rotated queries and keys, and their gradients."""
    query, key, cos, sin, *dys = inputs
    outputs = rotate(query, key, cos, sin, **more)
    return [*outputs, *torch.autograd.grad(outputs, (query, key), dys)]


def fused(rotary):
    """The function that modules get for one of a modeling file."""

    class Attention(torch.nn.Module):
        forward = eval("lambda self, *a, **k: apply_rotary_pos_emb(*a, **k)", {"apply_rotary_pos_emb": rotary})

    return functools.partial(fused_rope._fused(Attention).forward, None)


@pytest.mark.parametrize("kind", ROTATED)
def test_values_and_gradients_are_those_of_transformers(kind):
    for rotary in (32, 24, 8) if kind in PARTIAL else (32,):
        for dtype, close in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            inputs = tensors(dtype, rotary)
            for y, want in zip(results(fused(function(kind)), inputs), results(function(kind), inputs), strict=True):
                assert y.dtype == dtype and y.shape == want.shape
                assert (y - want).abs().max() <= close


@pytest.mark.parametrize("kind", ROTATED)
def test_in_16_bits_it_is_no_further_from_the_exact_values(kind):
    inputs = tensors(torch.bfloat16, 24 if kind in PARTIAL else 32)
    exact = results(function(kind), [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    ours, plain = results(fused(function(kind)), inputs), results(function(kind), inputs)
    for y, other, want in zip(ours, plain, exact):
        assert y.dtype == torch.bfloat16
        assert (y - want).norm() <= 1.02 * (other - want).norm() <= 0.01 * want.norm()


def test_queries_in_16_bits_stay_so_beside_cosines_in_float32():
    """Of full fine-tuning under autocast, whose attention rounds what transformers leaves in float32."""
    query, key, cos, sin, *dys = tensors(torch.bfloat16)
    inputs = [query, key, cos.float() / 3, sin.float() / 3, *dys]
    ours = results(fused(function("llama")), inputs)
    exact = results(function("llama"), [x.detach().float().requires_grad_(x.requires_grad) for x in inputs])
    for y, want in zip(ours, exact):
        assert y.dtype == torch.bfloat16
        assert ((y - want).abs() <= ROUNDING * want.abs() + 1e-6).all()  # rounded once


def test_tokens_may_stand_before_heads():
    query, key, cos, sin, *dys = tensors(torch.float32)
    turned = [x.detach().transpose(1, 2).requires_grad_(x.requires_grad) for x in (query, key)]
    inputs = [*turned, cos, sin, *(dy.transpose(1, 2) for dy in dys)]
    ours = results(fused(function("llama")), inputs, unsqueeze_dim=2)
    for y, want in zip(ours, results(function("llama"), [query, key, cos, sin, *dys])):
        assert (y.transpose(1, 2) - want).abs().max() <= 1e-5


def test_cosines_and_sines_alone_are_kept():
    kept = []
    query, key, cos, sin, *_ = tensors(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        fused(function("llama"))(query, key, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("kind", [*MODELS, *MORE])
def test_which_modules_have_it(kind):
    values = {key: value for key, value in {**SHAPE, **(MODELS | MORE)[kind]}.items() if value is not None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    before = {type(module): type(module).forward for module in attentions}
    others = kind in OTHERS or kind == "deepseek_v3"  # which calls an interleaved one, too
    assert len(attentions) == 4 and fuse_ropes(model) == (0 if others else 4)
    for module in attentions:
        (original,) = before
        assert isinstance(module, original) and type(module).__name__ == original.__name__
        assert (type(module) is original) == others and original.forward is before[original]
    assert fuse_ropes(model) == 0


def test_the_modeling_file_and_other_models_stay_as_they_are():
    before, forward = vars(modeling_llama).copy(), LlamaAttention.forward
    model, other = llama(), llama()
    assert fuse_ropes(model) == 4
    assert vars(modeling_llama) == before and LlamaAttention.forward is forward
    assert {type(layer.self_attn) for layer in other.model.layers} == {LlamaAttention}
    assert type(llama().model.layers[0].self_attn) is LlamaAttention
    fused_forward = type(model.model.layers[0].self_attn).forward
    assert fused_forward.__code__ is forward.__code__


def test_functions_that_compute_something_else_stay():
    def backwards(q, k, cos, sin, unsqueeze_dim=1):
        return function("llama")(q, k, cos, -sin, unsqueeze_dim)

    def queries_alone(q, k, cos, sin, unsqueeze_dim=1):
        return function("llama")(q, k, cos, sin)[0], k

    def last_numbers(q, k, cos, sin, unsqueeze_dim=1):
        """Differs where the cosines are partial."""
        rest = q.shape[-1] - cos.shape[-1]
        parts = [x.split((rest, cos.shape[-1]), dim=-1) for x in (q, k)]
        turned = function("llama")(parts[0][1], parts[1][1], cos, sin)
        return tuple(torch.cat([part[0], y], dim=-1) for part, y in zip(parts, turned))

    def of_four_dimensions(q, k, cos, sin, offset=0):
        """Raises an IndexError, as models with code of their own may."""
        cos, sin = (x[:, :, offset : q.shape[-2] + offset, :] for x in (cos, sin))
        return function("llama")(q, k, cos, sin)

    assert not any(map(is_rotation, (backwards, queries_alone, last_numbers, of_four_dimensions, None)))
    assert not any(is_rotation(function(kind)) for kind in OTHERS)
    assert all(is_rotation(function(kind)) for kind in ROTATED)


def test_a_decorated_forward_stays(monkeypatch):
    def doubled(function):
        @functools.wraps(function)
        def wrapper(*args):
            return tuple(2 * y for y in function(*args))

        return wrapper

    class Decorated(LlamaAttention):
        @doubled
        def forward(self, *args):
            return apply_rotary_pos_emb(*args)

    said = []
    monkeypatch.setattr(fused_rope.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_rope.logger, "warning", lambda text, *names: said.append(text % names))
    module = Decorated(LlamaConfig(**SMALL), 0)
    assert fuse_ropes(torch.nn.ModuleList([module, module.q_proj])) == 0 and type(module) is Decorated
    assert len(said) == 1 and said[0].endswith(": Decorated")


def test_calls_of_another_kind_are_the_modeling_files_own():
    def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return "own" if position_ids is not None else function("llama")(q, k, cos, sin, unsqueeze_dim)

    query, key, cos, sin, *_ = tensors(torch.float32)
    assert is_rotation(with_positions)
    rotated = fused(with_positions)
    assert rotated(query, key, cos, sin, IDS) == rotated(query, key, cos, sin, position_ids=IDS) == "own"
    assert "_Rotate" in type(rotated(query, key, cos, sin)[0].grad_fn).__name__

    def last_queries(q, k, cos, sin, unsqueeze_dim=1):
        count = q.shape[2]
        return function("llama")(q, q, cos[:, -count:], sin[:, -count:])[0], function("llama")(k, k, cos, sin)[1]

    few = fused(last_queries)(query[:, :, -2:], key, cos, sin)[0]
    assert (few - rotated(query, key, cos, sin)[0][:, :, -2:]).abs().max() <= 1e-5
    learned = cos.clone().requires_grad_()
    fused(function("llama"))(query, key, learned, sin)[0].sum().backward()
    assert learned.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_losses_of_a_run_are_the_same(kind, method, checkpointing):
    config, losses = recipe(f"--method={method}", f"--gradient_checkpointing={checkpointing}"), []
    for parts in (["attention"], ["attention", "rope"]):
        torch.manual_seed(0)
        model, _ = made(kind, config.model_copy(update={"disable_fused": parts}), torch.float32)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        ropes = [module for module in model.modules() if hasattr(module, "q_proj") or hasattr(module, "qkv_proj")]
        assert [hasattr(module, "plain_forward") for module in ropes] == ["rope" not in parts] * 4
        steps = []
        for _ in range(4):
            loss = model(**packs(), labels=packs()["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]


@torch.no_grad()
def test_tokens_are_generated_with_a_cache():
    plain = llama().eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(plain)
    assert fuse_ropes(model) == 4
    options = dict(attention_mask=torch.ones(2, 5), max_new_tokens=12, do_sample=False, eos_token_id=None)
    tokens, want = (each.generate(IDS[:, :5], **options) for each in (model, plain))
    assert torch.equal(tokens, want) and want[0, 5:].unique().numel() > 3


@pytest.mark.parametrize("changed", [{}, {"torch_compile": True}, {"disable_fused": ["rope"]}], ids=str)
def test_the_recipe_decides(changed):
    model = with_adapters(llama(), recipe("--method=lora").model_copy(update=changed))
    kinds = {type(module) for module in model.modules() if type(module).__name__ == "LlamaAttention"}
    assert (kinds == {LlamaAttention}) == bool(changed)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The source of the CUDA kernel, compiled for the CPU; the tensors are broadcast as torch does it."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    source = f"""#include <cstring>
    static float __uint_as_float(unsigned bits) {{ float value; memcpy(&value, &bits, 4); return value; }}
    static unsigned __float_as_uint(float value) {{ unsigned bits; memcpy(&bits, &value, 4);
      return value == value ? bits : 0x7fffffff; }} // the NaN of GPUs
    {fused_rope.SOURCE}
    extern "C" void words(int n, long backward, long* a, long* b, long* c, long* s, long* t, long* later, long* y) {{
      for (int i = 0; i < n; i++) y[i] = rotate<long>(a[i], b[i], c[i], s[i], t[i], later[i], backward);
    }}"""
    (folder / "kernel.cc").write_text(source)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "kernel.cc", "-o", "kernel.so"], cwd=folder, check=True)
    library = ctypes.CDLL(folder / "kernel.so")

    def call(*words: torch.Tensor, backward: int) -> torch.Tensor:
        each = [tensor.contiguous() for tensor in torch.broadcast_tensors(*words)]
        each.append(torch.empty_like(each[0]))
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in each)
        library.words(each[0].numel(), ctypes.c_long(backward), *pointers)
        return each[-1]

    return call


def test_the_source_of_the_cuda_kernel_computes_it(kernel):
    assert 2**-11 < deviation(kernel, torch.device("cpu")) <= ROUNDING
    for rotary in (32, 24, 8):
        query, _, cos, sin, *_ = (tensor.detach() for tensor in tensors(torch.bfloat16, rotary))
        cos, sin = cos[:, None], sin[:, None]
        for backward in (False, True):
            exact = by_operations(*(x.float() for x in (query, cos, sin)), backward=backward)[..., :rotary]
            (y,) = by_words(kernel, in_words(cos, sin, query, width=rotary), backward=backward)
            # to nearest, but where the sum is half way between two numbers, or the order of float32 decides
            assert (y == exact.bfloat16()).float().mean() > 0.99
            assert (y.float() - exact).norm() <= 2**-9 * exact.norm()


def test_modules_rotate_by_the_kernel_as_by_operations(kernel, monkeypatch):
    """As on CUDA; with halves that are no whole words, by operations there, too."""
    assert fused_rope.compiled("cpu") is None
    called = []

    def counted(*words, backward):
        called.append(backward)
        return kernel(*words, backward=backward)

    for rotary, calls in ((32, [0, 0, 1, 1]), (24, [0, 0, 1, 1]), (8, [0, 0, 1, 1]), (20, [])):
        inputs = tensors(torch.bfloat16, rotary)
        exact = results(function("phi3"), [x.detach().float().requires_grad_(x.requires_grad) for x in inputs])
        monkeypatch.setattr(fused_rope, "compiled", lambda kind: counted)
        called.clear()
        for y, want in zip(results(fused(function("phi3")), inputs), exact):
            assert y.dtype == torch.bfloat16 and (y - want).norm() <= 2**-8 * want.norm()
        assert called == calls


def test_the_kernel_rounds_to_even_and_keeps_what_is_not_finite(kernel):
    values = torch.tensor([0.0, 1.0, -1.0, 3.0e38, torch.inf, -torch.inf, torch.nan, 1.5], dtype=torch.bfloat16)
    x, sin = values.repeat(2).view(1, 1, 1, 16), torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    for factor in (1.0, 1.0078125, 3.0, 2.0**99):  # 1.5 times the second is half way between two numbers
        cos = torch.full_like(sin, factor)
        (y,) = by_words(kernel, in_words(cos, sin, x, width=16))
        y, want = y[0, 0, 0, :8], (values.float() * factor).bfloat16()
        finite = values.isfinite()  # 0 times what is infinite, of the sines, is no number
        assert torch.equal(y[..., finite], want[..., finite]) and y[..., ~finite].isnan().sum() == 3


def test_kernels_that_compute_something_else_are_not_taken(kernel):
    def one_way(*words, backward):
        return kernel(*words, backward=0)

    def first_half(*words, backward):
        return kernel(*words[:-1], torch.zeros_like(words[-1]), backward=backward)

    def nothing(*words, backward):
        return torch.zeros_like(kernel(*words, backward=backward))

    assert all(deviation(wrong, torch.device("cpu")) > 10 * ROUNDING for wrong in (one_way, first_half, nothing))


def test_the_kernel_takes_heads_of_whole_words():
    query, _, cos, sin, *_ = (tensor.detach() for tensor in tensors(torch.bfloat16))

    def shapes(x: torch.Tensor, width: int = 32) -> list[tuple[int, ...]] | None:
        words = in_words(x, cos, sin, width=width)
        return words and [tuple(each.shape) for each in words]

    assert shapes(query) == shapes(query.contiguous()) == [(2, 6, 7, 2, 4), (2, 7, 2, 4), (2, 7, 2, 4)]
    assert shapes(query, width=24) == [(2, 6, 7, 2, 3), (2, 7, 2, 3), (2, 7, 2, 3)]
    joined = torch.zeros(1, 7, 10 * 32, dtype=torch.bfloat16)[..., 6 * 32 : 8 * 32]
    assert shapes(joined.view(1, 7, 2, 32).transpose(1, 2))[0] == (1, 2, 7, 2, 4)
    assert shapes(query, width=20) is None and shapes(query, width=10) is None  # halves of 10 and 5 numbers
    assert shapes(query.float()) is None
    assert shapes(torch.zeros(1, 2, 7, 64, dtype=torch.bfloat16)[..., ::2]) is None
    assert shapes(torch.zeros(1, 2, 7, 33, dtype=torch.bfloat16)[..., 1:]) is None
    assert shapes(torch.zeros(1, 2, 7, 36, dtype=torch.bfloat16)[..., 2:34]) is None
