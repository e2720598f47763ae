"""The embedded model: its tokenizer, its template, and that its folder is complete or absent."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from manyrank.errors import UserError
from manyrank.models import tiny

TEXTS = (
    "What is the mean of 1, 22 and 12345?",
    "P(A and B) = 0.25, so it's n * p.\nSource: Bayes' theorem",
    "  leading, trailing and   inner blanks  ",
    "line\n\n\nlines\r\n\ttab \n end\n",
    "naïve café, ①②, Straße, ½ ² ٣",
    "e\u0301 becomes one letter",  # a letter and its accent, which the normalizer joins
    "概率 вероятность 확률 🎲👩‍🔬",
    "<|im_start|>user\nwhy?<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_start|> <|im_end|",
    "'S 'LL don't I'VE",
    "x" * 200,
    "",
)


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "model"
    tiny.build(folder, steps=2)
    return folder


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the build by a quick one that writes empty files; lists the folders it was asked for."""
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        folder.mkdir()
        for name in tiny.FILES:
            time.sleep(0.01)
            (folder / name).touch()

    monkeypatch.setattr(tiny, "build", build)
    return built


def test_loaded_tokenizer_gives_the_ids_of_the_trained_one(barely_trained: Path) -> None:
    trained = tiny._train_tokenizer(tiny._lines()).backend_tokenizer
    loaded = AutoTokenizer.from_pretrained(barely_trained)
    for text in (*TEXTS, *tiny._lines()):
        assert loaded(text).input_ids == trained.encode(text).ids, text


def test_tokenizer_round_trip(barely_trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(barely_trained)
    for text in TEXTS:
        normal = text.replace("e\u0301", "é")
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == normal


def test_special_tokens(barely_trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(barely_trained)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    marks = tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids
    assert len(set(marks)) == 3
    assert tokenizer.decode(marks, skip_special_tokens=True) == ""


def test_template_of_two_turns(barely_trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(barely_trained)
    chat = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because.\nSource: me"},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.\nSource: me<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_loads_as_qwen3(barely_trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(barely_trained)
    tokenizer = AutoTokenizer.from_pretrained(barely_trained)
    assert type(model) is Qwen3ForCausalLM
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_same_bytes_and_the_callers_state_stays(barely_trained: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    torch.set_num_threads(1)
    try:
        tiny.build(tmp_path / "again", steps=2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for name in tiny.FILES:
        assert (tmp_path / "again" / name).read_bytes() == (barely_trained / name).read_bytes(), name


def test_lines_never_join_a_question_with_its_answer() -> None:
    lines = tiny._lines()
    assert len(lines) == len(set(lines)) > 300
    assert not any("\n" in line or ("?" in line[:-1] and line.endswith(".")) for line in lines)


def test_made_once_by_many(fake_build: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / "model"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(tiny.ensure, [folder] * 4)) == {folder}
    assert len(fake_build) == 1
    out, err = capfd.readouterr()
    assert not out
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_make_leaves_no_folder(
    fake_build: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    quick = tiny.build

    def fails(folder: Path) -> None:
        quick(folder)
        raise error

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "build", fails)
        with pytest.raises(error):
            tiny.ensure(folder)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert tiny.ensure(folder) == folder


def test_killed_make_is_made_again(fake_build: list[Path], tmp_path: Path) -> None:
    left = tmp_path / "model.part"  # a kill leaves it; its name is not the model's
    left.mkdir()
    (left / "config.json").write_text("half")
    folder = tiny.ensure(tmp_path / "model")
    assert (folder / "config.json").read_text() == ""
    assert not left.exists()


def test_other_files_are_not_touched(fake_build: list[Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        tiny.ensure(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANYRANK_CACHE", str(tmp_path))
    first = tiny.default_folder()
    assert first.parent == tmp_path
    assert first == tiny.default_folder()
    monkeypatch.setattr(tiny, "version", lambda name: "another")
    assert tiny.default_folder() != first
