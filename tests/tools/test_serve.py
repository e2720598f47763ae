"""The endpoint through OpenAI's own client: completions, streams, stop strings, errors, and what ends it."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import torch
import warm
from launches import ROOT
from openai import OpenAI
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from manyrank import cli
from manyrank.chat_template.render import RenderOptions, prompt_ids, stop_ids
from manyrank.errors import UserError
from manyrank.models.generation import Sampling, generate
from manyrank.models.inference import load_model, rendering_of
from manyrank.models.text_stream import TextStream
from manyrank.runs.artifact import find
from manyrank.tools.serve import vllm
from manyrank.tools.serve.main import _served_name, _takes_vllm
from manyrank.tools.serve.model import ServedModel
from manyrank.tools.serve.options import ServeOptions
from manyrank.tools.serve.server import Server

QUESTIONS = [
    "What is the variance of a Bernoulli variable with p = 0.3?",
    "How is a median computed?",
]
MOST = 40  # tokens
KEY = "a key"


def user(text) -> list[dict]:
    return [{"role": "user", "content": text}]


def until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return value


def start(*argv) -> tuple[warm.Process, str]:
    """A server in a process of its own, and its base URL."""
    command = [sys.executable, "-m", "manyrank.cli", "serve", *map(str, argv), "--port=0", "--dtype=float32"]
    process = warm.start(command, cwd=ROOT)

    def url():
        assert process.poll() is None, process.err.read_text()
        return process.out.exists() and re.search(r"http://\S+/v1", process.out.read_text())

    return process, until(url)[0]


@pytest.fixture(scope="module")
def url(whole_run):
    process, url = start(whole_run.folder, f"--api-key={KEY}")
    yield url
    process.kill()


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def ask(client):
    """A completion of the run, greedy unless it is asked otherwise."""

    def ask(question=QUESTIONS[0], **more):
        return client.chat.completions.create(
            **{"model": "run", "messages": user(question), "temperature": 0, "max_tokens": MOST, **more}
        )

    return ask


@pytest.fixture(scope="module")
def expected(whole_run, embedded_model):
    """What `manyrank generate` makes of the questions: of the run, and of its base."""

    def completions(name):
        source = find(str(name))
        model, tokenizer = load_model(source, dtype="float32")
        rendering = rendering_of(source)
        prompts = [prompt_ids(tokenizer, user(question), options=rendering) for question in QUESTIONS]
        stops = stop_ids(tokenizer, rendering)
        sampling = Sampling(max_new_tokens=MOST)
        batches = generate(model, prompts, sampling=sampling, stops=stops, pad_token=0, batch_size=1)
        made = sorted((answer for batch in batches for answer in batch), key=lambda answer: answer.number)
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in made]
        return [(text, answer.finish, len(p), len(answer.tokens)) for text, answer, p in zip(texts, made, prompts)]

    return completions(whole_run.folder), completions(embedded_model)


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_whole_and_streamed_completions_are_those_of_the_run(ask, expected):
    run, base = expected
    assert run != base
    for question, (text, finish, prompt_tokens, tokens) in zip(QUESTIONS, run):
        whole = ask(question)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, finish)
        usage = [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens]
        assert usage == [prompt_tokens, tokens, prompt_tokens + tokens]
        chunks = list(ask(question, stream=True, stream_options={"include_usage": True}))
        assert text_of(chunks) == text and len(chunks) > 8
        assert chunks[-2].choices[0].finish_reason == finish and chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])
    assert "stop" in {finish for _, finish, _, _ in run}


def test_the_models_are_the_run(client):
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").owned_by == "manyrank"


def test_limits_and_parts_of_messages(ask, expected):
    (text, *_), *_ = expected[0]
    short = ask(max_tokens=openai.omit, max_completion_tokens=4)
    assert short.usage.completion_tokens == 4 and short.choices[0].finish_reason == "length"
    assert text.startswith(short.choices[0].message.content)
    whole = ask()
    parts = [{"type": "text", "text": QUESTIONS[0]}]
    assert ask(messages=[{"role": "user", "content": parts}]).choices == whole.choices
    turns = [*user(QUESTIONS[0]), whole.choices[0].message.model_dump(), *user("Why?")]
    longer = ask(messages=[{"role": "developer", "content": "Be brief."}, *turns], user="somebody", n=1, tools=[])
    assert longer.usage.prompt_tokens > whole.usage.total_tokens


def test_a_stop_string_ends_the_text_before_it(ask, expected):
    (text, *_), *_ = expected[0]
    inside = text[len(text) // 2 - 2 : len(text) // 2 + 5]  # from the middle of a word
    assert text.count(inside) == 1
    for stop in (inside, ["nowhere", inside]):
        whole = ask(stop=stop)
        assert whole.choices[0].message.content == text.partition(inside)[0].strip()
        assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens < MOST
        chunks = list(ask(stop=stop, stream=True))
        assert text_of(chunks) == whole.choices[0].message.content and chunks[-1].choices[0].finish_reason == "stop"


def test_draws_follow_the_seed(ask):
    def drawn(**more):
        return ask(temperature=1.5, max_tokens=8, **more).choices[0].message.content

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=-1)
    assert len({drawn() for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "wrong, param, message",
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "is empty"),
        ({"messages": [{"role": "tool", "content": "3", "tool_call_id": "a"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages.0.content"),
        ({"messages": user("mean " * 3000)}, "messages", "the model's context is 2,048"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"stop": ["a", ""]}, "stop", "at least 1 character"),
        ({"n": 2}, "n", "n 2 is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate", "frobnicate: not known"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_refused(ask, wrong, param, message, stream):
    if stream and "stream_options" in wrong:
        return
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        ask(**wrong, stream=stream)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_a_wrong_model_key_or_path_is_refused(ask, client, url):
    with pytest.raises(openai.NotFoundError, match="this server has 'run'") as caught:
        ask(model="gpt-4o")
    assert caught.value.code == "model_not_found"
    for call in (lambda: client.models.retrieve("gpt/4o"), lambda: client.embeddings.create(model="run", input="a")):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.AuthenticationError) as refused:
        OpenAI(base_url=url, api_key="another", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("GET", "/health", None, {}, 200),
        ("GET", "/v1/models", None, {}, 401),
        ("POST", "/v1/chat/completions", "{", {"Authorization": f"Bearer {KEY}"}, 400),
        ("POST", "/v1/chat/completions", "[" * 100_000, {"Authorization": f"Bearer {KEY}"}, 400),
        ("POST", "/v1/chat/completions", "[]", {"Authorization": f"Bearer {KEY}"}, 400),
        ("POST", "/v1/chat/completions", "", {"Content-Length": "99999999999"}, 413),
        ("POST", "/v1/chat/completions", None, {"Transfer-Encoding": "chunked"}, 411),
        ("DELETE", "/v1/models/run", None, {}, 501),
    ],
)
def test_plain_http_has_answers_of_json(url, method, path, body, headers, status):
    connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    read = json.loads(answer.read())
    assert answer.status == status and answer.headers["Content-Type"] == "application/json"
    assert read == {"status": "ok"} if status == 200 else read["error"]["message"]


# A model that never stops by itself


class Recorded(ServedModel):
    """Keeps what it has completed."""

    completions = ()

    def complete(self, *args, **more):
        completion = super().complete(*args, **more)
        self.completions = (*self.completions, completion)
        return completion


@pytest.fixture(scope="module")
def talker_folder(embedded_model, tokenizer, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted(stop_ids(tokenizer, RenderOptions()))] = 0.0
    folder = tmp_path_factory.mktemp("serve") / "talker"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talker(talker_folder):
    """A server in this process."""
    served = Recorded("talker", *load_model(str(talker_folder), dtype="float32"), RenderOptions())
    with Server("127.0.0.1", 0) as server:
        server.model = served
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_client_that_is_gone_stops_its_completion(talker):
    client = OpenAI(base_url=talker.url, api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="talker", messages=user("Hi"), stream=True)
    assert [next(stream).choices[0].delta.role, *(next(stream).choices[0].delta.content for _ in range(3))][0]
    stream.close()
    until(lambda: len(talker.model.completions) == 1 or not talker._generating.locked())
    body = json.dumps({"model": "talker", "messages": user("Hi")}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(talker.server_address) as connection:
        connection.sendall(head + body)
        until(talker._generating.locked)
        waiting = socket.create_connection(talker.server_address)  # its turn comes when it is gone
        waiting.sendall(head + body)
        waiting.close()
    until(lambda: not talker._generating.locked())
    made = client.chat.completions.create(model="talker", messages=user("Hi"), max_tokens=40)
    assert made.usage.completion_tokens == 40
    *cut, last = [len(completion.tokens) for completion in talker.model.completions]
    assert last == 40 and len(cut) <= 2 and all(tokens < 1500 for tokens in cut), cut


def test_requests_at_once_have_the_answers_of_requests_in_turn(talker):
    client = OpenAI(base_url=talker.url, api_key="none", max_retries=0, timeout=60)
    made = {1: [], 2: []}

    def ask(seed):
        more = {"temperature": 1.5, "seed": seed, "max_tokens": 8, "stream": True}
        made[seed].append(text_of(client.chat.completions.create(model="talker", messages=user("Hi"), **more)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, again), (second, too) = made.values()
    assert first == again != second == too


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_tells_the_client(number, talker_folder):
    process, url = start(talker_folder)
    try:
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="talker", messages=user("Hi"), stream=True)
        with pytest.raises(openai.APIError, match="shutting down"):
            for count, _ in enumerate(stream):
                if count == 3:
                    process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
    out, err = process.communicate()
    assert "Traceback" not in err and out.startswith("talker is served at http://127.0.0.1:")
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with Server(host, int(port)) as again:  # the port is free
        assert again.url == url


def test_what_cannot_be_served_is_three_lines(whole_run, capsys):
    with Server("127.0.0.1", 0) as taken:
        port = taken.server_address[1]
        for argv, what in [
            ([whole_run.folder, f"--port={port}"], f"cannot listen at 127.0.0.1, port {port}: Address already in use"),
            ([whole_run.folder, "--host=256.0.0.1"], "cannot listen at 256.0.0.1"),
            (["/nowhere/at/all"], "no folder /nowhere/at/all"),
            ([whole_run.folder, "--prot=80"], "there is no option '--prot'"),
            ([whole_run.folder, "--port=0", "--backend=vllm"], "vLLM is not installed"),
        ]:
            assert cli.main(["serve", *map(str, argv)]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 3 and what in lines[0], lines


# Parts


def test_a_model_has_the_name_of_its_run_or_folder(whole_run, embedded_model):
    run = whole_run.folder
    names = {
        "run": [run, run / "checkpoint-3", run / "final_model"],
        "embedded": ["embedded"],
        "org/name": ["org/name"],
    }
    for name, places in (names | {embedded_model.name: [embedded_model]}).items():
        for place in places:
            assert _served_name(ServeOptions(name=str(place)), find(str(place))) == name
    assert _served_name(ServeOptions(name=str(run), served_model_name="mine"), find(str(run))) == "mine"


def pieces_of(tokenizer, tokens, **more) -> tuple[list[str], list[str], TextStream]:
    """The pieces before and after the last token."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append, stops=(), **more)
    stream.put(torch.zeros(1, 3))
    for token in tokens:
        stream.put(torch.tensor([token]))
    before = list(pieces)
    stream.end()
    return before, pieces, stream


