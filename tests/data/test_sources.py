"""Files of every kind become rows with their places; broken rows are values, broken files are the user's error."""

import codecs
import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyrank.chat_template.types import BadRow
from manyrank.data.json_array import CHUNK
from manyrank.data.prompts import read_prompts
from manyrank.data.sources import Source, fingerprint, read_rows
from manyrank.errors import UserError

ROW = {"question": "q", "answer": "a"}


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".zst": zst}


def read(path: Path | str, **more) -> list[tuple[int, dict | str]]:
    """Numbers with rows, or with the reasons of bad ones."""
    rows = read_rows(Source(str(path), **more))
    return [(row.number, row.value.reason if isinstance(row.value, BadRow) else row.value) for row in rows]


def read_error(path: Path | str, **more) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, **more)
    return caught.value


# JSON and JSONL


def test_places_are_lines_of_jsonl(file):
    path = file(f"\n{json.dumps(ROW)}\n\n  \n{json.dumps({'b': 2})}")
    rows = list(read_rows(Source(str(path))))
    assert [(row.number, row.place, row.value) for row in rows] == [
        (2, f"{path}, line 2", ROW),
        (5, f"{path}, line 5", {"b": 2}),
    ]


def test_places_are_items_of_an_array(file):
    path = file(json.dumps([ROW, {"b": 2}], indent=2), "rows.json")
    rows = list(read_rows(Source(str(path))))
    assert [(row.number, row.place, row.value) for row in rows] == [
        (1, f"{path}, item 1", ROW),
        (2, f"{path}, item 2", {"b": 2}),
    ]


def test_the_content_decides_and_not_the_name(file):
    assert read(file(f"\n {json.dumps([ROW])}")) == [(1, ROW)]
    assert read(file(json.dumps(ROW), "rows.json")) == [(1, ROW)]


@pytest.mark.parametrize("content", [json.dumps(ROW), json.dumps([ROW]), "\n" + json.dumps([ROW])])
def test_a_byte_order_mark_is_skipped(file, content):
    assert read(file(content.encode("utf-8-sig")))[0][1] == ROW


def test_windows_line_ends(file):
    assert read(file('{"a": "x"}\r\n{"a": "y"}\r\n')) == [(1, {"a": "x"}), (2, {"a": "y"})]


def test_line_separators_inside_text_do_not_end_a_row(file):
    row = {"a": "x\u2028y\x85z"}
    assert read(file(json.dumps(row, ensure_ascii=False))) == [(1, row)]


