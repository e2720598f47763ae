"""Talking through a pipe and at a terminal: answers, commands, and what stops them."""

import functools
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from launches import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from rich.cells import cell_len
from transformers import AutoModelForCausalLM

from manyrank.chat_template.render import RenderOptions, stop_ids
from manyrank.data.formats import to_sample
from manyrank.data.sources import Source, known_format, read_rows
from manyrank.errors import UserError
from manyrank.models.generation import Sampling
from manyrank.tools import chat
from manyrank.tools.chat import HELP, ChatModel, interruptible, save, side_by_side

QUESTION = "What is the variance of a Bernoulli variable with p = 0.3?"
never = bool  # bool() is False


@pytest.fixture(scope="module")
def adapter(embedded_model, tmp_path_factory):
    """An adapter that makes other answers than the base's."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) if "lora_B" in name else 0
    folder = tmp_path_factory.mktemp("chat") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(embedded_model):
    return AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()


@pytest.fixture
def talk(base, tokenizer):
    return ChatModel(base, tokenizer, RenderOptions(), Sampling(max_new_tokens=12))


def said(monkeypatch, capsys, *argv, lines) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert chat.main([str(word) for word in (*argv, "--dtype=float32", "--max-new-tokens=12")]) == 0
    return capsys.readouterr().out


def by_hand(model, tokenizer, *messages) -> str:
    """Twelve greedy tokens by transformers alone."""
    stops = stop_ids(tokenizer, RenderOptions())
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    start = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_conversation_through_a_pipe_is_saved_as_training_data(
    adapter, embedded_model, tokenizer, tmp_path, monkeypatch, capsys
):
    """The completions are those of base and adapter, each with all that was said before it."""
    file = tmp_path / "said.json"
    lines = ["/system Be brief.", QUESTION, "Why?", f"/save {file}", "/reset", "Why?"]
    shown = said(monkeypatch, capsys, adapter, lines=lines)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32), adapter
    )
    system = {"role": "system", "content": "Be brief."}
    first = by_hand(model, tokenizer, system, user(QUESTION))
    second = by_hand(model, tokenizer, system, user(QUESTION), assistant(first), user("Why?"))
    alone = by_hand(model, tokenizer, system, user("Why?"))
    messages = [system, user(QUESTION), assistant(first), user("Why?"), assistant(second)]
    source = known_format(Source(str(file)))
    (row,) = read_rows(source)
    assert source.format_type == "messages" and to_sample(row.readable(), "messages").messages == messages
    printed = [
        line.removesuffix(" [cut: --max-new-tokens, or the model's context]").strip() for line in shown.splitlines()
    ]
    assert printed == ["system: Be brief.", first, second, f"saved to {file}", "a new conversation", alone]


def test_base_and_tuned_answer_side_by_side_each_with_its_own_history(
    adapter, embedded_model, tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "300")
    lines = [QUESTION, "Why?", f"/save {tmp_path / 'tuned.jsonl'}"]
    shown = said(monkeypatch, capsys, adapter, "--compare", lines=lines)
    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    answers = {}
    for title in ("base", "tuned"):
        model = base if title == "base" else PeftModel.from_pretrained(base, adapter)
        first = by_hand(model, tokenizer, user(QUESTION))
        answers[title] = [first, by_hand(model, tokenizer, user(QUESTION), assistant(first), user("Why?"))]
    assert answers["base"] != answers["tuned"]
    rows = [
        [cell.strip().partition(" [cut")[0] for cell in line.strip("|").split(" | ")]
        for line in shown.splitlines()
        if " | " in line
    ]
    assert [row for row in rows if row[0] == "base"] == [["base", "tuned"]] * 2
    assert [row for row in rows if row[0] in answers["base"]] == [list(pair) for pair in zip(*answers.values())]
    saved = json.loads((tmp_path / "tuned.jsonl").read_text())
    assert [message["content"] for message in saved["messages"][1::2]] == answers["tuned"]


def test_commands_that_fail_or_are_unknown_end_nothing(embedded_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text("mine")
    lines = [
        "/save a.json",
        "/frobnicate",
        "/save",
        "",
        QUESTION,
        f"/save {tmp_path}/mine.json",
        f"/save {tmp_path}/a/b.json",
        f"/save {tmp_path}/c.txt",
        f"/save {tmp_path}/d.json",
        f"/save {tmp_path}/d.json",
        "/help",
        "/exit",
        QUESTION,
    ]
    shown = said(monkeypatch, capsys, embedded_model, lines=lines)
    for text in (
        "nothing to save yet",
        "/frobnicate is not known so",
        "/save is not known so",
        "mine.json is there already",
        "cannot write",
        "not the name of a data file",
    ):
        assert shown.count(text) == 1, text
    assert shown.count(HELP) == 3 and shown.count("saved to") == 2
    assert (tmp_path / "mine.json").read_text() == "mine" and shown.rstrip().endswith(HELP)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "mine.json"]


def test_a_conversation_over_the_context_is_told_and_goes_on(embedded_model, monkeypatch, capsys):
    shown = said(monkeypatch, capsys, embedded_model, lines=["mean " * 3000, "/reset", QUESTION])
    assert "the model's context is 2,048" in shown and "/reset begins a new one" in shown
    assert shown.rstrip().splitlines()[-1] != "a new conversation"


@pytest.fixture(scope="module")
def talker(embedded_model, tokenizer, tmp_path_factory):
    """The embedded model, whose answers never end by themselves."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted(stop_ids(tokenizer, RenderOptions()))] = 0.0
    folder = tmp_path_factory.mktemp("talker")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_ctrl_c_stops_the_answer_and_not_the_program(talker):
    """At a real terminal: Ctrl-C in an answer, then another question, Ctrl-C at the prompt, then Ctrl-D."""
    main, end = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "manyrank.cli",
        "chat",
        str(talker),
        "--max-new-tokens",
        "1500",
        "--temperature",
        "0",
    ]
    pipes = {"stdin": end, "stdout": end, "stderr": subprocess.DEVNULL}
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore it
    process = subprocess.Popen(command, **pipes, cwd=ROOT, env={**os.environ, "TERM": "dumb"}, preexec_fn=hears)
    os.close(end)
    seen = []

    def read():
        while True:
            try:
                seen.append(os.read(main, 4096).decode(errors="replace"))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()

    def until(condition, seconds=60):
        limit = time.monotonic() + seconds
        while not condition("".join(seen)):
            assert time.monotonic() < limit and process.poll() is None, "".join(seen)
            time.sleep(0.02)

    try:
        until(lambda text: text.endswith("> "))
        for turn in (1, 2):
            before = len("".join(seen))
            os.write(main, f"{QUESTION}\n".encode())
            until(lambda text, before=before: len(text) > before + 2 * len(QUESTION))  # the answer has begun
            process.send_signal(signal.SIGINT)
            until(lambda text, turn=turn: text.count("[stopped]") == turn and text.endswith("> "))
        time.sleep(0.5)  # the prompt is shown before it is read
        process.send_signal(signal.SIGINT)
        until(lambda text: "/exit or Ctrl-D ends" in text and text.endswith("> "))
        os.write(main, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()


# Parts


def test_what_is_shown_as_it_comes_is_the_completion(talk):
    pieces = []
    talk.ask(QUESTION, show=pieces.append, stopped=never)
    assert "".join(pieces).strip() == talk.messages[-1]["content"]
    assert len(pieces) > 3 and "<|im_end|>" not in "".join(pieces)


def test_a_wish_to_stop_ends_the_completion_and_its_text_stays(talk):
    pieces = []
    answer = talk.ask(QUESTION, show=pieces.append, stopped=lambda: len(pieces) >= 4)
    assert 3 <= len(answer.tokens) <= 6 and talk.messages[-1]["content"] == "".join(pieces).strip()


def test_a_seed_gives_the_same_conversation_and_another_turn_other_draws(base, tokenizer):
    def completions(seed):
        talk = ChatModel(base, tokenizer, RenderOptions(), Sampling(max_new_tokens=12, temperature=2.0, seed=seed))
        for _ in range(2):
            talk.ask(QUESTION, show=lambda text: None, stopped=never)
        return [message["content"] for message in talk.messages[1::2]]

    assert completions(1) == completions(1) != completions(2) and len(set(completions(1))) == 2


def test_a_tokenizer_without_a_template_is_refused(base, embedded_model):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(embedded_model)
    bare.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        ChatModel(base, bare, RenderOptions(), Sampling())


def test_options_that_cannot_be_are_refused(embedded_model, monkeypatch):
    for argv, what in [
        ([embedded_model, "--compare"], "no adapter"),
        ([embedded_model, "--top-p", "0"], "top_p: '0' is invalid"),
        (["/nowhere/at/all"], "no folder /nowhere/at/all"),
        ([embedded_model, "--quantization", "2bit"], "quantization: '2bit' is invalid"),
        ([embedded_model, "--max-new-tokens", "0"], "max_new_tokens: '0' is invalid"),
    ]:
        with pytest.raises(UserError, match=what):
            chat.main([str(word) for word in argv])


def test_a_save_that_cannot_be_written_leaves_nothing(tmp_path):
    messages = [user("a"), assistant("b")]
    with pytest.raises(UserError, match="cannot write"):
        save(messages, tmp_path / ("x" * 248 + ".json"), replace=True)  # the name beside it is too long
    assert list(tmp_path.iterdir()) == []


def test_columns_have_the_width_of_the_terminal():
    shown = side_by_side({"base": "one two three [b]four[/b]\n\nsix", "tuned": "漢字" * 12}, width=43).splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in shown]
    assert rows[0] == ["base", "tuned"] and max(map(cell_len, shown)) == 43
    first, second = ([row[column] for row in rows[2:]] for column in (0, 1))
    assert first == ["one two three", "[b]four[/b]", "", "six"] and "".join(second) == "漢字" * 12


def test_the_first_interrupt_is_a_wish_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
