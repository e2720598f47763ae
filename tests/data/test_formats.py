"""Rows of every format become samples; what cannot is refused with its reason and place."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import ROOT

from manyrank.chat_template.types import BadRow
from manyrank.data.formats import FORMATS, Conversation, PlainText, TokenIds, detect, load_function, to_sample
from manyrank.data.messages import KEYS, ROLES
from manyrank.data.sources import Source, read_rows
from manyrank.errors import UserError
from manyrank.project_files import asset

SAMPLES = {path.name: path for path in sorted(asset("data", "formats").iterdir())}
REAL = ROOT.parent / "shared" / "data"  # beside the checkout, where somebody put it there
ROW = {"question": "q", "answer": "a"}
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


def shared(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def call(name: str, arguments: dict, **more) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def refused(row: dict, format_type: str, columns: dict | None = None) -> BadRow:
    with pytest.raises(BadRow) as caught:
        to_sample(row, format_type, columns)
    return caught.value


def samples(path: Path) -> tuple[str, list]:
    rows = [row.value for row in read_rows(Source(str(path)))]
    format_type, columns = detect(rows[0], where="")
    return format_type, [to_sample(row, format_type, columns) for row in rows]


# Sample files


def test_there_is_a_sample_of_every_format():
    assert {samples(path)[0] for path in SAMPLES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name):
    format_type, made = samples(SAMPLES[name])
    assert name.startswith(format_type)
    assert len(made) >= 3
    assert len({repr(sample) for sample in made}) == len(made)


@pytest.mark.parametrize("name", [name for name in SAMPLES if "tools" in name])
def test_samples_with_tools(name):
    made = samples(SAMPLES[name])[1]
    assert all(sample.tools for sample in made)
    called = {call["function"]["name"] for sample in made for m in sample.messages for call in m.get("tool_calls", ())}
    known = {tool["function"]["name"] for sample in made for tool in sample.tools}
    assert called and called <= known


def test_the_tokens_are_those_of_the_embedded_model(tokenizer):
    said = [
        tokenizer.decode([label for label in made.labels if label >= 0]) for made in samples(SAMPLES["tokens.jsonl"])[1]
    ]
    assert said[0] == "It is 4. The sum is 8, and 8 / 2 = 4.<|im_end|>"


@pytest.mark.parametrize("name, rows", [("sample", 160), ("validation", 16)])
def test_the_data_set(name, rows):
    found = list(read_rows(Source(str(asset("data", f"{name}.jsonl")))))
    assert [row.number for row in found] == list(range(1, rows + 1))
    for row in found:
        sample = to_sample(row.value, "question_answer")
        assert [message["role"] for message in sample.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "name, format_type, rows",
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("gsm8k_train.jsonl", "question_answer", 7473),
        ("gsm8k_test.jsonl", "question_answer", 1319),
    ],
)
@pytest.mark.skipif(not REAL.is_dir(), reason="those files are not here")
def test_files_that_others_wrote(name, format_type, rows):
    found, made = samples(REAL / name)
    assert (found, len(made)) == (format_type, rows)


@pytest.mark.skipif(not REAL.is_dir(), reason="those files are not here")
def test_tool_calls_that_others_wrote():
    made = samples(REAL / "glaive_toolcall_en_demo.json")[1]
    calls = [call for sample in made for message in sample.messages for call in message.get("tool_calls", ())]
    answers = [message for sample in made for message in sample.messages if message["role"] == "tool"]
    assert len(calls) == len(answers) == 211
    assert [call["function"]["name"] for call in calls] == [answer["name"] for answer in answers]
    assert sum(sample.tools is not None for sample in made) == 191


# Conversations, exactly

CONVERSATIONS = [
    ("question_answer", ROW, turns(("user", "q"), ("assistant", "a"))),
    ("question_answer", ROW | {"source": "s"}, turns(("user", "q"), ("assistant", "a\n\nSource: s"))),
    (
        "question_answer",
        ROW | {"system": "be brief", "history": [["x", "y"]]},
        turns(("system", "be brief"), ("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")),
    ),
    ("question_answer", ROW | {"source": ""}, turns(("user", "q"), ("assistant", "a"))),
    ("question_answer", ROW | {"source": None}, turns(("user", "q"), ("assistant", "a"))),
    ("alpaca", {"instruction": "i", "output": "o"}, turns(("user", "i"), ("assistant", "o"))),
    ("alpaca", {"instruction": "i", "input": " ", "output": "o"}, turns(("user", "i"), ("assistant", "o"))),
    (
        "alpaca",
        {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["h", "j"]]},
        turns(("system", "s"), ("user", "h"), ("assistant", "j"), ("user", "i\n\nn"), ("assistant", "o")),
    ),
    ("alpaca", {"instruction": "i", "output": "o", "history": []}, turns(("user", "i"), ("assistant", "o"))),
    (
        "sharegpt",
        {"conversations": shared(("human", "h"), ("gpt", "g")), "system": "s"},
        turns(("system", "s"), ("user", "h"), ("assistant", "g")),
    ),
    (
        "sharegpt",
        {"conversation": shared(("system", "s"), ("user", "h"), ("assistant", "g")), "tools": ""},
        turns(("system", "s"), ("user", "h"), ("assistant", "g")),
    ),
    ("sharegpt", {"conversations": turns(("user", "u"), ("assistant", "a"))}, turns(("user", "u"), ("assistant", "a"))),
    ("messages", {"messages": turns(("user", "u"), ("assistant", "a"))}, turns(("user", "u"), ("assistant", "a"))),
    ("messages", {"messages": turns(("assistant", " a\n")), "tools": []}, turns(("assistant", " a\n"))),
    (
        "messages",
        {"messages": turns(("developer", "s"), ("assistant", "a"))},
        turns(("system", "s"), ("assistant", "a")),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
        turns(("assistant", "ab")),
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "thinking": ""}]},
        turns(("assistant", "a")),
    ),
    ("prompt_completion", {"prompt": "p:", "completion": " c"}, turns(("user", "p:"), ("assistant", " c"))),
    (
        "prompt_completion",
        {"prompt": turns(("user", "u")), "completion": "c"},
        turns(("user", "u"), ("assistant", "c")),
    ),
]


@pytest.mark.parametrize("format_type, row, expected", CONVERSATIONS)
def test_rows_become_conversations(format_type, row, expected):
    before = json.dumps(row)
    assert detect(row, where="") == (format_type, None)
    assert to_sample(row, format_type) == Conversation(expected)
    assert json.dumps(row) == before


def test_a_prompt_of_messages_is_not_learned():
    row = {
        "prompt": turns(("user", "1"), ("assistant", "2"), ("user", "3")),
        "completion": turns(("assistant", "4")),
    }
    made = to_sample(row, "prompt_completion").messages
    assert [message["content"] for message in made] == ["1", "2", "3", "4"]
    assert [message.get("prompt") for message in made] == [None, True, None, None]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(key):
    row = {"messages": [{"role": "assistant", "content": "a", key: "r"}]}
    assert to_sample(row, "messages").messages == [{"role": "assistant", "content": "a", "reasoning_content": "r"}]


def test_weights_and_names():
    row = {
        "messages": [
            {"role": "user", "content": "u", "name": "ann", "weight": 0},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "assistant", "content": "b", "weight": 1.0},
        ]
    }
    assert to_sample(row, "messages").messages == [
        {"role": "user", "content": "u", "name": "ann", "weight": 0},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]


@pytest.mark.parametrize("key", ["train", "training"])
def test_weights_under_the_names_of_other_tools(key):
    row = {"conversations": [{"from": "gpt", "value": value, key: value == "b"} for value in "ab"]}
    assert [message["weight"] for message in to_sample(row, "sharegpt").messages] == [0, 1]


def test_a_weight_that_changes_nothing_or_is_another_column():
    assert to_sample({"text": "a", "weight": 1.0, "train": "validation"}, "text").text == "a"
    assert to_sample({"weight": "a"}, "text", {"text": "weight"}).text == "a"


def test_documents():
    row = {"messages": turns(("assistant", "a")), "documents": [{"title": "t", "text": "d"}]}
    assert to_sample(row, "messages").documents == [{"title": "t", "text": "d"}]


# Tools

BARE = {"name": "f", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": BARE}


@pytest.mark.parametrize(
    "tools",
    [
        [BARE],
        [WRAPPED],
        json.dumps([BARE]),
        json.dumps([WRAPPED]),
        [json.dumps(BARE)],
        BARE,
        [{"type": "function", **BARE}],
    ],
)
def test_tools_are_brought_into_one_form(tools):
    assert to_sample({"messages": turns(("assistant", "a")), "tools": tools}, "messages").tools == [WRAPPED]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null"])
def test_no_tools(tools):
    assert to_sample({"messages": turns(("assistant", "a")), "tools": tools}, "messages").tools is None


@pytest.mark.parametrize(
    "given, arguments", [({"x": 1}, {"x": 1}), ('{"x": 1}', {"x": 1}), ("", {}), (None, {}), ("{}", {})]
)
def test_the_arguments_of_a_call_are_an_object(given, arguments):
    message = {"role": "assistant", "content": None, "tool_calls": [call("f", given, id="c")]}
    made = to_sample({"messages": [message]}, "messages").messages
    assert made == [{"role": "assistant", "content": "", "tool_calls": [call("f", arguments, id="c")]}]


def test_the_older_function_call():
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "r"},
    ]
    assert to_sample({"messages": messages}, "messages").messages == [
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"x": 1})]},
        {"role": "tool", "content": "r", "name": "f"},
    ]


def test_answers_are_named_by_id_or_in_order():
    calls = {"role": "assistant", "content": "", "tool_calls": [call("f", {}, id="1"), call("g", {}, id="2")]}
    by_id = [{"role": "tool", "content": "", "tool_call_id": name} for name in ("2", "1")]
    made = to_sample({"messages": [calls, *by_id]}, "messages").messages
    assert [(message.get("name"), message.get("tool_call_id")) for message in made[1:]] == [("g", "2"), ("f", "1")]
    in_order = turns(("tool", "x"), ("tool", "y"))
    made = to_sample({"messages": [calls, *in_order]}, "messages").messages
    assert [message.get("name") for message in made[1:]] == ["f", "g"]


def test_function_call_turns_join_the_assistant_before_them():
    one, two = '{"name": "f", "arguments": {"x": 1}}', '[{"name": "g", "arguments": "{}"}, {"name": "h"}]'
    spoken = shared(
        ("human", "u"),
        ("gpt", "wait"),
        ("function_call", one),
        ("function_call", two),
        ("observation", "1"),
        ("observation", "2"),
        ("function_call", one),
        ("tool", "3"),
        ("gpt", "a"),
    )
    assert to_sample({"conversations": spoken}, "sharegpt").messages == [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "wait", "tool_calls": [call("f", {"x": 1}), call("g", {}), call("h", {})]},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "tool", "content": "2", "name": "g"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"x": 1})]},
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "assistant", "content": "a"},
    ]


def test_a_call_does_not_join_a_turn_of_another_weight():
    spoken = [{"from": "gpt", "value": "wait", "weight": 0}, {"from": "function_call", "value": '{"name": "f"}'}]
    made = to_sample({"conversations": spoken}, "sharegpt").messages
    assert [message.get("weight") for message in made] == [0, None]


# Text and tokens


def test_plain_text():
    assert to_sample({"text": " t\n", "id": 4}, "text") == PlainText(" t\n")


@pytest.mark.parametrize(
    "row, labels",
    [
        ({"input_ids": [1, 2]}, [1, 2]),
        ({"input_ids": [1, 2], "labels": None}, [1, 2]),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, [-100, 2]),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, [1, 2]),
    ],
)
def test_tokens(row, labels):
    assert to_sample(row, "tokens") == TokenIds([1, 2], labels)


# Bad rows

NAN, HALF = float("nan"), "\ud800"
DEEP = json.loads("[" * 900 + "]" * 900)
ASSISTANT = {"role": "assistant", "content": "a"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("f", {}, id="1")]}
WITHOUT = {"role": "assistant", "content": ""}
BAD = [
    ("question_answer", {"question": "q"}, "missing field", "'answer' is missing"),
    ("question_answer", {"question": "q", "answer": None}, "missing field", "'answer' is missing"),
    ("question_answer", {"question": "q", "answer": ""}, "empty field", "'answer' is empty"),
    ("question_answer", {"question": " \n", "answer": "a"}, "empty field", "'question' is empty"),
    ("question_answer", {"question": "q", "answer": 4}, "wrong type", "'answer' is int"),
    ("question_answer", {"question": "q", "answer": NAN}, "NaN", "'answer' is NaN"),
    ("question_answer", {"question": HALF, "answer": "a"}, "half a surrogate pair", "'question'"),
    ("question_answer", ROW | {"source": ["s"]}, "wrong type", "'source' is list"),
    ("alpaca", {"instruction": "i"}, "missing field", "'output' is missing"),
    ("alpaca", {"instruction": "i", "input": NAN, "output": "o"}, "NaN", "'input' is NaN"),
    ("alpaca", {"instruction": "i", "output": "o", "history": "h"}, "wrong type", "'history' is str"),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["h"]]}, "wrong type", "pair 1 of 'history' has 1"),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["h", ""]]}, "empty field", "pair 1 of 'history'"),
    ("sharegpt", {"conversations": []}, "empty field", "'conversations' is empty"),
    ("sharegpt", {"conversations": None}, "missing field", "'conversations' is missing"),
    ("sharegpt", {"conversations": "text"}, "wrong type", "'conversations' is str"),
    ("sharegpt", {"conversations": ["text"]}, "wrong type", "turn 1 of 'conversations' is str"),
    (
        "sharegpt",
        {"conversations": shared(("bot", "v"))},
        "unknown role",
        "turn 1 of 'conversations' has the role 'bot'",
    ),
    ("sharegpt", {"conversations": [{"from": "gpt"}]}, "missing field", "the content of turn 1"),
    ("sharegpt", {"conversations": shared(("human", "v"))}, "no assistant turn", "no assistant turn"),
    ("sharegpt", {"conversations": shared(("function_call", "f(x)"))}, "not JSON", "the content of turn 1"),
    ("sharegpt", {"conversations": shared(("function_call", "3"))}, "wrong type", "int, not a list"),
    ("sharegpt", {"conversations": shared(("function_call", "[]"))}, "empty field", "is empty"),
    (
        "sharegpt",
        {"conversations": shared(("function_call", '{"arguments": {}}'))},
        "missing field",
        "the name of call 1",
    ),
    ("sharegpt", {"conversations": shared(("gpt", "v"), ("observation", "o"))}, "answer without a call", "message 2"),
    ("sharegpt", {"conversations": shared(("gpt", "v")), "tools": "f(x)"}, "not JSON", "'tools' is not JSON"),
    ("messages", {}, "missing field", "'messages' is missing"),
    ("messages", {"messages": turns(("user", "u"), ("critic", "t"))}, "unknown role", "turn 2 of 'messages'"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "unknown role", "turn 1 of 'messages'"),
    ("messages", {"messages": [{"content": "x"}]}, "unknown role", "turn 1 of 'messages' has the role None"),
    ("messages", {"messages": turns(("user", "u"), ("assistant", ""))}, "empty field", "the content of turn 2"),
    ("messages", {"messages": turns(("user", ""), ("assistant", "a"))}, "empty field", "the content of turn 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": []}]}, "empty field", "the content of turn 1"),
    ("messages", {"messages": [WITHOUT | {"reasoning": "r"}]}, "empty field", "the content of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"content": NAN}]}, "NaN", "the content of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"content": {"a": 1}}]}, "wrong type", "the content of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"content": [{"type": "image_url"}]}]}, "wrong type", "not text"),
    ("messages", {"messages": [ASSISTANT | {"content": [{"type": "text"}]}]}, "missing field", "a part of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"audio": {"id": "x"}}]}, "lost field", "'audio', which would be lost"),
    ("messages", {"messages": [ASSISTANT | {"loss": 0}]}, "lost field", "'loss', which would be lost"),
    ("messages", {"messages": [ASSISTANT | {"from": "gpt"}]}, "lost field", "'from', which would be lost"),
    ("messages", {"messages": [ASSISTANT | {"tool_call_id": "1"}]}, "lost field", "'tool_call_id'"),
    ("messages", {"messages": [ASSISTANT | {"reasoning": "r", "thinking": "t"}]}, "lost field", "two different"),
    ("messages", {"messages": [CALLS | {"function_call": {"name": "f"}}]}, "lost field", "function_call"),
    ("messages", {"messages": [ASSISTANT | {"weight": 0.5}]}, "wrong type", "the weight of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"weight": True}]}, "wrong type", "the weight of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"weight": "0"}]}, "wrong type", "the weight of turn 1"),
    ("messages", {"messages": [ASSISTANT | {"train": 0.5}]}, "wrong type", "the train of turn 1"),
    (
        "messages",
        {"messages": [ASSISTANT | {"train": False, "weight": 1}]},
        "contradiction",
        "weight 1 and train False",
    ),
    (
        "prompt_completion",
        {"prompt": [ASSISTANT | {"weight": 1}], "completion": [ASSISTANT]},
        "lost field",
        "turn 1 of 'prompt'",
    ),
    ("text", {"text": "a", "weight": 0.5}, "weight of a row", "the row has weight 0.5"),
    ("question_answer", {"question": "q", "answer": "a", "train": False}, "weight of a row", "the row has train False"),
    ("messages", {"messages": [CALLS, {"role": "tool", "tool_call_id": "2"}]}, "answer without a call", "message 2"),
    ("messages", {"messages": [CALLS, *turns(("tool", "r"), ("tool", "r"))]}, "answer without a call", "message 3"),
    ("messages", {"messages": [CALLS, *turns(("user", "u"), ("tool", "r"))]}, "answer without a call", "message 3"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": "f"}]}, "not JSON", "tool_calls of turn 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [{}]}]}, "missing field", "the name of call 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", "x")]}]}, "not JSON", "the arguments of call 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", "[1]")]}]}, "wrong type", "the arguments of call 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", {"x": NAN})]}]}, "NaN", "call 1 in tool_calls"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", {"x": HALF})]}]}, "half a surrogate pair", "call 1"),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", {"x": b"y"})]}]}, "wrong type", "bytes"),
    (
        "messages",
        {"messages": [WITHOUT | {"tool_calls": [call("f", {}) | {"type": "custom"}]}]},
        "wrong type",
        "'custom'",
    ),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", {}, index=0)]}]}, "lost field", "'index'"),
    (
        "messages",
        {"messages": [WITHOUT | {"tool_calls": [{"name": "f", "parameters": {}}]}]},
        "lost field",
        "'parameters'",
    ),
    ("messages", {"messages": [WITHOUT | {"tool_calls": [call("f", {"x": DEEP})]}]}, "nested too deeply", "deep"),
    ("messages", {"messages": [ASSISTANT], "tools": [{}]}, "empty field", "tool 1 of 'tools' is empty"),
    ("messages", {"messages": [ASSISTANT], "tools": [{"type": "function"}]}, "missing field", "the name of tool 1"),
    ("messages", {"messages": [ASSISTANT], "tools": [{"type": "web_search"}]}, "wrong type", "'web_search'"),
    ("messages", {"messages": [ASSISTANT], "tools": 3}, "wrong type", "'tools' is int"),
    ("messages", {"messages": [ASSISTANT], "documents": ["d"]}, "not JSON", "a document"),
    ("messages", {"messages": [ASSISTANT], "documents": "d"}, "wrong type", "'documents' is str"),
    ("messages", {"messages": turns(("system", "s"), ("user", "u"))}, "no assistant turn", "no assistant turn"),
    ("prompt_completion", {"prompt": "p"}, "missing field", "'completion' is missing"),
    (
        "prompt_completion",
        {"prompt": "p", "completion": turns(("assistant", "a"))},
        "wrong type",
        "'completion' is list",
    ),
    ("prompt_completion", {"prompt": turns(("user", "u")), "completion": 5}, "wrong type", "'prompt' is list"),
    ("prompt_completion", {"prompt": turns(("user", "u")), "completion": " "}, "empty field", "'completion' is empty"),
    ("text", {"text": " "}, "empty field", "'text' is empty"),
    ("text", {"text": HALF}, "half a surrogate pair", "'text'"),
    ("tokens", {"input_ids": []}, "empty field", "'input_ids' is empty"),
    ("tokens", {"input_ids": "12"}, "wrong type", "'input_ids' is str"),
    ("tokens", {"input_ids": [1, 2.0]}, "wrong type", "'input_ids' has 2.0"),
    ("tokens", {"input_ids": [1, True]}, "wrong type", "'input_ids' has True"),
    ("tokens", {"input_ids": [1, -100]}, "wrong type", "'input_ids' has -100"),
    ("tokens", {"input_ids": [1, 2], "labels": [-1, 2]}, "wrong type", "'labels' has -1"),
    ("tokens", {"input_ids": [1, 2], "labels": [2]}, "lengths differ", "2 'input_ids' but 1 'labels'"),
    ("tokens", {"input_ids": [1, 2], "labels": [-100, -100]}, "nothing to learn", "every label"),
    ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "lost field", "'attention_mask'"),
    ("tokens", {"input_ids": [1, 2], "attention_mask": [1]}, "lost field", "'attention_mask'"),
    ("tokens", {"input_ids": [1, 2], "completion_mask": [0, 1]}, "lost field", "'completion_mask'"),
]


@pytest.mark.parametrize("format_type, row, reason, detail", BAD)
def test_bad_rows_say_why(format_type, row, reason, detail):
    caught = refused(row, format_type)
    assert (caught.reason, detail in str(caught)) == (reason, True), str(caught)
    assert "\n" not in str(caught)


def test_a_bad_row_survives_another_process():
    again = pickle.loads(pickle.dumps(BadRow("'x' is empty", reason="empty field")))
    assert (str(again), again.reason) == ("'x' is empty", "empty field")


# Which format


def test_no_format_fits():
    with pytest.raises(UserError) as caught:
        detect({"t": "t", "id": 1}, where="rows.jsonl, row 1")
    assert caught.value.what == "no format has the keys ['id', 't']"
    assert caught.value.where == "rows.jsonl, row 1"
    assert all(name in caught.value.fix for name in FORMATS)


@pytest.mark.parametrize(
    "row, format_type",
    [
        (ROW | {"messages": [], "text": ""}, "question_answer"),
        ({"instruction": "", "output": "", "text": ""}, "alpaca"),
        ({"prompt": "", "messages": []}, "messages"),
        ({"text": "", "input_ids": []}, "tokens"),
    ],
)
def test_the_first_format_that_fits_is_taken(row, format_type):
    assert detect(row, where="") == (format_type, None)


PAIR, ALPACA = "prompt_completion", "alpaca"


@pytest.mark.parametrize(
    ("row", "format_type", "expected"),
    [
        ({"prompt": "q", "response": "a"}, PAIR, ("q", "a")),
        ({"question": "q", "output": "a", "id": 1}, PAIR, ("q", "a")),
        ({"prompt": "q", "response": "a", "source": "web", "history": [["x", "y"]]}, PAIR, ("q", "a")),
        ({"Question": "q", "Answer": "a"}, PAIR, ("q", "a")),
        ({"problem": "q", "solution": "a"}, PAIR, ("q", "a")),
        ({"input": "q", "output": "a"}, PAIR, ("q", "a")),
        ({"inputs": "q", "targets": "a"}, PAIR, ("q", "a")),
        ({"query": "q", "response": "a", "system_prompt": ""}, PAIR, ("q", "a")),
        ({"instruction": "q", "answer": "a"}, ALPACA, ("q", "a")),
        ({"instruction": "q", "input": "i", "response": "a"}, ALPACA, ("q\n\ni", "a")),
        ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, ALPACA, ("q\n\ni", "a")),
    ],
)
def test_other_names_of_a_question_and_its_answer(row, format_type, expected):
    name, columns = detect(row, where="")
    assert name == format_type
    assert to_sample(row, name, columns).messages == turns(("user", expected[0]), ("assistant", expected[1]))


def test_a_system_prompt_under_its_other_name():
    row = {"system_prompt": "s", "question": "q", "response": "a"}
    assert to_sample(row, *detect(row, where="")).messages[0] == {"role": "system", "content": "s"}


def test_a_column_beside_the_question_counts_in_each_row_that_has_it():
    bare, full = {"question": "q", "response": "a"}, {"question": "q", "response": "a", "System_Prompt": "s"}
    for first in (bare, full):
        form, columns = detect(first, where="")
        assert [len(to_sample(row, form, columns).messages) for row in (bare, full)] == [2, 3]
    form, columns = detect({"instruction": "q", "response": "a"}, where="")
    assert to_sample({"instruction": "q", "context": "c", "response": "a"}, form, columns).messages[0] == {
        "role": "user",
        "content": "q\n\nc",
    }
    both = {"instruction": "q", "input": "i", "context": "c", "response": "a"}
    assert refused(both, form, columns).reason == "two columns for one field"
    given = {"question": "Q", "answer": "A", "system": "who?"}
    assert len(to_sample({"Q": "q", "A": "a"}, "question_answer", given).messages) == 2
    assert to_sample({"Q": "q", "A": "a", "who": "s"}, "question_answer", given).messages[0]["content"] == "s"


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "q", "solution": "s", "answer": "a"},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
        {"instruction": "q", "prompt": "p", "response": "a"},
        {"response": "a"},
        {"question": "q"},
        {"query": "q", "context": "c", "response": "a"},
        {"instruction": "q", "input": "i", "context": "c", "response": "a"},
        {"prompt": "q", "response": "a", "system": "s", "system_prompt": "t"},
    ],
)
def test_names_that_could_mean_two_columns_are_refused(row):
    with pytest.raises(UserError, match="no format has the keys"):
        detect(row, where="")


@pytest.mark.parametrize(
    "row, what, fix",
    [
        ({"text": "t", "label": 1}, "text, label", '{"prompt": the text, "completion": its class in words}'),
        ({"text": "t", "label": None}, "text, label", "--format_type text"),
        ({"text": "t", "label": "good"}, "text, label", "--columns '{prompt: text, completion: label}'"),
        (
            {"Review": "t", "Sentiment": "good", "id": 7},
            "Review, Sentiment",
            "--columns '{prompt: Review, completion: Sentiment}'",
        ),
        ({"premise": "a", "hypothesis": "b", "label": 0, "idx": 3}, "hypothesis, premise, label", "its class in words"),
        (
            {"question": "a", "coarse_label": 0, "fine_label": 3},
            "question, coarse_label, fine_label",
            "run_classification.py",
        ),
    ],
)
def test_rows_for_a_classifier_are_refused(row, what, fix):
    with pytest.raises(UserError, match=f"rows of {what} look like data for a classifier") as caught:
        detect(row, where="rows.jsonl")
    assert fix in caught.value.fix and caught.value.where == "rows.jsonl"


def test_rows_with_more_than_a_text_and_a_class_are_read():
    assert detect({"text": "t", "label": 1, "url": "u"}, where="")[0] == "text"
    columns = {"prompt": "text", "completion": "label"}
    assert detect({"text": "t", "label": "good"}, where="", columns=columns) == ("prompt_completion", columns)
    assert to_sample({"text": "t", "label": 1}, "text").text == "t"


def test_columns_are_read_under_other_names():
    row = {"q": "1", "a": "2", "messages": []}
    columns = {"prompt": "q", "completion": "a"}
    assert detect(row, where="", columns=columns) == ("prompt_completion", columns)
    made = to_sample(row, "prompt_completion", columns)
    assert made.messages == turns(("user", "1"), ("assistant", "2"))


def test_a_column_takes_the_place_of_the_field():
    row = {"question": "q", "answer": "worse", "better": "b"}
    assert to_sample(row, "question_answer", {"answer": "better"}).messages[1]["content"] == "b"


def test_a_column_that_the_row_lacks():
    columns = {"instruction": "q", "output": "a"}
    assert detect({"q": "1"}, where="", columns=columns) == ("alpaca", columns)
    assert refused({"q": "1"}, "alpaca", columns).reason == "missing column"


def test_a_field_that_the_format_lacks():
    with pytest.raises(UserError, match="no field 'sytem'"):
        to_sample({"instruction": "i", "output": "o", "s": "s"}, "alpaca", {"sytem": "s"})
    with pytest.raises(UserError, match="no format has the keys"):
        detect({"instruction": "i", "output": "o", "s": "s"}, where="", columns={"sytem": "s"})


@pytest.mark.parametrize("format_type", ["auto", "alpacca", ""])
def test_an_unknown_format(format_type):
    with pytest.raises(UserError, match="there is no format"):
        to_sample(ROW, format_type)


# A user's function


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = "rows_" + "".join(letter for letter in tmp_path.name if letter.isalnum())
    (tmp_path / f"{name}.py").write_text(
        "def good(row):\n"
        "    return {'messages': [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]}\n"
        "def other(row):\n    return {'question': row['q'], 'answer': row['a']}\n"
        "def picky(row):\n    raise ValueError('too silly')\n"
        "def broken(row):\n    return row['nothing']\n"
        "def wrong(row):\n    return [row]\n"
        "def unknown(row):\n    return {'x': 1}\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("name", ["good", "other"])
def test_a_function_of_the_current_folder(module, name):
    made = to_sample({"q": "1", "a": "2"}, f"{module}:{name}")
    assert made == Conversation(turns(("user", "1"), ("assistant", "2")))


def test_a_function_that_refuses_a_row(module):
    caught = refused({}, f"{module}:picky")
    assert (caught.reason, str(caught)) == (f"refused by {module}:picky", f"{module}:picky: too silly")


def test_a_function_whose_row_is_bad(module):
    assert refused({"q": "1", "a": ""}, f"{module}:good").reason == "empty field"


def test_a_function_that_fails_is_named_with_its_line(module):
    with pytest.raises(UserError) as caught:
        to_sample({}, f"{module}:broken")
    assert caught.value.what == f"{module}:broken fails with KeyError: 'nothing'"
    assert caught.value.where.endswith(f"{module}.py, line 8")


@pytest.mark.parametrize(
    "name, what",
    [
        ("wrong", "returned list, not a dict"),
        ("unknown", "no format has the keys"),
        ("number", "is not a function"),
        ("nothing", "cannot import"),
    ],
)
def test_a_function_that_is_none(module, name, what):
    with pytest.raises(UserError, match=what):
        to_sample({}, f"{module}:{name}")


@pytest.mark.parametrize("name", ["nowhere_at_all:f", ":f", "json:"])
def test_a_module_that_is_not_there(name):
    with pytest.raises(UserError, match="cannot import"):
        load_function(name)


def test_a_function_picks_its_own_columns(module):
    with pytest.raises(UserError, match="columns are given"):
        to_sample({"q": "1", "a": "2"}, f"{module}:good", {"question": "q"})


# Any text survives

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ROLE = st.sampled_from(["system", "user", "assistant"])
CONVERSATION = st.lists(st.fixed_dictionaries({"role": ROLE, "content": TEXT}), min_size=1).filter(
    lambda messages: any(message["role"] == "assistant" for message in messages)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(CONVERSATION)
def test_conversations_survive(messages):
    spoken = shared(*((SHAREGPT[message["role"]], message["content"]) for message in messages))
    assert to_sample({"messages": messages}, "messages").messages == messages
    assert to_sample({"conversations": spoken}, "sharegpt").messages == messages


@given(TEXT, TEXT)
def test_pairs_survive(prompt, answer):
    expected = Conversation(turns(("user", prompt), ("assistant", answer)))
    assert to_sample({"question": prompt, "answer": answer}, "question_answer") == expected
    assert to_sample({"instruction": prompt, "output": answer}, "alpaca") == expected
    assert to_sample({"prompt": prompt, "completion": answer}, "prompt_completion") == expected


@given(TEXT, st.dictionaries(TEXT, JSON, max_size=4))
def test_calls_survive(name, arguments):
    expected = [call(name, arguments)]
    spoken = shared(("function_call", json.dumps({"name": name, "arguments": arguments})))
    assert to_sample({"conversations": spoken}, "sharegpt").messages[0]["tool_calls"] == expected
    as_text = {"role": "assistant", "content": None, "tool_calls": [call(name, json.dumps(arguments))]}
    assert to_sample({"messages": [as_text]}, "messages").messages[0]["tool_calls"] == expected


WORD = st.sampled_from([*ROLES, "text", "f", "", '{"name": "f"}', "[{}]"]) | JSON
TURN = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "type", *set().union(*KEYS.values())]), WORD
)
PART = WORD | TURN | st.lists(TURN | st.just({"role": "assistant", "content": "a"}), max_size=4)
FIELDS = sorted(set().union(*(form.fields for form in FORMATS.values())))


@given(st.dictionaries(st.sampled_from(FIELDS), PART))
def test_any_row_is_a_sample_or_a_bad_row(row):
    for format_type in FORMATS:
        try:
            assert isinstance(to_sample(row, format_type), Conversation | PlainText | TokenIds)
        except BadRow as error:
            assert error.reason
