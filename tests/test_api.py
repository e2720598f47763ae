"""The Python API: it does what the command line does, and takes a script's own model, loss and callbacks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from launches import ROOT, launch
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer, DogeConfig, PreTrainedTokenizerFast, TrainerCallback

from manyrank import SFTConfig, SFTDataset, SFTTrainer, UserError, api, load_model
from manyrank.runs.logs import read_metrics
from manyrank.topology import ranks

DATA = str(ROOT / "data" / "sample.jsonl")
SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "bf16": False,
}


def config(folder, **more) -> SFTConfig:
    return SFTConfig(
        **{"model": "embedded", "data_path": DATA, "output_dir": folder, "max_length": 256, **SMALL, **more}
    )


def test_a_config_takes_all_names_and_recipes():
    made = SFTConfig(model_name_or_path="m", data_path="d.json", use_lora=False, lr=1e-5, epochs=2)
    assert (made.method, made.learning_rate, made.num_train_epochs) == ("full", 1e-5, 2)
    assert SFTConfig("quickstart", lora_r=4).lora_r == 4 and SFTConfig("quickstart").model_name_or_path == "embedded"
    for wrong, what in (
        ({"lora_rr": 4}, "lora_rr"),
        ({"lora_r": 0}, "lora_r: 0"),
        ({"use_lora": False, "use_4bit": True}, "contradict"),
    ):
        with pytest.raises(UserError, match=what):
            SFTConfig(model="m", data_path="d", **wrong)


def test_training_is_the_command_line_s(tmp_path, embedded_model):
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    result = SFTTrainer(config(tmp_path / "api", lora_r=8, save_steps=3)).train()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before
    flags = [f"--{key}={value}" for key, value in SMALL.items()]
    line = launch(
        tmp_path / "line",
        f"--data_path={DATA}",
        "--model=embedded",
        "--max_length=256",
        "--lora_r=8",
        *flags,
        recipe="default",
    )
    assert line.code == 0, line.stderr
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in result.history] == line.metrics(key)
    one, other = (load_file(tmp_path / name / "final_model" / "adapter_model.safetensors") for name in ("api", "line"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert result.global_step == 3 and result.metrics["loss"] == result.history[-1]["loss"]
    assert result.final_model.is_dir() and (result.folder / "checkpoint-3").is_dir()
    assert not (result.folder / "tokenizer").exists()  # it is the base's
    assert "SFTConfig, lora_r" in (result.folder / "config.yaml").read_text()
    model, tokenizer = load_model(str(result.final_model), dtype="float32")
    assert model.active_adapter == "default" and tokenizer.chat_template


def test_a_second_training_in_the_process_and_a_resumed_one(tmp_path, embedded_model):
    first = SFTTrainer(config(tmp_path / "a", save_steps=1, bf16="auto")).train()
    second = SFTTrainer(config(tmp_path / "b")).train()
    assert first.global_step == second.global_step == 3
    again = SFTTrainer(
        config(tmp_path / "b", max_steps=3, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"), bf16="auto")
    )
    assert [line["loss"] for line in again.train().history] == [line["loss"] for line in first.history]


def test_a_model_that_is_refused_is_given_back_as_it_was(tmp_path, embedded_model):
    """The fix that the refusal names works with the same model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(DogeConfig(**shape, num_key_value_heads=2, vocab_size=len(tokenizer)))
    attention, names = model.config._attn_implementation, [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match="packing does not know a mask of its own") as refused:
        SFTTrainer(config(tmp_path / "a"), model=model, tokenizer=tokenizer).train()
    assert "packing: none" in refused.value.fix and not (tmp_path / "a").exists()
    assert model.config._attn_implementation == attention and not hasattr(model, "peft_config")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert "forward" not in vars(model.lm_head)
    result = SFTTrainer(config(tmp_path / "b", packing="none"), model=model, tokenizer=tokenizer).train()
    assert result.global_step == 3 and (result.final_model / "adapter_model.safetensors").is_file()


