"""Training that continues from an adapter, of a run or of another tool."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from launches import launch, nightly
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import plain_loss
from transformers import AutoModelForCausalLM

from manyrank import SFTConfig, cli

START = ("--eval_data_path=data/validation.jsonl", "--eval_on_start", "--max_steps=2")


@pytest.fixture(scope="module")
def first(embedded_model, tmp_path_factory):
    """A run whose adapter has learned something."""
    run = launch(
        tmp_path_factory.mktemp("first") / "run", "--max_steps=8", "--lr=3e-3", "--lora_r=5", "--lora_alpha=11"
    )
    assert run.code == 0, run.stderr
    return run.folder


@pytest.fixture(scope="module")
def foreign(embedded_model, tmp_path_factory):
    """An adapter that another tool has made: rsLoRA on some layers, not at its beginning."""
    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    torch.manual_seed(3)
    config = LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def loss_of(adapter: Path, base, tokenizer) -> float:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return plain_loss(model.eval(), tokenizer, "data/validation.jsonl")


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero3", *nightly("ddp", "zero2")])
def test_the_loss_before_the_first_step_is_that_of_the_adapter(strategy, first, embedded_model, tokenizer, tmp_path):
    nproc = 1 if strategy == "single" else 2
    run = launch(tmp_path / "run", *START, f"--adapter={first}", f"--strategy={strategy}", f"--nproc={nproc}")
    assert run.code == 0, run.stderr
    wanted = loss_of(first / "final_model", embedded_model, tokenizer)
    assert run.metrics("eval_loss")[0] == pytest.approx(wanted, abs=1e-5)
    assert run.metrics("eval_loss")[-1] != pytest.approx(wanted, abs=1e-4)  # it has gone further
    shape = json.loads((run.folder / "final_model" / "adapter_config.json").read_text())
    assert (shape["r"], shape["lora_alpha"]) == (5, 11)


@pytest.mark.parametrize("strategy", ["single", *nightly("fsdp", "zero3")])
def test_on_a_base_in_4_bits(strategy, embedded_model, tmp_path):
    place = (f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}", "--method=qlora")
    before = launch(
        tmp_path / "before", *START[:1], *place, "--max_steps=4", "--eval_steps=4", "--save_steps=4", "--lr=3e-3"
    )
    run = launch(tmp_path / "run", *START, *place, f"--adapter={before.folder / 'checkpoint-4'}")
    assert run.code == 0, run.stderr
    assert run.metrics("eval_loss")[0] == pytest.approx(before.metrics("eval_loss")[-1], abs=1e-5)


@pytest.mark.parametrize("names", ["as peft", "wrapped", "pattern"])
def test_adapters_of_other_tools(names, foreign, embedded_model, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(foreign, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    if names == "wrapped":
        renamed = {
            name.replace("model.layers", "model._orig_mod.layers").replace(".lora_A", ".lora_A.default"): tensor
            for name, tensor in weights.items()
        }
        save_file(renamed, adapter / "adapter_model.safetensors")
    if names == "pattern":
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["target_modules"] = r".*\.(?:q_proj|down_proj)"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    run = launch(tmp_path / "run", *START, f"--adapter={adapter}", "--lr=0", "--strategy=single")
    assert run.code == 0, run.stderr
    assert run.metrics("eval_loss")[0] == pytest.approx(loss_of(foreign, embedded_model, tokenizer), abs=1e-5)
    final = run.folder / "final_model"
    shape = json.loads((final / "adapter_config.json").read_text())
    assert (shape["r"], shape["lora_alpha"], shape["use_rslora"]) == (6, 9, True)
    assert sorted(shape["target_modules"]) == ["down_proj", "q_proj"]
    saved = load_file(final / "adapter_model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    assert loss_of(final, embedded_model, tokenizer) == pytest.approx(run.metrics("eval_loss")[-1], abs=1e-5)


def test_a_resume_is_exact_and_knows_its_adapter(first, foreign, tmp_path):
    args = (f"--adapter={first}", "--max_steps=4", "--save_steps=2", "--strategy=single")
    whole = launch(tmp_path / "whole", *args)
    again = f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}"
    resumed = launch(tmp_path / "resumed", *args, again)
    assert resumed.code == 0 and resumed.metrics() == whole.metrics()[2:], resumed.stderr
    other = launch(tmp_path / "other", *args[1:], again, f"--adapter={whole.folder}")
    assert other.code == 2 and "adapter: " in other.stderr and "--resume_changes adapter" in other.stderr, other.stderr


@pytest.mark.parametrize(
    "args, what",
    [
        (("--adapter={first}", "--lora_r=32"), "lora_r is 32, and that of"),
        (("--adapter={first}", "--method=full"), "method full, and adapter"),
        (("--adapter={first}", "--use_rslora"), "use_rslora is true, and that of"),
        (("--adapter={first}", "--init_lora_weights=pissa"), "has its values"),
        (("--new_adapter",), "new_adapter, and no adapter below it"),
        (("--adapter=nowhere",), "there is no folder 'nowhere'"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(args, what, first, tmp_path):
    run = launch(tmp_path / "run", *(arg.format(first=first) for arg in args))
    assert run.code == 2 and what in run.stderr and not run.folder.exists()


@pytest.mark.parametrize("strategy", ["single", "fsdp", *nightly("ddp", "zero2", "zero3")])
@pytest.mark.parametrize("below", ["first", "foreign"])
def test_another_adapter_on_top(strategy, below, first, foreign, embedded_model, tokenizer, tmp_path):
    """The one below stays as it is, and both are one adapter of the base."""
    folder = {"first": first / "final_model", "foreign": foreign}[below]
    args = (*START[:2], "--max_steps=4", "--save_steps=2", f"--adapter={folder}", "--new_adapter", "--lora_r=4")
    args += (
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        "--lora_target_modules=q_proj,v_proj",
    )
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stderr
    assert run.metrics("eval_loss")[0] == pytest.approx(loss_of(folder, embedded_model, tokenizer), abs=1e-5)
    final = run.folder / "final_model"
    assert loss_of(final, embedded_model, tokenizer) == pytest.approx(run.metrics("eval_loss")[-1], abs=1e-5)
    before, after = load_file(folder / "adapter_model.safetensors"), load_file(final / "adapter_model.safetensors")
    only_below = [name for name in before if "down_proj.lora_A" in name]
    assert only_below and all(torch.equal(before[name], after[name]) for name in only_below)
    both = [name for name in before if "q_proj.lora_A" in name]
    assert both and all(torch.equal(after[name][4:], before[name]) for name in both)
    resumed = launch(tmp_path / "again", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0 and resumed.metrics() == run.metrics()[2:], resumed.stderr


def test_an_adapter_of_the_hub(foreign, embedded_model, tokenizer, tmp_path):
    hub = Hub()
    hub.files["me/mine"] = {file.name: file.read_bytes() for file in foreign.iterdir()}
    hub.files["me/mine"] |= {"checkpoint-1/optimizer.pt": b"x"}
    with hub.serving():
        place = {**hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache")}
        run = launch(tmp_path / "run", *START, "--adapter=me/mine", "--strategy=single", cold=True, **place)
        assert run.code == 0, run.stderr
        none = launch(tmp_path / "none", *START, "--adapter=me/other", "--strategy=single", cold=True, **place)
    assert run.metrics("eval_loss")[0] == pytest.approx(loss_of(foreign, embedded_model, tokenizer), abs=1e-5)
    assert not list((tmp_path / "cache").rglob("optimizer.pt"))
    assert none.code == 2 and "there is no folder 'me/other'" in none.stderr


def test_a_base_of_other_weights(first, embedded_model, tokenizer, tmp_path):
    """The run has recorded the fingerprint of its base; another one of the same shape is refused unless it is wanted."""
    other = tmp_path / "other"
    shutil.copytree(embedded_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    args = (*START, f"--adapter={first}", f"--model={other}", "--strategy=single")
    run = launch(tmp_path / "run", *args)
    assert run.code == 2 and "other weights" in run.stderr and not run.folder.exists()
    meant = launch(tmp_path / "meant", *args, "--allow_base_change")
    assert meant.code == 0, meant.stderr
    assert meant.metrics("eval_loss")[0] == pytest.approx(loss_of(first / "final_model", other, tokenizer), abs=1e-5)


def test_no_adapter_from_python_is_the_default():
    config = SFTConfig(model_name_or_path="embedded", data_path="data/sample.jsonl", adapter=None)
    assert config.method == "lora" and config.adapter is None


def test_an_adapter_of_another_base_is_refused(foreign, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(foreign, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor[:, :-1].contiguous() if "lora_A" in name else tensor for name, tensor in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    run = launch(tmp_path / "run", f"--adapter={adapter}", "--max_steps=1", "--strategy=single")
    assert run.code == 2 and "is for [192, 511] weights, and that of embedded has" in run.stderr
    whole = launch(tmp_path / "whole", "--adapter=" + str(first_base(adapter)), "--max_steps=1")
    assert whole.code == 2 and "is a whole model, and no adapter" in whole.stderr


@pytest.mark.parametrize("more", [(), ("--new_adapter",)])
def test_weights_in_pickle_are_refused_before_the_launch(more, foreign, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(foreign, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    run = launch(tmp_path / "run", f"--adapter={adapter}", *more, "--max_steps=1")
    assert run.code == 2 and "a pickle (adapter_model.bin) is not read" in run.stderr and not run.folder.exists()


def damage(adapter: Path, kind: str) -> None:
    """Damage a copy of `foreign`: rank 6 on q_proj and down_proj."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, theirs = load_file(file), json.loads(config.read_text())
    name = next(name for name in tensors if "lora_B" in name)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no JSON":
        config.write_text("{")
    elif kind == "rank 0":
        config.write_text(json.dumps(theirs | {"r": 0}))
        save_file({n: t[:0] if "lora_A" in n else t[:, :0].contiguous() for n, t in tensors.items()}, file)
    elif kind == "other rank":
        config.write_text(json.dumps(theirs | {"r": 8}))
    elif kind == "no B":
        save_file({n: t for n, t in tensors.items() if n != name}, file)
    elif kind == "a layer less":
        save_file({n: t for n, t in tensors.items() if "layers.0." not in n}, file)
    elif kind == "another width":
        save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    elif kind == "no such layer":
        save_file({n.replace("layers.0.", "layers.77."): t for n, t in tensors.items()}, file)
    elif kind == "nothing":
        save_file({"x": torch.zeros(1)}, file)


