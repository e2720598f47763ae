"""Files of prompts to files of answers: the right ones, each once, whatever kills the run."""

import json
import os
import shutil
import signal

import pytest
import torch
from launches import ROOT
from transformers import AutoModelForCausalLM

from manyrank import cli
from manyrank.chat_template.render import RenderOptions, prompt_ids, stop_ids
from manyrank.data.prompts import read_prompts
from manyrank.data.sources import Source
from manyrank.errors import UserError
from manyrank.tools import generate
from manyrank.tools.generate import CompletionFile, GenerateOptions

DATA = ROOT / "data" / "validation.jsonl"
SHORT = ["--dtype=float32", "--max-new-tokens=16"]


def run_generate(*argv) -> int:
    return generate.main([str(word) for word in argv])


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, *values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


def test_greedy_answers_are_those_of_single_prompts(embedded_model, tokenizer, tmp_path, capsys):
    assert run_generate(embedded_model, DATA, tmp_path / "out.jsonl", "--limit=5", "--batch-size=2", *SHORT) == 0
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()
    stops = stop_ids(tokenizer, RenderOptions())
    found = rows(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5]
    for row, given in zip(found, rows(DATA)):
        assert row["messages"] == [{"role": "user", "content": given["question"]}]
        ids = prompt_ids(tokenizer, row["messages"])
        said, finish = list(ids), "length"
        while finish == "length" and len(said) < len(ids) + 16:
            with torch.no_grad():
                token = model(input_ids=torch.tensor([said])).logits[0, -1].argmax().item()
            finish = "stop" if token in stops else "length"
            said += [token] if finish == "length" else []
        text = tokenizer.decode(said[len(ids) :], skip_special_tokens=True).strip()
        assert row["answers"] == [{"text": text, "finish": finish, "tokens": len(said) - len(ids)}]
        assert row["prompt_tokens"] == len(ids)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


class Killed(BaseException):
    """Ends a command between two batches, as SIGKILL does: nothing that catches an Exception sees it."""


@pytest.mark.parametrize(
    "sampling", [[], ["--temperature=1.5", "--num-samples=2", "--seed=3"]], ids=["greedy", "drawn"]
)
def test_a_killed_command_resumes_and_ends_as_one_that_was_left_alone(
    sampling, embedded_model, tmp_path, capsys, monkeypatch
):
    options = ["--dtype=float32", "--max-new-tokens=24", "--batch-size=2", "--limit=10", *sampling]
    assert run_generate(embedded_model, DATA, tmp_path / "whole.jsonl", *options) == 0
    out, partial, add = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", CompletionFile.add

    def killed(file, records):
        if len(file.rows) >= 4:
            raise Killed
        add(file, records)

    monkeypatch.setattr(CompletionFile, "add", killed)
    with pytest.raises(Killed):
        run_generate(embedded_model, DATA, out, *options)
    monkeypatch.setattr(CompletionFile, "add", add)
    kept = partial.read_bytes()
    assert not out.exists() and kept.count(b"\n") == 5
    for end in (len(kept), len(kept) - 20):  # as it was killed, and with half a line
        partial.write_bytes(kept[:end])
        capsys.readouterr()
        assert run_generate(embedded_model, DATA, out, *options) == 0
        assert f"{4 if end == len(kept) else 3} of 10 rows are there already" in capsys.readouterr().err
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()
        out.unlink()
    partial.write_bytes(kept)
    with pytest.raises(UserError, match="max_new_tokens: 24 -> 61"):
        run_generate(embedded_model, DATA, out, *options, "--max-new-tokens=61")
    assert partial.read_bytes() == kept


def test_completions_of_another_model_or_input_are_never_mixed(embedded_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(embedded_model, model)
    given, out = write(tmp_path / "in.jsonl", {"question": "How?"}), tmp_path / "out.jsonl"
    options = GenerateOptions(name=str(model), input=str(given), output=out)
    found = generate.find(str(model))
    before = generate._settings(options, found)
    assert generate._settings(options, found) == before
    with given.open("a") as file:
        file.write('{"question": "Why?"}\n')
    changed = generate._settings(options, found)
    (model / "model.safetensors").touch()
    again = generate._settings(options, found)
    assert before != changed != again != before
    CompletionFile(out, before).add([{"row": 1}])
    for settings in (changed, again):
        with pytest.raises(UserError, match="begun with other settings: changed: "):
            CompletionFile(out, settings)


def test_sigterm_ends_after_the_batch_with_75(embedded_model, tmp_path, monkeypatch, capsys):
    out, add = tmp_path / "out.jsonl", CompletionFile.add

    def terminated(file, records):
        add(file, records)
        if len(file.rows) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CompletionFile, "add", terminated)
    argv = ["generate", str(embedded_model), str(DATA), str(out), "--batch-size=1", *SHORT]
    assert cli.main(argv) == 75
    assert "2 of 16 rows are written: run the same command again to resume" in capsys.readouterr().err
    assert len(rows(tmp_path / "out.jsonl.partial")) == 3 and not out.exists()


def test_samples_differ_and_follow_the_seed(embedded_model, tmp_path):
    options = [DATA.with_name("validation.jsonl"), "--limit=2", "--temperature=1.5", "--num-samples=3", *SHORT]
    said = {}
    for name, more in {"a": ["--seed=1"], "b": ["--seed=1", "--batch-size=6"], "c": ["--seed=2"]}.items():
        assert run_generate(embedded_model, options[0], tmp_path / f"{name}.jsonl", *options[1:], *more) == 0
        said[name] = [[answer["text"] for answer in row["answers"]] for row in rows(tmp_path / f"{name}.jsonl")]
    assert said["a"] == said["b"] != said["c"]
    assert all(len(set(answers)) == 3 for answers in said["a"])


