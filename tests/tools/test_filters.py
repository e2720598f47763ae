"""Every filter keeps and drops what it says, counts it, and tells a broken row from a dropped one."""

import random
import socket
import unicodedata
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyrank.chat_template.types import BadRow
from manyrank.data.dedup import digest, same_text
from manyrank.data.numeric import number
from manyrank.errors import UserError
from manyrank.tools.prepare.filters import (
    FILTERS,
    PERMUTATIONS,
    FilterStage,
    Item,
    NearDuplicates,
    build_stages,
    find,
)

ROW = {
    "question": "How many?",
    "answer": "Three and four are seven.\n#### 7",
    "run": {"is_correct": True, "solution": "It is 7.0", "scores": [1, {"value": 5}]},
    "a.b": "dotted",
    "nothing": None,
}
CODE = "def add(a, b):\n    # sum of two\n    return a + b\n"
TESTED = CODE + "\n\ndef test_add():\n    assert add(1, 2) == 3\n"


def stage(given, *, workers: int = 1) -> FilterStage:
    return build_stages([given], workers=workers, where="config.yaml")[0]


def verdict(given, row) -> str | None:
    return stage(given).check(Item("rows.jsonl, line 1", row))


def kept(given, rows, **options) -> list:
    """The rows that pass; a broken one is a failure of the test."""
    return [
        item.row for item in stage(given).run((Item(f"row {n}", row, **options) for n, row in enumerate(rows)), fail)
    ]


def fail(item, name, error):
    raise AssertionError(f"{item.place}: {error}")


def config_error(given) -> UserError:
    with pytest.raises(UserError) as caught:
        stage(given)
    return caught.value


# Fields


@pytest.mark.parametrize(
    "path, value",
    [
        ("question", "How many?"),
        ("run.solution", "It is 7.0"),
        ("run.scores.0", 1),
        ("run.scores.1.value", 5),
        ("a.b", "dotted"),
    ],
)
def test_paths_lead_to_values(path, value):
    assert find(ROW, path) == value


@pytest.mark.parametrize(
    "path", ["none", "nothing", "question.more", "run.scores.2", "run.scores.x", "run..solution", ""]
)
def test_paths_that_lead_nowhere(path):
    with pytest.raises(BadRow) as caught:
        find(ROW, path)
    assert str(caught.value) == f"the row has no field {path!r}"
    assert caught.value.reason == "missing field"


def test_a_training_row_has_the_fields_that_are_asked_for():
    assert Item("", ROW, {"q": "question", "a": "run.solution"}).training == {"q": "How many?", "a": "It is 7.0"}
    assert Item("", ROW).training is ROW


# correct


@pytest.mark.parametrize(
    "text, value",
    [
        ("#### 18", 18),
        ("#### 18 apples in 3 bags", 18),
        ("1 #### 2 #### 3", 3),
        ("-$4", -4),
        ("US$-4", -4),
        ("A: 18", 18),
        ("A: 18.0", 18),
        ("so 1 and 2", 2),
        ("= 1,234,567.50", Decimal("1234567.5")),
        ("it is -3", -3),
        ("10-3", 3),
        ("(5)-3", 3),
        ("$-4", -4),
        ("\u22125", -5),
        ("18.", 18),
        ("18%", 18),
        (".5", Decimal("0.5")),
        ("-.5", Decimal("-0.5")),
        ("1e3", 1000),
        ("2,3", 3),
        ("1234,567", 567),
        ("x2", 2),
        ("v1.2.3", Decimal(".3")),
        ("none", None),
        ("", None),
        ("٣", None),
    ],
)
def test_the_number_that_a_text_ends_in(text, value):
    assert number(text) == value


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3))
def test_numbers_are_found_as_they_are_written(value):
    assert number(f"first 5, then {value}.") == value
    assert number(f"that is ${value:,}") == value


@pytest.mark.parametrize(
    "options, row, expected",
    [
        ({"field": "run.is_correct"}, ROW, None),
        ({"field": "ok"}, {"ok": False}, "not correct"),
        ({"prediction": "p", "reference": "r"}, {"p": "7", "r": "7"}, None),
        ({"prediction": "p", "reference": "r"}, {"p": [7], "r": [7]}, None),
        ({"prediction": "p", "reference": "r"}, {"p": "7", "r": "7.0"}, "not correct"),
        ({"prediction": "run.solution", "reference": "answer", "numeric": True}, ROW, None),
        ({"prediction": "p", "reference": "r", "numeric": True}, {"p": "6", "r": "#### 7"}, "not correct"),
        ({"prediction": "p", "reference": "r", "numeric": True}, {"p": "seven", "r": "#### 7"}, "no number"),
    ],
)
def test_correct(options, row, expected):
    assert verdict({"correct": options}, row) == expected


