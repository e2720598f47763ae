"""Each known-bad combination is refused with its reason, place and fix, and its mended form is not."""

import json
from pathlib import Path

import pytest

from manyrank.config import Entry, Resolved, asset, resolve
from manyrank.errors import UserError
from manyrank.hardware import Gpu, Hardware
from manyrank.rules import RULES, TRACKERS, Situation, check, check_data, check_output_dir

CPU = Hardware(gpus=(), cpu_cores=4, cpu_bf16=False)
CPU_WITH_BF16 = Hardware(gpus=(), cpu_cores=4, cpu_bf16=True)
GPUS = Hardware(gpus=(Gpu("H100", 80 << 30, (9, 0)),) * 2, cpu_cores=4, cpu_bf16=False)
OLD_GPUS = Hardware(gpus=(Gpu("V100", 32 << 30, (7, 0)),) * 2, cpu_cores=4, cpu_bf16=True)
DATA = str(asset("data", "sample.jsonl"))
BY_NAME = {rule.name: rule for rule in RULES}


def resolved(**values) -> Resolved:
    values = {"model_name_or_path": "embedded", "data_path": DATA} | values
    return resolve(None, [Entry(key, value, f"command line, --{key}") for key, value in values.items()])


def situation(*, strategy="ddp", nproc=2, world_size=None, hardware=CPU, **values) -> Situation:
    return Situation(resolved(**values), strategy, nproc, world_size or nproc, hardware)


BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
EVAL = {"eval_data_path": DATA, "eval_steps": 5}

# name of the rule, a situation that breaks it, what mends it
CASES = [
    ("one process for single", {"strategy": "single"}, {"nproc": 1}),
    ("one process for single", {"strategy": "single", "nproc": 1, "world_size": 2}, {"strategy": "ddp"}),
    ("a GPU for each process", {"hardware": GPUS, "nproc": 3}, {"nproc": 2}),
    ("a GPU for each process", {"hardware": GPUS, "nproc": 3}, {"hardware": CPU}),
    ("a GPU for each process", {"hardware": GPUS, "nproc": 4}, {"nproc": 2, "world_size": 4}),
    ("bf16 where it is native", {"bf16": True}, {"bf16": "auto"}),
    ("bf16 where it is native", {"bf16": True}, {"hardware": CPU_WITH_BF16}),
    ("bf16 where it is native", {"bf16": True, "hardware": OLD_GPUS}, {"hardware": GPUS}),
    ("offload needs a GPU", {"strategy": "fsdp_offload"}, {"strategy": "fsdp"}),
    ("offload needs a GPU", {"strategy": "fsdp_offload"}, {"hardware": GPUS}),
    ("no 8-bit base in shards", {"method": "int8", "strategy": "fsdp"}, {"method": "qlora"}),
    ("no 8-bit base in shards", {"method": "int8", "strategy": "zero3"}, {"strategy": "zero2"}),
    ("torch optimizers in shards", {"optim": "adamw_8bit", "strategy": "fsdp"}, {"strategy": "ddp"}),
    ("torch optimizers in shards", {"optim": "paged_adamw_8bit", "strategy": "zero2"}, {"optim": "sgd"}),
    ("torch optimizers in shards", {"optim": "paged_adamw_32bit", "strategy": "zero3"}, {"optim": "adamw_torch"}),
    ("AdamW under offload", {"optim": "sgd", "strategy": "zero3_offload"}, {"optim": "adamw_torch"}),
    ("AdamW under offload", {"optim": "sgd", "strategy": "zero3_offload"}, {"strategy": "zero3"}),
    ("batch adds up", {**BATCH, "global_batch_size": 4}, {"global_batch_size": 8}),
    ("batch adds up", {**BATCH, "global_batch_size": 4}, {"nproc": 1}),
    ("batch adds up", {**BATCH, "global_batch_size": 4}, {"gradient_accumulation_steps": None}),
    ("batch divides", {"global_batch_size": 6, "packing": "none"}, {"global_batch_size": 8}),
    ("batch divides", {"global_batch_size": 6, "packing": "none"}, {"packing": "step"}),
    ("validation needs data", {"eval_steps": 5}, {"eval_data_path": DATA}),
    ("validation needs data", {"eval_steps": 5}, {"eval_split": 0.1}),
    ("validation data needs steps", {"eval_split": 0.1}, {"eval_steps": 5}),
    ("one validation set", {**EVAL, "eval_split": 0.1}, {"eval_split": 0}),
    ("validation sees every row once", {"eval_data_path": f"{{path: {DATA}, weight: 2}}", "eval_steps": 5}, EVAL),
    ("packs of whole sources", {"packing": "dataset", "data_path": f"[{{path: {DATA}, weight: 1.5}}]"}, {"packing": "step"}),
    ("packs of whole sources", {"packing": "dataset", "data_path": f"{{path: {DATA}, weight: 0.5}}"}, {"data_path": DATA}),
    ("validation data needs steps", {"eval_data_path": DATA}, {"eval_steps": 5}),
    ("the best needs validation", {"load_best_model_at_end": True}, {**EVAL, "save_steps": 5}),
    ("the best needs validation", {"early_stopping_patience": 2}, EVAL),
    ("elastic runs resume", {"elastic": True, "global_batch_size": 8}, {"resume_from_checkpoint": "auto"}),
    (
        "elastic runs keep their batch",
        {"elastic": True, "resume_from_checkpoint": "auto"},
        {"global_batch_size": 8, "gradient_accumulation_steps": "none"},
    ),
    ("trackers are there", {"report_to": "wandbb"}, {"report_to": "none"}),
    ("trackers are there", {"report_to": "wandb,nonsense"}, {"report_to": "wandb"}),
]  # fmt: skip


