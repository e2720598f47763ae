"""`manyrank import`: recipes of other tools, trained as what they say, or an error that names what is not here."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from launches import ROOT, launch
from safetensors.numpy import save_file

from manyrank import cli
from manyrank.config.resolve import FIELDS, resolve
from manyrank.errors import UserError, UserErrors
from manyrank.tools.importer.axolotl import DIALECT as AXOLOTL
from manyrank.tools.importer.main import DIALECTS, ImportOptions, recognise, translate
from manyrank.tools.importer.translation import Translation

QUESTIONS = [json.loads(line) for line in (ROOT / "data" / "sample.jsonl").read_text().splitlines()[:8]]
AXOLOTL_RECIPE = {
    "base_model": "embedded",
    "datasets": [
        {
            "path": "turns.jsonl",
            "type": "chat_template",
            "field_messages": "dialog",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["human"], "assistant": ["gpt"]},
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
    ],
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 12,
    "lora_target_linear": True,
    "sequence_len": 256,
    "sample_packing": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": "3e-3",
    "max_steps": 4,
    "optimizer": "adamw_torch_fused",
    "bf16": False,
    "flash_attention": True,
    "wandb_entity": None,
    "special_tokens": {"pad_token": "<pad>"},
}
LLAMA_FACTORY_RECIPE = {
    "model_name_or_path": "embedded",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "dataset": "pairs,turns",
    "template": "chatml",
    "cutoff_len": 257,
    "neat_packing": True,
    "max_samples": 6,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "bf16": False,
    "plot_loss": True,
}
INFO = {
    "pairs": {"file_name": "pairs.json", "columns": {"prompt": "q", "query": "more", "response": "a"}},
    "turns": {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    },
}
TRL_RECIPE = {
    "model_name_or_path": "embedded",
    "dataset_name": "messages.jsonl",
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "bf16": False,
    "report_to": "none",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with the data that the recipes name."""
    monkeypatch.chdir(tmp_path)
    roles = (("human", "question"), ("gpt", "answer"))
    turns = [{"dialog": [{"from": role, "value": row[key]} for role, key in roles]} for row in QUESTIONS]
    names = (("user", "question"), ("assistant", "answer"))
    messages = [{"messages": [{"role": role, "content": row[key]} for role, key in names]} for row in QUESTIONS]
    for name, rows in {"turns.jsonl": turns, "messages.jsonl": messages}.items():
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("pairs.json").write_text(json.dumps([{"q": r["question"], "a": r["answer"]} for r in QUESTIONS]))
    Path("dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def write(values: dict, name: str = "theirs.yaml", **changes) -> Path:
    """Write a recipe with changes; None takes a key out."""
    changed = {key: value for key, value in (values | changes).items() if value is not None}
    Path(name).write_text(yaml.safe_dump(changed))
    return Path(name)


def imported(values: dict, *allow: str, **changes):
    """The resolved config of a recipe."""
    return translate(ImportOptions(file=write(values, **changes), allow=list(allow)))[1].config


def refused(values: dict, *allow: str, **changes) -> UserError:
    with pytest.raises(UserError) as caught:
        translate(ImportOptions(file=write(values, **changes), allow=list(allow)))
    return caught.value


def trained(folder: Path, recipe: str, *args: str):
    run = launch(folder, *args, "--strategy=single", recipe=recipe, cwd=folder.parent)
    assert run.code == 0, run.stderr
    return run


# Training


def test_a_recipe_of_axolotl_trains_as_it_says(folder, capsys):
    assert cli.main(["import", str(write(AXOLOTL_RECIPE)), "--output", "my.yaml"]) == 0
    run = trained(folder / "run", "my.yaml")
    adapter = json.loads((run.folder / "final_model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 12, 0.0)
    assert {"q_proj", "down_proj"} <= set(adapter["target_modules"])
    by_hand = {
        "model_name_or_path": "embedded",
        "data_path": {"path": "turns.jsonl", "format_type": "messages", "columns": {"messages": "dialog"}},
        **{"lora_r": 4, "lora_alpha": 12, "max_length": 256, "packing": "dataset", "overlong": "drop"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3},
        **{"max_steps": 4, "warmup_steps": 0.03, "bf16": False},
    }
    Path("hand.yaml").write_text(yaml.safe_dump(by_hand))
    other = trained(folder / "other", "hand.yaml")
    assert run.metrics() == other.metrics()
    assert run.metrics("learning_rate") == other.metrics("learning_rate")
    assert len(set(run.metrics())) == 4


def test_a_recipe_of_llama_factory_trains_as_it_says(folder):
    assert cli.main(["import", str(write(LLAMA_FACTORY_RECIPE)), "--output", "my.yaml"]) == 0
    run = trained(folder / "run", "my.yaml")
    adapter = json.loads((run.folder / "final_model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (4, 8, {"q_proj", "v_proj"})
    by_hand = {
        "model_name_or_path": "embedded",
        "data_path": [
            {"path": "pairs.json", "columns": {"instruction": "q", "output": "a"}, "max_rows": 6},
            {"path": "turns.jsonl", "columns": {"messages": "dialog"}, "max_rows": 6},
        ],
        **{"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "max_length": 256},
        **{"packing": "dataset", "chat_template": "chatml", "per_device_train_batch_size": 1, "bf16": False},
        **{"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 2, "lr_scheduler_type": "linear"},
    }
    Path("hand.yaml").write_text(yaml.safe_dump(by_hand))
    other = trained(folder / "other", "hand.yaml")
    assert run.metrics() == other.metrics()
    assert run.metrics("learning_rate") == other.metrics("learning_rate")


def test_a_recipe_of_trl_has_the_losses_of_trl(folder, embedded_model):
    """Of one batch that holds all rows, with all weights trained: what TRL itself does in three steps."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    assert cli.main(["import", str(write(TRL_RECIPE)), "--output", "my.yaml"]) == 0
    run = trained(folder / "run", "my.yaml")
    config = SFTConfig(
        **{key: TRL_RECIPE[key] for key in ("per_device_train_batch_size", "max_steps", "bf16", "report_to")},
        **{"output_dir": str(folder / "trl"), "logging_steps": 1, "use_cpu": True, "save_strategy": "no"},
    )
    rows = load_dataset("json", data_files="messages.jsonl", split="train", cache_dir=str(folder / "cache"))
    trainer = SFTTrainer(model=str(embedded_model), args=config, train_dataset=rows)
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert run.metrics() == pytest.approx([entry["loss"] for entry in theirs], abs=2e-4)
    assert run.metrics("learning_rate") == pytest.approx([entry["learning_rate"] for entry in theirs])


# Defaults of the tools


def test_defaults_that_differ_are_written_down():
    config = imported(AXOLOTL_RECIPE, adapter=None, sequence_len=None, micro_batch_size=None, max_steps=None)
    assert (config.method, config.max_length, config.num_train_epochs, config.warmup_steps) == ("full", 512, 1, 0.03)
    assert (config.per_device_train_batch_size, config.overlong) == (1, "drop")
    config = imported(
        LLAMA_FACTORY_RECIPE,
        **dict.fromkeys(("lora_rank", "lora_target", "cutoff_len", "neat_packing", "learning_rate")),
        per_device_train_batch_size=None,
    )
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (8, 16, "all-linear")
    assert (config.max_length, config.learning_rate, config.lr_scheduler_type) == (2048, 5e-5, "linear")
    assert (config.per_device_train_batch_size, config.packing) == (8, "step")
    config = imported(TRL_RECIPE, per_device_train_batch_size=None)
    assert (config.method, config.learning_rate, config.lr_scheduler_type) == ("full", 2e-5, "linear")
    assert (config.per_device_train_batch_size, config.train_on_prompt, config.max_length) == (8, True, 1024)
    config = imported(TRL_RECIPE, use_peft=True, lora_target_modules=["q_proj"])
    assert (config.method, config.lora_r, config.lora_alpha, config.lora_dropout) == ("lora", 16, 32, 0.05)


def test_modules_that_peft_adapts_without_names():
    model = "Qwen/Qwen2.5-0.5B"
    config = imported(TRL_RECIPE, model_name_or_path=model, use_peft=True, load_in_4bit=True)
    assert (config.method, config.lora_target_modules) == ("qlora", ["q_proj", "v_proj"])
    assert "peft names modules" in refused(TRL_RECIPE, model_name_or_path="some/model", use_peft=True).why


@pytest.mark.parametrize(
    ("rows", "learned"),
    [
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], True),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}],
            False,
        ),
        ([{"text": "a"}], False),
    ],
)
def test_rows_decide_what_trl_learns(rows, learned):
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert imported(TRL_RECIPE, dataset_name="rows.jsonl").train_on_prompt is learned
    assert not imported(TRL_RECIPE, dataset_name="rows.jsonl", assistant_only_loss=True).train_on_prompt
    assert imported(TRL_RECIPE, dataset_name="rows.jsonl", completion_only_loss=False).train_on_prompt


def test_sources_of_several_kinds_decide_nothing():
    Path("text.jsonl").write_text(json.dumps({"text": "a"}))
    sources = [{"path": "json", "data_files": name} for name in ("messages.jsonl", "text.jsonl")]
    error = refused(TRL_RECIPE, dataset_name=None, datasets=sources, packing=True, packing_strategy="bfd", max_length=9)
    assert "messages and text" in error.why
    changes = {"dataset_name": None, "datasets": sources[:1], "max_length": 9, "use_peft": False}
    config = imported(TRL_RECIPE, **changes)
    assert (config.train_on_prompt, config.method) == (True, "full")


def test_a_mixture_of_the_alignment_handbook():
    entry = {"id": "messages.jsonl", "config": None, "split": "train", "columns": ["messages"], "weight": 1.0}
    mixture = {"datasets": [entry, entry | {"id": "turns.jsonl"}], "test_split_size": 2}
    config = imported(
        TRL_RECIPE, "completion_only_loss", dataset_name=None, dataset_mixture=mixture, eval_strategy="epoch"
    )
    assert [source.path for source in config.data_path] == ["messages.jsonl", "turns.jsonl"]
    assert (config.eval_split, config.eval_steps) == (2, "epoch")
    options = ImportOptions(file=Path("theirs.yaml"), data="messages.jsonl")
    assert [source.path for source in translate(options)[1].config.data_path] == ["messages.jsonl"]
    mixture["datasets"][1]["weight"] = 0.5
    assert "dataset_mixture.weight" in str(refused(TRL_RECIPE, dataset_name=None, dataset_mixture=mixture))


@pytest.mark.parametrize("when", ["no", False, "epoch"])
def test_steps_beside_a_strategy_that_does_not_count_them(when):
    changes = {"save_strategy": when, "save_steps": 100, "eval_strategy": when, "eval_steps": 50, "val_size": 0.5}
    config = imported(LLAMA_FACTORY_RECIPE, **changes)
    ours = "epoch" if when == "epoch" else "off"
    assert config.save_steps == ours
    assert config.eval_steps == ("epoch" if when == "epoch" else None)
    config = imported(LLAMA_FACTORY_RECIPE, **changes | {"save_strategy": "steps", "eval_strategy": "steps"})
    assert (config.save_steps, config.eval_steps) == (100, 50)


def test_rows_that_are_not_here_decide_nothing(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(TRL_RECIPE, dataset_name="nobody/nothing")
    assert (error.where, error.fix) == (
        "theirs.yaml, completion_only_loss",
        "--allow completion_only_loss leaves it out",
    )
    assert not imported(TRL_RECIPE, dataset_name="nobody/nothing", completion_only_loss=True).train_on_prompt


# GRPO

GRPO_RECIPE = {
    "model_name_or_path": "embedded",
    "dataset_name": "solutions.jsonl",
    "reward_funcs": ["think_format_reward"],
    "num_generations": 4,
    "max_completion_length": 24,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "beta": 0.1,
    "learning_rate": 1e-3,
    "bf16": False,
    "report_to": "none",
}


@pytest.fixture
def solutions():
    rows = [
        {"prompt": [{"role": "user", "content": row["question"]}], "solution": row["answer"]} for row in QUESTIONS[:4]
    ]
    Path("solutions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_recipe_of_grpo_trains_as_it_says(folder, solutions):
    rewards = {"brief": {"reward": "length", "max": 12}, "repetition": 0.5}
    options = ImportOptions(file=write(GRPO_RECIPE), rewards=rewards)
    translation, resolved, allowed = translate(options)
    Path("my.yaml").write_text(translation.text(resolved, allowed))
    run = trained(folder / "run", "my.yaml")
    by_hand = {
        **{"task": "grpo", "method": "full", "model_name_or_path": "embedded", "rewards": rewards, "beta": 0.1},
        **{"data_path": {"path": "solutions.jsonl", "columns": {"completion": "solution"}}, "num_generations": 4},
        **{"max_completion_length": 24, "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "linear", "bf16": False},
    }
    Path("hand.yaml").write_text(yaml.safe_dump(by_hand))
    other = trained(folder / "other", "hand.yaml")
    assert run.metrics("reward") == other.metrics("reward")
    assert run.metrics("grad_norm") == other.metrics("grad_norm")
    assert all(run.metrics("reward_std"))


def test_defaults_of_grpo_are_written_down(solutions):
    config = imported({key: GRPO_RECIPE[key] for key in ("model_name_or_path", "dataset_name", "reward_funcs")})
    assert (config.task, config.method, config.beta, config.learning_rate) == ("grpo", "full", 0.0, 1e-6)
    assert (config.num_generations, config.max_completion_length, config.per_device_train_batch_size) == (8, 512, 8)
    assert (config.lr_scheduler_type, config.loss_type, config.scale_rewards) == ("linear", "dapo", "group")
    assert (config.data_path[0].path, config.columns) == ("solutions.jsonl", {"completion": "solution"})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"scale_rewards": False, "loss_type": "dr_grpo"}, {"scale_rewards": "none", "loss_type": "dr_grpo"}),
        ({"scale_rewards": "batch", "mask_truncated_completions": True}, {"scale_rewards": "batch"}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"max_prompt_length": 99}, {"max_length": 99}),
        ({"use_vllm": True}, {"use_vllm": "colocate"}),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "gpu1"},
            {"use_vllm": "server", "vllm_server_base_url": "http://gpu1:8000"},
        ),
        ({"num_iterations": 1, "epsilon": 0.2, "steps_per_generation": 1, "top_k": 0}, {"task": "grpo"}),
        (
            {"reward_funcs": None, "reward_model_name_or_path": "some/judge", "reward_weights": [2]},
            {"rewards": {"some/judge": {"reward": "model", "model": "some/judge", "weight": 2}}},
        ),
        ({"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}, {"method": "lora"}),
    ],
)
def test_keys_of_grpo(solutions, theirs, ours):
    config = imported(GRPO_RECIPE, **theirs)
    assert {key: getattr(config, key) for key in ours} == ours


def test_the_format_of_thinking_is_scored_as_trl_does(solutions):
    from trl.rewards import think_format_reward

    from manyrank.data.rewards import read_rewards, scorers

    rewards = read_rewards(imported(GRPO_RECIPE, reward_weights=[0.5]).rewards)
    score = scorers(rewards)["think_format_reward"]
    texts = ["<think>a</think>b", "<think>\na\n</think>\n\nb\n", "a <think>b</think>", "<think>a<think>b</think>", "a"]
    texts += ["a\n<think>b</think>", "<think>a</think><think>b</think>", "<think></think>", "<think>a"]
    theirs = think_format_reward([[{"content": text}] for text in texts])
    assert [score(text, "", {}) for text in texts] == theirs
    assert set(theirs) == {0.0, 1.0} and rewards[0].weight == 0.5


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_iterations": 4}, "num_iterations"),
        ({"epsilon": 0.3}, "epsilon"),
        ({"top_k": 50}, "top_k"),
        ({"loss_type": "cispo"}, "loss_type"),
        ({"steps_per_generation": 4}, "steps_per_generation"),
        ({"system_prompt": "Think."}, "system_prompt"),
        ({"use_peft": True, "lora_target_modules": "all-linear"}, "lora_dropout"),
        ({"dataset_name": "pairs.json"}, "columns"),
        ({"dataset_name": "nobody/nothing"}, "columns"),
        ({"dataset_name": "text_prompts.jsonl"}, "dataset_name"),
    ],
)
def test_what_changes_the_loss_of_grpo_needs_to_be_allowed(solutions, monkeypatch, changes, key):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text_prompts.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    if changes.keys() - FIELDS.keys() or key in ("loss_type", "columns", "dataset_name", "lora_dropout"):
        assert f"{key} changes the loss, and is not translated" in refused(GRPO_RECIPE, **changes).what
        assert imported(GRPO_RECIPE, key, **changes).task == "grpo"
    else:  # a key that the schema has by now
        assert getattr(imported(GRPO_RECIPE, **changes), key) == changes[key]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("accuracy_reward", "numeric or exact"), ("my.lib.score", "my.lib:score"), ("cosine", "my_module:cosine")],
)
def test_reward_functions_of_python_are_named_with_what_to_write(solutions, name, hint):
    for allow in ((), ("all",)):
        error = refused(GRPO_RECIPE, *allow, reward_funcs=[name])
        assert (error.what, hint in error.why) == ("rewards is not in it", True)
        assert error.fix.startswith("add --rewards '{NAME: WEIGHT}'")
    options = ImportOptions(file=Path("theirs.yaml"), rewards={"numeric": 2})
    assert translate(options)[1].config.rewards == {"numeric": 2}


def test_a_script_of_grpo(solutions):
    Path("train.sh").write_text(
        "accelerate launch src/grpo.py --model_name_or_path embedded \\\n --dataset_name=solutions.jsonl"
    )
    config = translate(ImportOptions(file=Path("train.sh"), as_from="trl", rewards={"numeric": 1}))[1].config
    assert (config.task, config.rewards, config.num_generations) == ("grpo", {"numeric": 1}, 8)


# What is not here


@pytest.mark.parametrize(
    ("values", "changes", "key"),
    [
        (AXOLOTL_RECIPE, {"datasets": [{"path": "pairs.json", "type": "alpaca"}]}, "datasets.type"),
        (AXOLOTL_RECIPE, {"relora": True}, "relora"),
        (AXOLOTL_RECIPE, {"chat_template": "cohere"}, "chat_template"),
        (AXOLOTL_RECIPE, {"lora_target_linear": None}, "lora_target_modules"),
        (AXOLOTL_RECIPE, {"optimizer": "lion_8bit_of_nobody"}, "optimizer"),
        (AXOLOTL_RECIPE, {"special_tokens": {"eos_token": "<end>"}}, "special_tokens"),
        (
            AXOLOTL_RECIPE,
            {"special_tokens": {"eos_token": "<end>", "additional_special_tokens": ["<a>"]}},
            "special_tokens",
        ),
        (AXOLOTL_RECIPE, {"tensor_parallel_size": 2}, "tensor_parallel_size"),
        (AXOLOTL_RECIPE, {"added_tokens_overrides": {7: "<call>"}}, "added_tokens_overrides"),
        (AXOLOTL_RECIPE, {"unfrozen_parameters": ["^model.embed_tokens.weight$[:32000]"]}, "unfrozen_parameters"),
        (AXOLOTL_RECIPE, {"loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-3}, "loraplus_lr_embedding"),
        (AXOLOTL_RECIPE, {"peft": {"loftq_config": {"loftq_bits": 4}}}, "peft"),
        (AXOLOTL_RECIPE, {"bnb_config_kwargs": {"llm_int8_threshold": 5}}, "bnb_config_kwargs.llm_int8_threshold"),
        (LLAMA_FACTORY_RECIPE, {"template": "vicuna"}, "template"),
        (LLAMA_FACTORY_RECIPE, {"neat_packing": None, "packing": True}, "packing"),
        (LLAMA_FACTORY_RECIPE, {"use_galore": True}, "use_galore"),
        (LLAMA_FACTORY_RECIPE, {"fp8": True}, "fp8"),
        (LLAMA_FACTORY_RECIPE, {"add_tokens": "<a>,<b>"}, "additional_target"),
        (LLAMA_FACTORY_RECIPE, {"resize_vocab": True}, "additional_target"),
        (LLAMA_FACTORY_RECIPE, {"mix_strategy": "interleave_under"}, "mix_strategy"),
        (LLAMA_FACTORY_RECIPE, {"adapter_name_or_path": "one,two"}, "adapter_name_or_path"),
        (LLAMA_FACTORY_RECIPE, {"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method"),
        (TRL_RECIPE, {"loss_type": "entropic"}, "loss_type"),
        (TRL_RECIPE, {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        (TRL_RECIPE, {"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
def test_what_changes_the_loss_needs_to_be_allowed(values, changes, key):
    error = refused(values, **changes)
    assert f"{key} changes the loss, and is not translated" in error.what
    assert error.where == f"theirs.yaml, {key}"
    translation, resolved, allowed = translate(ImportOptions(file=Path("theirs.yaml"), allow=[key]))
    assert [left.key for left in allowed] == [key]
    text = translation.text(resolved, allowed)
    assert f"{key}:" in text.partition("changes the loss")[2].partition("without an effect")[0]


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (AXOLOTL_RECIPE, "rl", "dpo"),
        (AXOLOTL_RECIPE, "pretraining_dataset", [{"path": "c4"}]),
        (LLAMA_FACTORY_RECIPE, "stage", "dpo"),
        (LLAMA_FACTORY_RECIPE, "stage", "pt"),
        (TRL_RECIPE, "desirable_weight", 2),
    ],
)
def test_other_tasks_are_refused_whatever_is_allowed(values, key, value):
    error = refused(values, "all", **{key: value})
    assert error.what.startswith(f"{key}: {value} ")
    assert error.where == f"theirs.yaml, {key}"


def test_roles_that_mean_something_else_are_not_guessed():
    source = AXOLOTL_RECIPE["datasets"][0]
    roles = {"user": ["human"], "assistant": ["bot"]}
    assert "'bot'" in refused(AXOLOTL_RECIPE, datasets=[source | {"roles": roles}]).why
    learned = {"train_on_eos": "last", "roles_to_train": ["human", "gpt"]}
    if unknown := [key for key in learned if key not in FIELDS]:
        error = refused(AXOLOTL_RECIPE, datasets=[source | learned])
        assert str(error).count("changes the loss") == len(unknown)
    else:
        config = imported(AXOLOTL_RECIPE, datasets=[source | learned])
        assert (config.train_on_eos, sorted(config.roles_to_train)) == ("last", ["assistant", "user"])


def test_what_one_source_says_is_for_all():
    source = AXOLOTL_RECIPE["datasets"][0]
    pairs = (("chat_template", "chatml", "llama3"), ("train_on_eos", "turn", "last"))
    for name, one, other in pairs:
        both = [source | {name: one}, source | {name: other}]
        assert f"datasets.{name}" in refused(AXOLOTL_RECIPE, datasets=both).what
    sources = [source | {"chat_template": "chatml"}] * 2
    assert imported(AXOLOTL_RECIPE, datasets=sources, chat_template="llama3").chat_template == "chatml"
    assert imported(AXOLOTL_RECIPE, chat_template="llama3").chat_template == "llama3"
    text = {"path": "text.jsonl", "type": "completion"}
    assert imported(AXOLOTL_RECIPE, datasets=[text]).overlong == "split"
    assert "overlong" in refused(AXOLOTL_RECIPE, datasets=[text, source]).why


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        (AXOLOTL_RECIPE, {"datasets": ["rows.jsonl"]}),
        (AXOLOTL_RECIPE, {"datasets": [{"type": "chat_template"}]}),
        (AXOLOTL_RECIPE, {"gradient_accumulation_steps": None, "batch_size": "large"}),
        (LLAMA_FACTORY_RECIPE, {"cutoff_len": "long"}),
        (LLAMA_FACTORY_RECIPE, {"dataset": 3}),
        (TRL_RECIPE, {"datasets": ["rows.jsonl"]}),
    ],
)
def test_values_that_their_tool_does_not_read_either(values, changes):
    error = refused(values, **changes)
    assert "is nothing that" in error.what
    assert error.where in {f"theirs.yaml, {key}" for key in changes}


def test_what_has_no_effect_on_the_loss_is_listed_with_its_reason(capsys):
    assert cli.main(["import", str(write(AXOLOTL_RECIPE, xformers_attention=False, dataset_processes=4))]) == 0
    shown = capsys.readouterr()
    for key in ("flash_attention: true", "dataset_processes: 4", "special_tokens", "xformers_attention: false"):
        assert f"left out: {key}" in shown.err
        assert f"#   {key}" in shown.out
    assert "warmup_steps: 0.03" in shown.out
    assert "# Axolotl's default" in shown.out
    assert "# micro_batch_size" in shown.out


def test_the_schema_decides_what_is_known(monkeypatch):
    """A key that is added to the schema is translated from then on."""
    monkeypatch.setitem(AXOLOTL.renamed, "peft_use_qalora", "no_such_key")
    assert "peft_use_qalora" in refused(AXOLOTL_RECIPE, peft_use_qalora=True).what
    monkeypatch.setitem(AXOLOTL.renamed, "peft_use_qalora", "use_rslora")
    assert imported(AXOLOTL_RECIPE, peft_use_qalora=True).use_rslora


def test_options_of_adapters():
    theirs = {"peft_use_dora": True, "lora_modules_to_save": ["lm_head"], "peft_layers_to_transform": [1, 2]}
    config = imported(AXOLOTL_RECIPE, **theirs, peft_init_lora_weights="gaussian", loraplus_lr_ratio=8)
    assert (config.use_dora, config.modules_to_save, config.layers_to_transform) == (True, ["lm_head"], [1, 2])
    assert (config.init_lora_weights, config.loraplus_lr_ratio) == ("gaussian", 8)
    theirs = {"additional_target": "embed_tokens,lm_head", "use_rslora": True, "pissa_convert": True}
    for steps, start in ((-1, "pissa"), (None, "pissa_niter_16"), (4, "pissa_niter_4")):
        config = imported(LLAMA_FACTORY_RECIPE, **theirs, pissa_init=True, pissa_iter=steps, loraplus_lr_ratio=16.0)
        assert (config.init_lora_weights, config.loraplus_lr_ratio) == (start, 16)
    assert config.modules_to_save == ["embed_tokens", "lm_head"] and config.use_rslora
    assert imported(LLAMA_FACTORY_RECIPE, pissa_init=False, pissa_iter=4).init_lora_weights == "true"


FOUR_BITS = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
QLORA_OF_AXOLOTL = {"adapter": "qlora", "load_in_4bit": True}
QLORA_OF_TRL = {"use_peft": True, "load_in_4bit": True, "lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("values", "theirs", "ours"),
    [
        (AXOLOTL_RECIPE, QLORA_OF_AXOLOTL | {"bnb_config_kwargs": FOUR_BITS}, {"method": "qlora", **FOUR_BITS}),
        (
            AXOLOTL_RECIPE,
            QLORA_OF_AXOLOTL | {"peft": {"loftq_config": {"loftq_bits": 4}}},
            {"init_lora_weights": "loftq"},
        ),
        (
            AXOLOTL_RECIPE,
            {"peft_layers_pattern": ["layers"], "peft_layers_to_transform": 1},
            {"layers_to_transform": [1]},
        ),
        (
            AXOLOTL_RECIPE,
            {"peft_use_rslora": True, "peft_trainable_token_indices": [5, 6]},
            {"use_rslora": True, "trainable_token_indices": [5, 6]},
        ),
        (AXOLOTL_RECIPE, {"lora_rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
        (
            AXOLOTL_RECIPE,
            {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"], "pad_token": "<pad>"}},
            {"add_tokens": ["<a>"], "add_special_tokens": ["<b>"]},
        ),
        (AXOLOTL_RECIPE, {"noisy_embedding_alpha": 5}, {"neftune_noise_alpha": 5}),
        (AXOLOTL_RECIPE, {"neftune_noise_alpha": 5, "use_dynamic_finetuning": True}, {"dft_loss": True}),
        (AXOLOTL_RECIPE, {"streaming": True, "max_steps": 9, "sample_packing": False}, {"streaming": True}),
        (
            AXOLOTL_RECIPE,
            {"adapter": None, "lora_target_linear": None, "unfrozen_parameters": ["^lm_head.weight$", "layers.1"]},
            {"method": "full", "unfrozen_parameters": ["^lm_head.weight$", "^layers.1.*"]},
        ),
        (
            LLAMA_FACTORY_RECIPE,
            {"finetuning_type": "full", "pure_bf16": True, "bf16": None, "quantization_bit": None},
            {"method": "full", "pure_bf16": True},
        ),
        (AXOLOTL_RECIPE, {"optimizer": "adamw_bnb_8bit"}, {"optim": "adamw_8bit"}),
        (
            AXOLOTL_RECIPE,
            {"optimizer": "sgd", "optim_args": "momentum=0.9"},
            {"optim": "sgd", "optim_args": {"momentum": 0.9}},
        ),
        (AXOLOTL_RECIPE, {"lr_scheduler": "constant_with_warmup"}, {"lr_scheduler_type": "constant_with_warmup"}),
        (
            LLAMA_FACTORY_RECIPE,
            {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
            {"method": "qlora", **FOUR_BITS},
        ),
        (
            LLAMA_FACTORY_RECIPE,
            {"add_special_tokens": "<a>,<b>", "additional_target": "lm_head"},
            {"add_special_tokens": ["<a>", "<b>"], "modules_to_save": ["lm_head"]},
        ),
        (
            LLAMA_FACTORY_RECIPE,
            {"neftune_alpha": 5, "use_dft_loss": True},
            {"neftune_noise_alpha": 5, "dft_loss": True},
        ),
        (
            LLAMA_FACTORY_RECIPE,
            {"create_new_adapter": True, "use_dora": True},
            {"new_adapter": False, "use_dora": True},
        ),
        (LLAMA_FACTORY_RECIPE, {"mask_history": True}, {"train_on_last_turn": True}),
        (LLAMA_FACTORY_RECIPE, {"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_8bit"}),
        (AXOLOTL_RECIPE, {"flash_attention": None, "sdp_attention": True}, {"attn_implementation": "sdpa"}),
        (AXOLOTL_RECIPE, {"flash_attention": True, "bf16": "auto"}, {"attn_implementation": None}),
        (AXOLOTL_RECIPE, {"tf32": True, "full_determinism": True}, {"tf32": True, "full_determinism": True}),
        (LLAMA_FACTORY_RECIPE, {"flash_attn": "disabled"}, {"attn_implementation": "eager"}),
        (LLAMA_FACTORY_RECIPE, {"flash_attn": "fa2"}, {"attn_implementation": None}),
        (TRL_RECIPE, {"attn_implementation": "eager"}, {"attn_implementation": "eager"}),
        (TRL_RECIPE, {"attn_implementation": "kernels-community/flash-attn2"}, {"attn_implementation": None}),
        (TRL_RECIPE, {"callbacks": ["push_to_hub_revision"], "chat_template": "chatml"}, {"callbacks": []}),
        (TRL_RECIPE, QLORA_OF_TRL, {"bnb_4bit_quant_type": None, "bnb_4bit_use_double_quant": False}),
        (TRL_RECIPE, QLORA_OF_TRL | {"use_bnb_nested_quant": True}, {"bnb_4bit_use_double_quant": True}),
        (TRL_RECIPE, QLORA_OF_TRL | {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_quant_type": "fp4"}),
        (TRL_RECIPE, {"loss_type": "dft", "neftune_noise_alpha": 5}, {"dft_loss": True, "neftune_noise_alpha": 5}),
        (TRL_RECIPE, {"loss_type": "chunked_nll", "model_revision": "main"}, {"dft_loss": False}),
        (TRL_RECIPE, {"optim": "adamw_bnb_8bit", "label_smoothing_factor": 0.1}, {"label_smoothing_factor": 0.1}),
        (
            TRL_RECIPE,
            {"use_peft": True, "lora_target_modules": "all-linear", "lora_modules_to_save": ["lm_head"]},
            {"lora_target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        ),
        (
            TRL_RECIPE,
            {"use_peft": True, "lora_target_modules": ["q_proj"], "use_rslora": True, "use_dora": True},
            {"use_rslora": True, "use_dora": True},
        ),
    ],
)
def test_keys_that_this_project_has_are_translated(values, theirs, ours):
    config = imported(values, **theirs)
    assert {key: getattr(config, key) for key in ours} == ours


@pytest.mark.parametrize(
    ("values", "key"), [(AXOLOTL_RECIPE, "lora_model_dir"), (LLAMA_FACTORY_RECIPE, "adapter_name_or_path")]
)
def test_a_saved_adapter_that_is_trained_further_keeps_its_shape(values, key):
    Path("saved").mkdir()
    shape = {"r": 2, "lora_alpha": 3, "target_modules": ["up_proj"], "base_model_name_or_path": "embedded"}
    Path("saved/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **shape}))
    pair = {"A": np.zeros((2, 192), np.float32), "B": np.zeros((512, 2), np.float32)}
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({name.format(part): value for part, value in pair.items()}, "saved/adapter_model.safetensors")
    translation, resolved, _ = translate(ImportOptions(file=write(values, **{key: "saved"})))
    config = resolved.config
    assert (config.adapter, config.method) == ("saved", "lora")
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (2, 3, ["up_proj"])
    assert {"lora_r", "lora_rank"} & {left.key for left in translation.dropped}
    if values is LLAMA_FACTORY_RECIPE:
        new = imported(values, **{key: "saved"}, create_new_adapter=True)
        assert (new.new_adapter, new.lora_r) == (True, 4)


def test_arguments_go_with_their_optimizer():
    theirs = {"optimizer": "adamw_torch_8bit", "optim_args": {"bf16_stochastic_round": True}}
    assert "optimizer changes the loss" in refused(AXOLOTL_RECIPE, **theirs).what
    config = imported(AXOLOTL_RECIPE, "optimizer", **theirs)
    assert (config.optim, config.optim_args) == ("adamw_torch", {})


def test_keys_that_nothing_reads_are_left_out():
    changes = {"adapter": None, "evals_per_epoch": 2, "gradient_checkpointing": "offload"}
    translation, resolved, _ = translate(ImportOptions(file=write(AXOLOTL_RECIPE, **changes)))
    config = resolved.config
    assert {"evals_per_epoch": 2, "lora_r": 4}.items() <= {left.key: left.value for left in translation.dropped}.items()
    assert config.gradient_checkpointing == "full"
    assert (config.method, config.lora_r, config.eval_steps) == ("full", FIELDS["lora_r"].default, None)


# Values


def test_shares_of_an_epoch_are_shares_of_the_run():
    config = imported(
        AXOLOTL_RECIPE, max_steps=None, num_epochs=2, saves_per_epoch=4, evals_per_epoch=1, val_set_size=0.25
    )
    assert (config.save_steps, config.eval_steps, config.eval_split) == (0.125, "epoch", 0.25)


def test_a_batch_of_one_process_is_split_into_micro_batches():
    config = imported(AXOLOTL_RECIPE, gradient_accumulation_steps=None, micro_batch_size=2, batch_size=8)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)


def test_a_schedule_that_ends_above_zero():
    config = imported(AXOLOTL_RECIPE, cosine_min_lr_ratio=0.1, lr_scheduler="cosine")
    assert (config.lr_scheduler_type, config.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "zero3"),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, "zero2"),
        ({"deepspeed": "stage.json"}, "zero3_offload"),
        ({"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"offload_params": True}}, "fsdp_offload"),
        ({"fsdp_config": {"reshard_after_forward": True}, "fsdp_version": 2}, "fsdp"),
        ({"fsdp": [], "deepspeed": None}, None),
    ],
)
def test_sharding_is_a_strategy(changes, strategy):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    Path("stage.json").write_text(json.dumps({"zero_optimization": zero}))
    assert imported(AXOLOTL_RECIPE, **changes).strategy == strategy


def test_a_rule_that_is_broken_names_the_line_of_the_file():
    error = refused(AXOLOTL_RECIPE, load_in_8bit=True, fsdp=["full_shard"])
    assert "int8" in error.what
    assert "theirs.yaml, load_in_8bit" in error.where


def test_trackers_and_the_hub():
    config = imported(AXOLOTL_RECIPE, wandb_project="mine", use_tensorboard=True, hub_model_id="me/model")
    assert (config.report_to, config.wandb_project) == (["wandb", "tensorboard"], "mine")
    assert (config.push_to_hub, config.hub_private_repo, config.hub_model_id) == (True, True, "me/model")


def test_text_to_complete():
    Path("text.jsonl").write_text(json.dumps({"body": "Some text."}))
    source = {"path": "text.jsonl", "type": "completion", "field": "body"}
    (source,) = imported(AXOLOTL_RECIPE, datasets=[source]).data_path
    assert (source.format_type, source.columns) == ("text", {"text": "body"})


@pytest.mark.parametrize(
    ("model", "own"),
    [("Qwen/Qwen2.5-7B-Instruct", True), ("Qwen/Qwen2.5-7B", False), ("Qwen/Qwen2.5-Math-7B-Instruct", False)],
)
def test_a_template_is_left_out_where_it_is_the_models_own(model, own):
    if own:
        assert imported(LLAMA_FACTORY_RECIPE, model_name_or_path=model, template="qwen").chat_template is None
        assert imported(AXOLOTL_RECIPE, base_model=model, chat_template="qwen_25").chat_template is None
    else:
        assert "template" in refused(LLAMA_FACTORY_RECIPE, model_name_or_path=model, template="qwen").what
        assert "chat_template" in refused(AXOLOTL_RECIPE, base_model=model, chat_template="qwen_25").what
    assert "template" in refused(LLAMA_FACTORY_RECIPE, model_name_or_path=model, template="qwen3_vl").what


# Files and options


def test_a_script_of_trl(tmp_path):
    write({"learning_rate": 1e-3, "max_length": 99}, "beside.yaml")
    Path("train.sh").write_text(
        "export A=1\naccelerate launch trl/scripts/sft.py --config beside.yaml \\\n  --model_name_or_path embedded "
        "--dataset_name messages.jsonl \\\n  --packing --use_peft --lora_target_modules q_proj v_proj --max_length=77\n"
    )
    config = translate(ImportOptions(file=Path("train.sh")))[1].config
    assert (config.learning_rate, config.max_length, config.packing) == (1e-3, 77, "dataset")
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    Path("train.sh").write_text("trl sft --model_name $MODEL --dataset_name messages.jsonl --max_length 99\n")
    with pytest.raises(UserError) as caught:
        translate(ImportOptions(file=Path("train.sh"), as_from="trl"))
    assert caught.value.where == "train.sh, model_name"
    config = translate(ImportOptions(file=Path("train.sh"), as_from="trl", model="embedded"))[1].config
    assert (config.model_name_or_path, config.max_length) == ("embedded", 99)


def test_the_arguments_of_transformers():
    from transformers import TrainingArguments

    arguments = TrainingArguments("out", learning_rate=1e-3, adam_beta2=0.95, per_device_train_batch_size=2)
    Path("args.json").write_text(arguments.to_json_string())
    config = translate(ImportOptions(file=Path("args.json"), model="embedded", data="messages.jsonl"))[1].config
    assert (config.learning_rate, config.adam_beta2, config.per_device_train_batch_size) == (1e-3, 0.95, 2)
    assert (config.method, config.lr_scheduler_type) == ("full", "linear")
    with pytest.raises(UserErrors) as caught:
        translate(ImportOptions(file=Path("args.json")))
    assert [problem.fix for problem in caught.value.problems] == ["add --model NAME", "add --data NAME"]


def test_a_file_is_known_by_its_keys():
    for recipe, name in ((AXOLOTL_RECIPE, "axolotl"), (LLAMA_FACTORY_RECIPE, "llamafactory"), (TRL_RECIPE, "trl")):
        assert recognise(recipe, "file").name == name
    with pytest.raises(UserError) as caught:
        recognise({"some": "thing"}, "file")
    assert "--from axolotl" in caught.value.fix


def test_the_recipe_that_is_printed_is_the_one_that_was_checked(capsys):
    translation, resolved, allowed = translate(ImportOptions(file=write(AXOLOTL_RECIPE)))
    Path("printed.yaml").write_text(translation.text(resolved, allowed))
    assert resolve("printed.yaml").config == resolved.config


def test_a_file_is_not_replaced_without_force(capsys):
    Path("my.yaml").write_text("mine")
    assert cli.main(["import", str(write(TRL_RECIPE)), "--output", "my.yaml"]) == 2
    assert Path("my.yaml").read_text() == "mine"
    assert cli.main(["import", "theirs.yaml", "--output", "my.yaml", "--force"]) == 0
    assert resolve("my.yaml").config.method == "full"


def test_data_sets_that_are_not_listed_are_an_error():
    Path("dataset_info.json").unlink()
    assert "--data FILE" in refused(LLAMA_FACTORY_RECIPE).fix
    options = ImportOptions(file=Path("theirs.yaml"), data="messages.jsonl")
    assert translate(options)[1].config.data_path[0].path == "messages.jsonl"


def test_allow_of_what_is_known_is_a_mistake():
    assert "needs no --allow" in refused(TRL_RECIPE, "learning_rate").what


def test_every_dialect_names_keys_of_the_schema():
    """A handler that sets a key which is renamed one day must not fail only when somebody needs it."""
    for dialect in DIALECTS.values():
        translation = Translation(dialect, "file", {})
        translation.read()
        assert {entry.key for entry in translation.settings} <= FIELDS.keys()