@pytest.mark.parametrize(
    "options, row, reason",
    [
        ({"field": "ok"}, {}, "missing field"),
        ({"field": "ok"}, {"ok": "true"}, "wrong type"),
        ({"field": "ok"}, {"ok": 1}, "wrong type"),
        ({"prediction": "p", "reference": "r"}, {"p": 1}, "missing field"),
        ({"prediction": "p", "reference": "r", "numeric": True}, {"p": 1, "r": "1"}, "wrong type"),
        ({"prediction": "p", "reference": "r", "numeric": True}, {"p": "1", "r": "one"}, "no number"),
    ],
)
def test_correct_refuses_rows_that_say_nothing(options, row, reason):
    with pytest.raises(BadRow) as caught:
        verdict({"correct": options}, row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "options, problem",
    [
        ({}, "give `field`, or"),
        ({"prediction": "p"}, "give `field`, or"),
        ({"field": "f", "prediction": "p", "reference": "r"}, "give `field`, or"),
        ({"field": "f", "function": "m:f"}, "give `field`, or"),
        ({"field": "f", "numeric": True}, "numeric goes with"),
    ],
)
def test_correct_is_told_in_one_way(options, problem):
    assert problem in config_error({"correct": options}).what


# dedup


def test_dedup_keeps_the_first():
    rows = [{"q": "a", "n": 1}, {"q": "b", "n": 2}, {"q": "a", "n": 3}, {"q": "a", "n": 1}]
    assert kept("dedup", rows) == rows[:3]
    assert kept({"dedup": {"fields": ["q"]}}, rows) == rows[:2]
    assert kept({"dedup": {"fields": ["q", "n"]}}, rows) == rows[:3]


def test_dedup_of_the_training_row():
    rows = [{"q": "a", "id": 1}, {"q": "a", "id": 2}]
    assert kept("dedup", rows) == rows
    assert kept("dedup", rows, fields={"question": "q"}) == rows[:1]


def test_dedup_sees_through_spaces_and_unicode_forms():
    texts = ["caf\u00e9  au\nlait", "cafe\u0301 au lait ", "cafe au lait"]
    assert kept("dedup", [{"t": text} for text in texts]) == [{"t": texts[0]}, {"t": texts[2]}]


def test_dedup_tells_structures_apart():
    rows = [{"t": ["a b"]}, {"t": ["a", "b"]}, {"t": "a b"}, {"t": {"a": "b"}}, {"t": 1}, {"t": "1"}, {"t": True}]
    assert kept("dedup", rows) == rows


@given(st.text())
def test_the_digest_of_normal_forms(text):
    assert digest(unicodedata.normalize("NFD", text)) == digest(f" {unicodedata.normalize('NFC', text)}\n")
    assert same_text(same_text(text)) == same_text(text)


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_the_order_of_keys_does_not_matter(row):
    assert digest(row) == digest(dict(reversed(row.items())))


WORDS = [f"word{number}" for number in range(3000)]


def jaccard(one: list[str], other: list[str]) -> float:
    sets = [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85])
def test_near_duplicates_are_those_of_the_jaccard_similarity(threshold):
    """Against the exact similarity, but for pairs within 3 standard errors of the threshold."""
    numbers, wrong, sides = random.Random(1), [], [0, 0]
    margin = 3 * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    for _ in range(300):
        one = numbers.choices(WORDS, k=200)
        other = one[: numbers.randrange(60, 201)]
        exact, seen = jaccard(one, other), NearDuplicates(threshold)
        assert not seen.seen(" ".join(one))
        if abs(exact - threshold) > margin:
            sides[exact > threshold] += 1
            wrong += [exact] * (seen.seen(" ".join(other)) != (exact > threshold))
    assert min(sides) > 10
    assert wrong == []


def test_near_duplicates_keep_the_first():
    base = random.Random(2).choices(WORDS, k=100)
    rows = [{"t": " ".join(words)} for words in (base, base[:-1], WORDS[:100], base[:50], [*base, "more"])]
    assert kept({"dedup": {"fields": ["t"], "near": 0.85}}, rows) == [rows[0], rows[2], rows[3]]


