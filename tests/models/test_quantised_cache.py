"""The quantised base on disk: written once by all ranks, read by every sharding strategy, never used when damaged."""

import json

import pytest
import torch
from launches import launch

from manyrank.config.resolve import Setting, resolve
from manyrank.models.load import LoadPlan, load_model
from manyrank.models.quantised_cache import cached_base
from manyrank.models.shards import Share, take_parts

CPU, TYPE = torch.device("cpu"), torch.bfloat16


def loaded(name, where, lines: list[str], *kind):
    """A base of which this process is the first of two ranks that share it."""
    share = Share(0, 2, flat=False, device=CPU, trained=False, storage=TYPE)
    quantization, double_quant = kind or ("nf4", True)
    plan = LoadPlan(str(name), TYPE, TYPE, quantization, {"": CPU}, share, double_quant=double_quant)
    return cached_base(plan, where=str(where), say=lines.append)


def test_the_second_start_reads_what_the_first_has_quantised(embedded_model, tmp_path):
    cache = tmp_path / "cache"
    common = ("--method=qlora", "--nproc=2", "--max_steps=2", f"--quantized_cache={cache}", "--sample_questions=[]")
    first = launch(tmp_path / "first", *common, "--strategy=fsdp")
    assert first.code == 0, first.stderr
    (folder,) = cache.iterdir()
    assert f"the quantised base is cached in {folder}" in first.stdout
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "others may read what safetensors wrote, too"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model-000-000.safetensors", "model-001-000.safetensors"}
    assert "model.layers.0.mlp.up_proj.weight.nested_absmax" in index and "lm_head.weight" in index

    second = launch(tmp_path / "second", *common, "--strategy=zero3")
    assert second.code == 0, second.stderr
    assert f"the quantised base comes from {folder}" in second.stdout
    assert second.metrics() == pytest.approx(first.metrics(), abs=1e-5)
    adapter = json.loads((second.folder / "final_model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(embedded_model)

    weights = folder / "model-001-000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    third = launch(tmp_path / "third", *common, "--strategy=fsdp")
    assert f"{weights} is damaged: the base is quantised again" in third.stdout
    assert third.metrics() == first.metrics()
    content[-1] ^= 1
    assert weights.read_bytes() == content and list(cache.iterdir()) == [folder]


def test_the_cached_base_is_the_quantised_one(embedded_model, tmp_path):
    lines = []
    models = [loaded(embedded_model, tmp_path, lines) for _ in range(2)]
    assert ["cached in" in lines[0], "comes from" in lines[1]] == [True, True]
    constants = [
        {
            name: module.quant_state.as_dict(packed=True)
            for name, module in model.named_modules()
            if hasattr(module, "quant_state")
        }
        for model in models
    ]
    parts = [take_parts(model) for model in models]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(parts[0][name].view(torch.uint8), parts[1][name].view(torch.uint8)) for name in parts[0])
    assert len(constants[0]) == 4 * 7
    assert all(
        torch.equal(constants[0][name][key], constants[1][name][key])
        for name in constants[0]
        for key in constants[0][name]
    )


def test_other_numbers_and_constants_are_cached_apart(embedded_model, tmp_path):
    lines, kinds = [], [("nf4", True), ("fp4", True), ("nf4", False)]
    for kind in (*kinds, *kinds):
        model = loaded(embedded_model, tmp_path, lines, *kind)
        states = [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]
        assert {(state.quant_type, state.nested) for state in states} == {kind}
    assert len(list(tmp_path.iterdir())) == 3
    assert ["comes from" in line for line in lines] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("place", ["off", "a file"])
def test_a_run_without_a_cache(place, embedded_model, tmp_path):
    where, lines = tmp_path / "cache" if place == "a file" else "off", []
    if place == "a file":
        where.write_text("")
    assert take_parts(loaded(embedded_model, where, lines))
    assert [line.startswith("the quantised base is not cached: ") for line in lines] == (
        [True] if place == "a file" else []
    )
    assert [path.name for path in tmp_path.iterdir()] == (["cache"] if place == "a file" else [])


def test_a_full_disk_ends_the_cache_and_not_the_run(embedded_model, tmp_path, monkeypatch):
    from manyrank.models import quantised_cache

    monkeypatch.setattr(quantised_cache, "SPARE", 1)
    lines = []
    assert take_parts(loaded(embedded_model, tmp_path, lines))
    assert "not cached" in lines[0] and "would be left" in lines[0] and not list(tmp_path.iterdir())


def test_a_base_with_adapters_is_named_after_its_own_folder(embedded_model, tmp_path):
    given = {"model_name_or_path": str(embedded_model), "data_path": "x", "method": "qlora"}
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    for _ in range(2):
        share = Share(0, 2, flat=False, device=CPU, trained=False, storage=TYPE)
        plan = LoadPlan(str(embedded_model), TYPE, TYPE, "nf4", {"": CPU}, share)
        model = load_model(plan, config, read=lambda plan: cached_base(plan, where=str(tmp_path), say=print))
        assert model.peft_config["default"].base_model_name_or_path == str(embedded_model)


def test_a_cache_that_cannot_be_used_is_said(embedded_model, tmp_path):
    lines, plan = [], LoadPlan(str(embedded_model), TYPE, TYPE, "nf4", {"": CPU}, share=None)
    cached_base(plan, where=str(tmp_path), say=lines.append)
    assert lines == ["quantized_cache is not used: the strategy does not shard the base"] and not list(
        tmp_path.iterdir()
    )
