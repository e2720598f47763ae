"""Inputs that once gave a traceback or a silently wrong value."""

import json

import pytest

from manyrank.chat_template.types import BadRow
from manyrank.config.args import parse
from manyrank.config.resolve import Setting, resolve
from manyrank.data.formats import to_sample
from manyrank.data.sources import Source, read_rows
from manyrank.errors import UserError
from manyrank.launch.command import plan_launch
from manyrank.project_files import asset
from manyrank.rules.check import check_output_dir, check_rules
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import Hardware
from manyrank.topology.strategies import STRATEGIES

DATA = str(asset("data", "sample.jsonl"))
CPU = Hardware((), 4, False)


def entries(**v):
    return [Setting(f"--{k}", x, f"command line, --{k}") for k, x in v.items()]


def check(**v):
    r = resolve(None, entries(**({"model_name_or_path": "embedded", "data_path": DATA} | v)))
    check_rules(RunContext(r, STRATEGIES["single"], 1, 1, CPU))


def write(p, t):
    p.write_text(t)
    return str(p)


def refused(f):
    with pytest.raises(UserError):
        f()


def test_01_formats_line_of_a_truncated_row(tmp_path):
    p = tmp_path / "r.jsonl"
    p.write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    rows = list(read_rows(Source(str(p))))
    assert isinstance(rows[1].value, BadRow) and rows[1].place.endswith(", line 2")
    assert not isinstance(rows[2].value, BadRow)


def test_02_rules_empty_array(tmp_path):
    refused(lambda: check(data_path=write(tmp_path / "e.json", "[]")))


def test_03_formats_role_that_is_no_text():
    with pytest.raises(BadRow):
        to_sample({"messages": [{"role": ["user"], "content": "x"}]}, "messages")


@pytest.mark.parametrize("text", ["{bad", "[]"])
def test_05_rules_broken_tokenizer_config(tmp_path, text):
    for n in ("config.json", "model.safetensors"):
        (tmp_path / n).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(text)
    refused(lambda: check(model_name_or_path=str(tmp_path)))


def test_06_config_unclosed_bracket():
    refused(lambda: check(sample_questions="[a"))


def test_07_rules_empty_data_path():
    refused(lambda: check(data_path=""))


@pytest.mark.parametrize(
    "flags",
    [
        ["--nnodes=2", "--node_rank=7", "--rdzv_endpoint=h:1"],
        ["--node_rank=1"],
        ["--rdzv_endpoint=h:1"],
        ["--nnodes=2", "--rdzv_endpoint=host"],
        ["--nnodes=2", "--rdzv_endpoint=host:port"],
    ],
)
def test_08_launcher_node_flags(flags):
    def f():
        line = parse(["quickstart", "--nproc=2", *flags], prog="", launch=True)
        plan_launch(line, strategy="ddp", nproc=2, output_dir="o", hardware=CPU)

    refused(f)


def test_09_config_duplicate_yaml_key(tmp_path):
    refused(lambda: resolve(write(tmp_path / "d.yaml", "seed: 1\nseed: 2\nmodel: embedded\ndata_path: x\n")))


def test_10_config_misspelt_method_under_a_flag(tmp_path):
    refused(
        lambda: resolve(
            write(tmp_path / "d.yaml", "method: lorra\nmodel: embedded\ndata_path: x\n"), entries(no_4bit=True)
        )
    )


def test_11_rules_adapter_or_training_args_are_no_weights(tmp_path):
    for n in ("config.json", "chat_template.jinja", "training_args.bin", "adapter_model.safetensors"):
        (tmp_path / n).write_text("")
    refused(lambda: check(model_name_or_path=str(tmp_path)))


def test_12_formats_deep_nesting(tmp_path):
    p = tmp_path / "r.jsonl"
    p.write_text('{"a":' * 100_000)
    (row,) = read_rows(Source(str(p)))
    assert isinstance(row.value, BadRow)


def test_13_formats_lone_surrogate():
    with pytest.raises(BadRow):
        to_sample(json.loads('{"question": "\\ud800", "answer": "a"}'), "question_answer")


def test_14_formats_blank_optional_fields():
    sample = to_sample({"instruction": "i", "input": " ", "output": "o"}, "alpaca")
    assert sample.messages[0]["content"] == "i"


def test_15_formats_sharegpt_empty_tools():
    assert to_sample({"conversations": [{"from": "gpt", "value": "v"}], "tools": []}, "sharegpt").tools is None


def test_16_options_two_recipes_in_a_row():
    with pytest.raises(UserError, match="one word too many"):
        parse(["quickstart", "verify"], prog="", launch=True)


def test_17_options_bf16_none():
    assert (
        resolve(
            None, parse(["--model=embedded", "--data-path=x", "--bf16", "none"], prog="", launch=True).overrides
        ).config.bf16
        == "auto"
    )


def test_18_options_superscript_count():
    refused(lambda: parse(["--nproc=²"], prog="", launch=True))


def test_20_infinite_numbers():
    refused(lambda: check(num_train_epochs="inf"))


def test_21_output_dir_under_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    refused(lambda: check_output_dir(resolve("quickstart").config, tmp_path / "f" / "run"))


def test_22_yaml_fix_names_a_file_that_is_there(tmp_path):
    with pytest.raises(UserError) as c:
        resolve(write(tmp_path / "e.yaml", ""))
    assert asset(*c.value.fix.split()[-1].split("/")).is_file()


def test_23_as_yaml_origin_with_newline(tmp_path):
    r = resolve(None, [*entries(model="embedded", data_path="x"), Setting("seed", 1, "a\nb: c")])
    assert resolve(write(tmp_path / "o.yaml", r.as_yaml())).config == r.config


def test_24_base_that_is_empty(tmp_path):
    with pytest.raises(UserError) as c:
        resolve(write(tmp_path / "b.yaml", "base:\nmodel: embedded\ndata_path: x\n"))
    assert "b.yaml" in c.value.where
