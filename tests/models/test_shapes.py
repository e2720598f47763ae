"""The arithmetic of models against the modules that transformers makes of the same configs."""

import json

import pytest
import torch
from small_models import LATENT, MOE, SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from manyrank.errors import UserError
from manyrank.models import catalog, spec

KINDS = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"head_dim": None},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 80, "head_dim": None},
    "qwen3": {},
    "qwen3, biases": {"attention_bias": True},
    "qwen3_moe": MOE,
    "qwen3_moe, every second": {**MOE, "decoder_sparse_step": 2},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "olmoe": {"head_dim": None, "num_experts": 8, "num_experts_per_tok": 2},
    "glm4": {"attention_bias": True},
    "cohere": {"head_dim": None},
    "cohere, normed": {"head_dim": None, "use_qk_norm": True},
    "starcoder2": {"head_dim": None, "use_bias": True},
    "granite": {"head_dim": None},
    "smollm3": {"head_dim": None},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
}


def made(kind: str) -> tuple[torch.nn.Module, dict]:
    """The model of a config on the meta device, and the config as its config.json has it."""
    values = {**SMALL, **KINDS[kind]}
    config = AutoConfig.for_model(
        kind.split(",")[0], **{key: value for key, value in values.items() if value is not None}
    )
    if KINDS[kind].get("q_lora_rank", 1) is None:
        config.q_lora_rank = None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_modules(kind):
    model, config = made(kind)
    shape = spec.from_config(config, name=kind)
    assert not shape.guessed
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_of_each_layer_are_those_of_the_modules(kind):
    model, config = made(kind)
    kinds = []
    for layer in model.model.layers:
        linears = {name.split(".")[-1]: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        kinds.append({name: (m.in_features, m.out_features, m.bias is not None) for name, m in linears.items()})
    read = [
        {name: (linear.inputs, linear.outputs, linear.bias) for name, linear in layer.linears.items()}
        for layer in spec.from_config(config, name=kind).layers
        for _ in range(layer.count)
    ]
    assert sorted(map(repr, (dict(sorted(kind.items())) for kind in read))) == sorted(
        map(repr, (dict(sorted(kind.items())) for kind in kinds))
    )


# As published.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "google/gemma-2-9b-it": 9_241_705_984,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "microsoft/phi-4": 14_659_507_200,
    "deepseek-ai/deepseek-math-7b-instruct": 6_910_365_696,
    "deepseek-ai/deepseek-coder-1.3b-base": 1_346_471_936,
    "mistralai/Codestral-22B-v0.1": 22_247_282_688,
    "upstage/SOLAR-10.7B-v1.0": 10_731_524_096,
    "01-ai/Yi-1.5-9B-Chat": 8_829_407_232,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "teknium/OpenHermes-2.5-Mistral-7B": 7_241_732_096,
    "HuggingFaceTB/SmolLM-135M": 134_515_008,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_known_names_have_the_published_number_of_parameters(name, parameters):
    assert catalog.read(name).parameters == parameters


def test_every_known_name_can_be_read():
    assert len(catalog.known()) >= 30
    for name in catalog.known():
        shape = catalog.read(name)
        assert shape.depth > 0 and not shape.guessed, name


def test_a_name_that_is_not_known_is_an_error_with_the_nearest():
    with pytest.raises(UserError, match=r"nothing is known(.|\n)*qwen2.5-7b"):
        catalog.read("qwen2.5-8b")
    with pytest.raises(UserError, match="nothing is known"):
        catalog.read("Llama-2-7b-longer")


def test_a_type_that_is_not_known_is_read_as_a_llama_and_says_so():
    config = {**SMALL, "model_type": "brand_new"}
    shape = spec.from_config(config, name="x")
    assert (
        shape.guessed and shape.parameters == spec.from_config({**config, "model_type": "llama"}, name="x").parameters
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a JSON object"),
        ("{}", "there is no"),
        ('{"hidden_size": "x"}', "hidden_size is 'x'"),
    ],
)
def test_what_is_no_config_is_an_error(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        catalog.read(str(tmp_path))
