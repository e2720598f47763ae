"""Runs as GGUF files: how llama.cpp's converter is called, what is left of a failure, and the real one where it is here.

The stand-in writes down how it was called and a header. `LLAMA_CPP=FOLDER pytest tests/tools/test_gguf.py` takes the real one, too.
"""

import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from launches import ROOT
from peft import LoraConfig, get_peft_model
from processes import is_running
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyrank import cli
from manyrank.errors import UserError
from manyrank.tools import gguf

STAND_IN = """
import json, os, pathlib, struct, sys, time
argv = sys.argv[1:]
model, out = pathlib.Path(argv[-1]), pathlib.Path(argv[argv.index("--outfile") + 1])
called = {"script": pathlib.Path(sys.argv[0]).name, "argv": argv, "pid": os.getpid(), "files": sorted(os.listdir(model))}
pathlib.Path(os.environ["CALLED"]).write_text(json.dumps(called))
how = os.environ.get("HOW", "")
if how == "fails":
    out.write_bytes(b"GGUF, and half of a tensor")
    print(*(f"INFO line {number}" for number in range(99)), sep="\\n")
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
if how == "waits":
    time.sleep(300)
weights = next(model.glob("*model.safetensors"))
with weights.open("rb") as file:
    names = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).keys() - {"__metadata__"}
out.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0 if how == "empty" else len(names), 0))
"""


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A folder with the stand-in as both scripts."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in (gguf.OF_MODEL, gguf.OF_ADAPTER):
        (folder / name).write_text(STAND_IN)
    monkeypatch.setenv("CALLED", str(tmp_path / "called.json"))
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


def called(tmp_path) -> dict:
    return json.loads((tmp_path / "called.json").read_text())


def export(*argv) -> int:
    return gguf.main([str(word) for word in argv])


def tensors(file: Path) -> int:
    return struct.unpack("<4sIQ", file.read_bytes()[:16])[2]