def test_a_second_interrupt_ends_a_script_s_training(tmp_path, embedded_model):
    script = ROOT / "tests" / "support" / "interrupted_script.py"
    done = warm.run([sys.executable, str(script), DATA, str(tmp_path / "run")], timeout=55)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "interrupted", done.stderr


def test_a_model_a_tokenizer_callbacks_and_a_loss_of_one_s_own(tmp_path, embedded_model):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def smoothed(logits, targets):
        seen.append((logits.dtype, logits.shape[0] == len(targets)))
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)

    plain = SFTTrainer(config(tmp_path / "plain")).train()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(embedded_model),
        AutoTokenizer.from_pretrained(embedded_model),
    )
    own = SFTTrainer(config(tmp_path / "own"), model=model, tokenizer=tokenizer, callbacks=[Watch()]).train()
    assert own.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-6) and seen == [1, 2, 3]
    ids = tokenizer("What is", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3  # it is its owner's again
    with pytest.raises(UserError, match="the model has adapters"):
        SFTTrainer(config(tmp_path / "twice"), model=load_model(str(own.final_model))[0]).train()
    validated = config(tmp_path / "loss", eval_data_path=DATA, eval_steps=3, save_steps=2)
    other = SFTTrainer(validated, loss=smoothed).train()
    assert "eval_loss" in other.metrics and "eval_perplexity" not in other.metrics
    with pytest.raises(UserError, match=r"loss: .*smoothed -> None"):
        SFTTrainer(config(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "loss" / "checkpoint-2"))).train()
    assert (torch.float32, True) in seen and other.history[0]["loss"] > plain.history[0]["loss"] + 0.1


def test_a_model_that_was_trained_in_part_can_be_trained_as_a_whole(tmp_path, embedded_model):
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    for name, options in {"part": {"unfrozen_parameters": ["layers.3"]}, "whole": {}}.items():
        trainer = SFTTrainer(config(tmp_path / name, method="full", learning_rate=1e-3, **options), model=model)
        trainer.train()
        facts = json.loads((tmp_path / name / "logs" / "strategy.json").read_text())
        assert (facts["trained_parameters"] == facts["parameters"]) == (name == "whole")
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpoints_are_used_with_the_tokenizer_of_their_run(method, tmp_path, embedded_model):
    base = AutoTokenizer.from_pretrained(embedded_model)
    base.backend_tokenizer.normalizer = Lowercase()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        chat_template="{{ 'Mind. ' }}" + base.chat_template,
    )
    own = SFTTrainer(config(tmp_path / "own", method=method, save_steps=2), tokenizer=tokenizer).train()
    asked = [{"role": "user", "content": "What IS the mean?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    for name in ("own", "own/checkpoint-2", "own/final_model"):
        used = load_model(str(tmp_path / name))[1]
        assert used.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == ids, name
    shutil.rmtree(own.final_model)
    assert load_model(str(own.folder))[1].chat_template == tokenizer.chat_template


def test_a_checkpoint_is_evaluated_with_the_tokenizer_of_its_run(tmp_path, embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    tokenizer.chat_template = "{{ 'Mind. ' }}" + tokenizer.chat_template
    SFTTrainer(config(tmp_path / "own", save_steps=3), tokenizer=tokenizer).train()
    shutil.copytree(tmp_path / "own" / "checkpoint-3", tmp_path / "alone")  # nothing tells of its run
    losses = {}
    for name in ("own/checkpoint-3", "own/final_model", "alone"):
        argv = [
            sys.executable,
            "-m",
            "manyrank.cli",
            "evaluate",
            str(tmp_path / name),
            "--metrics=loss",
            f"--data={DATA}",
        ]
        argv += ["--max-rows=8", "--no-base", "--dtype=float32", f"--output={tmp_path / 'evaluation' / name}"]
        done = warm.run(argv)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "evaluation" / name / "eval_results.json").read_text())
        losses[name] = found["models"][str(tmp_path / name)]["metrics"]["loss"]["mean"]
    assert losses["own/checkpoint-3"] == losses["own/final_model"] != losses["alone"]


def test_paths_in_lists_and_an_epoch_that_a_callback_ends(tmp_path, embedded_model):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    made = config(tmp_path, data_path=[ROOT / "data" / "sample.jsonl", {"path": ROOT / "data" / "validation.jsonl"}])
    assert [source.path for source in made.data_path] == [DATA, str(ROOT / "data" / "validation.jsonl")]
    with pytest.raises(UserError, match="ends the epoch early"):
        SFTTrainer(made, callbacks=[Ends()]).train()


def test_full_fine_tuning_of_one_s_own_model_keeps_float32_masters(tmp_path, embedded_model):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.bfloat16)
    SFTTrainer(config(tmp_path, use_lora=False, max_steps=1), model=model).train()
    assert load_file(tmp_path / "final_model" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    with pytest.raises(UserError, match="not quantised"):
        SFTTrainer(config(tmp_path / "q", method="qlora"), model=model).train()
    with pytest.raises(UserError, match="fp8 with a model in memory"):
        SFTTrainer(config(tmp_path / "f", method="fp8"), model=model).train()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_script_under_torchrun(strategy, tmp_path, embedded_model):
    line = launch(tmp_path / "line", "--max_steps=3", f"--data_path={DATA}", f"--strategy={strategy}", "--nproc=2")
    assert line.code == 0, line.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "tests/support/api_script.py")]
    done = warm.run([*command, DATA, str(tmp_path / "run"), strategy])
    assert done.returncode == 0, done.stderr
    assert [entry["loss"] for entry in read_metrics(tmp_path / "run")] == line.metrics()
    assert done.stdout.count("final model") == 1


