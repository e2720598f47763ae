"""Rows of every format become conversations; what cannot is refused with its reason and place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyrank.config import asset
from manyrank.errors import UserError
from manyrank.formats import FORMATS, BadRow, detect, read_rows, to_messages

SAMPLES = sorted(asset("data", "formats").glob("*.json*"))
ROW = {"question": "q", "answer": "a"}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read_error(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return caught.value


# The samples


def test_there_is_a_sample_of_every_format():
    assert {path.stem for path in SAMPLES} == set(FORMATS)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples(path):
    rows = list(read_rows(path))
    assert len(rows) >= 5
    for _, row in rows:
        assert detect(row, where="") == path.stem
        messages = to_messages(row, path.stem)
        assert messages[-1]["role"] == "assistant"
        assert all(set(message) == {"role", "content"} and message["content"] for message in messages)


@pytest.mark.parametrize("name, rows", [("sample", 160), ("validation", 16)])
def test_the_data_set(name, rows):
    found = list(read_rows(asset("data", f"{name}.jsonl")))
    assert [number for number, _ in found] == list(range(1, rows + 1))
    for _, row in found:
        assert [message["role"] for message in to_messages(row, "question_answer")] == ["user", "assistant"]


# Each format, exactly

CONVERSATIONS = [
    ("question_answer", ROW, turns(("user", "q"), ("assistant", "a"))),
    ("question_answer", ROW | {"source": "s"}, turns(("user", "q"), ("assistant", "a\n\nSource: s"))),
    ("question_answer", ROW | {"source": ""}, turns(("user", "q"), ("assistant", "a"))),
    ("question_answer", ROW | {"source": None}, turns(("user", "q"), ("assistant", "a"))),
    ("alpaca", {"instruction": "i", "output": "o"}, turns(("user", "i"), ("assistant", "o"))),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, turns(("user", "i"), ("assistant", "o"))),
    (
        "alpaca",
        {"instruction": "i", "input": "n", "output": "o", "system": "s"},
        turns(("system", "s"), ("user", "i\n\nn"), ("assistant", "o")),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "s"},
        turns(("system", "s"), ("user", "h"), ("assistant", "g")),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "h"}, {"from": "assistant", "value": "g"}]},
        turns(("user", "h"), ("assistant", "g")),
    ),
    ("messages", {"messages": turns(("user", "u"), ("assistant", "a"))}, turns(("user", "u"), ("assistant", "a"))),
    ("messages", {"messages": turns(("assistant", " a\n")), "tools": []}, turns(("assistant", " a\n"))),
    ("prompt_completion", {"prompt": "p:", "completion": " c"}, turns(("user", "p:"), ("assistant", " c"))),
]


@pytest.mark.parametrize("format_type, row, expected", CONVERSATIONS)
def test_rows_become_conversations(format_type, row, expected):
    assert detect(row, where="") == format_type
    assert to_messages(row, format_type) == expected


# Bad rows


@pytest.mark.parametrize(
    "format_type, row, reason",
    [
        ("question_answer", {"question": "q"}, "'answer' is missing"),
        ("question_answer", {"question": "q", "answer": None}, "'answer' is missing"),
        ("question_answer", {"question": "q", "answer": ""}, "'answer' is empty"),
        ("question_answer", {"question": " \n", "answer": "a"}, "'question' is empty"),
        ("question_answer", {"question": "q", "answer": 4}, "'answer' is no text"),
        ("question_answer", ROW | {"source": ["s"]}, "'source' is no text"),
        ("alpaca", {"instruction": "i"}, "'output' is missing"),
        ("sharegpt", {"conversations": []}, "'conversations' is not a list of turns"),
        ("sharegpt", {"conversations": "text"}, "'conversations' is not a list of turns"),
        ("sharegpt", {"conversations": ["text"]}, "turn 1 of 'conversations' has no 'from'"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "v"}]}, "turn 1 of 'conversations' has no 'from'"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "'value' is missing"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "v"}], "tools": "[]"}, "'tools' would be lost"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "v"}]}, "no assistant turn"),
        ("messages", {}, "'messages' is not a list of turns"),
        ("messages", {"messages": turns(("user", "u"), ("tool", "t"))}, "turn 2 of 'messages' has no 'role'"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "tool_calls, which"),
        ("messages", {"messages": turns(("user", "u"), ("assistant", ""))}, "'content' is empty"),
        ("messages", {"messages": turns(("assistant", "a")), "tools": [{}]}, "'tools' would be lost"),
        ("messages", {"messages": turns(("system", "s"), ("user", "u"))}, "no assistant turn"),
        ("prompt_completion", {"prompt": "p"}, "'completion' is missing"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(format_type, row, reason):
    with pytest.raises(BadRow, match=reason):
        to_messages(row, format_type)


def test_no_format_fits():
    with pytest.raises(UserError) as caught:
        detect({"text": "t", "id": 1}, where="rows.jsonl, row 1")
    assert caught.value.what == "no format has the keys ['id', 'text']"
    assert caught.value.where == "rows.jsonl, row 1"
    assert all(name in caught.value.fix for name in FORMATS)


# Files


def test_places_are_lines_of_jsonl(file):
    assert list(read_rows(file(f"\n{json.dumps(ROW)}\n\n  \n{json.dumps({'b': 2})}"))) == [(2, ROW), (5, {"b": 2})]


def test_places_are_items_of_an_array(file):
    assert list(read_rows(file(json.dumps([ROW, {"b": 2}], indent=2), "rows.json"))) == [(1, ROW), (2, {"b": 2})]


def test_the_content_decides_and_not_the_name(file):
    assert list(read_rows(file(json.dumps([ROW])))) == [(1, ROW)]
    assert list(read_rows(file(json.dumps(ROW), "rows.json"))) == [(1, ROW)]


@pytest.mark.parametrize("content", [json.dumps(ROW), json.dumps([ROW])])
def test_a_byte_order_mark_is_skipped(file, content):
    assert list(read_rows(file(content.encode("utf-8-sig")))) == [(1, ROW)]


def test_windows_line_ends(file):
    assert list(read_rows(file('{"a": "x"}\r\n{"a": "y"}\r\n'))) == [(1, {"a": "x"}), (2, {"a": "y"})]


def test_line_separators_inside_text_do_not_end_a_row(file):
    row = {"a": "x\u2028y\x85z"}
    assert list(read_rows(file(json.dumps(row, ensure_ascii=False)))) == [(1, row)]


@pytest.mark.parametrize("broken", ['{"a": 1}, ', '{"a" 1}', "{a: 1}", "nonsense", '{"a": "unfinished'])
def test_broken_json_names_its_line(file, broken):
    path = file(f'{{"a": 1}}\n\n{broken}\n{{"a": 2}}\n')
    caught = read_error(path)
    assert caught.what.startswith("broken JSON: ")
    assert caught.where.startswith(f"{path}, line 3, column ")


def test_broken_json_in_an_array_names_its_line(file):
    path = file('[\n {"a": 1},\n {"a": 2,,}\n]', "rows.json")
    assert read_error(path).where.startswith(f"{path}, line 3, column ")


def test_rows_before_a_broken_line_are_read(file):
    rows = read_rows(file('{"a": 1}\n{"a"'))
    assert next(rows) == (1, {"a": 1})


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file(file, content):
    caught = read_error(path := file(content))
    assert (caught.what, caught.where) == ("the file is empty", str(path))


@pytest.mark.parametrize("content", ['{"a": "é"}'.encode("latin-1"), json.dumps(ROW).encode("utf-16")])
def test_a_file_that_is_not_utf8(file, content):
    caught = read_error(path := file(content))
    assert caught.what.startswith("not UTF-8: ")
    assert caught.where == str(path)


def test_a_late_byte_that_is_not_utf8(file):
    rows = b'{"a": 1}\n' * 5000
    assert read_error(file(rows + b'{"a": "\xff"}\n')).what.startswith("not UTF-8: ")


def test_a_row_of_jsonl_that_is_no_object(file):
    caught = read_error(path := file('{"a": 1}\n"text"\n'))
    assert caught.what == "a row is str, not an object"
    assert caught.where == f"{path}, line 2"


def test_an_item_of_an_array_that_is_no_object(file):
    caught = read_error(path := file('[{"a": 1}, 3]', "rows.json"))
    assert caught.what == "a row is int, not an object"
    assert caught.where == f"{path}, item 2"


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_is_not_there(tmp_path, name):
    assert read_error(tmp_path / name).what == f"there is no file {tmp_path / name}"


# Any text survives

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ROLE = st.sampled_from(["system", "user", "assistant"])
CONVERSATION = st.lists(st.fixed_dictionaries({"role": ROLE, "content": TEXT}), min_size=1).filter(
    lambda messages: any(message["role"] == "assistant" for message in messages)
)
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


@given(CONVERSATION)
def test_conversations_survive(messages):
    shared = [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in messages]
    assert to_messages({"messages": messages}, "messages") == messages
    assert to_messages({"conversations": shared}, "sharegpt") == messages


@given(TEXT, TEXT)
def test_pairs_survive(prompt, answer):
    expected = turns(("user", prompt), ("assistant", answer))
    assert to_messages({"question": prompt, "answer": answer}, "question_answer") == expected
    assert to_messages({"instruction": prompt, "output": answer}, "alpaca") == expected
    assert to_messages({"prompt": prompt, "completion": answer}, "prompt_completion") == expected


@given(st.lists(st.dictionaries(TEXT, TEXT), min_size=1), st.booleans())
def test_rows_survive_a_file(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    for content in ("\n".join(lines), f"[{', '.join(lines)}]"):
        path.write_text(content, encoding="utf-8", newline="")
        assert list(read_rows(path)) == list(enumerate(rows, 1))
