"""Models that accelerate by itself does not prepare for FSDP2: their class names layers that are not there."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from launches import launch
from safetensors.torch import load_file
from small_models import LAUNCHED, save_for_launch
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import Gemma4TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

from manyrank.parallel.fsdp_preparation import layers_apart, name_layers

GEMMA4 = dict(
    LAUNCHED,
    vocab_size_per_layer_input=1536,
    hidden_size_per_layer_input=8,
    global_head_dim=8,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"],
    num_kv_shared_layers=0,
)


def gemma4() -> Gemma4ForCausalLM:
    """A text model whose layers have a buffer each, which scales them, and whose class names layers of other parts."""
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA4))
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + number)  # the class makes ones
    return model


def policy(**given) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=transformer_auto_wrap_policy, **given)


def test_layers_to_shard_apart_are_those_that_are_there():
    model, plugin = gemma4(), policy()
    name_layers(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == layers_apart(model) == ["Gemma4TextDecoderLayer"]
    plugin.set_auto_wrap_policy(model)
    llama = LlamaForCausalLM(LlamaConfig(**LAUNCHED))
    assert layers_apart(llama) == ["LlamaDecoderLayer"]
    llama._no_split_modules = None
    assert layers_apart(llama) == ["LlamaDecoderLayer"]  # a layer that can be checkpointed
    own = policy(transformer_cls_names_to_wrap=["LlamaMLP"])
    name_layers(own, llama)
    assert own.transformer_cls_names_to_wrap == ["LlamaMLP"]


def test_the_names_of_layers_are_still_needed():
    """The day accelerate skips names that the model does not have, `name_layers` can go."""
    with pytest.raises(ValueError, match="Could not find the transformer layer class"):
        policy().set_auto_wrap_policy(gemma4())


def test_fsdp_trains_a_model_with_buffers_and_named_layers_it_lacks(embedded_model, tmp_path):
    """With the losses of one process; buffers come from the weights' files, and are saved."""
    model = gemma4()
    save_for_launch(model, tmp_path / "model", embedded_model)
    given = [f"--model_name_or_path={tmp_path}/model", "--method=full", "--max_steps=2", "--max_length=256"]
    single = launch(tmp_path / "single", *given, "--strategy=single")
    fsdp = launch(tmp_path / "fsdp", *given, "--strategy=fsdp", "--nproc=2")
    assert single.code == 0 and fsdp.code == 0, single.stderr + fsdp.stderr
    assert fsdp.facts()["wrapper"].startswith("FSDP") and fsdp.facts()["world_size"] == 2
    assert fsdp.metrics() == pytest.approx(single.metrics(), abs=1e-5) and len(single.metrics()) == 2
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    assert len(buffers) == 2
    for run in (single, fsdp):
        saved = load_file(run.folder / "final_model" / "model.safetensors")
        assert all(torch.equal(saved[name], buffer) for name, buffer in buffers.items())