def test_a_dataset_has_the_labels_of_the_training(tokenizer):
    made = SFTDataset(data_path=DATA, tokenizer=tokenizer, max_length=128, use_chat_template=True)
    example = made[0]
    assert list(example) == ["input_ids", "attention_mask", "labels"] and len(made) == 160
    learned = example["labels"] != -100
    assert torch.equal(example["labels"][learned], example["input_ids"][learned]) and 0 < learned.sum() < len(learned)
    assert example["attention_mask"].all() and torch.equal(made[-1]["input_ids"], made[159]["input_ids"])
    with pytest.raises(IndexError):
        made[160]


def test_a_dataset_without_a_template(tokenizer):
    before = tokenizer.chat_template
    example = SFTDataset(DATA, tokenizer, use_chat_template=False)[0]
    text = tokenizer.decode(example["input_ids"])
    learned = tokenizer.decode(example["labels"][example["labels"] != -100])
    assert learned.endswith(tokenizer.eos_token) and learned in text and "assistant" not in text
    assert tokenizer.chat_template == before
    with pytest.raises(UserError, match="not used"):
        SFTDataset(DATA, tokenizer, use_chat_template=False, chat_template="chatml")
    with pytest.raises(UserError, match="has each row once"):
        SFTDataset(DATA, tokenizer, sampling_temperature=2)


def test_the_package_imports_without_torch():
    code = "import sys, manyrank; assert 'torch' not in sys.modules; print(sorted(manyrank.__all__)); manyrank.nothing"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "SFTTrainer" in done.stdout and "no attribute 'nothing'" in done.stderr


def test_a_config_needs_no_torch():
    code = (
        "import sys; from manyrank import SFTConfig, UserError; SFTConfig('verify'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_a_run_without_a_name_takes_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, place = SFTConfig("verify"), ranks.from_environment()
    assert api._folder(config, place) == Path("output/run")
    Path("output/run").mkdir(parents=True)
    assert api._folder(config, place) == Path("output/run-2")
    assert api._folder(SFTConfig("verify", resume_from_checkpoint="auto"), place) == Path("output/run")
    assert api._folder(config, replace(place, world_size=2)) == Path("output/run")