DAMAGE = {
    "truncated": "cannot be read: ",
    "no JSON": "cannot be read: ",
    "rank 0": "its B is [",
    "no B": "its B is not there",
    "nothing": "it has no matrices of LoRA",
    "another width": "weights, and that of ",
}


@pytest.mark.parametrize("more", [(), ("--new_adapter",)])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_refused_before_the_launch(kind, more, foreign, tmp_path, capsys):
    assert_refused(kind, DAMAGE[kind], more, foreign, tmp_path, capsys)


@pytest.mark.parametrize(
    "kind, more, what",
    [
        ("other rank", (), "in the model"),
        ("a layer less", (), "is not there, and ["),
        ("no such layer", (), "is not there, and ["),
        ("no such layer", ("--new_adapter",), "layers.77."),
    ],
)
def test_an_adapter_that_does_not_fit_the_skeleton_is_refused(kind, more, what, foreign, tmp_path, capsys):
    assert_refused(kind, what, more, foreign, tmp_path, capsys)


def assert_refused(kind, what, more, foreign, tmp_path, capsys) -> None:
    adapter = shutil.copytree(foreign, tmp_path / "saved")
    damage(adapter, kind)
    line = ["train", "verify", f"--adapter={adapter}", *more, f"--output_dir={tmp_path / 'run'}"]
    assert cli.main(line) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "where: ", "fix: "))]
    assert len(lines) == 3 and what in lines[0] and "adapter" in lines[1] and not (tmp_path / "run").exists()


def first_base(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
