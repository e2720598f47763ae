"""What a name stands for, and loading it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

from manyrank.artifact import find
from manyrank.embedded import ensure
from manyrank.errors import UserError
from manyrank.loaded import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded_model):
    """A short LoRA run with a checkpoint."""
    from conftest import launch

    folder = tmp_path_factory.mktemp("artifact") / "run"
    done = launch(folder, "--max_steps=2", "--save_steps=1", "--strategy=single")
    assert done.code == 0, done.stderr
    return folder


def test_a_run_an_adapter_a_checkpoint_and_a_model_are_found(run):
    base = str(ensure())
    final = find(str(run))
    assert (final.base, final.adapter, final.run) == (base, run / "final_model", run)
    assert find(str(run / "final_model")).run == run
    checkpoint = find(str(run / "checkpoint-1"))
    assert (checkpoint.adapter, checkpoint.run) == (run / "checkpoint-1", run)
    assert find(base).adapter is None and find(base).base == base
    assert find("org/name").base == "org/name"


def test_a_run_without_a_final_model_gives_its_newest_complete_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final_model")
    assert find(str(tmp_path / "run")).adapter.name == "checkpoint-2"
    (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"half")
    assert find(str(tmp_path / "run")).adapter.name == "checkpoint-1"


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("adapter_model.safetensors", "half", "the adapter cannot be read"),
        ("adapter_model.safetensors", None, "the adapter has no weights"),
        ("tokenizer.json", '{"x": 1}', "cannot load the tokenizer"),
        (
            "adapter_config.json",
            '{"peft_type": "LORA", "base_model_name_or_path": "/gone"}',
            "there is no folder /gone",
        ),
    ],
)
def test_a_damaged_adapter_is_the_users_to_mend(file, text, what, run, tmp_path):
    folder = shutil.copytree(run / "final_model", tmp_path / "adapter")
    (folder / file).unlink()
    if text:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=what):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("config.json", '{"model_type": "qwen3", "hidden_size": "a"}', "cannot load the model: .*hidden_size"),
        ("model.safetensors", "half", "cannot load the model"),
    ],
)
def test_a_damaged_model_is_the_users_to_mend(file, text, what, embedded_model, tmp_path):
    folder = shutil.copytree(embedded_model, tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=what):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("files", "options", "what"),
    [
        ({}, {}, "neither a model"),
        ({"adapter_config.json": "{"}, {}, "cannot be read"),
        ({"adapter_config.json": "{}"}, {}, "names no base"),
        ({"config.json": "{}"}, {"base": "x"}, "no adapter"),
        ({"launch.json": "{}"}, {}, "saved nothing"),
    ],
)
def test_what_cannot_be_used_is_refused(files, options, what, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=what):
        find(str(tmp_path), **options)


def test_loading_base_adapter_and_merged_weights(run):
    ids = torch.arange(5, 25)[None]
    logits = {}
    for name, options in {"base": {}, "run": {}, "merged": {"merge": True}}.items():
        model, tokenizer = load_model("embedded" if name == "base" else str(run), dtype="float32", **options)
        assert not model.training and tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
        assert isinstance(model, PeftModel) == (name == "run")
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits
    assert (logits["base"] - logits["run"]).abs().max() > 1e-4
    assert torch.allclose(logits["run"], logits["merged"], atol=1e-4)


def test_a_quantised_base_with_its_adapter(run):
    model, _ = load_model(str(run), quantization="4bit")
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    with pytest.raises(UserError, match="merging into a quantised base"):
        load_model(str(run), quantization="4bit", merge=True)


def test_an_adapter_of_another_shape_is_refused(run, tmp_path):
    shutil.copytree(run / "final_model", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "r": config["r"] * 2}))
    with pytest.raises(UserError, match="does not fit"):
        load_model(str(tmp_path / "adapter"))
