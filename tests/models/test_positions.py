"""Rows that are longer than a model's table of positions are refused before any weights are loaded."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    XGLMConfig,
)

from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.models.positions import check_lengths, table_of
from manyrank.tasks.sft import SFT
from manyrank.training.build import _data
from manyrank.training.task import UserObjects

SMALL = {"vocab_size": 1600, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
WIDE = {"n_embd": 32, "n_layer": 1, "n_head": 2}
MODELS = {
    "learned": (GPT2Config(n_positions=48, **WIDE, **SMALL), 48),
    "learned, with an offset": (
        OPTConfig(
            max_position_embeddings=48,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            **SMALL,
        ),
        48,
    ),
    "computed, looked up": (GPTJConfig(n_positions=48, rotary_dim=8, **WIDE, **SMALL), 48),
    "rope": (
        LlamaConfig(
            max_position_embeddings=48,
            hidden_size=48,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            **SMALL,
        ),
        None,
    ),
    "computed, extends itself": (
        XGLMConfig(max_position_embeddings=48, d_model=32, ffn_dim=32, num_layers=1, attention_heads=2, **SMALL),
        None,
    ),
    "alibi": (BloomConfig(hidden_size=32, n_layer=1, n_head=2, **SMALL), None),
}


def config(folder, **values):
    given = {"model_name_or_path": str(folder), "data_path": "none", "max_length": "256"} | values
    return resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config


@pytest.mark.parametrize("kind", MODELS)
def test_the_table_is_where_the_model_fails_beyond_it(kind, tmp_path):
    shape, positions = MODELS[kind]
    model = AutoModelForCausalLM.from_config(shape).eval()
    assert table_of(model) == positions
    shape.save_pretrained(tmp_path)  # no weights: none are read
    longer = torch.ones(1, 49, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=longer[:, :48])
        if positions is None:
            model(input_ids=longer)
            check_lengths(config(tmp_path), [49])
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer)
    check_lengths(config(tmp_path), [1, 48])
    for own in (None, model):
        with pytest.raises(UserError, match="up to 49 tokens, and the model has a table of 48 positions") as refusal:
            check_lengths(config(tmp_path), [1, 49], own)
        assert "--max_length 48" in refusal.value.fix


@pytest.mark.parametrize("long", ["train", "eval"])
def test_rows_of_training_and_of_validation_are_refused_with_the_data(long, tmp_path, tokenizer):
    MODELS["learned"][0].save_pretrained(tmp_path / "model")
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    for name, path in paths.items():
        rows = [{"question": "a", "answer": "b " * count} for count in (1, 90 if name == long else 2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data_path": str(paths["train"]), "eval_data_path": str(paths["eval"])}
    long_rows, short_rows = config(tmp_path / "model", **given), config(tmp_path / "model", **given, max_length="48")
    with pytest.raises(UserError, match="a table of 48 positions"):
        SFT(long_rows, UserObjects()).select_examples(*_data(long_rows, tokenizer, None), tokenizer)
    train, evaluation = SFT(short_rows, UserObjects()).select_examples(*_data(short_rows, tokenizer, None), tokenizer)
    assert max(train.lengths.max(), evaluation.lengths.max()) == 48
