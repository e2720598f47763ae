"""`manyrank data prepare` from files to a folder: what is in it, what is counted, and what is left after an error."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from launches import ROOT

from manyrank.data.formats import detect, to_sample
from manyrank.data.sources import Source, read_rows
from manyrank.errors import UserError
from manyrank.project_files import asset
from manyrank.tools.prepare.filters import Item, build_stages
from manyrank.tools.prepare.main import examples, main, question, read_config, split_of

SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k_model_solutions.jsonl"
PARTS = {"train": 0.85, "validation": 0.15}
FIELDS = {"question": "q", "answer": "run.text"}


def raw(number: int, **more) -> dict:
    return {"q": f"What is {number}?", "run": {"ok": number % 4 != 0, "text": f"It is {number}, für immer."}, **more}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the command on rows in a folder of its own."""

    def run(rows: list | None, *argv: str, **config) -> Path:
        if rows is not None:
            write_lines(tmp_path / "raw.jsonl", rows)
        values = {"data_path": str(tmp_path / "raw.jsonl"), "output_dir": str(tmp_path / "out"), **config}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        capsys.readouterr()
        assert main([str(tmp_path / "config.yaml"), *argv]) == 0
        return tmp_path / "out"

    return run


@pytest.fixture
def refused(prepare, tmp_path):
    """The error of a run, after which nothing new may be there."""

    def run(rows: list | None, *argv: str, **config) -> UserError:
        before = sorted(path for path in tmp_path.rglob("*") if path.suffix != ".yaml" and path.name != "raw.jsonl")
        with pytest.raises(UserError) as caught:
            prepare(rows, *argv, **config)
        after = sorted(path for path in tmp_path.rglob("*") if path.suffix != ".yaml" and path.name != "raw.jsonl")
        assert after == before
        return caught.value

    return run


def summary(folder: Path) -> dict:
    return json.loads((folder / "sft_data_summary.json").read_text(encoding="utf-8"))


# The folder


