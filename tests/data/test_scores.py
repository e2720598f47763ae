"""Every score on what models really write."""

from decimal import Decimal

import pytest

from manyrank.data.numeric import number
from manyrank.data.scores import choice, exact, f1, letter, normal_text, normalised, numeric, row_scores, scored
from manyrank.errors import UserError


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("Paris", " Paris\n", 1), ("paris", "Paris", 0), ("Paris.", "Paris", 0), ("", "", 1), ("a  b", "a b", 0)],
)
def test_exact(answer, reference, right):
    assert exact(answer, reference) == right


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("An apple, a day.", "apple day"),
        ("Theatre", "theatre"),
        ("It's\n\tfine", "its fine"),
        ("well-known", "wellknown"),
        ("1/3", "1/3"),
        ("1,000.50", "1000.50"),
        ("$5", "5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("3-4", "3-4"),
        ("x-5", "x5"),
        ("5.", "5"),
        ("10:30", "10:30"),
        ("“Straße”", "strasse"),
        ("ｆｕｌｌ", "full"),
        ("—", ""),
        ("the", ""),
        ("50%", "50"),
        ("2^4", "2^4"),
        (" .5", "5"),
        ("Ça va?", "ça va"),
        ("c++", "c"),
        ("日本。", "日本"),
    ],
)
def test_normal_text(text, normal):
    assert normal_text(text) == normal == normal_text(normal)


def test_normalised_keeps_numbers_apart():
    assert normalised("the Answer: 0.21.", "answer 0.21") == 1
    assert normalised("1/3", "13") == normalised("-5", "5") == normalised("2.5", "25") == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16 - 3 = 13\n#### 18", "18"),
        ("#### $1,218", "1218"),
        ("#### 1,218 for 3 days", "1218"),
        ("so 5 + 7 = 12.", "12"),
        ("A: 18.0", "18"),
        ("it costs $5.50", "5.5"),
        ("-3", "-3"),
        ("-$3", "-3"),
        ("\u22123", "-3"),
        ("7-3", "3"),
        ("50%", "50"),
        ("#### 1\n#### 2", "2"),
        ("1,000,000 people", "1000000"),
        ("\\boxed{42}", "42"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("1,2", "2"),
        ("5.0", "5"),
    ],
)
def test_number(text, value):
    assert number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "18\n#### nothing", "####", "-", "."])
def test_no_number(text):
    assert number(text) is None


def test_numeric():
    gold = "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
    assert numeric("... so $18.00", gold) == numeric("#### 18", gold) == numeric("5.0", "5") == 1
    assert (
        numeric("It is 81", gold) == numeric("eighteen", gold) == numeric("", gold) == numeric("18\n#### ?", gold) == 0
    )
    with pytest.raises(ValueError, match="no number"):
        numeric("5", "five")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("b) Paris", "B"),
        ("B: Paris", "B"),
        ("**C**", "C"),
        ("[D]", "D"),
        ("The answer is B.", "B"),
        ("the correct answer is (b).", "B"),
        ("Answer: C", "C"),
        ("ANSWER: **D**", "D"),
        ("Final answer: $\\boxed{E}$", "E"),
        ("A dog barks, so the answer is C", "C"),
        ("I think it is B", "B"),
        ("I'd say D.", "D"),
        ("Not (A), but (C)", "C"),
        ("Answer: A? No. The answer is B", "B"),
        ("It is A", "A"),
        ("A\nbecause", "A"),
        ("Option C is best", "C"),
        ("The answer is a dog. So B", "B"),
        ("J", "J"),
        ("D, since A fails", "D"),
        ("The answer is, I think, B", "B"),
        ("I, personally, pick C", "C"),
        ("The answer is I.", "I"),
        ("I", "I"),
    ],
)
def test_letter(text, chosen):
    assert letter(text) == chosen


@pytest.mark.parametrize(
    "text", ["", "A dog is an animal", "I am sure", "Paris", "K", "42", "I'm unsure", "the answer is a dog"]
)
def test_no_letter(text):
    assert letter(text) is None


def test_choice():
    assert choice("The answer is (B)", "B) Paris") == 1
    assert choice("C", "B") == choice("no idea", "B") == 0
    with pytest.raises(ValueError, match="no letter"):
        choice("B", "Paris")


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("the cat sat", "a cat sat", 1),
        ("cat", "cat sat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0),
        ("", "", 1),
        ("the", "", 1),
        ("", "cat", 0),
        ("a b c d", "b d", 0.8),
    ],
)
def test_f1(answer, reference, value):
    assert f1(answer, reference) == pytest.approx(value)


def test_scores_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "def length(answer, reference, row):\n    return len(answer) / row['most']\n\n"
        "def broken(answer, reference, row):\n    return 'good'\n"
    )
    monkeypatch.chdir(tmp_path)
    found = row_scores(["exact", "own_scores:length", "own_scores:broken"])
    row = {"most": 4}
    assert scored("exact", found["exact"], "a", "a", row, place="x, line 1") == 1.0
    assert scored("own_scores:length", found["own_scores:length"], "abc", "", row, place="x, line 1") == 0.75
    with pytest.raises(UserError, match="KeyError") as wrong:
        scored("own_scores:length", found["own_scores:length"], "abc", "", {}, place="x, line 7")
    assert "x, line 7" in wrong.value.where and "own_scores.py, line 2" in wrong.value.where
    with pytest.raises(UserError, match="'good', not a number"):
        scored("own_scores:broken", found["own_scores:broken"], "", "", row, place="x, line 1")
    with pytest.raises(UserError, match="no number") as wrong:
        scored("numeric", row_scores(["numeric"])["numeric"], "5", "five", {}, place="x, line 9")
    assert wrong.value.where == "x, line 9"


@pytest.mark.parametrize(
    ("name", "fix"),
    [("normalized", "did you mean normalised"), ("bleu", "one of exact"), ("nowhere:f", "module:function")],
)
def test_unknown_scores_are_refused(name, fix):
    with pytest.raises(UserError, match=name) as wrong:
        row_scores([name])
    assert fix in wrong.value.fix and wrong.value.where == "--metrics"
