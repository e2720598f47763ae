"""Recipes to configs: precedence, other spellings, and errors that name the place."""

import re
import warnings

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from manyrank.config.args import LaunchOptions
from manyrank.config.json_schema import recipe_schema
from manyrank.config.keywords import SFTConfig
from manyrank.config.resolve import (
    ASSUMED,
    DEFAULT_MODEL,
    FIELDS,
    KNOWN,
    METHODS,
    NOT_GIVEN,
    SWITCHES,
    Setting,
    presets,
    resolve,
)
from manyrank.config.spellings import (
    ALIASES,
    INSTEAD,
    METHOD_FLAGS,
    METHOD_VALUES,
    OPPOSITES,
    OTHER_TOOLS,
    VALUES,
    WHEN,
)
from manyrank.errors import UserError
from manyrank.project_files import asset

REQUIRED = {"model_name_or_path": "embedded", "data_path": "data/sample.jsonl"}


def entries(**values) -> list[Setting]:
    return [Setting(f"--{key}", value, f"command line, --{key}") for key, value in values.items()]


def make(**values):
    """A config from the command line alone."""
    return resolve(None, entries(**(REQUIRED | values))).config


def error(**values) -> UserError:
    with pytest.raises(UserError) as caught:
        make(**values)
    return caught.value


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def recipe_error(path: str, *overrides: Setting) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(path, overrides)
    return caught.value


# Precedence and origins


def test_command_line_over_recipe_over_base_over_defaults(recipe):
    base = recipe("seed: 1\nlora_r: 2\nmax_length: 100\nmodel_name_or_path: embedded\ndata_path: x\n", "base.yaml")
    path = recipe("base: base.yaml\nseed: 3\nlora_r: 4\n")
    resolved = resolve(path, entries(seed=5))
    config = resolved.config
    assert (config.seed, config.lora_r, config.max_length, config.lora_alpha) == (5, 4, 100, 32)
    assert resolved.provenance["seed"] == "command line, --seed"
    assert resolved.provenance["lora_r"] == f"{path}, lora_r"
    assert resolved.provenance["max_length"] == f"{base}, max_length"
    assert "lora_alpha" not in resolved.provenance
    assert resolved.where("seed", "lora_alpha") == "seed (command line, --seed), lora_alpha (default)"


def test_a_base_may_be_a_preset(recipe):
    config = resolve(recipe("base: quickstart\nseed: 7\n")).config
    preset = resolve("quickstart").config
    assert config == preset.model_copy(update={"seed": 7})


def test_a_base_may_have_a_base(recipe):
    lowest = recipe("seed: 1\nlora_r: 2\nmodel: embedded\n", "lowest.yaml")
    recipe("base: lowest.yaml\nlora_r: 4\nmax_length: 8\n", "middle.yaml")
    resolved = resolve(recipe("base: middle.yaml\nmax_length: 16\n"))
    assert (resolved.config.seed, resolved.config.lora_r, resolved.config.max_length) == (1, 4, 16)
    assert resolved.provenance["seed"] == f"{lowest}, seed"


def test_a_recipe_that_is_its_own_base_is_refused(recipe):
    recipe("base: recipe.yaml\n", "other.yaml")
    caught = recipe_error(path := recipe("base: other.yaml\n"))
    assert caught.what == f"{path} is its own base"


@pytest.mark.parametrize("key", ["data", "dataset"])
def test_data_is_a_path_or_a_section(recipe, key):
    for text in (f"{key}: rows.jsonl\n", f"{key}: {{path: rows.jsonl}}\n", f"{key}: [{{path: rows.jsonl}}]\n"):
        path = recipe(f"model: embedded\n{text}")
        assert [source.path for source in resolve(path).config.data_path] == ["rows.jsonl"]
        jsonschema.validate(yaml.safe_load(text), recipe_schema())


def test_a_base_that_is_not_there(recipe):
    assert "no file nowhere.yaml" in recipe_error(recipe("base: nowhere.yaml\n")).what


# Other spellings


