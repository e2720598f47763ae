"""Which flash attention runs over packs: the choice, the trial of an implementation of torch's registry, and the way back."""

import itertools
import subprocess
import sys

import pytest
from small_models import MODELS, SHAPE
from torch.nn.attention import list_flash_attention_impls
from transformers import AutoConfig

from manyrank.errors import UserError
from manyrank.models import flash
from manyrank.models.flash import Heads, choose, heads_of

ALL = ("flash-attn-3", "flash-attn-4")


def test_hopper_has_3_before_4_and_blackwell_4():
    assert choose(capability=(9, 0), installed=ALL, known=("FA3", "FA4")) == "FA3"
    assert choose(capability=(9, 0), installed=ALL[1:], known=("FA3", "FA4")) == "FA4"
    assert choose(capability=(9, 0), installed=ALL, known=("FA4",)) == "FA4"
    for capability in ((10, 0), (10, 3)):
        assert choose(capability=capability, installed=ALL, known=("FA3", "FA4")) == "FA4"
        assert choose(capability=capability, installed=ALL[:1], known=("FA3", "FA4")) is None


def test_everything_else_has_torch_s_own():
    for capability, installed in itertools.product((None, (8, 0), (8, 9), (12, 0)), ((), ALL)):
        assert choose(capability=capability, installed=installed, known=("FA3", "FA4")) is None
    assert choose(capability=(9, 0), installed=("flash-attn",), known=("FA3", "FA4")) is None
    assert choose(capability=(10, 0), installed=ALL, known=()) is None


def test_the_installed_torch_knows_both_by_these_names():
    assert set(flash.PACKAGES) == set(flash.GPUS) <= set(list_flash_attention_impls())


def config(kind: str, **more):
    values = {key: value for key, value in {**SHAPE, **MODELS.get(kind, {}), **more}.items() if value is not None}
    return AutoConfig.for_model(kind, **values)


def test_the_kinds_of_attention_are_those_of_all_layers():
    assert heads_of(config("llama")) == {Heads(2, 32, 32, None)}
    assert heads_of(config("gemma3_text", num_hidden_layers=7, sliding_window=16)) == {
        Heads(2, 32, 32, 16),
        Heads(2, 32, 32, None),
    }
    assert heads_of(config("deepseek_v3")) == {Heads(1, 48, 32, None)}
    with pytest.raises(UserError, match="the heads of a gpt2 model are not known"):
        heads_of(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("llama", {}, None),
        ("llama", {"attention_dropout": 0.1}, "dropout 0.1"),
        ("llama", {"head_dim": 320}, "above 256"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "soft-cap 50"),
        ("gpt_oss", {}, "attention sinks"),
        ("deepseek_v3", {}, "values of 32 beside queries of 48"),
    ],
)
def test_a_model_whose_attention_goes_by_sdpa_keeps_torch_s_kernels(kind, more, why):
    asked = config(kind, **more)
    found = flash._obstacle(asked, heads_of(asked))
    assert found is None if why is None else why in found


PROGRAM = """
import torch
from flash_implementation import register
from torch.nn.attention import current_flash_attention_impl as current
from manyrank.models import flash
from manyrank.models.flash import Heads

cpu, heads = torch.device("cpu"), [Heads(2, 32, 32, None), Heads(1, 16, 16, 8)]

def fails():
    try:
        return flash.deviation(heads[0], cpu)
    except NotImplementedError:
        return "torch has no such kernel for CPUs"

calls = register("FA4", "CPU")
before = torch.random.get_rng_state()
assert flash.try_out("FA4", heads, cpu) is None and flash.active() == current() == "FA4"
assert calls == ["forward", "backward"] * 2 and torch.equal(torch.random.get_rng_state(), before)
with flash.suspended():
    assert current() is None and fails() == "torch has no such kernel for CPUs"
assert current() == "FA4" and fails() < 0.01
assert flash.restore() == "FA4" and current() is None and flash.restore() is None
assert fails() == "torch has no such kernel for CPUs"

register("FA4", "CPU", wrong=1.1)
why = flash.try_out("FA4", heads, cpu)
assert "off by 1.0e-01" in why and current() is None, why
register("FA4", "CPU", widest=16)
why = flash.try_out("FA4", heads, cpu)
assert why == "AssertionError: no heads of 32" and current() is None, why
assert flash.try_out("FA4", heads[1:], cpu) is None and flash.restore() == "FA4"

def missing():
    raise ImportError("libcute.so: no such file")
torch.nn.attention.register_flash_attention_impl("FA4", register_fn=missing)
assert flash.try_out("FA4", heads, cpu) == "ImportError: libcute.so: no such file" and current() is None
print("as wanted")
"""


def test_an_implementation_is_tried_before_it_is_trusted(pytestconfig):
    """By torch's registry, on the CPU, where torch itself has no kernel for packs: what computes there is this one."""
    support = f"import sys; sys.path.insert(0, {str(pytestconfig.rootpath / 'tests' / 'support')!r})"
    done = subprocess.run([sys.executable, "-c", support + PROGRAM], capture_output=True, text=True)
    assert done.stdout == "as wanted\n", done.stderr