def test_short_texts_are_near_only_when_equal():
    rows = [{"t": text} for text in ("one two", "one three", "one two", "", "four", "")]
    assert kept({"dedup": {"near": 0.85}}, rows) == [rows[0], rows[1], rows[3], rows[4]]


def test_near_counts_both_kinds():
    rows = [{"t": " ".join(WORDS[:60])}, {"t": " ".join(WORDS[:60])}, {"t": " ".join(WORDS[:59])}]
    made = stage({"dedup": {"near": 0.85}})
    assert len(list(made.run([Item("", row) for row in rows], fail))) == 1
    assert made.dropped == {"duplicate": 1, "near duplicate": 1}


# length and regex


@pytest.mark.parametrize(
    "options, text, expected",
    [
        ({"min": 3}, "abc", None),
        ({"min": 3}, "ab", "too short"),
        ({"max": 3}, "abc", None),
        ({"max": 3}, "abcd", "too long"),
        ({"min": 2, "max": 3}, "日本語", None),
        ({"max": 2}, "日本語", "too long"),
        ({"min": 2, "unit": "words"}, "one  two\n", None),
        ({"min": 2, "unit": "words"}, "one", "too short"),
        ({"max": 2, "unit": "words"}, "a b c", "too long"),
        ({"min": 0}, "", None),
    ],
)
def test_length(options, text, expected):
    assert verdict({"length": {"field": "t", **options}}, {"t": text}) == expected


@pytest.mark.parametrize(
    "options, text, expected",
    [
        ({"keep": "^#### [0-9]+$"}, "#### 7", None),
        ({"keep": "^#### [0-9]+$"}, "so #### 7", "pattern not found"),
        ({"keep": "(?m)^####"}, "so\n#### 7", None),
        ({"drop": "(?i)sorry"}, "I am Sorry", "pattern found"),
        ({"drop": "sorry"}, "fine", None),
        ({"drop": ""}, "any", "pattern found"),
    ],
)
def test_regex(options, text, expected):
    assert verdict({"regex": {"field": "t", **options}}, {"t": text}) == expected


# quality


@pytest.mark.parametrize(
    "options, code, expected",
    [
        ({}, CODE, None),
        ({}, "def f(:", "does not parse"),
        ({}, "a\0b", "does not parse"),
        ({}, "(" * 500, "does not parse"),
        ({"parses": False}, "def f(:", None),
        ({"parses": False, "has_tests": True}, "def f(:", "does not parse"),
        ({"has_tests": True}, CODE, "no tests"),
        ({"has_tests": True}, TESTED, None),
        ({"has_tests": True}, "import unittest", None),
        ({"has_tests": True}, "from pytest import raises", None),
        ({"has_tests": True}, "def test_it(): ...", None),
        ({"has_tests": True}, "assert f() == 1", None),
        ({"has_tests": True}, "import pytester\nx = 'assert'", "no tests"),
        ({"min_lines": 3}, CODE, None),
        ({"min_lines": 4}, CODE, "too few lines"),
        ({"min_lines": 4}, CODE + "\n\n\n", "too few lines"),
        ({"max_lines": 2}, CODE, "too many lines"),
        ({"max_line_length": 17}, CODE, None),
        ({"max_line_length": 15}, CODE, "line too long"),
        ({"min_comment_ratio": 0.3}, CODE, None),
        ({"min_comment_ratio": 0.4}, CODE, "too few comments"),
        ({"max_comment_ratio": 0.3}, CODE, "too many comments"),
        ({"max_comment_ratio": 0.4}, CODE, None),
        ({"min_comment_ratio": 0.1}, "s = '# no comment'", "too few comments"),
        ({"min_comment_ratio": 0.1}, "x = 1  # one", None),
        ({"parses": False, "min_comment_ratio": 0.1}, "x = (", "does not tokenize"),
        ({}, "x = '\\d'", None),
    ],
)
def test_quality(options, code, expected):
    assert verdict({"quality": {"field": "code", **options}}, {"code": code}) == expected


@pytest.mark.parametrize("name", ["length", "regex", "quality"])
def test_text_filters_refuse_what_is_no_text(name):
    options = {"length": {"max": 1}, "regex": {"keep": "."}, "quality": {}}[name]
    for row, reason in (({}, "missing field"), ({"t": 5}, "wrong type"), ({"t": ["a"]}, "wrong type")):
        with pytest.raises(BadRow) as caught:
            verdict({name: {"field": "t", **options}}, row)
        assert caught.value.reason == reason


