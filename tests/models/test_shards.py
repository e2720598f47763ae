"""Loading in shards: the parts of all ranks are the whole model, and no rank holds more than its own."""

from pathlib import Path

import pytest
import torch
from launches import launch
from small_models import save_for_launch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from manyrank.config.resolve import Setting, resolve
from manyrank.models.load import LoadPlan, load_model
from manyrank.models.quantised_cache import cached_base
from manyrank.models.shards import Share, take_parts

CPU = torch.device("cpu")
TYPE = torch.bfloat16


def loaded(name, method: str, share: Share | None):
    given = {"model_name_or_path": "embedded", "data_path": "x", "method": method}
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    quantization = "nf4" if method == "qlora" else None
    device_map = {"": CPU} if quantization else None
    return load_model(LoadPlan(str(name), TYPE, TYPE, quantization, device_map, share), config)


def shares(count: int, *, flat: bool = False, trained: bool = False) -> list[Share]:
    return [Share(index, count, flat, CPU, trained, TYPE) for index in range(count)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Packed weights seen as floats have NaN among them."""
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(scope="module")
def stored_in_4_bits(embedded_model, tmp_path_factory):
    """The embedded model as bitsandbytes stores it by default, in bytes."""
    folder = tmp_path_factory.mktemp("stored")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=TYPE)
    model = AutoModelForCausalLM.from_pretrained(
        embedded_model, quantization_config=quantised, dtype=TYPE, device_map={"": "cpu"}
    )
    save_for_launch(model, folder, embedded_model)
    return folder


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("flat", [False, True])
def test_cuts_are_the_whole(count, flat):
    tensor = torch.arange(7 * 3).view(7, 3)
    parts = [share.cut(tensor) for share in shares(count, flat=flat)]
    if flat:
        assert torch.equal(torch.cat(parts), tensor.flatten()) and max(map(len, parts)) == -(-21 // count)
        return
    assert torch.equal(torch.cat(parts), tensor)
    assert [len(part) for part in parts if len(part)] == [len(chunk) for chunk in tensor.chunk(count)]
    assert all(part.untyped_storage().nbytes() == part.numel() * 8 for part in parts)


@pytest.mark.parametrize(("method", "count"), [("lora", 2), ("qlora", 2), ("qlora", 3), ("full", 2)])
def test_parts_are_the_whole_model(embedded_model, method, count):
    whole = dict(loaded(embedded_model, method, None).named_parameters())
    models = [loaded(embedded_model, method, share) for share in shares(count, trained=method == "full")]
    for model in models:  # with the same adapters at the start
        own = {name: p for name, p in model.named_parameters() if not hasattr(p, "part")}
        assert set(own) == {name for name in whole if "lora_" in name}
        assert all(torch.equal(p, whole[name]) for name, p in own.items())
    taken = [take_parts(model) for model in models]
    assert set(taken[0]) == {name for name in whole if "lora_" not in name}
    for name in taken[0]:
        assert same_bits(torch.cat([parts[name] for parts in taken]), whole[name].data), name
    kept = [p for p in models[0].parameters() if not p.requires_grad]
    assert all(p.is_meta for p in kept) and bool(kept) == (method != "full")


def test_constants_of_a_4_bit_base_are_those_of_the_whole(embedded_model):
    whole, model = loaded(embedded_model, "qlora", None), loaded(embedded_model, "qlora", shares(2)[0])
    compared = 0
    for (_, one), (_, other) in zip(whole.named_modules(), model.named_modules()):
        if getattr(one, "quant_state", None) is not None and hasattr(one, "compute_dtype"):
            a, b = one.quant_state.as_dict(packed=True), other.quant_state.as_dict(packed=True)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            compared += 1
    assert compared == 4 * 7


def test_a_base_that_is_stored_in_4_bits_is_not_quantised_again(embedded_model, stored_in_4_bits):
    whole = dict(loaded(embedded_model, "qlora", None).named_parameters())
    taken = [take_parts(loaded(stored_in_4_bits, "qlora", share)) for share in shares(2)]
    for name in taken[0]:
        assert same_bits(torch.cat([parts[name] for parts in taken]), whole[name].data), name


def test_a_base_that_is_stored_in_4_bits_trains_to_the_losses_of_one_process(stored_in_4_bits, tmp_path):
    common = (f"--model={stored_in_4_bits}", "--method=qlora", "--max_steps=3", "--sample_questions=[]")
    single = launch(tmp_path / "single", *common, "--strategy=single")
    assert single.code == 0, single.stderr
    losses = single.metrics()
    assert len(losses) == 3
    for strategy in ("fsdp", "zero3"):
        run = launch(tmp_path / strategy, *common, f"--strategy={strategy}", "--nproc=2")
        assert run.code == 0, run.stderr
        assert run.metrics() == pytest.approx(losses, abs=1e-5)
        assert max(run.facts()["base_bytes_here"]) < 0.51 * run.facts()["base_bytes"]


def test_two_names_of_one_tensor_in_memory(embedded_model, tmp_path):
    """A pickle of the old format is not mapped, and its tensors are the checkpoint's."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=TYPE)
    model.config.save_pretrained(tmp_path)
    state = {**model.state_dict(), "lm_head.weight": model.model.embed_tokens.weight.data}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    taken = [take_parts(loaded(tmp_path, "lora", share)) for share in shares(2)]
    assert state.keys() == {name.replace("base_model.model.", "").replace("base_layer.", "") for name in taken[0]}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert same_bits(torch.cat([parts[f"base_model.model.{name}"] for parts in taken]), state[name])


@pytest.mark.parametrize("where", ["off", "cache"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "quantised"])
def test_the_config_of_a_4_bit_base_is_read_once(
    embedded_model, stored_in_4_bits, stored, where, tmp_path, monkeypatch
):
    """Each read of a hub name asks the hub."""
    folder, read, files = stored_in_4_bits if stored else embedded_model, PreTrainedConfig._dict_from_json_file, []

    def noted(file):
        files.append(Path(file))
        return read(file)

    monkeypatch.setattr(PreTrainedConfig, "_dict_from_json_file", noted)
    plan = LoadPlan(str(folder), TYPE, TYPE, "nf4", {"": CPU}, shares(2)[0])
    model = cached_base(plan, where="off" if where == "off" else str(tmp_path), say=lambda line: None)
    assert files == [folder / "config.json"]
    assert model.config.quantization_config.load_in_4bit


def test_a_rank_holds_its_parts_and_no_more(embedded_model):
    model = loaded(embedded_model, "qlora", shares(4)[1])
    standing = [p for p in model.parameters() if hasattr(p, "part")]
    held = sum(p.part.untyped_storage().nbytes() for p in standing)
    assert sum(p.untyped_storage().nbytes() for p in standing) <= 4 * len(standing)
    assert held <= 0.26 * sum(p.numel() * p.element_size() for p in standing)
