"""Compiled decoder layers: what is compiled does not grow with the layers or the packs, and computes the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from small_models import SMALL, recipe
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from manyrank.data.loader import MicroBatch, side_by_side, trial
from manyrank.models import varlen
from manyrank.models.load import with_adapters
from manyrank.training.loss import TokenLoss
from manyrank.training.packing_trial import prove_packing

PACKS = ((30, 20, 40), (10, 77), (50,), (33, 12, 9, 20), (64, 65, 66))


def masked(query, key, value, bounds, longest, *, scaling, window) -> torch.Tensor:
    """Stand in for the CUDA kernel: one product for all documents."""
    at = torch.arange(query.shape[2], dtype=bounds.dtype)
    document = torch.searchsorted(bounds, at, right=True)
    mask = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def compiler(monkeypatch) -> CompileCounter:
    """Count what is compiled, run as it is; attention goes through the kernel's path."""
    torch._dynamo.reset()
    counters.clear()
    counter, plain, obstacle = CompileCounter(), torch.nn.Module.compile, varlen.obstacle
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend=counter, **options))
    as_on_cuda = {"device": "cuda", "dtype": torch.bfloat16}
    monkeypatch.setattr(varlen, "obstacle", lambda **facts: obstacle(**{**facts, **as_on_cuda}))
    monkeypatch.setattr(varlen, "attend", masked)
    yield counter
    torch._dynamo.reset()


def packs() -> list[MicroBatch]:
    random = np.random.default_rng(0)
    documents = [[random.integers(1, 300, length) for length in pack] for pack in PACKS]
    labelled = [[{"input_ids": ids, "labels": np.where(ids > 99, ids, -100)} for ids in pack] for pack in documents]
    return [side_by_side([{**row, "source": "x", "row": 0} for row in pack]) for pack in labelled]


def adapted(layers: int, *argv: str):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": layers}))
    model = with_adapters(base, recipe("--method=lora", *argv)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def results(model, compiler: CompileCounter) -> tuple[list[float], dict, list[int]]:
    """Losses, the gradients of all packs, and how much was compiled after each pack."""
    token_loss, losses, compiled, few = TokenLoss(model), [], [], trial(packed=True)
    with torch.no_grad():
        prove_packing(model, model, exact=True)
        token_loss.prove(few.inputs, few.positions, few.targets)
    assert compiler.frame_count == 0  # for a few tokens
    for micro in packs():
        loss = token_loss(micro.inputs, micro.positions, micro.targets)
        loss.backward()
        losses.append(loss.item())
        compiled.append(compiler.frame_count)
    token_loss.head.release()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, compiled


@pytest.mark.parametrize("more", [("--gradient_checkpointing=off",), ("--gradient_checkpointing=full", "--lora_bias")])
def test_what_is_compiled_grows_neither_with_layers_nor_with_packs(more, compiler):
    argv, found = ("--torch_compile", *more), {}
    for layers in (2, 12):
        torch._dynamo.reset()
        compiler.clear()
        losses, gradients, compiled = results(adapted(layers, *argv), compiler)
        assert compiled[0] == compiled[-1] > 0  # other lengths and numbers of documents compile nothing
        assert not counters["graph_break"] and set(counters["frames"].values()) == {counters["frames"]["ok"]}
        found[layers] = compiled[0]
    assert found[2] == found[12]
    wanted, wanted_gradients, compiled = results(adapted(12, *argv[1:]), CompileCounter())
    assert compiled[-1] == 0 and losses == pytest.approx(wanted, rel=1e-6)
    for name, want in wanted_gradients.items():
        assert (gradients[name] - want).norm() <= 3e-5 * want.norm(), name


def test_layers_one_document_at_a_time_are_compiled_around_them(compiler, monkeypatch):
    monkeypatch.undo()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend=compiler, **options))
    found = {}
    for layers in (2, 12):
        torch._dynamo.reset()
        compiler.clear()
        losses, _, compiled = results(adapted(layers, "--torch_compile"), compiler)
        assert compiled[1] == compiled[-1] > 0
        assert [reason for reason in counters["graph_break"] if "_by_document" not in reason] == []
        found[layers] = compiled[-1]
    assert found[2] == found[12]
    assert losses == pytest.approx(results(adapted(12), CompileCounter())[0], rel=1e-6)


def test_adapted_layers_are_pefts_by_name_and_class():
    layers = [m for m in adapted(2).modules() if isinstance(m, Linear)]
    assert len(layers) == 14 and len({type(layer) for layer in layers}) == 1
    assert not any("forward" in vars(layer) for layer in layers)
    (kind,) = {type(layer) for layer in layers}
    assert (kind.__name__, kind.__module__) == (Linear.__name__, Linear.__module__)