@pytest.mark.parametrize(
    "broken, reason",
    [
        (b'{"a": 1}, ', "not JSON"),
        (b'{"a" 1}', "not JSON"),
        (b"nonsense", "not JSON"),
        (b'{"a": "unfinished', "not JSON"),
        (b'{"a": "\x00"}', "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'"text"', "not an object"),
        (b"[1]", "not an object"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_a_bad_row(file, broken, reason):
    filler = json.dumps({"a": "x" * 99}).encode() + b"\n"
    before = 2 * (1 << 20) // len(filler)  # the broken line is not in the part that is looked at first
    path = file(filler * before + broken + b'\n{"a": 2}\n')
    rows = read(path)
    assert rows[before:] == [(before + 1, reason), (before + 2, {"a": 2})]


def test_a_bad_row_names_its_column(file):
    value = next(read_rows(Source(str(file('{"a" 1}\n'))))).value
    assert str(value) == "broken JSON: Expecting ':' delimiter (column 6)"


@pytest.mark.parametrize("content", ['{\n "data": [\n {"a": 1}\n ]\n}', '{"data": [\n{"a": 1}\n]}'])
def test_one_object_over_several_lines(file, content):
    caught = read_error(path := file(content, "rows.json"))
    assert (caught.what, caught.where) == ("one object over several lines", f"{path}, line 1")


@pytest.mark.parametrize(
    "content, place",
    [
        ('[\n {"a": 1},\n {"a": 2,,}\n]', "line 3, column 10"),
        ('[\n {"a": 1}\n {"a": 2}\n]', "line 3, column 2"),
        ('[{"a": 1}, {"a": "x', "line 1, column 18"),
        ('[{"a": 1}, {"a": 2}', "line 1, column 20"),
        ('[{"a": 1},]', "line 1, column 11"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2, column 1"),
        ("[", "line 1, column 2"),
        ('[{"a":' * 20_000, "line 1, column 2"),
    ],
)
def test_broken_json_in_an_array_names_its_place(file, content, place):
    path = file(content, "rows.json")
    caught = read_error(path)
    assert caught.what.startswith("broken JSON: ")
    assert caught.where == f"{path}, {place}"


def test_a_place_far_into_an_array(file):
    lines = [json.dumps({"a": "é" * 1000}, ensure_ascii=False) + "," for _ in range(3000)]
    path = file("[\n" + "\n".join(lines) + '\n  {"a": }\n]', "rows.json")
    assert read_error(path).where == f"{path}, line 3002, column 9"


def test_items_before_broken_json_are_read(file):
    rows = read_rows(Source(str(file('[{"a": 1}, {"a"', "rows.json"))))
    assert next(rows).value == {"a": 1}


def test_items_that_are_no_rows(file):
    assert read(file(b'[{"a": 1}, 3, {"a": "\xff"}, {"a": 4}]', "rows.json")) == [
        (1, {"a": 1}),
        (2, "not an object"),
        (3, "not UTF-8"),
        (4, {"a": 4}),
    ]


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 14, 20, 22])
def test_items_that_lie_over_the_edge_of_what_is_read(file, cut):
    tail = '{"a": -12.5e3, "b": [true, false, null, "\\u00e9\\n"]}'
    start = '[{"a": "'
    content = start + "x" * (CHUNK - len(start) - 4 - cut) + '"}, ' + tail + ", 123456789]"
    (_, first), *rest = read(file(content, "rows.json"))
    assert set(first["a"]) == {"x"}
    assert rest == [(2, json.loads(tail)), (3, "not an object")]


def test_an_item_longer_than_what_is_read_at_once(file):
    row = {"a": "\\" * (3 * CHUNK)}
    assert read(file(json.dumps([row, ROW]), "rows.json")) == [(1, row), (2, ROW)]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1), st.booleans())
def test_rows_survive_a_file(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    for content in ("\n".join(lines), f"[{', '.join(lines)}]"):
        path.write_text(content, encoding="utf-8", newline="")
        assert read(path) == list(enumerate(rows, 1))


# Archives


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("content", [f"\n{json.dumps(ROW)}\n", json.dumps([ROW]), "\ufeff" + json.dumps([ROW])])
def test_archives(file, content, suffix):
    path = file(PACKED[suffix](content.encode()), f"rows.json{suffix}")
    assert [value for _, value in read(path)] == [ROW]


@pytest.mark.parametrize("suffix", PACKED)
def test_an_archive_of_two_parts(file, suffix):
    lines = [json.dumps(ROW).encode() + b"\n", json.dumps({"b": 2}).encode()]
    path = file(b"".join(map(PACKED[suffix], lines)), f"rows.jsonl{suffix}")
    assert read(path) == [(1, ROW), (2, {"b": 2})]


@pytest.mark.parametrize("suffix", PACKED)
def test_a_table_in_an_archive(file, suffix):
    assert read(file(PACKED[suffix](b"a,b\n1,2\n"), f"rows.CSV{suffix}")) == [(2, {"a": "1", "b": "2"})]


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_its_end(content: bytes) -> bytes:
    return content[:-4]


def garbled(content: bytes) -> bytes:
    """More than a block of zstd, whose frames need not have a checksum."""
    return content[:100_000] + b"\xff" * 200_000 + content[300_000:]


def plain(content: bytes) -> bytes:
    return b'{"a": 1}\n'


@pytest.mark.parametrize("suffix", PACKED)
def test_a_damaged_archive(file, suffix):
    packed = PACKED[suffix]("\n".join(json.dumps({"a": os.urandom(40).hex()}) for _ in range(15_000)).encode())
    for damage in (halved, without_its_end, garbled, plain):
        caught = read_error(path := file(damage(packed), f"rows.jsonl{suffix}"))
        assert caught.what.startswith("a broken archive: "), damage
        assert caught.where == str(path)


# Tables


def test_a_table(file):
    content = '\ufeffquestion,answer\r\nq,"a, ""b""\r\nc"\r\n\r\nr,é\r\n'
    assert read(file(content, "rows.csv")) == [
        (2, {"question": "q", "answer": 'a, "b"\r\nc'}),
        (5, {"question": "r", "answer": "é"}),
    ]


def test_a_table_with_tabs(file):
    assert read(file("a\tb\n1,0\t\n", "rows.tsv")) == [(2, {"a": "1,0", "b": ""})]


def test_a_long_cell(file):
    assert read(file(f"a\n{'x' * 1_000_000}\n", "rows.csv")) == [(2, {"a": "x" * 1_000_000})]


def test_broken_lines_of_a_table(file):
    content = b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n1,\xff\n3,4\n'
    assert read(file(content, "rows.csv")) == [
        (2, {"a": "1", "b": "2"}),
        (3, "wrong number of cells"),
        (4, "wrong number of cells"),
        (5, "not CSV"),
        (6, "not UTF-8"),
        (7, {"a": "3", "b": "4"}),
    ]


def test_a_quote_that_is_not_closed(file):
    caught = read_error(path := file('a,b\n1,2\n1,"2\n3,4\n5,6\n', "rows.csv"))
    assert caught.what.startswith("broken CSV: ")
    assert caught.where == f"{path}, line 3"


def test_a_quote_that_takes_other_rows_with_it(file):
    """What of it is a row nobody knows, so nothing is skipped."""
    caught = read_error(path := file('q,a\nq1,a1\n"q2,a2\nq3,a3\n"q5",a5\nq6,a6\n', "rows.csv"))
    assert caught.what.startswith("broken CSV: ") and caught.where == f"{path}, line 3"


def test_what_stands_in_a_broken_row_is_kept(file):
    table = read_rows(Source(str(file(b'a,b\n1\n"x"y,2\n1,\xff\n', "rows.csv"))))
    assert [row.text for row in table] == ["1", '"x"y,2', "1,\\xff"]
    array = read_rows(Source(str(file('[{"a": 1}, "text", [2]]', "rows.json"))))
    assert [row.text for row in array] == ["", '"text"', "[2]"]
    lines = read_rows(Source(str(file('{"a": {\n{"a": 2}\n'))))
    assert [row.text for row in lines] == ['{"a": {', ""]


def test_semicolons(file):
    assert read_error(file("a;b\n1;2\n", "rows.csv")).what == "the cells are parted by semicolons"


def test_columns_of_the_same_name(file):
    assert read_error(file("a,b,a\n1,2,3\n", "rows.csv")).what == "two columns are called 'a'"


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=2, max_size=2)
    )
)
def test_any_table_survives(tmp_path_factory, cells):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["a", "b"], *cells, ["1", "2"]])
    assert [value for _, value in read(path)] == [dict(zip("ab", row)) for row in [*cells, ["1", "2"]]]