@pytest.mark.parametrize(
    "alias, key",
    [
        entry
        for entry in (ALIASES | OTHER_TOOLS).items()
        if entry[0] not in {*METHOD_VALUES, *WHEN, *OPPOSITES} and entry[1] != "adapter"
    ],
)
def test_aliases_and_dashes(alias, key):
    value = {
        "per_device_train_batch_size": 2,
        "max_length": 77,
        "frozen_parameters": ["norm"],
        "lora_r": 3,
        "num_train_epochs": 1.5,
        "duplicates": "drop",
        "train_on_prompt": True,
        "train_on_last_turn": True,
        "max_rows": 2,
        "streaming": True,
        "train_on_eos": "all",
        "num_generations": 2,
        "max_completion_length": 9,
        "disable_fused": ["lora"],
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "dft_loss": True,
        "neftune_noise_alpha": 5.0,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "overwrite_output_dir": True,
        "method": "full",
        "packing": "dataset",
        "gradient_checkpointing": "full",
        "beta": 0.1,
        "global_batch_size": 2,
        "max_steps": 2,
        "warmup_steps": 2,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "lora_alpha": 3.0,
        "lora_dropout": 0.1,
        "new_adapter": True,
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "pissa",
        "layers_to_transform": [1],
        "trainable_token_indices": [1],
        "modules_to_save": ["a"],
        "add_special_tokens": ["a"],
        "layers_pattern": ["a"],
        "target_parameters": ["a"],
        "torch_compile": True,
        "attn_implementation": "sdpa",
    }.get(key, "0.5")
    given_key = alias.replace("_", "-")
    values = {name: text for name, text in REQUIRED.items() if name != key}
    resolved = resolve(None, [*entries(**values), Setting(f"--{given_key}", value, "here")])
    assert resolved.provenance[key] == "here"
    expected = {"lora_target_modules": ["0.5"], "learning_rate": 0.5, "eval_split": 0.5}.get(key, value)
    assert resolved.config.plain()[key] == expected


@pytest.mark.parametrize("name", sorted(OPPOSITES))
@pytest.mark.parametrize("value, opposite", [(True, False), (False, True), ("no", True), (1, False), ("0", True)])
def test_names_that_say_the_opposite(name, value, opposite):
    given = [*entries(**REQUIRED), Setting(name, value, "here")]
    assert resolve(None, given).config.train_on_prompt is opposite
    with pytest.raises(UserError, match="is not true or false"):
        resolve(None, [*entries(**REQUIRED), Setting(name, "sometimes", "here")])


def test_no_name_means_two_things():
    kinds = [set(FIELDS), SWITCHES, set(ALIASES), set(OTHER_TOOLS), set(INSTEAD)]
    assert len(set().union(*kinds)) == sum(map(len, kinds))
    assert set((ALIASES | OTHER_TOOLS).values()) | set(VALUES) <= set(FIELDS)


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("packing", True, "dataset"),
        ("neat_packing", "false", "step"),
        ("lora_target", "all", "all-linear"),
        ("optimizer", "adamw_bnb_8bit", "adamw_8bit"),
        ("optim", "adamw_torch_fused", "adamw_torch"),
        ("use_gradient_checkpointing", "unsloth", "full"),
        ("resume_from_checkpoint", True, "auto"),
        ("resume", "false", None),
    ],
)
def test_values_of_other_tools(key, theirs, ours):
    resolved = resolve(None, entries(**REQUIRED, **{key: theirs}))
    assert resolved.config.plain()[KNOWN.spellings[key]] == ours


@pytest.mark.parametrize("key", INSTEAD)
def test_what_other_tools_have_and_we_do_not_is_answered(key):
    with pytest.raises(UserError) as caught:
        resolve(None, entries(**REQUIRED, **{key: "x"}))
    assert caught.value.fix == INSTEAD[key] and caught.value.what == f"there is no option '--{key}'"
    for word in re.findall(r"(?:write|--)\s?([a-z_0-9]+)[:,]?", caught.value.fix):
        assert word in (*KNOWN.spellings, *LaunchOptions.model_fields), word


def test_the_same_key_twice_with_two_values():
    caught = error(lr="1e-4", learning_rate="2e-4")
    assert "contradict" in caught.what
    assert caught.where == "command line, --lr; command line, --learning_rate"


def test_the_same_key_twice_with_one_value():
    assert make(lr="1e-4", learning_rate="1e-4").learning_rate == 1e-4


# Methods