def test_everything_is_written(prepare, tmp_path, capsys):
    folder = prepare(
        [raw(number) for number in range(1, 101)],
        fields=FIELDS,
        filters=[{"correct": {"field": "run.ok"}}, "dedup", {"length": {"field": "run.text", "max": 22}}],
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset",
        "sft_data_summary.json",
        "train.jsonl",
        "validation.jsonl",
    ]
    files = {name: read_lines(folder / f"{name}.jsonl") for name in PARTS}
    expected = [{"question": f"What is {n}?", "answer": f"It is {n}, für immer."} for n in range(1, 100) if n % 4]
    assert sorted(sum(files.values(), []), key=str) == sorted(expected, key=str)
    assert files["train"] == [row for row in expected if row in files["train"]]  # in order
    saved = load_from_disk(folder / "dataset")
    assert {name: rows.to_list() for name, rows in saved.items()} == files
    assert "für" in (folder / "train.jsonl").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("out.partial*"))

    found = summary(folder)
    assert [(one["filter"], one["in"], one["out"], one["dropped"]) for one in found["filters"]] == [
        ("correct", 100, 75, {"not correct": 25}),
        ("dedup", 75, 75, {}),
        ("length", 75, 75, {}),
    ]
    assert (found["accuracy"], found["rows_read"], found["rows_written"]) == (0.75, 100, 75)
    assert found["splits"] == {name: len(rows) for name, rows in files.items()}
    assert found["format"] == "question_answer"
    assert found["config"]["fields"] == FIELDS
    content = (tmp_path / "raw.jsonl").read_bytes()
    assert found["sources"] == [
        {
            "path": str(tmp_path / "raw.jsonl"),
            "split": None,
            "rows": 100,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    ]

    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["filter", "in", "out", "dropped", "reasons"]
    assert said[1].split() == ["1", "correct", "100", "75", "25", "not", "correct", "25"]
    assert said[-1] == f"written to {folder}"


def test_rows_without_fields_are_kept_as_they_are(prepare):
    rows = [
        {"messages": [{"role": "user", "content": f"u{n}"}, {"role": "assistant", "content": "a"}], "id": n}
        for n in range(9)
    ]
    folder = prepare(rows, splits={"all": 1})
    assert read_lines(folder / "all.jsonl") == rows
    assert load_from_disk(folder / "dataset")["all"].to_list() == rows
    assert summary(folder)["format"] == "messages"


def test_the_folder_itself_is_a_source_of_its_splits(prepare):
    folder = prepare([{"question": f"q{n}", "answer": "a"} for n in range(40)])
    for split, name in ((None, "train"), ("validation", "validation")):
        rows = [row.value for row in read_rows(Source(str(folder), split=split))]
        assert rows and rows == read_lines(folder / f"{name}.jsonl")
    with pytest.raises(UserError, match=r"no split 'test'(.|\n)*train, validation"):
        list(read_rows(Source(str(folder), split="test")))


def test_what_is_written_can_be_trained_on(prepare):
    folder = prepare([raw(number) for number in range(1, 9)], fields=FIELDS, splits={"train": 1})
    for path in (folder / "train.jsonl", folder / "dataset"):
        rows = list(read_rows(Source(str(path), split="train" if path.is_dir() else None)))
        assert len(rows) == 8
        assert all(detect(row.value, where="") == ("question_answer", None) for row in rows)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
MIXED = [
    {
        "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "day": "2024-01-01",
        "score": 1,
        "tags": ["a"],
        "meta": {"by": "x"},
        "any": 1,
        "big": 2**62,
        "none": None,
    },
    {
        "messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}],
        "day": "2024-01-02",
        "score": 2.5,
        "tags": [],
        "meta": {"by": "y"},
        "any": "one",
        "big": 3,
        "none": None,
    },
    {
        "messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "c", "reasoning_content": "r"}],
        "day": "",
        "score": None,
        "tags": None,
        "meta": None,
        "any": [{"deep": [None, {}]}],
        "big": None,
        "none": None,
    },
]


def test_rows_of_any_shape_survive_the_table(prepare):
    folder = prepare(MIXED, splits={"train": 1})
    assert read_lines(folder / "train.jsonl") == MIXED
    assert load_from_disk(folder / "dataset")["train"].to_list() == MIXED


def test_a_column_of_any_two_values_survives_the_table(prepare):
    values = [None, 1, 2.5, "a", True, "2024-01-01", [], [1], ["a"], {}, {"a": 1}, {"a": None}, {"b": 1}, {"a": "x"}]
    talk = {"question": "q", "answer": "a"}
    pairs = [(one, other) for one in values for other in values]
    rows = [talk | {f"column{at}": pair[side] for at, pair in enumerate(pairs)} for side in (0, 1)]
    folder = prepare(rows, splits={"train": 1})
    assert load_from_disk(folder / "dataset")["train"].to_list() == rows == read_lines(folder / "train.jsonl")


def test_a_column_that_no_table_can_hold(refused):
    talk = {"question": "q", "answer": "a"}
    error = refused([talk | {"x": 2.5}, talk | {"x": 2**62}], splits={"train": 1})
    assert error.what.startswith("no table can hold the rows") and error.where == "train.jsonl"


def test_an_empty_split_has_no_file(prepare, capsys):
    folder = prepare([raw(1)], fields=FIELDS, splits={"a": 0.5, "b": 0.5})
    full, empty = ("a", "b") if (folder / "a.jsonl").exists() else ("b", "a")
    assert not (folder / f"{empty}.jsonl").exists()
    assert list(load_from_disk(folder / "dataset")) == [full]
    assert f"{empty:<20} {0:>9}  (no file)" in capsys.readouterr().out


# Splits


def test_rows_never_move_and_questions_stay_together(prepare):
    rows = [raw(number % 60, run={"text": f"answer {number}"}) for number in range(180)]

    def places(folder: Path) -> dict[str, str]:
        found = {(row["question"], name) for name in PARTS for row in read_lines(folder / f"{name}.jsonl")}
        assert len(dict(found)) == len(found)  # each question on one side
        return dict(found)

    few = places(prepare(rows[:100], fields=FIELDS))
    many = places(
        prepare([*reversed(rows), *(raw(number) for number in range(500, 600))], "--overwrite", fields=FIELDS)
    )
    assert len(many) == 160
    assert few.items() <= many.items()


def test_the_parts_are_as_asked():
    splits = {"train": 0.7, "validation": 0.2, "test": 0.1}
    found = Counter(split_of(f"question {number}", splits) for number in range(20_000))
    for name, part in splits.items():
        assert abs(found[name] / 20_000 - part) < 4 * (part * (1 - part) / 20_000) ** 0.5
    assert list(splits) == [name for name, _ in found.most_common()]


@given(st.text())
def test_one_split_takes_all(text):
    assert split_of(text, {"train": 1.0}) == "train"
    assert split_of(text, PARTS) == split_of(f"  {text}\n", PARTS)


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"question": "q", "answer": "a", "source": "s"}, ["q"]),
        ({"instruction": "i", "input": "n", "output": "o", "system": "s"}, ["i\n\nn"]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "1"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "2"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            ["1"],
        ),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}, ["s"]),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ["a"]),
        ({"text": "t"}, "t"),
        ({"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}, [1, 5]),
        ({"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}, [1, 5, 6]),
        ({"input_ids": [1, 5, 6]}, [1, 5, 6]),
    ],
)
def test_the_question_of_a_row(row, expected):
    assert question(to_sample(row, *detect(row, where=""))) == expected


# Sources


def test_several_sources(prepare, tmp_path):
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(raw(number)) + "\n" for number in range(50, 60))
    (tmp_path / "array.json").write_text(json.dumps([raw(number) for number in range(80, 90)]))
    folder = prepare(
        [raw(number) for number in range(5)],
        data_path=[
            str(tmp_path / "raw.jsonl"),
            {"path": str(tmp_path / "more.jsonl.gz"), "max_rows": 3},
            str(tmp_path / "array.json"),
        ],
        fields=FIELDS,
        splits={"train": 1},
        max_rows=10,
    )
    assert [row["question"] for row in read_lines(folder / "train.jsonl")] == [
        f"What is {number}?" for number in (*range(5), 50, 51, 52, 80, 81)
    ]
    assert [source["rows"] for source in summary(folder)["sources"]] == [5, 3, 2]


def test_a_folder_that_was_prepared_can_be_a_source(prepare, tmp_path):
    first = prepare([raw(number) for number in range(1, 30)], fields=FIELDS)
    rows = read_lines(first / "train.jsonl")
    source = {"path": str(first / "dataset"), "split": "train"}
    again = prepare(None, data_path=source, output_dir=str(tmp_path / "again"), splits={"train": 1})
    assert read_lines(again / "train.jsonl") == rows
    assert len(summary(again)["sources"][0]["sha256"]) == 64


def test_columns_and_format_of_a_source(prepare, tmp_path):
    source = {
        "path": str(tmp_path / "raw.jsonl"),
        "format_type": "question_answer",
        "columns": {"question": "q", "answer": "a"},
    }
    folder = prepare([{"q": "1", "a": "one"}], data_path=[source], splits={"train": 1})
    assert read_lines(folder / "train.jsonl") == [{"q": "1", "a": "one"}]
    assert summary(folder)["format"] == "question_answer"


def test_sources_of_two_formats(refused, tmp_path):
    write_lines(tmp_path / "raw2.jsonl", [{"text": "t"}])
    found = refused(
        [{"question": "q", "answer": "a"}], data_path=[str(tmp_path / "raw.jsonl"), str(tmp_path / "raw2.jsonl")]
    )
    assert "has the format text, another source question_answer" in found.what


def test_a_file_that_is_not_there(refused, tmp_path):
    assert "nowhere.jsonl" in refused([raw(1)], data_path=str(tmp_path / "nowhere.jsonl")).what


# Broken rows


def test_broken_rows_stop_by_default(refused, tmp_path):
    found = refused([raw(1), {"q": "no run"}], fields=FIELDS, filters=[{"correct": {"field": "run.ok"}}])
    assert found.what == "the row has no field 'run.ok'"
    assert found.where == f"{tmp_path / 'raw.jsonl'}, line 2, filter 1 (correct)"
    assert "on_bad_row: skip" in found.fix


def test_broken_rows_are_put_aside(prepare, tmp_path, capsys):
    rows = [
        raw(1),
        '{"q": ',
        raw(2, run={"text": "no ok"}),
        {"q": "q", "run": {"ok": True}},
        "[1]",
        raw(3, run={"ok": True, "text": ""}),
        raw(5, run={"ok": True, "text": "half \ud800"}),
        raw(7),
    ]
    folder = prepare(
        rows, fields=FIELDS, filters=[{"correct": {"field": "run.ok"}}], splits={"train": 1}, on_bad_row="skip"
    )
    assert [row["question"] for row in read_lines(folder / "train.jsonl")] == ["What is 1?", "What is 7?"]
    aside = read_lines(folder / "quarantine.jsonl")
    assert [(entry["place"].rpartition(" ")[2], entry["stage"], entry["reason"]) for entry in aside] == [
        ("2", "reading", "not JSON"),
        ("3", "filter 1 (correct)", "missing field"),
        ("4", "training row", "missing field"),
        ("5", "reading", "not an object"),
        ("6", "training row", "empty field"),
        ("7", "training row", "half a surrogate pair"),
    ]
    assert aside[1]["row"] == rows[2] and aside[5]["row"] == rows[6]
    assert "'run.ok'" in aside[1]["detail"]
    found = summary(folder)
    assert found["quarantined"] == Counter(entry["reason"] for entry in aside)
    assert (found["rows_read"], found["rows_written"], found["filters"][0]["broken"]) == (8, 2, 1)
    assert "6 quarantined in quarantine.jsonl: missing field 2, " in capsys.readouterr().out


@pytest.mark.parametrize("more, reason", [("NaN", "NaN"), ("-Infinity", "NaN"), (f"[{2**63}]", "number too large")])
def test_numbers_that_cannot_be_kept(prepare, more, reason):
    rows = ['{"question": "q", "answer": "a"}', f'{{"question": "q", "answer": "a", "score": {more}}}']
    folder = prepare(rows, on_bad_row="skip", splits={"train": 1})
    assert summary(folder)["quarantined"] == {reason: 1}
    assert len(read_lines(folder / "train.jsonl")) == 1


def test_rows_of_no_format(prepare, refused, tmp_path):
    rows = [{"odd": 1}, {"question": "q", "answer": "a"}]
    assert refused(rows).what == "no format has the keys ['odd']"
    assert summary(prepare(rows, on_bad_row="skip"))["quarantined"] == {"unknown format": 1}


def test_nothing_left(refused, tmp_path):
    found = refused([raw(4), raw(8)], fields=FIELDS, filters=["dedup", {"correct": {"field": "run.ok"}}])
    assert found.what == "no row is left of 2"
    assert "2 (correct)" in found.fix


# The output folder


def test_a_folder_that_is_there(prepare, refused, tmp_path):
    folder = prepare([raw(1)], fields=FIELDS)
    before = (folder / "sft_data_summary.json").read_bytes()
    found = refused([raw(2)], fields=FIELDS)
    assert (found.what, found.where) == (f"{folder} is there already", "output_dir")
    assert (folder / "sft_data_summary.json").read_bytes() == before
    prepare([raw(2), raw(3)], "--overwrite", fields=FIELDS)
    assert summary(folder)["rows_read"] == 2


def test_an_old_folder_stays_after_an_error(prepare, refused):
    folder = prepare([raw(1)], fields=FIELDS)
    assert (
        refused([raw(4)], "--overwrite=true", fields=FIELDS, filters=[{"correct": {"field": "run.ok"}}]).what
        == "no row is left of 1"
    )
    assert summary(folder)["rows_written"] == 1


def test_a_folder_of_somebody_else_is_never_replaced(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert refused([raw(1)], "--overwrite", fields=FIELDS).what == f"there is something else at {tmp_path / 'out'}"
    assert refused([raw(1)], fields=FIELDS, output_dir=str(tmp_path / "out" / "thesis.tex")).what.endswith("is a file")


def test_a_source_is_never_replaced(prepare, refused, tmp_path):
    folder = prepare([raw(1)], fields=FIELDS, splits={"train": 1})
    found = refused(None, "--overwrite", data_path=str(folder / "train.jsonl"))
    assert found.what == f"{folder / 'train.jsonl'} would be replaced"


def test_the_output_is_no_part_of_a_source(refused, tmp_path):
    (tmp_path / "raw").mkdir()
    write_lines(tmp_path / "raw" / "rows.jsonl", [raw(1)])
    error = refused(None, data_path=str(tmp_path / "raw"), output_dir=str(tmp_path / "raw" / "out"))
    assert error.what.startswith("it lies in the source folder") and error.where == "output_dir"


def test_an_empty_folder_is_taken(prepare, tmp_path):
    (tmp_path / "out").mkdir()
    assert summary(prepare([raw(1)], fields=FIELDS))["rows_written"] == 1


def test_what_a_killed_run_left_is_no_obstacle(prepare, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "train.jsonl").write_text("old")
    folder = prepare([raw(1)], fields=FIELDS, splits={"other": 1})
    assert not (folder / "train.jsonl").exists()


# Config and command line


def test_the_command_line_comes_last(prepare, tmp_path):
    write_lines(tmp_path / "other.jsonl", [raw(number) for number in range(1, 9)])
    argv = [
        "--data-path",
        str(tmp_path / "other.jsonl"),
        "--limit=3",
        "--output_dir",
        str(tmp_path / "there"),
        "--workers",
        "2",
    ]
    prepare([raw(1)], *argv, fields=FIELDS, max_rows=1)
    found = summary(tmp_path / "there")
    assert (found["rows_read"], found["config"]["max_rows"], found["config"]["workers"]) == (3, 3, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, what, fix",
    [
        ({"filter": []}, "there is no option 'filter'", "did you mean filters?"),
        ({"splits": {"train": 0.9, "validation": 0.2}}, "the parts sum to 1.1, not to 1", "README"),
        ({"splits": {"train": 1.5, "validation": -0.5}}, "the part of train is not between 0 and 1", "README"),
        ({"splits": {"a/b": 1}}, "'a/b' cannot name a split", "README"),
        ({"splits": {"quarantine": 1}}, "'quarantine' cannot name a split", "README"),
        ({"splits": {}}, "splits: {} is invalid", "README"),
        ({"on_bad_row": "drop"}, "on_bad_row: 'drop' is invalid", "README"),
        ({"max_rows": 0}, "max_rows: 0 is invalid", "README"),
        ({"fields": ["question"]}, "fields: ['question'] is invalid", "README"),
        ({"filters": "dedup"}, "filters: 'dedup' is invalid", "README"),
        ({"filters": ["dedupe"]}, "there is no filter 'dedupe'", "did you mean dedup?"),
        ({"data_path": {"path": "a", "weight": 2}}, "there is no option 'weight'", "there are path"),
        ({"data_path": {"paht": "a"}}, "there is no option 'paht'", "did you mean path?"),
        ({"data_path": []}, "data_path: [] is invalid", "README"),
        ({"data_path": 5}, "5 is not a mapping of options", "path"),
    ],
)
def test_wrong_configs(refused, config, what, fix):
    found = refused([raw(1)], **config)
    assert what in found.what
    assert fix in found.fix


@pytest.mark.parametrize(
    "argv, what, fix",
    [
        (["--outputdir", "x"], "there is no option '--outputdir'", "did you mean --output_dir?"),
        (["--max_rows", "few"], "max_rows: 'few' is invalid", "README"),
        (
            ["--overwrite", "perhaps"],
            "--overwrite: 'perhaps' is none of its values",
            "--overwrite: replace an output_dir",
        ),
        (["--output_dir"], "--output_dir needs a value", "the folder to write"),
    ],
)
def test_wrong_command_lines(refused, argv, what, fix):
    found = refused([raw(1)], *argv, fields=FIELDS)
    assert what in found.what
    assert fix in found.fix


@pytest.mark.parametrize(
    "content, what",
    [
        ("data_path: a\ndata_path: b\n", "the key 'data_path' is given twice"),
        ("a: [", "not valid YAML"),
        ("- a\n", "expected a YAML mapping"),
        ("output_dir: x\n", "data_path must be given"),
    ],
)
def test_wrong_files(tmp_path, content, what):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=what):
        main([str(tmp_path / "config.yaml")])


def test_a_config_that_is_not_there():
    with pytest.raises(UserError) as caught:
        main(["nowhere.yaml"])
    assert caught.value.what == "there is no config nowhere.yaml"
    assert all(name in caught.value.fix for name in examples())


def test_there_are_examples():
    assert examples() == ["code", "gsm8k_verified"]


@pytest.mark.parametrize("name", examples())
def test_the_examples_are_right(name):
    config, _ = read_config([name])
    assert build_stages(config.filters, workers=1, where=name)


# The examples at work


def test_the_code_example(tmp_path, capsys):
    add = "def add(a, b):\n    return a + b\n"
    rows = [
        {"prompt": "Add.", "completion": add, "tests": "assert add(1, 2) == 3"},
        {"prompt": "Add!", "completion": add, "tests": "assert add(1, 2) == 3"},
        {"prompt": "Add wrongly.", "completion": add.replace("+", "-"), "tests": "assert add(1, 2) == 3"},
        {
            "prompt": "Add for ever.",
            "completion": "def add(a, b):\n    while True: pass\n",
            "tests": "assert add(1, 2) == 3",
        },
        {"prompt": "Add nothing.", "completion": "def add(a, b)\n    return a + b\n", "tests": "assert add(1, 2) == 3"},
        {"prompt": "Untested.", "completion": "def sub(a, b):\n    return a - b\n", "tests": "sub(1, 2)"},
        {"prompt": "Nothing."},
    ]
    config = yaml.safe_load(asset("data", "prepare", "code.yaml").read_text(encoding="utf-8"))
    command = next(one["command"] for one in config["filters"] if "command" in one)
    command |= {"timeout": 2, "network": True}  # some machines forbid namespaces; those have their own tests
    config |= {"data_path": str(write_lines(tmp_path / "code.jsonl", rows)), "output_dir": str(tmp_path / "out")}
    (tmp_path / "code.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main([str(tmp_path / "code.yaml")]) == 0
    found = summary(tmp_path / "out")
    assert [(one["filter"], one["dropped"]) for one in found["filters"]] == [
        ("dedup", {"duplicate": 1}),
        ("quality", {"does not parse": 1}),
        ("quality", {"no tests": 1}),
        ("command", {"exit code 1": 1, "time limit": 1}),
        ("dedup", {}),
    ]
    assert (found["rows_written"], found["quarantined"]) == (1, {"missing field": 1})
    written = sum((read_lines(path) for path in (tmp_path / "out").glob("[tv]*.jsonl")), [])
    assert written == [{"prompt": "Add.", "completion": add}]


@pytest.mark.skipif(not SOLUTIONS.is_file(), reason="the file is not part of the project")
class TestRealSolutions:
    """GSM8K's model solutions, as the example prepares them."""

    def test_the_example(self, tmp_path):
        assert main(["gsm8k_verified", "--data_path", str(SOLUTIONS), "--output_dir", str(tmp_path / "out")]) == 0
        found = summary(tmp_path / "out")
        assert (found["rows_read"], found["rows_written"]) == (1319, 742)
        assert found["splits"] == {"train": 625, "validation": 117}
        right = [row for row in read_lines(SOLUTIONS) if row["175b_verification"]["is_correct"]]
        written = sum((read_lines(tmp_path / "out" / f"{name}.jsonl") for name in PARTS), [])
        assert sorted((row["question"], row["answer"]) for row in written) == sorted(
            (row["question"], row["175b_verification"]["solution"]) for row in right
        )
        assert {name: rows.to_list() for name, rows in load_from_disk(tmp_path / "out" / "dataset").items()} == {
            name: read_lines(tmp_path / "out" / f"{name}.jsonl") for name in PARTS
        }

    @pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
    def test_numbers_agree_with_the_given_verdicts(self, model):
        check = {"prediction": f"{model}.solution", "reference": "ground_truth", "numeric": True}
        judge = build_stages([{"correct": check}], workers=1, where="")[0].check
        rows = read_lines(SOLUTIONS)
        assert [judge(Item("", row)) is None for row in rows] == [row[model]["is_correct"] for row in rows]
