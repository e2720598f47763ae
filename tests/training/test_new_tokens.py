"""Tokens that the base does not have: in the tokenizer, as rows that are trained, and in what is saved."""

import json

import pytest
import torch
from launches import launch, nightly
from peft import PeftModel
from safetensors.torch import load_file
from small_models import LAUNCHED, plain_loss, save_for_launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manyrank.models.inference import load_model

TOKENS = ("--add_tokens=zorp,blick", "--add_special_tokens=<tool>")
NEW = [1536, 1537, 1538]  # behind those of the embedded model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows in which the new tokens are learned."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"question": f"What is zorp {n}?", "answer": f"<tool> blick and zorp {n}"} for n in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return file


def base_of(kind: str, folder, embedded_model):
    """The embedded model; or one with tied embeddings, of as many rows (tied) or of more than its tokenizer (spare)."""
    if kind == "untied":
        return embedded_model
    torch.manual_seed(0)
    shape = LAUNCHED | {"vocab_size": 1600 if kind == "spare" else 1536}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape, tie_word_embeddings=True))
    save_for_launch(model, folder, embedded_model)
    return folder


def in_transformers(base, run, tokenizer):
    """The run's result as any other tool loads it."""
    final = run.folder / "final_model"
    model = AutoModelForCausalLM.from_pretrained(base)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, final).eval()


CASES = [("untied", "single"), ("untied", "fsdp"), ("tied", "zero3"), ("spare", "single")]
REST = [(kind, name) for kind in ("untied", "tied", "spare") for name in ("single", "ddp", "fsdp", "zero2", "zero3")]


@pytest.mark.parametrize("kind, strategy", [*CASES, *nightly(*(case for case in REST if case not in CASES))])
def test_new_rows_are_trained_and_saved(kind, strategy, rows, embedded_model, tmp_path):
    base = base_of(kind, tmp_path / "base", embedded_model)
    args = (f"--model={base}", f"--data_path={rows}", f"--eval_data_path={rows}", "--eval_on_start", "--max_steps=4")
    args += ("--save_steps=2", "--lr=1e-2", "--max_length=128", *TOKENS, f"--strategy={strategy}")
    args += (f"--nproc={1 if strategy == 'single' else 2}",)
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final_model")
    assert tokenizer.convert_tokens_to_ids(["zorp", "blick", "<tool>"]) == NEW
    saved = load_file(run.folder / "final_model" / "adapter_model.safetensors")
    deltas = {name: tensor for name, tensor in saved.items() if ".lora_" not in name}
    assert len(deltas) == (2 if kind == "untied" else 1)
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"][:1536]
    (embedding,) = (tensor for name, tensor in deltas.items() if "embed_tokens" in name)
    assert embedding.shape == (3, old.shape[1]) and not torch.allclose(embedding[0], embedding[1])
    assert (embedding - old.mean(0)).abs().max() < 0.1  # it began as their mean, and took 4 steps of 0.01
    model = in_transformers(base, run, tokenizer)
    assert run.metrics("eval_loss")[-1] == pytest.approx(plain_loss(model, tokenizer, str(rows)), abs=1e-5)
    assert run.metrics("eval_loss")[-1] < run.metrics("eval_loss")[0] - 0.01
    resumed = launch(tmp_path / "again", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0 and resumed.metrics() == run.metrics()[2:], resumed.stderr
    for folder in (run.folder, run.folder / "checkpoint-4"):
        ours, own = load_model(str(folder), dtype="float32")
        assert own.convert_tokens_to_ids("<tool>") == 1538 and plain_loss(ours, own, str(rows)) == pytest.approx(
            run.metrics("eval_loss")[-1], abs=1e-5
        )


@pytest.mark.parametrize("strategy", ["single", *nightly("ddp", "fsdp", "zero2", "zero3")])
def test_with_whole_matrices_beside_adapters(strategy, rows, embedded_model, tmp_path):
    args = (f"--data_path={rows}", f"--eval_data_path={rows}", "--max_steps=2", "--lr=1e-3", *TOKENS)
    args += ("--modules_to_save=embed_tokens,lm_head", f"--strategy={strategy}")
    run = launch(tmp_path / "run", *args, f"--nproc={1 if strategy == 'single' else 2}")
    assert run.code == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final_model")
    saved = load_file(run.folder / "final_model" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in saved.items() if ".lora_" not in name} == {1539}
    loss = plain_loss(in_transformers(embedded_model, run, tokenizer), tokenizer, str(rows))
    assert run.metrics("eval_loss")[-1] == pytest.approx(loss, abs=1e-5)
    more = (f"--data_path={rows}", f"--eval_data_path={rows}", "--eval_on_start", "--max_steps=1", "--strategy=single")
    again = launch(tmp_path / "again", *more, f"--adapter={run.folder}", *TOKENS)
    assert again.code == 0, again.stderr
    assert again.metrics("eval_loss")[0] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("strategy", ["zero3", *nightly("single", "fsdp", "zero2")])
def test_of_a_model_that_is_trained_whole(strategy, rows, embedded_model, tmp_path):
    nproc = 1 if strategy == "single" else 2
    args = (
        f"--data_path={rows}",
        f"--eval_data_path={rows}",
        "--eval_on_start",
        "--max_steps=2",
        "--method=full",
        *TOKENS,
    )
    run = launch(tmp_path / "run", *args, f"--strategy={strategy}", f"--nproc={nproc}", "--lr=1e-3")
    assert run.code == 0, run.stderr
    final = run.folder / "final_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.config.vocab_size == len(tokenizer) == 1539 == len(model.get_output_embeddings().weight)
    assert run.metrics("eval_loss")[-1] == pytest.approx(plain_loss(model.eval(), tokenizer, str(rows)), abs=1e-5)
    assert run.metrics("eval_loss")[-1] < run.metrics("eval_loss")[0]


def test_an_adapter_with_new_tokens_is_continued(rows, embedded_model, tmp_path):
    args = (f"--data_path={rows}", f"--eval_data_path={rows}", "--eval_on_start", "--max_steps=2", "--strategy=single")
    first = launch(tmp_path / "first", *args, *TOKENS, "--lr=1e-2")
    assert first.code == 0, first.stderr
    other = launch(tmp_path / "other", *args, f"--adapter={first.folder}", "--add_tokens=blick,zorp")
    assert other.code == 2 and f"add_tokens is blick,zorp, and that of {first.folder}" in other.stderr
    again = launch(tmp_path / "again", *args, f"--adapter={first.folder}", *TOKENS)
    assert again.code == 0, again.stderr
    assert again.metrics("eval_loss")[0] == pytest.approx(first.metrics("eval_loss")[-1], abs=1e-5)


@pytest.mark.parametrize("strategy", ["fsdp", *nightly("single", "zero3")])
def test_on_a_base_in_4_bits(strategy, rows, tmp_path):
    args = (f"--data_path={rows}", f"--eval_data_path={rows}", "--max_steps=2", "--method=qlora", *TOKENS, "--lr=1e-2")
    run = launch(tmp_path / "run", *args, f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}")
    assert run.code == 0, run.stderr
    model, tokenizer = load_model(str(run.folder), quantization="4bit", dtype="float32")
    # bitsandbytes computes in bf16 where it evaluates on such a CPU (see `models.load.evaluation_mode`).
    assert run.metrics("eval_loss")[-1] == pytest.approx(plain_loss(model, tokenizer, str(rows)), abs=1e-3)
