"""Rewards as pure functions, put together as a recipe has them."""

import pytest

from manyrank.data.rewards import read_rewards, rewarded, scorers
from manyrank.errors import UserError


def scores(rewards: dict, answer: str, reference: str = "", row: dict | None = None, on_error="error") -> dict:
    found = read_rewards(rewards)
    functions = scorers(found)
    return {
        reward.name: rewarded(
            reward, functions[reward.name], answer, reference, row or {}, place="my.jsonl, line 3", on_error=on_error
        )
        for reward in found
    }


def test_weights_and_names():
    found = read_rewards({"numeric": 1, "brief": {"reward": "length", "weight": 0.5, "max": 9}, "f1": {"weight": 0}})
    assert [(reward.name, reward.kind, reward.weight) for reward in found] == [
        ("numeric", "numeric", 1.0),
        ("brief", "length", 0.5),
        ("f1", "f1", 0.0),
    ]


def test_what_is_right_is_asked_of_what_comes_after_the_thinking():
    answer = "<think>maybe 4</think>The answer is 5."
    assert scores({"numeric": 1, "exact": 1}, answer, "5") == {"numeric": 1.0, "exact": 0.0}
    assert scores({"exact": 1}, "<think>so</think> Yes ", "<think>other</think>Yes") == {"exact": 1.0}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\n</think>\n<answer>b</answer>\n", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think> well <answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
    ],
)
def test_tags(answer, expected):
    assert scores({"format": {"tags": ["think", "answer"]}}, answer) == {"format": expected}


@pytest.mark.parametrize(("answer", "expected"), [("so\n#### 1,218", 1.0), ("#### $5", 1.0), ("####", 0.0), ("5", 0.0)])
def test_a_final_number(answer, expected):
    assert scores({"format": {"final": True}}, answer) == {"format": expected}


def test_a_pattern():
    assert scores({"format": {"pattern": r"^a.*z$"}}, "a\nz") == {"format": 1.0}
    assert scores({"format": {"pattern": r"^a.*z$"}}, "az?") == {"format": 0.0}


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (2, 0.5), (4, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (50, 0.0)]
)
def test_length(words, expected):
    assert scores({"length": {"min": 4, "max": 10}}, "w " * words) == {"length": expected}


def test_repetition():
    assert scores({"repetition": 1}, "one two three four five six") == {"repetition": 0.0}
    assert scores({"repetition": {"words": 1}}, "a a a a") == {"repetition": -0.75}
    assert scores({"repetition": {"words": 2}}, "a b a b a") == {"repetition": -0.5}
    assert scores({"repetition": 1}, "") == {"repetition": 0.0}


def test_a_program_judges_code():
    reward = {"command": {"run": ["python", "{file}"], "file": "solution.py", "tests": ["tests"]}}
    row = {"tests": "assert double(3) == 6"}
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    assert scores(reward, right, row=row) == {"command": 1.0}
    assert scores(reward, f"Like this:\n```python\n{right}\n```\nDone.", row=row) == {"command": 1.0}
    assert scores(reward, wrong, row=row) == {"command": 0.0}
    slow = {"command": {**reward["command"], "timeout": 1}}
    assert scores(slow, "while True: pass", row=row) == {"command": 0.0}
    with pytest.raises(UserError) as told:
        scores(reward, right, row={})
    assert "no field" in told.value.what and "line 3" in told.value.where


def test_a_function_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "def fair(answer, reference, row):\n    return row['marks'][answer]\n\ndef none(answer, reference, row):\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scores({"judge:fair": 1}, "a", row={"marks": {"a": 0.25}}) == {"judge:fair": 0.25}
    for name, what in (("judge:fair", "KeyError"), ("judge:none", "returned None, not a number")):
        with pytest.raises(UserError) as told:
            scores({name: 1}, "b", row={"marks": {}})
        assert what in told.value.what and told.value.where.startswith("my.jsonl, line 3")
        assert "--on_reward_error" in told.value.fix
        assert scores({name: 1}, "b", row={"marks": {}}, on_error=-1.0) == {name: -1.0}


@pytest.mark.parametrize(
    ("rewards", "what"),
    [
        ({}, "grpo without rewards"),
        ({"numerics": 1}, "there is no reward 'numerics'"),
        ({"numeric": "much"}, "the weight 'much' is not a number"),
        ({"numeric": True}, "the weight True is not a number"),
        ({"numeric": {"weight": 1, "form": 2}}, "form: extra inputs are not permitted"),
        ({"format": 1}, "give one of `pattern`, `tags` and `final: true`"),
        ({"format": {"pattern": "("}}, "not a regular expression"),
        ({"length": {"min": 5, "max": 2}}, "`min` is more than `max`"),
        ({"length": 1}, "give `min`, `max` or both"),
        ({"command": 1}, "run: field required"),
        ({"model": 1}, "model: field required"),
    ],
)
def test_wrong_rewards(rewards, what):
    with pytest.raises(UserError) as told:
        read_rewards(rewards)
    assert what in told.value.what and told.value.fix


def test_a_function_that_is_not_there():
    with pytest.raises(UserError) as told:
        scorers(read_rewards({"no_such_module:f": 1}))
    assert "no_such_module" in told.value.what
