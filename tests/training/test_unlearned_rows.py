"""Tokens whose rows a base has never learned, and that a run with adapters learns, are named with what helps."""

import pytest
import torch
from launches import launch
from small_models import LAUNCHED, save_for_launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manyrank import SFTConfig, SFTTrainer

UNUSED, END = 0, 1  # added tokens of the embedded tokenizer: one that the data does not have, and the end of a turn


def base_of(folder, embedded_model, damage: str, *, tied: bool):
    """A base whose rows have been drawn, each by itself; but for those of some added tokens."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model("qwen2", **LAUNCHED, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(shape)
    matrix = (model.get_output_embeddings() if "lm_head" in damage else model.get_input_embeddings()).weight
    with torch.no_grad():
        if "zero" in damage:
            matrix[END] = 0
        elif "mean" in damage:  # as transformers fills the rows of tokens that are added
            matrix[END] = matrix.mean(0) + torch.randn(matrix.shape[1]) * 1e-5
        elif "unused" in damage:
            matrix[UNUSED] = torch.randn(matrix.shape[1]) * 0.02
            matrix[END] = matrix[UNUSED] * 1.001
    save_for_launch(model, folder, embedded_model)
    return folder


def printed(base, folder, *args: str) -> list[str]:
    run = launch(folder / "run", f"--model={base}", "--dry_run", "--max_steps=1", "--max_length=128", *args)
    assert run.code == 0, run.stderr
    return [line for line in run.stdout.splitlines() if "has never learned" in line]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("damage", ["zero", "mean", "unused", "zero lm_head", "mean lm_head"])
def test_a_row_that_was_never_learned_is_named(damage, tied, embedded_model, tmp_path):
    if tied and "lm_head" in damage:
        pytest.skip("it is the embedding")
    base = base_of(tmp_path / "base", embedded_model, damage, tied=tied)
    (line,) = printed(base, tmp_path, "--strategy=single")
    helps = "trainable_token_indices: [1]" if tied else "trainable_token_indices: {embed_tokens: [1], lm_head: [1]}"
    assert "never learned <|im_end|>, " in line and line.endswith(helps)
    option = f"--{helps.replace(': ', '=', 1)}"
    assert printed(base, tmp_path, "--strategy=single", option) == []


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_of_sharded_and_quantised_bases_once_and_not_of_whole_training(method, embedded_model, tmp_path):
    base = base_of(tmp_path / "base", embedded_model, "zero", tied=False)
    lines = printed(base, tmp_path, "--strategy=fsdp", "--nproc=2", f"--method={method}")
    assert len(lines) == (1 if method == "qlora" else 0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_nothing_is_said_of_ordinary_rows(tied, embedded_model, tmp_path):
    assert printed(base_of(tmp_path / "base", embedded_model, "", tied=tied), tmp_path, "--strategy=single") == []
    if not tied:
        assert printed("embedded", tmp_path, "--strategy=single") == []


def test_of_a_model_in_memory(embedded_model, tmp_path, capsys):
    base = base_of(tmp_path / "base", embedded_model, "zero", tied=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    given = {"data_path": "data/sample.jsonl", "max_steps": 1, "max_length": 128, "output_dir": str(tmp_path / "run")}
    SFTTrainer(SFTConfig(**given, dry_run=True), model=model, tokenizer=tokenizer).train()
    assert "the base has never learned <|im_end|>" in capsys.readouterr().out
