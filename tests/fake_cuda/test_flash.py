"""FlashAttention 4 by torch's registry on a stand-in Hopper: when a packed model takes it, and when torch has its own back."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.cuda

PROGRAM = """
import torch
from flash_implementation import register
from small_models import SMALL, packs, recipe
from transformers import LlamaConfig, LlamaForCausalLM
from manyrank.models.attention import own_attention
from manyrank.models.flash import active
from manyrank.models.load import with_adapters

calls = register("FA4", "CUDA", widest=32)

def packed(lines, changed={}, **shape):
    calls.clear()
    base = LlamaForCausalLM(LlamaConfig(**{**SMALL, **shape})).bfloat16().cuda()
    config = recipe("--method=lora").model_copy(update={"disable_fused": [], **changed})
    return base, with_adapters(base, config, say=lines.append)

def step(model):
    calls.clear()
    inputs = {key: value.cuda() if torch.is_tensor(value) else value for key, value in packs().items()}
    if model.config._attn_implementation == "sdpa":
        inputs = {"input_ids": inputs["input_ids"]}
    model(**inputs, use_cache=False).logits.sum().backward()
    return list(calls)

lines = []
base, model = packed(lines)
assert active() == "FA4" and "packed attention in 16 bits runs by FA4" in lines and calls == ["forward", "backward"]
assert step(model) == ["forward"] * 4 + ["backward"] * 4
with own_attention(base):
    assert active() is None
assert active() == "FA4"
for changed, shape in (({"disable_fused": ["attention"]}, {}), ({"packing": "none"}, {}), ({}, {"head_dim": 64})):
    lines = []
    _, model = packed([])
    assert active() == "FA4"
    _, model = packed(lines, changed, **shape)
    assert active() is None and not any("runs by" in line for line in lines), changed
    assert step(model) == []
print("as wanted")
"""


@pytest.fixture
def package(tmp_path):
    """What importlib.metadata takes for an installed flash-attn-4."""
    folder = tmp_path / "flash_attn_4-4.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n")
    return tmp_path


def test_a_packed_model_takes_it_where_it_is_installed(package, pytestconfig):
    paths = [str(package), str(pytestconfig.rootpath / "tests" / "support")]
    program = f"import sys; sys.path[:0] = {paths!r}" + PROGRAM
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("as wanted\n"), done.stderr
    assert "not by FA4: AssertionError: no heads of 64" in done.stderr