def test_every_rule_is_covered():
    assert len(BY_NAME) == len(RULES)
    assert {name for name, _, _ in CASES} == set(BY_NAME)


@pytest.mark.parametrize("name, broken, mend", CASES)
def test_a_rule_broken_and_mended(name, broken, mend):
    rule, broken_situation = BY_NAME[name], situation(**broken)
    problem = rule.broken(broken_situation)
    with pytest.raises(UserError) as caught:
        check(broken_situation)
    assert (caught.value.what, caught.value.fix) == (problem, rule.fix)
    assert all(key in caught.value.where for key in rule.keys)
    check(situation(**(broken | mend)))


def test_a_rule_says_where_its_values_came_from():
    with pytest.raises(UserError) as caught:
        check(situation(optim="adamw_8bit", strategy="zero2"))
    assert caught.value.what == "adamw_8bit keeps 8-bit or paged state that zero2 cannot shard"
    assert caught.value.where == "optim (command line, --optim), strategy (default)"


def test_a_tracker_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", "no_such_package")
    problem = BY_NAME["trackers are there"].broken(situation(report_to="mlflow"))
    assert problem == "tracker mlflow needs the package no_such_package, which is not installed"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_the_table_does_not_name_is_allowed(strategy, method):
    check(situation(strategy=strategy, method=method))


# Data


