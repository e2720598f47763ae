"""Merged folders answer, in plain transformers, as base and adapter; what is not right is not kept."""

import json
import resource
import shutil
import sys

import pytest
import torch
import warm
from launches import ROOT, launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from small_models import LAUNCHED, save_for_launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manyrank.errors import UserError
from manyrank.models import inference
from manyrank.tools.merge import main as merge
from manyrank.tools.merge import merging
from manyrank.tools.merge.logits import in_float32, logits

IDS = torch.arange(5, 69).view(2, 32)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, embedded_model):
    folder = tmp_path_factory.mktemp("merge") / "run"
    done = launch(folder, "--max_steps=4", "--save_steps=2", "--strategy=single", "--lr=0.01")
    assert done.code == 0, done.stderr
    return folder


def out(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def plain(folder, adapter=None, dtype=torch.float32):
    """As a user of transformers and peft loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return out(PeftModel.from_pretrained(model, adapter) if adapter else model)


def run(*argv) -> int:
    return merge.main([str(word) for word in argv])


def test_a_merged_run_answers_as_base_and_adapter(lora_run, embedded_model, tmp_path, capsys):
    assert run(lora_run, "--output", tmp_path / "merged", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    base, tuned = plain(embedded_model), plain(embedded_model, lora_run / "final_model")
    merged = plain(tmp_path / "merged")
    assert (base - tuned).abs().max() > 0.1
    assert torch.allclose(merged, tuned, atol=1e-4)
    assert report["dtype"] == "float32" and report["largest_difference"] < 1e-4 < report["adapter_effect"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(embedded_model).chat_template
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_of_16_bits_is_written_in_shards_with_an_index(dtype, lora_run, embedded_model, tmp_path, capsys):
    assert run(lora_run, "--output", tmp_path / "m", "--dtype", dtype, "--max-shard-size", "1MB") == 0
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        assert file.stat().st_size < 1.1e6
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {getattr(torch, dtype)}
    tuned = plain(embedded_model, lora_run / "final_model")
    assert (plain(tmp_path / "m") - tuned).abs().max() < 0.02 * tuned.abs().max()
    assert "tolerance" in capsys.readouterr().out


def test_qlora_adapters_of_a_sharded_run_go_into_the_full_base(embedded_model, tmp_path):
    done = launch(
        tmp_path / "run",
        "--max_steps=2",
        "--save_steps=1",
        "--strategy=fsdp",
        "--nproc=2",
        "--method=qlora",
        "--lr=0.01",
    )
    assert done.code == 0, done.stderr
    assert done.facts()["wrapper"].startswith("FSDP")
    for name in ("run", "run/checkpoint-1"):
        assert run(tmp_path / name, "--output", tmp_path / "m", "--overwrite") == 0
        adapter = tmp_path / name / ("final_model" if name == "run" else "")
        merged = plain(tmp_path / "m")
        assert torch.allclose(merged, plain(embedded_model, adapter), atol=1e-4)
        assert not torch.allclose(merged, plain(embedded_model), atol=1e-2)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}


def test_a_checkpoint_of_full_training_becomes_a_folder_with_its_tokenizer(embedded_model, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{# own #}"
    (tmp_path / "own.jinja").write_text(template)
    done = launch(
        tmp_path / "run",
        "--max_steps=1",
        "--save_steps=1",
        "--strategy=single",
        "--method=full",
        f"--chat_template={tmp_path}/own.jinja",
    )
    assert done.code == 0, done.stderr
    assert run(tmp_path / "run" / "checkpoint-1", "--dtype", "bfloat16") == 0
    merged = tmp_path / "run" / "merged"
    assert AutoTokenizer.from_pretrained(merged).chat_template == template
    assert (plain(merged) - plain(tmp_path / "run" / "checkpoint-1")).abs().max() < 0.5
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="no adapter to merge"):
        run(merged, "--output", tmp_path / "again")


def adapted(folder, base, **config):
    """An adapter with values that matter, made without a training."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **config}))
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return out(model)


LINEAR = ["q_proj", "o_proj", "down_proj"]
KINDS = {
    "rslora with patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "alpha_pattern": {"o_proj": 32},
        "rank_pattern": {"q_proj": 2},
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "trained whole": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "embedding and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "trained tokens": {"target_modules": LINEAR, "trainable_token_indices": [7, 9]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged(kind, embedded_model, tmp_path):
    tuned = adapted(tmp_path / "adapter", embedded_model, **KINDS[kind])
    assert run(tmp_path / "adapter", "--output", tmp_path / "m") == 0
    assert torch.allclose(plain(tmp_path / "m"), tuned, atol=2e-3)
    assert (plain(embedded_model) - tuned).abs().max() > 0.5


def test_biases_go_only_into_a_base_with_biases(embedded_model, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **LAUNCHED, use_bias=True))
    save_for_launch(model, tmp_path / "base", embedded_model)
    layers = ["q_proj", "c_proj"]
    tuned = adapted(tmp_path / "biased", tmp_path / "base", target_modules=layers, lora_bias=True)
    assert run(tmp_path / "biased", "--output", tmp_path / "m") == 0
    assert torch.allclose(plain(tmp_path / "m"), tuned, atol=2e-3)
    adapted(tmp_path / "adapter", embedded_model, target_modules=LINEAR, lora_bias=True)  # of layers without a bias
    monkeypatch.setattr(inference, "load_stored", None)  # nothing is loaded
    with pytest.raises(UserError, match="cannot be merged: it has biases"):
        run(tmp_path / "adapter", "--output", tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "saved", "none"])
