"""Two processes load a base in shards: what each holds, at most and at the end, and the bytes that it maps and reads."""

import pytest
from load_model import RANKS, SHARDED, load, make

from manyrank.models.shards import RETURNED_EACH
from manyrank.plan.memory import NF4_ON_CPU

MiB = 2**20
SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LARGEST = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]  # bytes of the embedding, and of lm_head
QUANTISING = NF4_ON_CPU * SHAPE["intermediate_size"] * SHAPE["hidden_size"]
LITTLE = 12 * MiB  # what the libraries keep, and the code that runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("wide")
    make(made, SHAPE)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(folder, cache):
    """What each rank took, by case of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process
        return load(folder, str(cache), SHARDED)


def weights(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_of_16_bits_a_rank_holds_and_maps_its_part_alone(strategy, folder, loaded):
    for rank in loaded[f"lora {strategy}"]:
        assert rank["held"] == pytest.approx(weights(folder) / RANKS, rel=0.01)
        assert rank["peak"] < rank["held"] + LITTLE
        assert rank["held"] <= rank["mapped"] < rank["held"] + LARGEST / 4  # the kernel maps by up to 2 MiB
        assert rank["read"] < 4 * MiB


def test_a_rank_that_quantises_holds_its_part_and_one_tensor(folder, loaded):
    for rank in loaded["qlora fsdp uncached"]:
        assert rank["held"] < 0.45 * weights(folder)
        assert rank["peak"] < rank["held"] + QUANTISING + LITTLE  # the embedding is cut as it is mapped
    for rank in loaded["qlora fsdp"]:
        assert rank["peak"] < rank["held"] + LARGEST + LITTLE


def test_what_quantising_frees_leaves_the_process(tmp_path):
    """Also where glibc keeps it, as it does unless a variable says no: many matrices are quantised, parts stay between."""
    shape = SHAPE | {"num_hidden_layers": 12, "vocab_size": 4096}
    make(tmp_path / "deep", shape)
    (uncached,) = load(tmp_path / "deep", str(tmp_path), ["qlora fsdp uncached"]).values()
    for rank in uncached:
        assert rank["peak"] < rank["held"] + QUANTISING + NF4_ON_CPU * RETURNED_EACH + LITTLE


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_the_second_start_reads_a_rank_s_part_and_its_share_of_the_hashes(strategy, cache, loaded):
    ranks, size = loaded[f"qlora {strategy} again"], weights(cache)
    for rank in ranks:
        constants = size - RANKS * rank["held"]
        assert 0 < constants < 0.05 * size  # which each rank needs whole
        assert rank["peak"] < rank["held"] + constants + LITTLE
        assert rank["held"] <= rank["mapped"] < rank["held"] + constants + LARGEST / 4
        assert rank["read"] < 0.55 * size
    assert size < sum(rank["read"] for rank in ranks) < size + RANKS * 4 * MiB