@pytest.fixture
def data(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error(**values) -> UserError:
    with pytest.raises(UserError) as caught:
        check(situation(**values))
    return caught.value


@pytest.mark.parametrize(
    "text, format_type, what, where",
    [
        ('{"question": "q", "answer": ""}', "auto", "1 of the first 1 rows", "line 1: 'answer' is empty"),
        ('\n{"question": "q"}', "question_answer", "1 of the first 1 rows", "line 2: 'answer' is missing"),
        ('{"question": "q"}', "auto", "no format has the keys ['question']", "line 1"),
        ('{"question": "q", "answer": "a"}', "alpaca", "1 of the", "line 1: 'instruction' is missing"),
        ('{"question" "q"}', "auto", "1 of the", "line 1: broken JSON: Expecting ':' delimiter (column 13)"),
        ("3", "auto", "1 of the first 1 rows", "line 1: a row is int, not an object"),
        ("", "auto", "there are no rows in it", "rows.jsonl"),
    ],
)
def test_data_errors(data, text, format_type, what, where):
    caught = error(data_path=data(text), format_type=format_type)
    assert caught.what.startswith(what)
    assert "rows.jsonl" in caught.where
    assert caught.where.endswith(where)


def test_errors_in_the_validation_data(data):
    caught = error(eval_data_path=data('{"question": "q", "answer": ""}'), eval_steps=5)
    assert caught.what == "1 of the first 1 rows cannot be used (1 empty field)"
    assert caught.where.endswith("rows.jsonl, line 1: 'answer' is empty")


def test_rows_are_read_up_to_the_first_good_one(data):
    """Bad rows beside good ones are told of all together, by the run."""
    config = resolved(data_path=data('nonsense\n{"question": "q", "answer": "a"}\nnonsense')).config
    assert check_data(config.data_path[0], config) == "question_answer"


def test_a_source_that_only_starts_with_bad_rows(data):
    caught = error(data_path=data("nonsense\n" * 150))
    assert caught.what == "100 of the first 100 rows cannot be used (100 not JSON)"
    assert caught.where.count("rows.jsonl, line ") == 10 and caught.where.endswith("and 90 more")
    config = resolved(data_path=data("nonsense\n" * 150), on_bad_row="skip").config
    assert check_data(config.data_path[0], config) == "auto"  # no reason yet to ask for a template


def test_a_data_file_that_is_not_there():
    assert error(data_path="nowhere.jsonl").what == "there is no file nowhere.jsonl"


# Model folders


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that has all that a check looks for."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def test_a_whole_model_folder(model):
    check(situation(model_name_or_path=str(model)))


@pytest.mark.parametrize(
    "missing, what",
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer_config.json", "the tokenizer has no chat template"),
    ],
)
def test_a_model_folder_with_a_file_missing(model, missing, what):
    (model / missing).unlink()
    caught = error(model_name_or_path=str(model))
    assert what in caught.what
    assert caught.where == "model_name_or_path (command line, --model_name_or_path)"


def test_plain_text_needs_no_template(model, data):
    (model / "tokenizer_config.json").write_text("{}")
    check(situation(model_name_or_path=str(model), data_path=data('{"text": "some words"}')))


def test_a_bad_first_row_may_be_put_aside(data):
    check(situation(data_path=data('{"question": "q", "answer": ""}\n'), on_bad_row="skip"))


def test_a_tokenizer_without_a_chat_template(model, tmp_path):
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert error(model_name_or_path=str(model)).fix == "give one: --chat_template chatml, or a file"
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    check(situation(model_name_or_path=str(model), chat_template=str(own)))


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_in_its_own_file(model, name):
    (model / "tokenizer_config.json").unlink()
    (model / name).write_text("{}")
    check(situation(model_name_or_path=str(model)))


def test_older_weight_files(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    check(situation(model_name_or_path=str(model)))


def test_a_model_folder_that_is_not_there(tmp_path):
    assert error(model_name_or_path=f"{tmp_path}/nowhere").what == f"there is no folder {tmp_path}/nowhere"
    check(situation(model_name_or_path="someone/a-name-on-the-hub"))


def test_a_chat_template_file_that_is_not_there():
    assert error(chat_template="own.jinja").what == "there is no file own.jinja"


# Output folders


def test_an_output_folder_with_files(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        check_output_dir(resolved().config, tmp_path)
    assert caught.value.what == f"the output folder {tmp_path} is not empty"
    assert "--resume_from_checkpoint auto" in caught.value.fix


@pytest.mark.parametrize("values", [{"dry_run": True}, {"resume_from_checkpoint": "auto"}])
def test_an_output_folder_that_may_have_files(tmp_path, values):
    (tmp_path / "config.yaml").write_text("")
    check_output_dir(resolved(**values).config, tmp_path)


def test_an_output_folder_that_is_empty_or_not_there(tmp_path):
    check_output_dir(resolved().config, tmp_path)
    check_output_dir(resolved().config, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError):
        check_output_dir(resolved().config, tmp_path / "run")


def test_questions_need_a_template_too(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "bare"
    rows.write_text('{"text": "plain"}\n')
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    given = {"data_path": str(rows), "model_name_or_path": str(folder)}
    check(situation(**given))
    assert error(**given, sample_questions=["why?"]).what == "the tokenizer has no chat template"