def test_joined_pieces_are_the_decoded_text(tokenizer):
    torch.manual_seed(0)
    for count in range(60):
        tokens = torch.randint(len(tokenizer), (count,)).tolist()
        _, pieces, _ = pieces_of(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_pieces_keep_the_blanks_of_a_tokenizer_that_drops_the_first():
    """As Llama 2's decodes."""
    words = ["▁", "\n", "x", "▁def", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    emoji = [f"<0x{byte:02X}>" for byte in "😀".encode()]
    tokens = [words.index(word) for word in ["▁def", "\n", "▁", "▁", "x", *emoji, "▁def", *emoji[:2]]]
    _, pieces, _ = pieces_of(PreTrainedTokenizerFast(tokenizer_object=backend), tokens)
    assert "".join(pieces) == "def\n  x😀 def" + 2 * "\ufffd" and len(pieces) == 5


@pytest.mark.parametrize("stops", [["bb\nc"], ["\n"], ["a b", "b"], ["cc", "nowhere"], ["日本"], [" "]])
def test_no_piece_has_the_beginning_of_a_stop_string(tokenizer, stops):
    text = "aa bb\ncc 日本 aa"
    before, pieces, stream = pieces_of(tokenizer, tokenizer.encode(text, add_special_tokens=False), stop_strings=stops)
    end = min(text.find(stop) for stop in stops if stop in text)
    assert stream.stopped and pieces == before and "".join(pieces) == text[:end].strip()


def test_vllm_gets_the_adapter_the_template_and_the_stop_tokens(whole_run, embedded_model, tmp_path):
    options = ServeOptions(name=str(whole_run.folder), port=81, api_key=KEY, quantization="4bit", max_new_tokens=9)
    source = find(options.name)
    argv = vllm.prepare(options, source, tmp_path, name="mine")
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(embedded_model)]
    assert argv[5] == "--enable-lora" and KEY not in " ".join(argv)
    values = dict(zip(argv[6::2], argv[7::2]))
    rank = json.loads((source.adapter / "adapter_config.json").read_text())["r"]
    assert json.loads(values.pop("--lora-modules")) == {"name": "mine", "path": str(source.adapter)}
    assert rank <= int(values.pop("--max-lora-rank")) <= max(8, 2 * rank)
    assert json.loads(values.pop("--override-generation-config")) == {"temperature": 0.0, "max_new_tokens": 9}
    assert values == {
        "--host": "127.0.0.1",
        "--port": "81",
        "--dtype": "auto",
        "--quantization": "bitsandbytes",
        "--tokenizer": str(tmp_path),
        "--generation-config": str(tmp_path),
        "--chat-template": str(tmp_path / "chat_template.jinja"),
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(whole_run.folder / "final_model")
    assert (tmp_path / "chat_template.jinja").read_text() == own.chat_template == tokenizer.chat_template
    stops = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == stop_ids(own, rendering_of(source))
    merged = vllm.prepare(ServeOptions(name=str(embedded_model)), find(str(embedded_model)), tmp_path, name="base")
    assert "--enable-lora" not in merged and merged[merged.index("--served-model-name") + 1] == "base"


def test_an_adapter_whose_options_vllm_passes_over_is_not_served_by_it(whole_run, tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    run = shutil.copytree(whole_run.folder, tmp_path / "run")
    file = run / "final_model" / "adapter_config.json"
    config = json.loads(file.read_text())
    for options, taken in (({"use_rslora": True}, True), ({"alpha_pattern": {"q_proj": 5}}, False)):
        file.write_text(json.dumps(config | options))
        assert _takes_vllm(ServeOptions(name="run"), find(str(run))) == taken
    with pytest.raises(UserError, match="vLLM does not read alpha_pattern of this adapter"):
        _takes_vllm(ServeOptions(name="run", backend="vllm"), find(str(run)))


def test_a_run_without_thinking_is_not_served_by_vllm(whole_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    run = shutil.copytree(whole_run.folder, tmp_path / "run")
    source = find(str(run))
    assert _takes_vllm(ServeOptions(name="run"), source)
    assert not _takes_vllm(ServeOptions(name="run", quantization="8bit"), source)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("thinking: keep", "thinking: strip"))
    capsys.readouterr()
    assert not _takes_vllm(ServeOptions(name="run"), source)
    assert "(thinking: strip): transformers generates" in capsys.readouterr().out
    with pytest.raises(UserError, match="vLLM keeps the thinking of earlier turns"):
        _takes_vllm(ServeOptions(name="run", backend="vllm"), source)
    assert not _takes_vllm(ServeOptions(name="run", backend="transformers"), source)


def test_vllm_ends_with_the_server(tmp_path, whole_run):
    """A program in the place of vLLM writes what it was given, and waits."""
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(
        "import json, os, pathlib, sys, time\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(json.dumps([sys.argv, os.environ['VLLM_API_KEY']]))\n"
        "part.rename(part.with_name('given'))\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "manyrank.cli", "serve", str(whole_run.folder), "--port=0"]
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = warm.start(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "MANYRANK_API_KEY": KEY})
    try:
        until(lambda: (tmp_path / "given").exists() or process.poll() is not None)
        argv, key = json.loads((tmp_path / "given").read_text())
        folder = Path(argv[argv.index("--tokenizer") + 1])
        assert key == KEY and folder.is_dir()
        process.terminate()
        assert process.wait(20) == 0 and not folder.exists()
    finally:
        process.kill()