def test_a_run_is_merged_first_and_only_the_file_stays(whole_run, llama_cpp, tmp_path, capsys):
    out = tmp_path / "made" / "my.gguf"
    assert export(whole_run.folder, "--output", out, "--outtype", "q8_0") == 0
    call = called(tmp_path)
    assert call["script"] == "convert_hf_to_gguf.py" and "--outtype q8_0" in " ".join(call["argv"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(call["files"])
    folder = Path(call["argv"][-1])
    assert folder.parent.parent == out.parent and not folder.exists()
    assert [path.name for path in out.parent.iterdir()] == ["my.gguf"] and tensors(out) == 47
    said = capsys.readouterr().out
    assert f"llama-cli -m {out}" in said and f"FROM {out}" in said and "47 tensors" in said


def test_a_whole_model_goes_as_it_is(embedded_model, llama_cpp, tmp_path):
    assert export(embedded_model, "--output", tmp_path / "my.gguf") == 0
    assert called(tmp_path)["argv"][-1] == str(embedded_model)


def test_the_adapter_alone_goes_with_its_base(whole_run, embedded_model, llama_cpp, tmp_path, capsys):
    out = tmp_path / "adapter.gguf"
    assert export(whole_run.folder, "--adapter", "--output", out) == 0
    call = called(tmp_path)
    final = whole_run.folder / "final_model"
    assert call["script"] == "convert_lora_to_gguf.py" and call["argv"][-3:] == [
        "--base",
        str(embedded_model),
        str(final),
    ]
    assert tensors(out) == len(load_file(final / "adapter_model.safetensors")) and "--lora" in capsys.readouterr().out
    with pytest.raises(UserError, match="no adapter"):
        export(embedded_model, "--adapter")
    shutil.copytree(final, tmp_path / "special")
    config = json.loads((final / "adapter_config.json").read_text()) | {"use_rslora": True, "rank_pattern": {"q": 3}}
    (tmp_path / "special" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"llama.cpp does not read use_rslora of this adapter"):
        export(tmp_path / "special", "--adapter")


@pytest.mark.parametrize(
    ("how", "said"), [("fails", "pre-tokenizer was not recognized"), ("empty", "no GGUF file with tensors")]
)
def test_a_failure_leaves_what_was_there(how, said, embedded_model, llama_cpp, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOW", how)
    out = tmp_path / "made" / "my.gguf"
    out.parent.mkdir()
    out.write_text("the last one")
    with pytest.raises(UserError, match="is there already"):
        export(embedded_model, "--output", out)
    assert export(embedded_model, "--output", out, "--overwrite") == 1
    error = capsys.readouterr().err
    assert said in error and (how == "empty" or "git pull" in error) and "INFO line 3\n" not in error
    assert [path.read_text() for path in out.parent.iterdir()] == ["the last one"]


def test_a_signal_ends_the_converter_and_leaves_nothing(whole_run, llama_cpp, tmp_path):
    out = tmp_path / "made" / "my.gguf"
    argv = [sys.executable, "-m", "manyrank.cli", "export", "gguf", str(whole_run.folder), f"--output={out}"]
    process = warm.start(argv, cwd=ROOT, env={**os.environ, "HOW": "waits"})
    end = time.monotonic() + 60
    while not (tmp_path / "called.json").exists() or not (tmp_path / "called.json").read_text():
        assert process.poll() is None and time.monotonic() < end, process.err.read_text()
        time.sleep(0.05)
    assert list(out.parent.glob("*.partial-*/merged/model.safetensors"))
    process.terminate()
    process.wait(30)
    assert process.returncode == 128 + signal.SIGTERM and list(out.parent.iterdir()) == []
    assert not is_running(called(tmp_path)["pid"])


def test_without_a_converter_the_error_says_what_to_type(embedded_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    argv = ["export", "gguf", str(embedded_model), "--output", "my.gguf"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3 and "git clone" in error[2] and error[2].endswith(" ".join(["manyrank", *argv]))
    for folder in (
        tmp_path,
        tmp_path / "llama.cpp",
        tmp_path / "home" / "llama.cpp",
    ):  # from the last place to the first
        folder.mkdir(parents=True, exist_ok=True)
    places = [tmp_path / "home" / "llama.cpp", Path("llama.cpp"), tmp_path]
    for place in places:
        (place / gguf.OF_MODEL).touch(mode=0o755)
        assert gguf.find_converter(gguf.OF_MODEL, None, argv) == place / gguf.OF_MODEL
    monkeypatch.setenv("LLAMA_CPP", "nowhere")
    with pytest.raises(UserError, match="in nowhere"):
        gguf.find_converter(gguf.OF_MODEL, None, argv)


# The real one


def llama(folder: Path) -> None:
    """A small Llama with a tokenizer of Llama's kind; llama.cpp knows tokenizers of Qwen's kind by a hash."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"etaoinshrdlu?."]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), num_hidden_layers=2, max_position_embeddings=128, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="LLAMA_CPP names no folder with llama.cpp's converter")
def test_the_real_converter_writes_the_merged_weights_and_the_adapter(tmp_path):
    reader = pytest.importorskip("gguf").GGUFReader
    llama(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "adapter")

    def read(*argv) -> tuple[dict, dict]:
        assert export(tmp_path / "adapter", "--output", tmp_path / "my.gguf", "--overwrite", *argv) == 0
        file = reader(tmp_path / "my.gguf")
        assert len(file.tensors) == gguf.count_tensors(tmp_path / "my.gguf")
        return {tensor.name: tensor for tensor in file.tensors}, file.fields

    merged = model.merge_and_unload()
    made, fields = read("--outtype", "f32")
    assert fields["general.architecture"].contents() == "llama" and fields["tokenizer.chat_template"].contents()
    down = merged.model.layers[1].mlp.down_proj.weight.detach().numpy()
    written = made["blk.1.ffn_down.weight"].data
    assert written.shape == down.shape and np.abs(written - down).max() < 1e-6
    assert len(made) == 21  # 9 of each of 2 layers, embedding, norm and head
    made, _ = read("--outtype", "q8_0")
    assert made["blk.1.ffn_down.weight"].tensor_type.name == "Q8_0"
    made, _ = read("--adapter", "--outtype", "f32")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    one = adapter["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].numpy()
    assert len(made) == len(adapter) and np.array_equal(made["blk.1.ffn_down.weight.lora_b"].data, one)
