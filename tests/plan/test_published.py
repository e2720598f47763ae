"""The plan against figures that others have published, and the page that shows both."""

import json
import runpy

import pytest
from launches import ROOT

from manyrank import cli

SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_memory.py"))


@pytest.fixture(scope="module")
def counted():
    return [figure for figure in SCRIPT["figures"]() if figure.counts]


def test_the_page_is_what_its_script_writes():
    assert SCRIPT["FILE"].read_text(encoding="utf-8") == SCRIPT["text"]()


def test_the_plan_is_near_published_figures(counted):
    error, near, bias = SCRIPT["summary"](counted)
    assert len(counted) > 100 and error < 0.08 and near > 0.8 and -0.05 < bias < 0.05


def test_a_source_that_trains_as_this_project_does_is_near_throughout(counted):
    for source in ("Qwen, README", "fsdp_qlora, benchmarks_03_2024.md", "peft, docs on FSDP and DeepSpeed"):
        error, near, _ = SCRIPT["summary"]([figure for figure in counted if figure.row["source"] == source])
        assert error < 0.08 and near == 1, source


def test_a_plan_tells_what_other_software_takes(capsys):
    model = [
        "plan",
        "--model=llama-3.1-8b",
        "--gpu=A100-80GB",
        "--strategy=single",
        "--gradient_checkpointing=full",
        "--json",
    ]
    assert cli.main(model) == 0
    fused = json.loads(capsys.readouterr().out)
    assert cli.main([*model, "--disable_fused=lm_head,lora,norm,mlp"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert fused["plain_per_gpu_bytes"] == plain["per_gpu_bytes"] == plain["plain_per_gpu_bytes"]
    assert fused["per_gpu_bytes"] < 0.9 * plain["per_gpu_bytes"]