def test_rows_that_cannot_be_answered_are_all_told_or_said_in_the_output(embedded_model, tmp_path):
    given = write(tmp_path / "in.jsonl", {"question": "How?"}, {"question": " "}, {"question": "mean " * 3000})
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError) as caught:
        run_generate(embedded_model, given, out, *SHORT)
    assert caught.value.what == "2 of 3 rows cannot be used"
    assert "line 2: 'question' is empty" in caught.value.where and "context of 2,048" in caught.value.where
    assert not out.exists() and not out.with_name("out.jsonl.partial").exists()
    assert run_generate(embedded_model, given, out, "--on-bad-row=skip", *SHORT) == 0
    good, empty, long = rows(out)
    assert len(good["answers"]) == 1 and "is empty" in empty["error"] and "leaves no room" in long["error"]


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--num-samples=2"], "2 samples at temperature 0"),
        (["--batch-size=0"], "batch_size: '0' is invalid"),
        (["--limit=-1"], "limit: '-1' is invalid"),
        (["--top-p=2"], "top_p: '2' is invalid"),
        (["--dtype=int"], "dtype: 'int' is invalid"),
        (["--frobnicate"], "no option '--frobnicate'"),
    ],
)
def test_wrong_options_are_refused(argv, what, embedded_model, tmp_path):
    with pytest.raises(UserError, match=what):
        run_generate(embedded_model, DATA, tmp_path / "out.jsonl", *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_never_replaced_by_mistake(embedded_model, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    for name, what in {
        "out.jsonl": "is there already",
        "out.txt": "not named",
        "a/out.jsonl": "cannot be written",
    }.items():
        with pytest.raises(UserError, match=what):
            run_generate(embedded_model, DATA, tmp_path / name)
    assert run_generate(embedded_model, DATA, tmp_path / "out.jsonl", "--overwrite", "--limit=1", *SHORT) == 0
    assert len(rows(tmp_path / "out.jsonl")) == 1


# The file


def test_half_a_line_is_dropped_and_the_rows_end_in_order(tmp_path):
    out = tmp_path / "out.jsonl"
    CompletionFile(out, {"seed": 1}).add([{"row": 3}, {"row": 1}])
    with (tmp_path / "out.jsonl.partial").open("ab") as stream:
        stream.write(b'{"row": 2, "answers": [')
    file = CompletionFile(out, {"seed": 1})
    assert file.rows.keys() == {1, 3}
    file.add([{"row": 3, "again": True}, {"row": 2}])
    file.finish()
    assert rows(out) == [{"row": 1}, {"row": 2}, {"row": 3}]
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_with_other_settings_is_not_resumed(tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    CompletionFile(out, {"seed": 1, "top_p": 1.0}).add([{"row": 1}])
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        CompletionFile(out, {"seed": 2, "top_p": 1.0})
    assert CompletionFile(out, {"seed": 2, "top_p": 1.0}, overwrite=True).rows == {}
    assert rows(partial) == [{"settings": {"seed": 2, "top_p": 1.0}}]
    for foreign in ('{"row": 1}\n', "mine\n"):
        partial.write_text(foreign)
        with pytest.raises(UserError, match="not a file that this command began"):
            CompletionFile(out, {"seed": 1})
        assert partial.read_text() == foreign
    partial.write_text('{"settings": {"se')  # killed while it was begun
    assert CompletionFile(out, {"seed": 1}).rows == {} and rows(partial) == [{"settings": {"seed": 1}}]


# Prompts

ASKED = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "a", "answer": "b"}, ASKED),
        ({"question": "a"}, ASKED),
        ({"prompt": "a"}, ASKED),
        ({"prompt": ASKED}, ASKED),
        ({"instruction": "a", "input": "b"}, [{"role": "user", "content": "a\n\nb"}]),
        ({"conversations": [{"from": "human", "value": "a"}]}, ASKED),
        ({"messages": [*ASKED, {"role": "assistant", "content": "b"}]}, ASKED),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "b", "weight": 1}, *ASKED]},
            [*ASKED, {"role": "assistant", "content": "b"}, *ASKED],
        ),
        ({"question": "a", "system": "s"}, [{"role": "system", "content": "s"}, *ASKED]),
    ],
)
def test_a_prompt_is_all_before_the_last_answer(row, messages, tmp_path):
    (prompt,) = read_prompts(Source(str(write(tmp_path / "in.jsonl", row))))
    assert prompt.messages == messages and not prompt.problem
    system = {"role": "system", "content": row.get("system", "own")}
    (prompt,) = read_prompts(Source(str(tmp_path / "in.jsonl")), system="own")
    assert prompt.messages == [system, *[message for message in messages if message["role"] != "system"]]


def test_lines_of_text_are_prompts(tmp_path):
    (tmp_path / "in.txt").write_bytes("\ufeffWhat is é?\n\nHow?\r\n".encode() + b"\xff\n")
    found = read_prompts(Source(str(tmp_path / "in.txt")))
    assert [(prompt.number, prompt.messages and prompt.messages[0]["content"]) for prompt in found] == [
        (1, "What is é?"),
        (3, "How?"),
        (4, []),
    ]
    assert "not UTF-8" in found[2].problem


def test_rows_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows of text have no prompt"):
        read_prompts(Source(str(write(tmp_path / "in.jsonl", {"text": "a"}))))
    (prompt,) = read_prompts(
        Source(str(write(tmp_path / "in.jsonl", {"messages": [{"role": "assistant", "content": "b"}]})))
    )
    assert prompt.problem == "nothing is said before the answer"
    (tmp_path / "in.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(Source(str(tmp_path / "in.txt")))