FLAGS = [
    ({}, "lora"),
    ({"use_lora": "true"}, "lora"),
    ({"use_lora": "true", "use_4bit": "true"}, "qlora"),
    ({"use_qlora": "yes"}, "qlora"),
    ({"use_8bit": "true"}, "int8"),
    ({"use_lora": "true", "use_8bit": "on"}, "int8"),
    ({"fp8": "true"}, "fp8"),
    ({"use_lora": "true", "fp8": "true"}, "fp8"),
    ({"no_lora": "true"}, "full"),
    ({"use_lora": "false"}, "full"),
    ({"no_lora": "false"}, "lora"),
    ({"no_4bit": "true"}, "lora"),
    ({"use_4bit": "false", "use_8bit": "false"}, "lora"),
    ({"method": "qlora", "use_lora": "true"}, "qlora"),
    ({"use_peft": True, "load_in_4bit": True}, "qlora"),
    ({"finetuning_type": "lora"}, "lora"),
    ({"finetuning_type": "lora", "load_in_4bit": True}, "qlora"),
    ({"finetuning_type": "lora", "quantization_bit": 8}, "int8"),
    ({"finetuning_type": "full", "quantization_bit": None}, "full"),
    ({"adapter": "lora", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ({"adapter": "qlora", "load_in_4bit": True}, "qlora"),
    ({"adapter": None}, "full"),
]


@pytest.mark.parametrize("flags, method", FLAGS)
def test_method_flags(flags, method):
    assert make(**flags).method == method


@pytest.mark.parametrize(
    "recipe_method, flags, method",
    [
        ("qlora", {"no_4bit": True}, "lora"),
        ("qlora", {"use_lora": True}, "qlora"),
        ("qlora", {"no_lora": True}, "full"),
        ("int8", {"use_lora": True}, "int8"),
        ("full", {"use_lora": True}, "lora"),
        ("full", {"no_4bit": True}, "full"),
        ("full", {"method": "qlora"}, "qlora"),
    ],
)
def test_method_flags_against_the_recipe(recipe, recipe_method, flags, method):
    path = recipe(f"method: {recipe_method}\nmodel_name_or_path: embedded\ndata_path: x\n")
    resolved = resolve(path, entries(**flags))
    assert resolved.config.method == method
    assert resolved.provenance["method"].startswith("command line, --")


@pytest.mark.parametrize(
    "flags",
    [
        {"use_lora": True, "no_lora": True},
        {"use_4bit": True, "use_8bit": True},
        {"fp8": True, "use_4bit": True},
        {"fp8": True, "use_8bit": True},
        {"fp8": True, "no_lora": True},
        {"use_4bit": True, "no_4bit": True},
        {"use_4bit": True, "no_lora": True},
        {"method": "full", "use_lora": True},
        {"method": "qlora", "no_4bit": True},
        {"finetuning_type": "full", "load_in_4bit": True},
        {"adapter": "qlora", "load_in_8bit": True},
    ],
)
def test_contradicting_method_flags(flags):
    caught = error(**flags)
    assert "contradict" in caught.what
    assert all(f"--{key}" in caught.where for key in flags)


@pytest.mark.parametrize("name", METHOD_FLAGS)
def test_each_method_flag_leaves_a_method_both_ways(name):
    assert make(**{name: True}).method in METHOD_FLAGS[name]
    assert make(**{name: False}).method in METHODS - METHOD_FLAGS[name]


def test_a_method_flag_that_is_neither_yes_nor_no():
    assert "'maybe' is not true or false" in error(use_lora="maybe").what
    assert error(finetuning_type="freeze").what == "--finetuning_type: 'freeze' is none of lora, full"


# Values


def test_yaml_reads_1e_4_as_text_and_we_as_a_number(recipe):
    path = recipe("learning_rate: 1e-4\nmodel_name_or_path: embedded\ndata_path: x\n")
    assert yaml.safe_load("1e-4") == "1e-4"
    assert resolve(path).config.learning_rate == 1e-4


@pytest.mark.parametrize(
    "value, expected",
    [
        ("all-linear", "all-linear"),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
    ],
)
def test_lists(value, expected):
    assert make(lora_target_modules=value).lora_target_modules == expected


@pytest.mark.parametrize(
    "given, trackers",
    [
        ({}, []),
        ({"report_to": "none"}, []),
        ({"report_to": ["none"]}, []),
        ({"report_to": "wandb"}, ["wandb"]),
        ({"report_to": "wandb,mlflow"}, ["wandb", "mlflow"]),
        ({"wandb": "yes"}, ["wandb"]),
        ({"wandb": "no"}, []),
    ],
)
def test_trackers(given, trackers):
    assert make(**given).report_to == trackers


@pytest.mark.parametrize(
    "given, value",
    [
        ({}, "auto"),
        ({"bf16": "auto"}, "auto"),
        ({"bf16": "true"}, True),
        ({"bf16": False}, False),
        ({"bf16": None}, "auto"),
    ],
)
def test_bf16(given, value):
    assert make(**given).bf16 is value or make(**given).bf16 == value


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.default in ([], {})])
def test_nothing_is_the_default_of_lists_and_mappings(key, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: x\ndata_path: x\n{key}:\n")
    for config in (resolve(str(recipe)).config, SFTConfig(**REQUIRED, **{key: None})):
        assert getattr(config, key) == FIELDS[key].default


def test_nothing_takes_back_what_a_base_says(tmp_path):
    (tmp_path / "base.yaml").write_text("model_name_or_path: x\ndata_path: x\nrank_pattern: {q_proj: 3}\n")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nrank_pattern:\n")
    resolved = resolve(str(tmp_path / "recipe.yaml"))
    assert resolved.config.rank_pattern == {} and "rank_pattern: {}  # default" in resolved.as_yaml()


@pytest.mark.parametrize(
    "given, key, value",
    [
        ({"warmup_ratio": 0.03}, "warmup_steps", 0.03),
        ({"warmup_steps": "10"}, "warmup_steps", 10),
        ({"save_steps": "0.25"}, "save_steps", 0.25),
        ({"save_steps": "epoch"}, "save_steps", "epoch"),
        ({"save_steps": 0}, "save_steps", "off"),
        ({"eval_steps": "epoch"}, "eval_steps", "epoch"),
        ({"eval_steps": 0.5}, "eval_steps", 0.5),
        ({"logging_steps": "epoch"}, "logging_steps", "epoch"),
        ({"logging_steps": "1"}, "logging_steps", 1),
        ({"save_strategy": "epoch"}, "save_steps", "epoch"),
        ({"save_strategy": "no"}, "save_steps", "off"),
        ({"save_strategy": False}, "save_steps", "off"),
        ({"save_strategy": "steps", "save_steps": 7}, "save_steps", 7),
        ({"eval_strategy": "no"}, "eval_steps", "off"),
        ({"evaluation_strategy": "steps", "eval_steps": 0.5}, "eval_steps", 0.5),
        ({"logging_strategy": "epoch"}, "logging_steps", "epoch"),
        ({"lr_scheduler_kwargs": "{min_lr_rate: 0.1}"}, "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
    ],
)
def test_numbers_of_steps_and_shares_of_them(given, key, value):
    config = make(**given)
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
    with warnings.catch_warnings(action="error"):  # pydantic's, of a value that is not of the field's type
        config.model_dump()


@pytest.mark.parametrize(
    "given, what, fix",
    [
        ({"save_strategy": "steps"}, "save_strategy: steps, and no save_steps beside it", "write save_steps: a number"),
        (
            {"save_strategy": "best"},
            "save_strategy: 'best' is not known",
            "load_best_model_at_end: true saves each best",
        ),
        ({"logging_strategy": "no"}, "logging_strategy: 'no' is not known", "choose one of epoch, steps"),
        ({"save_strategy": "epoch", "save_steps": 500}, "these contradict each other", "keep one of them"),
    ],
)
def test_strategies_of_steps_that_cannot_be(given, what, fix):
    with pytest.raises(UserError) as refused:
        make(**given)
    assert what in refused.value.what and fix in refused.value.fix


def test_fp16_stands_in_place_of_bf16(tmp_path):
    (tmp_path / "r.yaml").write_text("data_path: d\nmodel_name_or_path: m\nbf16: true\n")
    above = resolve(str(tmp_path / "r.yaml"), [Setting("fp16", "true", "command line")]).config
    assert above.fp16 and above.bf16 == "auto"
    (tmp_path / "r.yaml").write_text("data_path: d\nmodel_name_or_path: m\nfp16: true\n")
    below = resolve(str(tmp_path / "r.yaml"), [Setting("bf16", "true", "command line")]).config
    assert below.bf16 is True and not below.fp16
    (tmp_path / "r.yaml").write_text("data_path: d\nmodel_name_or_path: m\nfp16: true\nbf16: true\n")
    with pytest.raises(UserError, match="these contradict each other: bf16=True against fp16=True"):
        resolve(str(tmp_path / "r.yaml"), [])


@pytest.mark.parametrize(
    "given, world_size, examples",
    [
        ({"batch_size": 2}, 4, 8),
        ({"batch_size": 2, "gradient_accumulation_steps": 3}, 4, 24),
        ({"batch_size": 2, "global_batch_size": 16}, 4, 16),
        ({"batch_size": 2, "global_batch_size": 16}, 1, 16),
    ],
)
def test_examples_of_a_step(given, world_size, examples):
    assert make(**given).batch(world_size) == examples


def test_the_project_s_data_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [source.path for source in make().data_path] == [str(asset("data", "sample.jsonl"))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample.jsonl").write_text("{}")
    assert [source.path for source in make().data_path] == ["data/sample.jsonl"]


def test_sources(recipe):
    path = recipe(
        "model: embedded\ndata_path:\n- a.jsonl\n- {path: b.csv, weight: 0.5, columns: {question: q}}\nstop_tokens: [x]\n"
    )
    resolved = resolve(path, entries(eval_data_path="[c.jsonl, {path: openai/gsm8k, name: main, split: test}]"))
    first, second = resolved.config.data_path
    assert (first.path, first.weight, first.max_rows) == ("a.jsonl", 1, None)
    assert (second.path, second.weight, second.columns) == ("b.csv", 0.5, {"question": "q"})
    assert [source.name for source in resolved.config.eval_data_path] == [None, "main"]
    again = recipe(resolved.as_yaml(), "again.yaml")
    assert resolve(again).config == resolved.config


@pytest.mark.parametrize(
    "data_path, what",
    [
        ("[]", "at least 1"),
        ("{pth: x}", "path: field required"),
        ("{path: x, weigth: 1}", "a source has no 'weigth'"),
        ("{path: x, weight: 0}", "weight: "),
        ("[x, 3]", "valid dictionary"),
        ("[x", "not a mapping"),
        ("{path: x, format_type: csv}", "format_type: "),
    ],
)
def test_sources_that_are_wrong(data_path, what):
    assert what in error(data_path=data_path).what


def test_what_a_base_sets_can_be_taken_back():
    config = resolve("quickstart", entries(eval_data_path="none", eval_steps="null")).config
    assert config.eval_data_path is None and config.eval_steps is None


def test_a_format_of_one_s_own():
    assert make(format_type="my.module:rows").format_type == "my.module:rows"
    assert "nor module:function" in error(format_type="module:").what


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make().seed = 1


# Errors


@pytest.mark.parametrize(
    "key, nearest",
    [("learning_rat", "learning_rate"), ("lora_rnk", "lora_rank"), ("epoch", "epochs"), ("use_4bits", "use_4bit")],
)
def test_an_unknown_key_names_the_nearest(recipe, key, nearest):
    caught = recipe_error(path := recipe(f"{key}: 1\n"))
    assert caught.what == f"there is no option {key!r}"
    assert caught.where == f"{path}, {key}"
    assert caught.fix == f"did you mean {nearest}?"


def test_an_unknown_key_that_is_like_no_other():
    assert error(zzzzqqqq=1).fix == "`--help all` lists every option"


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", "fast"),
        ("learning_rate", -1),
        ("learning_rate", True),
        ("lora_r", 0),
        ("lora_r", 1.5),
        ("seed", False),
        ("method", "lorra"),
        ("strategy", "zero4"),
        ("format_type", "csv"),
        ("bf16", "maybe"),
        ("fp16", "auto"),
        ("eval_split", 1.5),
        ("warmup_steps", 2.5),
        ("warmup_steps", -0.1),
        ("save_steps", 0.0),
        ("save_steps", "each"),
        ("eval_steps", 3.5),
        ("logging_steps", "off"),
        ("lr_scheduler_kwargs", 3),
        ("eval_split", -1),
        ("packing", "dense"),
        ("lora_dropout", 1),
        ("dry_run", "perhaps"),
        ("max_steps", -2),
        ("optim", "adam"),
        ("learning_rate", float("nan")),
        ("report_to", 3),
        ("data_path", 3),
        ("max_length", None),
    ],
)
def test_wrong_values(key, value):
    caught = error(**{key: value})
    assert caught.what.startswith(f"{key}: {value!r} is invalid: ")
    assert caught.where == f"command line, --{key}"
    choices = {
        "method": "write lora, the default",
        "packing": "write dataset",
        "optim": "write adamw_torch, the default",
    }
    assert caught.fix == choices.get(key, f"{key} is: {FIELDS[key].description}")


def test_missing_keys():
    with pytest.raises(UserError) as caught:
        resolve(None)
    assert caught.value.what == "model_name_or_path and data_path must be given"
    assert caught.value.fix == (
        "give --model_name_or_path and --data_path, or a recipe; as in: "
        "manyrank train --model_name_or_path=embedded --data_path=data/sample.jsonl"
    )
    with pytest.raises(UserError, match="data_path must be given"):
        resolve(None, entries(model="someone/model"))


def test_the_model_and_data_of_somebody_who_names_none():
    own = resolve(None, entries(data_path="data/validation.jsonl"))
    assert own.config.model_name_or_path == DEFAULT_MODEL and own.provenance["model_name_or_path"] == NOT_GIVEN
    assert own.assumed() == [ASSUMED["model_name_or_path"]] and own.config.data_path[0].path.endswith(
        "validation.jsonl"
    )
    bare = resolve("fast_test")
    assert bare.config.model_name_or_path == DEFAULT_MODEL and bare.config.data_path[0].path.endswith(
        "data/sample.jsonl"
    )
    assert bare.assumed() == list(ASSUMED.values()) and resolve("quickstart").assumed() == []
    assert resolve(None, entries(model="embedded")).assumed() == [ASSUMED["data_path"]]


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1"])
def test_broken_yaml(recipe, text):
    caught = recipe_error(path := recipe(text))
    assert caught.what.startswith("not valid YAML: ")
    assert caught.where == path
    assert len(str(caught).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_yaml_that_is_no_list_of_keys(recipe, text):
    assert recipe_error(recipe(text)).what == "expected a YAML mapping of `key: value` lines"


def test_a_recipe_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run_name: café\n".encode("latin-1"))
    assert recipe_error(str(path)).where == str(path)


def test_a_recipe_that_is_not_there():
    caught = recipe_error("quikstart")
    assert caught.what == "there is no recipe 'quikstart'"
    assert caught.fix.startswith("did you mean quickstart?")
    assert all(name in caught.fix for name in presets())


# Out and in again


def test_as_yaml_names_each_origin(recipe):
    path = recipe("model_name_or_path: embedded\ndata_path: x\n")
    lines = resolve(path, entries(seed=5)).as_yaml().splitlines()
    assert len(lines) == len(FIELDS)
    assert "seed: 5  # command line, --seed" in lines
    assert f"data_path: x  # {path}, data_path" in lines
    assert "lora_r: 16  # default" in lines


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_target_modules": "q_proj,v_proj", "bf16": False, "report_to": "wandb", "learning_rate": 1e-7},
        {"run_name": "null", "sample_questions": ["Wie groß ist π?", "a, b: {c} # d", "x" * 300], "wandb_project": "1"},
    ],
)
def test_as_yaml_loads_again(recipe, values):
    resolved = resolve(None, entries(**(REQUIRED | values)))
    assert resolve(recipe(resolved.as_yaml())).config == resolved.config


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("no", "off"), ("on", "auto"), ("./folder", "./folder")])
def test_words_of_yaml_for_the_quantised_cache(recipe, text, value):
    recipe_of = yaml.safe_dump(REQUIRED) + f"method: qlora\nquantized_cache: {text}\n"
    assert resolve(recipe(recipe_of)).config.quantized_cache == value