# Parquet and datasets

CALLS = [
    {"id": None, "calls": [{"name": "f", "arguments": {"x": 1}}]},
    {"id": 2, "calls": [{"name": "g", "arguments": {"y": "z"}}]},
]


@pytest.fixture
def saved(tmp_path):
    """A folder with one data set, and one with two splits."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(CALLS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    return tmp_path


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS * 500), path, row_group_size=300)
    rows = list(read_rows(Source(str(path))))
    assert [row.value for row in rows] == CALLS * 500
    assert (rows[-1].number, rows[-1].place) == (1000, f"{path}, row 1000")


def test_a_broken_parquet_file(file, tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS * 500), path)
    whole = path.read_bytes()
    for content in (whole[:-20], b"PAR1 and no more", whole[:40] + b"0" * 200 + whole[240:]):
        assert read_error(file(content, "broken.parquet")).where == str(tmp_path / "broken.parquet")


def test_a_saved_data_set(saved):
    assert read(saved / "one") == [(1, CALLS[0]), (2, CALLS[1])]
    assert read(saved / "two") == [(1, CALLS[0]), (2, CALLS[1])]
    assert read(saved / "two", split="test") == [(1, CALLS[1])]


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_split_that_a_saved_data_set_lacks(saved, name):
    assert read_error(saved / name, split="exam").what == "there is no split 'exam'"


def test_a_saved_data_set_that_is_broken(saved):
    (saved / "one" / "state.json").write_text("{}")
    assert read_error(saved / "one").what.startswith("datasets cannot read it: ")


def test_a_folder_with_data_files(tmp_path):
    for name, rows in {"train-0": [ROW], "train-1": [{"question": "r", "answer": "b"}], "test": [ROW] * 3}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path) == [(1, ROW), (2, {"question": "r", "answer": "b"})]
    assert len(read(tmp_path, split="test")) == 3
    caught = read_error(tmp_path, split="exam")
    assert "exam" in caught.what and str(tmp_path) in caught.where


def test_a_folder_whose_files_would_not_all_be_read(tmp_path):
    for name in ("train.jsonl", "extra.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    error = read_error(tmp_path)
    assert error.what.startswith("1 data files in it would not be read, extra.jsonl the first")
    (tmp_path / "extra.jsonl").rename(tmp_path / "test.jsonl")
    (tmp_path / "README.md").write_text("about the data")
    assert [row for _, row in read(tmp_path)] == [{"text": "a"}]


def test_a_folder_with_a_card_that_names_its_files(tmp_path):
    for name in ("main", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": name}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read(tmp_path, name="other") == [(1, {"text": "other"})]


def test_a_folder_without_data_files(tmp_path):
    assert read_error(tmp_path).what.startswith("datasets cannot read it: ")


def test_a_folder_with_a_broken_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"')
    assert read_error(tmp_path).what.startswith("datasets cannot read it: ")


def test_a_name_on_the_hub_without_a_connection():
    program = "from manyrank.data.sources import *; next(read_rows(Source('no/such-data-set', split='test')))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert "UserError: error: datasets cannot read it: " in done.stderr
    assert "where: no/such-data-set (test)" in done.stderr


# What is wrong with a whole file


@pytest.mark.parametrize(
    "content, name",
    [(b"", "e.jsonl"), (b"\n \n", "e.json"), (codecs.BOM_UTF8, "e.json"), (b"[ ]", "e.json"), (b"a,b\n", "e.csv")],
)
def test_no_rows(file, content, name):
    caught = read_error(path := file(content, name))
    assert (caught.what, caught.where) == ("there are no rows in it", str(path))


@pytest.mark.parametrize("suffix", PACKED)
def test_no_rows_in_an_archive(file, suffix):
    assert read_error(file(PACKED[suffix](b""), f"e.jsonl{suffix}")).what == "there are no rows in it"


@pytest.mark.parametrize("content", [json.dumps(ROW).encode("utf-16"), b"\x7fELF\x02\0\0", b"PK\x03\x04\x14\0"])
def test_a_binary_file(file, content):
    assert read_error(file(content)).what == "binary, not text in UTF-8"


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "nowhere.csv.gz", "some/folder/that/is/not/there", "../nowhere", "~/x"]
)
def test_a_file_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_error(name).what == f"there is no file {name}"
    with pytest.raises(UserError, match="there is no file"):
        fingerprint(Source(name))


def test_an_empty_path():
    with pytest.raises(UserError, match="the path is empty"):
        Source("")


def test_a_file_has_no_splits(file):
    assert read_error(file(json.dumps(ROW)), split="train").what == "a file has no split 'train'"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(file):
    path = file(json.dumps(ROW))
    path.chmod(0)
    assert "Permission denied" in read_error(path).what


# Fingerprints


def test_a_fingerprint_follows_the_content(file):
    first = fingerprint(Source(str(file("a,b\n1,2\n", "one.csv"))))
    assert fingerprint(Source(str(file("a,b\n1,2\n", "other.csv")))) == first
    assert fingerprint(Source(str(file("a,b\n1,3\n", "one.csv")))) != first
    assert fingerprint(Source(str(file("a,b\n1,2\n", "one.tsv")))) != first


def test_a_fingerprint_of_a_folder(saved):
    found = {fingerprint(Source(str(saved / "two"), split=split)) for split in (None, "train", "test")}
    assert len(found) == 3
    before = fingerprint(Source(str(saved / "one")))
    inside = saved / "one" / "more.txt"
    inside.write_text("x")
    more = fingerprint(Source(str(saved / "one")))
    inside.rename(inside.with_name("again.txt"))
    assert len({before, more, fingerprint(Source(str(saved / "one")))}) == 3


def test_a_fingerprint_of_a_name_on_the_hub():
    program = (
        "from manyrank.data.sources import *\n"
        "for name, split in (('no/such', None), ('no/such', 'test'), ('no/other', None), ('no/such', None)):\n"
        "    print(fingerprint(Source(name, split=split)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    found = done.stdout.split()
    assert found[0] == found[3] and len(set(found)) == 3, done.stderr


# Memory

READ = """
import resource, sys
from manyrank.data.sources import Source, read_rows
warm, path = sys.argv[1:]
list(read_rows(Source(warm)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for row in read_rows(Source(path)) if isinstance(row.value, dict))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "jsonl.gz", "json.zst", "parquet"])
def test_a_long_file_is_read_in_little_memory(tmp_path, kind):
    rows = 30_000
    paths = [tmp_path / f"warm.{kind}", tmp_path / f"long.{kind}"]
    for path, count in zip(paths, (10, rows)):
        _write(
            path,
            kind,
            ({"question": f"{number}" * 100, "answer": "é" * 750} for number in range(10_000, 10_000 + count)),
        )
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True)
    count, grown = map(int, done.stdout.split())
    assert count == rows, done.stderr
    assert grown < 30  # MiB; the rows have 60


def _write(path: Path, kind: str, rows) -> None:
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=1000)
    elif kind == "csv":
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = ("[" + ",\n".join(lines) + "]" if "jsonl" not in kind else "\n".join(lines)).encode()
        path.write_bytes(PACKED[path.suffix](content) if path.suffix in PACKED else content)


def test_prompts_of_rows_under_other_names(tmp_path):
    """With their answers, and with what stands beside the question."""
    file = tmp_path / "rows.jsonl"
    dolly = {"instruction": "q", "context": "c", "response": "a"}
    for row, expected in ((dolly, "q\n\nc"), ({"system_prompt": "", "query": "q", "response": "a"}, "q")):
        file.write_text(json.dumps(row) + "\n")
        (prompt,) = read_prompts(Source(str(file)))
        assert [message["content"] for message in prompt.messages] == [expected]
