"""The plan's bytes against what autograd really saves, and against the tensors that are really there."""

import contextlib

import pytest
import torch
from planned import planned_run
from small_models import CHECKPOINTED, FULL, LORA, MODELS, TOKENS, made, packs, recipe

from manyrank.plan import activations
from manyrank.training.loss import TokenLoss

SOME = ("--gradient_checkpointing=2",)
CASES = [
    *((model, dtype, method) for model in MODELS for dtype in ("bfloat16", "float32") for method in (LORA, FULL)),
    ("llama", "bfloat16", (*FULL, "--pure_bf16")),
    *((model, "autocast", FULL) for model in ("llama", "qwen3", "gemma3_text", "qwen3_moe")),
    *(
        (model, "bfloat16", (*method, *again))
        for model in ("llama", "qwen3", "gemma3_text", "qwen3_moe")
        for method in (LORA, FULL)
        for again in (CHECKPOINTED, SOME)
    ),
    ("llama", "bfloat16", (*LORA, "--lora_target_modules=q_proj,v_proj")),
    ("llama", "float32", (*LORA, "--lora_dropout=0.1")),
    ("qwen3", "bfloat16", (*LORA, "--lora_dropout=0.1")),
    ("qwen3", "bfloat16", (*LORA, "--lora_r=64")),
    ("llama", "float32", (*LORA, "--attn_implementation=eager")),
    ("qwen3", "bfloat16", (*LORA, "--attn_implementation=eager")),
    ("qwen3", "bfloat16", (*LORA, "--attn_implementation=sdpa")),
    ("qwen3_moe", "bfloat16", (*LORA, "--lora_target_modules=q_proj,k_proj,v_proj,o_proj")),
]


def really_saved(model: torch.nn.Module) -> int:
    """Bytes of the storages that autograd keeps of a forward, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    loss = TokenLoss(model, model)
    some = torch.arange(TOKENS // 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(packs(), some, some % 300).backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("kind", "precision", "options"), CASES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_activations_are_what_autograd_saves(kind, precision, options):
    config = recipe(*options)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, shape = made(kind, config, dtype)
    autocast = precision == "autocast"
    if kind == "deepseek_v3" and dtype == torch.bfloat16:
        pytest.skip("values are narrower than keys, and sdpa of CPUs then computes in float32")
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        real = really_saved(model)
    strategy = "single" if autocast or config.method != "full" or config.pure_bf16 else "fsdp"
    planned = activations.saved(planned_run(config, shape, strategy, bf16=precision != "float32", gpu=False))
    assert planned == pytest.approx(real, rel=0.05), planned / real


def test_layers_below_the_first_trained_one_save_nothing():
    config = recipe(*FULL, "--unfrozen_parameters=[layers.2, layers.3, model.norm]")
    model, shape = made("llama", config, torch.bfloat16)
    run = planned_run(config, shape, "fsdp", bf16=True, gpu=False)
    assert run.first_learned == 2
    assert activations.saved(run) == pytest.approx(really_saved(model), rel=0.05)


def test_norms_of_torch_s_kernel_keep_their_input_in_its_type():
    config = recipe("--method=lora")
    _, shape = made("llama", config, torch.bfloat16)

    def kept(**more) -> int:
        run = planned_run(config.model_copy(update=more), shape, "single", bf16=True, gpu=True)
        return activations._norm(run, 1000)

    assert kept() == 2 * 1000 + 4
    assert kept(disable_fused=["norm"]) == kept(torch_compile=True) == 4 * 1000 + 4