def test_a_word_is_no_folder_of_the_quantised_cache():
    with pytest.raises(UserError, match="maybe") as caught:
        resolve(None, entries(**REQUIRED, method="qlora", quantized_cache="maybe"))
    assert "./maybe" in str(caught.value)


LINE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)


@given(name=LINE, questions=st.lists(LINE), lr=st.floats(0, 1), modules=st.just("all-linear") | st.lists(LINE))
def test_as_yaml_loads_again_with_any_text(tmp_path_factory, name, questions, lr, modules):
    values = {"run_name": name, "sample_questions": questions, "learning_rate": lr, "lora_target_modules": modules}
    resolved = resolve(None, entries(**(REQUIRED | values)))
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(resolved.as_yaml(), encoding="utf-8")
    assert resolve(str(path)).config == resolved.config


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves(name):
    text = asset("launch", "recipes", f"{name}.yaml").read_text(encoding="utf-8")
    missing = {key: value for key, value in REQUIRED.items() if key not in yaml.safe_load(text)}
    resolved = resolve(name, entries(**missing))
    assert all(getattr(resolved.config, key) for key in REQUIRED)
    assert text.startswith("#"), "a preset says what it is for"


@pytest.mark.parametrize("text", ["learning_rate: {}", "nonsense: {}", "training: {}", "model: {}", "training:"])
def test_an_empty_section_is_no_way_to_leave_a_key_out(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: embedded\ndata_path: d.jsonl\n{text}\n")
    with pytest.raises(UserError, match="is a section") as refused:
        resolve(str(tmp_path / "recipe.yaml"))
    assert refused.value.fix == "leave it out"


def test_the_fix_of_a_section_in_a_section_names_its_keys(tmp_path):
    text = "model_name_or_path: embedded\ndata_path: d.jsonl\ntraining: {lr: 1e-4, epochs: 1, lora: {r: 4}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="training is a section") as refused:
        resolve(str(tmp_path / "recipe.yaml"))
    assert refused.value.fix == "write at the left margin: learning_rate, num_train_epochs, lora_r"


@pytest.mark.parametrize(
    ("text", "where", "name"),
    [
        ("training: {lr: 1e-4, deepspeed: ds.json}", "training.deepspeed", "deepspeed"),
        ("deepspeed: {stage: 2}", "deepspeed", "deepspeed"),
        ("training: {fsdp_config: {version: 2}}", "training.fsdp_config", "fsdp_config"),
        ("wandb: {project: mine, entity: ours}", "wandb.entity", "wandb_entity"),
    ],
)
def test_a_section_with_what_other_tools_have_alone_is_answered_as_without_one(recipe, text, where, name):
    path = recipe(f"model: embedded\ndata_path: x\n{text}\n")
    with pytest.raises(UserError) as refused:
        resolve(path)
    assert refused.value.fix == INSTEAD[name] and refused.value.where == f"{path}, {where}"


def test_a_section_takes_names_of_other_tools_with_their_values(recipe):
    path = recipe("model: embedded\ndata_path: x\ntraining: {finetuning_type: lora, quantization_bit: 4, lr: 1e-3}\n")
    assert (config := resolve(path).config).method == "qlora" and config.learning_rate == 1e-3


def test_a_section_whose_name_alone_means_something_else_is_read(recipe):
    assert resolve(recipe("model: embedded\ndata_path: x\nlora: {r: 4, alpha: 9}\n")).config.lora_r == 4
    assert not INSTEAD.keys() & KNOWN.spellings.keys()  # what has a name here is not answered with another


# The JSON schema for editors


def checked(recipe: dict) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(recipe_schema()).iter_errors(recipe)]


@pytest.mark.parametrize("name", presets())
def test_the_schema_accepts_every_preset(name):
    recipe = yaml.safe_load(asset("launch", "recipes", f"{name}.yaml").read_text())
    assert checked(recipe) == []


def test_the_schema_accepts_what_recipes_may_say_and_marks_slips():
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    given = {"model": "a/b", "dataset_path": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "strategy": "auto"}
    given |= {"quantization_bit": 4, "finetuning_type": "lora"}
    given |= {"use_4bit": True, "gradient_checkpointing": True, "report_to": "wandb", "eval_steps": None}
    assert checked(given) == []
    assert checked({"learnin_rate": 1}) == ["$"]
    assert checked({"strategy": "dpp"}) == ["$.strategy"]
    assert checked({"lora_r": 0, "packing": "maybe"}) == ["$.lora_r", "$.packing"]
