"""What a text reaches, what is quantised and what has adapters, on tiny random models of several architectures."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from manyrank.checkpoint.state import _Attempt, _write_weights, load_weights, save_weights
from manyrank.config.resolve import TrainConfig
from manyrank.errors import UserError
from manyrank.models.coverage import check_quantised, matrices
from manyrank.models.inference import load_model as load_to_use
from manyrank.models.load import LoadPlan, load_model, with_adapters
from manyrank.models.reach import count_parameters, reach, unreached_modules
from manyrank.parallel import first_look
from manyrank.parallel.sharded_engines import prepare_engine
from manyrank.training.optim import build_optimizer

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
SHAPES = {
    "llama": TEXT,
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "qwen2_moe": {**TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "glm4_moe": {
        **TEXT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v4": {
        **TEXT,
        **EXPERTS,
        "n_routed_experts": 4,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "max_position_embeddings": 512,
    },
}


def tiny(kind: str):
    torch.manual_seed(0)
    if kind == "gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        }
        config = Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_id=63)
    else:
        config = CONFIG_MAPPING[kind](**SHAPES[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def recipe(**values) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", data_path="d", lora_r=2, packing="none", **values)


def adapted(kind: str, **values):
    lines = []
    return with_adapters(tiny(kind), recipe(**values), say=lines.append), "\n".join(lines)


def without_gradient(model) -> set[str]:
    model.train()
    model(
        input_ids=torch.arange(2, 50)[None], token_type_ids=torch.zeros(1, 48).long(), use_cache=False
    ).logits.sum().backward() if hasattr(model.config, "vision_config") else model(
        input_ids=torch.arange(2, 50)[None], use_cache=False
    ).logits.sum().backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "falcon", "mamba", "qwen2_moe", "glm4_moe", "gemma3"])
def test_all_that_is_trained_gets_a_gradient(kind, method):
    model, _ = adapted(kind, method=method)
    assert without_gradient(model) == set()
    assert [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["llama", "falcon", "mamba", "qwen2_moe", "gemma3"])
def test_reach_is_what_autograd_says(kind):
    model = tiny(kind)
    found = reach(model)
    assert {name for name, _ in model.named_parameters()} - found.parameters == without_gradient(model)


def test_reach_is_the_same_without_weights():
    model = tiny("gemma3")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    assert reach(skeleton) == reach(model)


def test_reach_of_what_only_a_long_text_uses():
    assert reach(tiny("deepseek_v4")).parameters >= {"model.layers.0.self_attn.compressor.kv_proj.weight"}


def test_reach_is_not_known_where_values_decide(monkeypatch):
    model = tiny("llama")
    forward = model.model.forward

    def deciding(*args, **kwargs):
        return forward(*args, **kwargs) if int(kwargs["input_ids"].sum()) >= 0 else None

    model.model.forward = deciding
    assert reach(model) is None
    assert len([p for p in with_adapters(model, recipe()).parameters() if p.requires_grad]) == 28


def test_a_layer_without_a_part_is_left_out_alone():
    model = tiny("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    names = [rf"model\.layers\.1\.mlp\.{at}_proj" for at in ("gate", "up", "down")]
    assert unreached_modules(model, reach(model)) == names


def test_a_vision_tower_has_no_adapters_and_the_adapter_fits_the_whole_model(tmp_path):
    model, said = adapted("gemma3")
    assert "no adapters where no text comes: model.multi_modal_projector, model.vision_tower" in said
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all("language_model" in name for name in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("gemma3"), tmp_path)
    found = {name: p for name, p in again.named_parameters() if ".lora_" in name}
    assert found.keys() == trained.keys() and all(torch.equal(found[name], p) for name, p in trained.items())


def test_full_leaves_a_vision_tower_as_it_is():
    model, said = adapted("gemma3", method="full")
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"}
    assert "are not trained, a text does not reach them: model.multi_modal_projector, model.vision_tower" in said


def test_mamba_adapts_what_peft_can_and_says_the_rest():
    model, said = adapted("mamba")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"in_proj", "x_proj"}
    assert "adapters reach" in said and "mixer.out_proj" in said and "mixer.dt_proj" in said


def test_the_fix_for_refused_targets_works_when_typed():
    with pytest.raises(UserError) as wrong:
        adapted("mamba", lora_target_modules=["in_proj", "out_proj"])
    assert wrong.value.fix == "give --lora_target_modules '[in_proj]', or all-linear"
    adapted("mamba", lora_target_modules=["in_proj"])
    with pytest.raises(UserError) as wrong:
        adapted("mamba", lora_target_modules=["dt_proj"])
    assert wrong.value.fix == "give --lora_target_modules '[in_proj,x_proj]', or all-linear"


@pytest.mark.parametrize(
    "kind, left", [("qwen2_moe", "mlp.experts (gate_up_proj)"), ("glm4_moe", "mlp.shared_experts.gate_proj")]
)
def test_the_share_that_adapters_reach_is_said(kind, left):
    model, said = adapted(kind)
    found = list(matrices(model))
    share = sum(m.weights for m in found if m.adapted) / sum(m.weights for m in found)
    assert f"adapters reach {share:.0%} of the weights of the layers" in said and left in said
    base = tiny(kind)
    outside = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    counted = sum(p.numel() for p in base.parameters() if p.ndim > 1) - sum(p.numel() for p in outside)
    assert sum(m.weights for m in found) == counted


def test_nothing_is_said_of_a_model_that_adapters_reach():
    assert adapted("llama")[1] == ""


def quantised(kind: str, folder, quantization: str, say=print):
    tiny(kind).save_pretrained(folder)
    plan = LoadPlan(
        name=str(folder),
        dtype=torch.float32,
        compute_dtype=torch.float32,
        quantization=quantization,
        device_map={"": "cpu"},
        trust_remote_code=False,
    )
    method = {"nf4": "qlora", "int8": "int8"}[quantization]
    return load_model(plan, recipe(method=method), say=say)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_parameters_of_a_quantised_base_are_counted_unpacked(quantization, tmp_path):
    model = quantised("llama", tmp_path, quantization)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapters and count_parameters(model) - adapters == tiny("llama").num_parameters()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_of_which_nothing_is_quantised_is_refused(tmp_path, quantization):
    with pytest.raises(UserError) as wrong:
        quantised("falcon", tmp_path, quantization)
    assert "nothing is quantised" in wrong.value.what and "FalconLinear" in wrong.value.what
    assert "method: lora" in wrong.value.fix


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_taken_without_a_word(tmp_path, quantization):
    lines = []
    model = quantised("llama", tmp_path, quantization, lines.append)
    assert lines == [] and all(m.quantised and m.adapted for m in matrices(model))


def test_experts_in_full_precision_are_said(tmp_path):
    lines = []
    found = list(matrices(quantised("qwen2_moe", tmp_path, "nf4", lines.append)))
    share = 1 - sum(m.weights for m in found if m.quantised) / sum(m.weights for m in found)
    assert lines[0].startswith(f"method qlora: {share:.0%} of the weights of the layers are not quantised: ")
    assert "mlp.experts (gate_up_proj)" in lines[0]


def test_most_of_a_base_in_full_precision_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    skip = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["gate_proj", "up_proj", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=skip, device_map="cpu")
    with pytest.raises(UserError, match="of the weights are not quantised"):
        check_quantised(model, method="method qlora", where="method", fix="use lora", say=print)


def test_a_model_to_use_is_looked_at_too(tmp_path, embedded_model):
    tiny("falcon").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((embedded_model / name).read_bytes())
    with pytest.raises(UserError) as wrong:
        load_to_use(str(tmp_path), quantization="4bit")
    assert "nothing is quantised" in wrong.value.what and wrong.value.fix == "leave quantization out"


def test_the_first_backward_tells_what_gets_no_gradient(capsys):
    model = tiny("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    engine = prepare_engine(Accelerator(cpu=True), model, build_optimizer(model, recipe(method="full")))
    for _ in range(2):
        with engine.forward_backward(last=True):
            engine.backward(engine.wrapped(input_ids=torch.arange(8)[None]).logits.sum(), last=True)
        engine.step(learning_rate=1e-3, max_grad_norm=1.0, sums=torch.zeros(1))
    (line,) = capsys.readouterr().out.splitlines()
    share = 3 * 32 * 48 / sum(p.numel() for p in model.parameters())
    assert line.startswith(f"{share:.1%} of the trained weights get no gradient in the first step: ")
    assert "model.layers.*.mlp.down_proj" in line


@pytest.mark.parametrize("kind", ["qwen2_moe", "glm4_moe"])
def test_a_whole_model_with_experts_is_saved_and_read_again(kind, tmp_path):
    """transformers writes stacked experts one by one in a model for others, and a checkpoint has them as they are trained."""
    engine = prepared(tiny(kind))
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    save_weights(engine, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert again.keys() == engine.model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in engine.model.state_dict().items())
    attempt = _Attempt(engine)
    _write_weights(engine, tmp_path / "checkpoint", attempt)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    load_weights(engine, tmp_path / "checkpoint")
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


def prepared(model):
    model.requires_grad_(True)
    return prepare_engine(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_ddp_is_refused_before_it_waits():
    names = [
        f"base_model.model.model.layers.0.mlp.{at}.lora_{which}.default.weight"
        for at in ("up", "down")
        for which in "AB"
    ]
    trained = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in names}
    missing = [name for name in names if ".up." in name]
    with pytest.raises(UserError) as wrong:
        first_look.look(missing, trained, waits=True)
    assert wrong.value.what.startswith("50.0% of the trained weights") and "model.layers.*.mlp.up" in wrong.value.what
    assert wrong.value.fix.startswith("give --lora_target_modules '[down]'")
    assert first_look.look([], trained, waits=True) is None
    assert "mlp.up" in first_look.look(missing, trained, waits=False)