# command; `test_sandbox` tests the limits

RUN = {"run": ["python", "{file}"], "file": "test.py", "content": "code", "network": True}


@pytest.mark.parametrize(
    "code, expected",
    [
        ("assert 1 + 1 == 2", None),
        ("assert 1 + 1 == 3", "exit code 1"),
        ("raise SystemExit(4)", "exit code 4"),
        ("while True: pass", "time limit"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("x = bytearray(10**9)", "exit code 1"),
        ("import sys; assert sys.argv == ['test.py']; assert open(__file__).read().endswith('é\\'')  # 'é'", None),
    ],
)
def test_command(code, expected):
    assert verdict({"command": {**RUN, "timeout": 2, "memory_mb": 256}}, {"code": code}) == expected


def test_command_puts_several_fields_together():
    options = {**RUN, "content": ["code", "checks.0"]}
    assert verdict({"command": options}, {"code": CODE, "checks": ["assert add(1, 2) == 3"]}) is None
    assert verdict({"command": options}, {"code": CODE, "checks": ["assert add(1, 2) == 4"]}) == "exit code 1"


def test_command_has_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert verdict({"command": RUN}, {"code": connect}) is None
        try:
            assert verdict({"command": {**RUN, "network": False}}, {"code": connect}) == "exit code 1"
        except UserError as error:
            assert "forbids a network namespace" in error.what and "network: true" in error.fix
            pytest.skip("namespaces are forbidden here")


def test_a_command_that_is_not_there():
    with pytest.raises(UserError) as caught:
        verdict({"command": {**RUN, "run": ["no-such-program", "{file}"]}}, {"code": ""})
    assert "'no-such-program' cannot be run" in caught.value.what


def test_a_row_without_content_is_broken():
    for row, reason in (({}, "missing field"), ({"code": "'\ud800'"}, "half a surrogate pair")):
        with pytest.raises(BadRow) as caught:
            verdict({"command": RUN}, row)
        assert caught.value.reason == reason


def test_commands_run_side_by_side_and_rows_keep_their_order():
    rows = [
        {"n": n, "code": f"import time; time.sleep({0.3 if n % 4 == 0 else 0}); raise SystemExit({n % 3})"}
        for n in range(12)
    ]
    made = stage({"command": RUN}, workers=4)
    items = [Item(f"row {n}", row) for n, row in enumerate([*rows, {"n": 12}])]
    refused = []
    passed = list(made.run(items, lambda item, name, error: refused.append((item.place, name, error.reason))))
    assert [item.row["n"] for item in passed] == [0, 3, 6, 9]
    assert (made.seen, made.kept, made.broken) == (13, 4, 1)
    assert made.dropped == {"exit code 1": 4, "exit code 2": 4}
    assert refused == [("row 12", "filter 1 (command)", "missing field")]


def test_no_more_rows_are_taken_than_are_in_work():
    taken = []

    def rows():
        for at in range(100):
            taken.append(at)
            yield Item("", {"code": ""})

    items = stage({"command": RUN}, workers=2).run(rows(), fail)
    next(items)
    items.close()
    assert len(taken) <= 5


# function


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module with a name of its own into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(program: str) -> str:
        name = f"filters_of_{abs(hash(request.node.name + program))}"
        (tmp_path / f"{name}.py").write_text(program)
        return name

    return write


def test_functions_of_the_user(module):
    name = module("def long(row, least=3):\n    return len(row['t']) >= least\n")
    for spelling in (f"{name}:long", {"function": f"{name}:long"}, {f"{name}:long": {}}, {f"{name}:long": None}):
        assert verdict(spelling, {"t": "abc"}) is None
        assert verdict(spelling, {"t": "ab"}) == f"refused by {name}:long"
    assert verdict({f"{name}:long": {"least": 2}}, {"t": "ab"}) is None
    assert verdict({"correct": {"function": f"{name}:long"}}, {"t": "ab"}) == "not correct"


@pytest.mark.parametrize(
    "body, problem",
    [
        ("return 1", "returned 1, not True or False"),
        ("return None", "returned None, not True or False"),
        ("return row['gone']", "fails with KeyError: 'gone'"),
    ],
)
def test_functions_that_fail_name_the_row(module, body, problem):
    name = module(f"def f(row):\n    {body}\n")
    with pytest.raises(UserError) as caught:
        verdict(f"{name}:f", {})
    assert problem in caught.value.what
    assert caught.value.where.startswith("rows.jsonl, line 1")


def test_a_function_that_calls_a_row_broken(module):
    name = module("from manyrank.data.formats import BadRow\ndef f(row):\n    raise BadRow('odd', 'odd row')\n")
    with pytest.raises(BadRow, match="odd"):
        verdict(f"{name}:f", {})


def test_a_function_that_is_not_there(module):
    name = module("")
    assert config_error(f"{name}:gone").where == f"the filter {name}:gone"
    assert "no_such_module" in config_error("no_such_module:f").what


# The config's spelling


@pytest.mark.parametrize(
    "given, what, fix",
    [
        ("dedupe", "there is no filter 'dedupe'", "did you mean dedup?"),
        ({"lenght": {}}, "there is no filter 'lenght'", "did you mean length?"),
        ("xyz", "there is no filter 'xyz'", "there are correct, dedup"),
        ({"length": {"feild": "a", "field": "a", "max": 1}}, "there is no option 'feild'", "did you mean field?"),
        ({"length": {"max": 1}}, "field must be given", "add field:"),
        ({"length": {"field": "a"}}, "give `min`, `max` or both", "README"),
        ({"length": {"field": "a", "min": 2, "max": 1}}, "`min` is more than `max`", "README"),
        ({"length": {"field": "a", "max": "many"}}, "max: 'many' is invalid", "README"),
        ({"length": {"field": "a", "max": -1}}, "max: -1 is invalid", "README"),
        ({"length": {"field": "a", "max": 5, "unit": "tokens"}}, "unit: 'tokens' is invalid", "README"),
        ({"length": 5}, "5 is not a mapping of options", "field, min"),
        ({"regex": {"field": "a", "keep": "("}}, "not a regular expression", "README"),
        ({"regex": {"field": "a"}}, "give `keep` or `drop`", "README"),
        ({"regex": {"field": "a", "keep": "a", "drop": "b"}}, "give `keep` or `drop`", "README"),
        ({"dedup": {"near": 1.5}}, "near: 1.5 is invalid", "README"),
        ({"dedup": {"fields": []}}, "fields: [] is invalid", "README"),
        ({"command": {**RUN, "file": "../test.py"}}, "file: '../test.py' is invalid", "README"),
        ({"command": {**RUN, "run": "python {file}"}}, "run: 'python {file}' is invalid", "README"),
        ({"command": {**RUN, "timeout": 0}}, "timeout: 0 is invalid", "README"),
        ({"quality": {"field": "a", "language": "rust"}}, "language: 'rust' is invalid", "README"),
        ({"quality": {"field": "a", "min_comment_ratio": 30}}, "min_comment_ratio: 30 is invalid", "README"),
        ({"function": {"min": 3}}, "is not a function", "module:function"),
        ({"dedup": {}, "length": {}}, "is not a filter", "one key"),
        (5, "5 is not a filter", "write a name"),
    ],
)
def test_wrong_configs_say_what_and_how(given, what, fix):
    caught = config_error(given)
    assert what in caught.what
    assert fix in caught.fix
    assert caught.where.startswith("config.yaml, filter 1")


def test_every_filter_has_options_that_are_checked():
    assert all(model.model_config["extra"] == "forbid" for model in FILTERS.values())


# Stages in a row


def test_stages_count_rows_in_and_out():
    stages = build_stages(
        [{"length": {"field": "t", "min": 2}}, "dedup", {"regex": {"field": "t", "drop": "x"}}], workers=1, where=""
    )
    items = iter([Item(f"row {n}", {"t": text}) for n, text in enumerate(["a", "bb", "bb", "xx", "cc"])])
    for one in stages:
        items = one.run(items, fail)
    assert [item.row["t"] for item in items] == ["bb", "cc"]
    assert [(one.seen, one.kept) for one in stages] == [(5, 4), (4, 3), (3, 2)]
    assert [dict(one.dropped) for one in stages] == [{"too short": 1}, {"duplicate": 1}, {"pattern found": 1}]
    assert all(one.kept == later.seen for one, later in pairwise(stages))


def test_the_summary_of_a_stage():
    made = stage({"correct": {"field": "ok"}})
    list(made.run([Item("", {"ok": ok}) for ok in (True, False, False, True)], fail))
    assert made.summary() == {
        "filter": "correct",
        "options": {"field": "ok"},
        "in": 4,
        "out": 2,
        "dropped": {"not correct": 2},
        "broken": 0,
        "accuracy": 0.5,
    }
