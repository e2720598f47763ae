"""What a name stands for, and loading it."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.models.inference import load_model
from manyrank.models.load import load_model as with_model
from manyrank.models.load import plan_load, with_adapters
from manyrank.models.tiny import ensure
from manyrank.runs.artifact import find
from manyrank.runs.run_folder import ADAPTER, link_adapter
from manyrank.topology.precision import Precision


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded_model):
    """A short LoRA run with a checkpoint."""
    from launches import launch

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


def test_the_folder_of_a_run_has_links_to_its_final_adapter(run, tmp_path):
    links = [run / name for name in ADAPTER]
    assert all(
        link.is_symlink() and link.read_bytes() == (run / "final_model" / link.name).read_bytes() for link in links
    )
    copy = shutil.copytree(run, tmp_path / "run")  # which has files in their place
    (copy / "final_model" / "adapter_model.safetensors").write_bytes(b"of a later training")
    link_adapter(copy)
    assert (copy / "adapter_model.safetensors").read_bytes() == b"of a later training"
    shutil.move(copy, tmp_path / "moved")
    assert (tmp_path / "moved" / "adapter_model.safetensors").read_bytes() == b"of a later training"


def trained_on(name: str, folder):
    """An adapter as a training saves it, on a base that its recipe names so."""
    given = {"model_name_or_path": name, "data_path": "none", "lora_r": 2, "packing": "none"}
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    model = with_model(plan_load(config, Accelerator(cpu=True), precision=Precision.FLOAT32), config)
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_its_base_by_the_whole_path(embedded_model, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(embedded_model)
    monkeypatch.chdir(tmp_path)
    assert trained_on("models/base", tmp_path / "adapter") == str(tmp_path / "models" / "base")
    monkeypatch.chdir("/")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_base_model().num_parameters() > 1e6
    assert find(str(tmp_path / "adapter")).base == str(tmp_path / "models" / "base")


def test_an_adapter_on_a_brought_base_names_it_so_too(embedded_model, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(embedded_model)
    monkeypatch.chdir(tmp_path)
    config = resolve(
        None, [Setting(k, v, "test") for k, v in {"model": "x", "data_path": "x", "packing": "none"}.items()]
    )
    adapted = with_adapters(AutoModelForCausalLM.from_pretrained("base"), config.config)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.fixture
def older_run(embedded_model, tmp_path):
    """A run of an earlier version, whose adapter names a base relative to the folder of the training."""
    where, final = tmp_path / "work", tmp_path / "work" / "out" / "run" / "final_model"
    (where / "models").mkdir(parents=True)
    (where / "models" / "base").symlink_to(embedded_model)
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    (final.parent / "config.yaml").write_text("output_dir: out/run  # command line\n")
    return final.parent


def test_a_relative_base_of_an_older_run_is_found_from_the_run(older_run, tmp_path, monkeypatch):
    base = str(tmp_path / "work" / "models" / "base")
    monkeypatch.chdir("/")
    for name in (older_run, older_run / "final_model"):
        assert find(str(name)).base == base
    monkeypatch.chdir(older_run.parent)
    assert find("run").base == base
    (older_run / "config.yaml").write_text("output_dir: null\n")
    assert find("run").base == "models/base"  # nothing tells where that was: it may be a name on the hub
    monkeypatch.chdir(tmp_path / "work")
    assert find("out/run").base == base
    (tmp_path / "work" / "out").rename(tmp_path / "work" / "output")
    monkeypatch.chdir("/")
    assert find(str(tmp_path / "work" / "output" / "run")).base == base  # where a run goes by default


@pytest.mark.parametrize("base", ["./base", "a/b/c"])
def test_a_base_that_is_no_hub_name_and_not_there_is_told(base, older_run):
    (older_run / "final_model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(UserError, match="no such folder here") as error:
        find(str(older_run))
    assert "adapter_config.json" in error.value.where and "whole path" in error.value.fix


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
