"""attn_implementation: each value computes by what it says, and documents of a pack stay apart."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launches import launch
from transformers import AutoModelForCausalLM

from manyrank.api import SFTConfig
from manyrank.data.loader import side_by_side
from manyrank.errors import UserError
from manyrank.models.attention import CHOICES, PACKED, set_attention
from manyrank.training.packing_trial import prove_packing

DOCUMENTS = [np.arange(10, 15), np.arange(20, 27), np.arange(30, 42)]
STEPS = ("--max_steps=3", "--lr=3e-3", "--bf16=false", "--micro_batch=4")


def config(**options) -> SFTConfig:
    return SFTConfig(model_name_or_path="embedded", data_path="data/sample.jsonl", **options)


def computed(base, dtype=torch.float32, *, grads: bool = True, **options):
    """The logits of a pack, the gradient of the embeddings, the calls of sdpa, and the name of the attention."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    set_attention(model, config(**options), lambda line: None)
    rows = [{"input_ids": ids, "labels": ids, "source": "test", "row": 0} for ids in DOCUMENTS]
    calls, sdpa = [], F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
        logits = model(**side_by_side(rows).inputs, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), model.get_input_embeddings().weight.grad, len(calls), model


@pytest.mark.parametrize("choice, calls", [("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_is_computed_by_what_was_chosen(embedded_model, choice, calls, dtype):
    usual, usual_gradient, _, model = computed(embedded_model, dtype)
    assert model.config._attn_implementation == PACKED
    logits, gradient, counted, model = computed(embedded_model, dtype, attn_implementation=choice)
    assert (model.config._attn_implementation, bool(counted)) == (CHOICES[choice], calls)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logits, usual, **close)
    torch.testing.assert_close(gradient, usual_gradient, **close)
    prove_packing(model.eval(), model, exact=dtype == torch.float32)


def test_flash_attention_is_never_replaced(embedded_model):
    with pytest.raises(UserError) as caught:
        computed(embedded_model, torch.bfloat16, attn_implementation="flash_attention_2")
    assert "flash attention does not compute a cpu device" in caught.value.what
    assert caught.value.where == "attn_implementation"
    with pytest.raises(UserError, match="FA3 does not compute here: flash-attn-3 is not installed"):
        computed(embedded_model, torch.bfloat16, attn_implementation="flash_attention_3")


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_padded_rows_attend_by_the_models_own(embedded_model, choice):
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    set_attention(model, config(attn_implementation=choice, packing="none"), lambda line: None)
    assert model.config._attn_implementation == choice


@pytest.mark.parametrize(
    "placed", [("--strategy=single",), ("--strategy=fsdp", "--nproc=2"), ("--strategy=single", "--packing=none")]
)
def test_losses_are_those_of_the_default(tmp_path, placed):
    runs = {
        choice: launch(tmp_path / choice, *STEPS, *placed, f"--attn_implementation={choice}")
        for choice in ("none", "eager", "sdpa")
    }
    assert {choice: run.code for choice, run in runs.items()} == dict.fromkeys(runs, 0), runs["eager"].stderr
    for choice in ("eager", "sdpa"):
        for name in ("loss", "grad_norm"):
            assert runs[choice].metrics(name) == pytest.approx(runs["none"].metrics(name), rel=1e-5)
        assert re.search(rf"^attention: {choice}$", runs[choice].stdout, re.MULTILINE)
    assert "attention:" not in runs["none"].stdout