def test_a_tied_head_is_untied_only_where_the_adapter_makes_the_two_differ(target, embedded_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(embedded_model).save_pretrained(tmp_path / "tied")
    more = {"modules_to_save": ["embed_tokens"]} if target == "saved" else {}
    targets = [*LINEAR, *([target] if target in ("embed_tokens", "lm_head") else [])]
    tuned = adapted(tmp_path / "adapter", tmp_path / "tied", target_modules=targets, **more)
    assert run(tmp_path / "adapter", "--output", tmp_path / "m") == 0
    assert torch.allclose(plain(tmp_path / "m"), tuned, atol=2e-3)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] == (target == "none")


def test_adapters_on_experts_and_a_base_in_bin(embedded_model, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1536,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    base = Qwen3MoeForCausalLM(config)
    base.config.save_pretrained(tmp_path / "moe")
    torch.save(base.state_dict(), tmp_path / "moe" / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(embedded_model).save_pretrained(tmp_path / "moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = adapted(tmp_path / "adapter", tmp_path / "moe", target_modules=["q_proj"], target_parameters=experts)
    assert run(tmp_path / "adapter", "--output", tmp_path / "m") == 0
    assert torch.allclose(plain(tmp_path / "m"), tuned, atol=1e-3)
    assert (plain(tmp_path / "moe") - tuned).abs().max() > 0.1


def test_memory_is_that_of_one_copy(embedded_model, tokenizer, tmp_path):
    """A model of 150 MiB adds to the peak of a small one its merged copy, a layer in float32, and the pages of its file.

    These last are the file's: the system takes them back when it needs memory.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(
        vocab_size=1536,
        head_dim=64,
        num_attention_heads=12,
        num_key_value_heads=6,
        hidden_size=768,
        intermediate_size=2304,
    )
    for name, layers in (("small", 1), ("large", 11)):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=layers)).bfloat16().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / f"{name}-adapter"
        )
    script = str(ROOT / "tests" / "support" / "merge_memory.py")
    done = warm.run([sys.executable, script, *(str(tmp_path / f"{name}-adapter") for name in ("small", "large"))])
    assert done.returncode == 0, done.stderr
    small, large, size = json.loads(done.stdout)
    assert size > 140 * 2**20 and large - small < 2.5 * size


# What is refused or fails


def test_a_result_over_the_tolerance_fails_and_is_not_kept(lora_run, tmp_path, capsys):
    assert run(lora_run, "--output", tmp_path / "m", "--dtype", "bfloat16", "--tolerance", "0") == 1
    error = capsys.readouterr().err
    assert "largest difference of a logit" in error and "(tolerance 0)" in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_damaged_on_the_disk_fails(lora_run, tmp_path, monkeypatch, capsys):
    save = merging.save

    def then_damage(model, tokenizer, folder, **options):
        save(model, tokenizer, folder, **options)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])

    monkeypatch.setattr(merging, "save", then_damage)
    assert run(lora_run, "--output", tmp_path / "m") == 1
    assert "error: the result cannot be loaded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(lora_run, tmp_path, capsys):
    """A limit on the size of files is the write error that a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        assert run(lora_run, "--output", tmp_path / "m") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_replaced_only_on_demand_and_only_if_merge_wrote_it(lora_run, tmp_path):
    assert run(lora_run, "--output", tmp_path / "m") == 0
    before = (tmp_path / "m" / "model.safetensors").stat().st_ino
    with pytest.raises(UserError, match="is there already"):
        run(lora_run, "--output", tmp_path / "m")
    assert run(lora_run, "--output", tmp_path / "m", "--overwrite", "--dtype", "bfloat16", "--tolerance", "0") == 1
    assert (tmp_path / "m" / "model.safetensors").stat().st_ino == before  # a failure costs nothing
    shutil.copytree(lora_run / "final_model", tmp_path / "mine")
    with pytest.raises(UserError, match="something else"):
        run(lora_run, "--output", tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--dtype", "int8"], "dtype: 'int8' is invalid"),
        (["--tolerance", "-1"], "tolerance: '-1' is invalid"),
        (["--tolerance", "nan"], "tolerance: 'nan' is invalid"),
        (["--max-shard-size", "5"], "not a size"),
        (["--max-shard-size", "0GB"], "not a size"),
        (["--push-to-hub", "a/b"], "no option '--push_to_hub'"),
        (["--frobnicate"], "no option '--frobnicate'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(argv, what, lora_run):
    with pytest.raises(UserError, match=what):
        run(lora_run, *argv)


def test_a_quantised_base_is_refused(lora_run, embedded_model, tmp_path):
    shutil.copytree(embedded_model, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UserError, match="quantised"):
        run(lora_run, "--output", tmp_path / "m", "--base", tmp_path / "base")


def test_values_that_are_no_numbers_are_refused(embedded_model, tmp_path):
    adapted(tmp_path / "adapter", embedded_model, target_modules=LINEAR)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match="NaN"):
        run(tmp_path / "adapter", "--output", tmp_path / "m")


# Parts


def test_logits_in_float32_from_16_bits_are_those_of_the_widened_model(embedded_model):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.bfloat16).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, narrow = logits(model, IDS), out(model)
    with pytest.raises(TypeError), in_float32(model):
        model(input_ids="no tensor")
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert model.dtype == torch.bfloat16 and not model.model.embed_tokens._forward_pre_hooks
    wide = out(model.float())
    assert torch.equal(found, wide) and not torch.equal(narrow, wide)
