"""Sources to examples: what becomes of every row, in which order, and what is kept in the cache."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from manyrank.chat_template.types import IGNORE
from manyrank.config.resolve import Setting, resolve
from manyrank.data import formats, tokenize
from manyrank.data.dataset import prepare, write_quarantine
from manyrank.data.loader import StepLoader, epoch_order
from manyrank.data.questions import read_questions
from manyrank.data.sources import Source
from manyrank.data.tokenize import count_rows
from manyrank.errors import UserError
from manyrank.models.tokenizer import load_tokenizer

SAMPLE = "data/sample.jsonl"


def config(**values):
    given = {"model_name_or_path": "embedded", "data_path": SAMPLE, "max_length": 512} | values
    return resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config


@pytest.fixture
def examples_of(tokenizer):
    def build(needed=None, **values):
        made = config(**values)
        own = load_tokenizer(made) if made.chat_template else tokenizer
        return prepare(made.data_path, own, made, needed=needed)

    return build


@pytest.fixture
def file(tmp_path):
    """Write rows, which are dicts or lines as they are."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def qa(question, answer="yes"):
    return {"question": question, "answer": answer}


def qa_turn(role, content, **more):
    return {"role": role, "content": content, **more}


def rows_of(examples):
    return [int(examples[i]["row"]) for i in range(len(examples))]


# Long rows


def test_every_row_is_kept_cut_or_left_out_and_counted(examples_of):
    whole, cut = examples_of(), examples_of(max_length=80)
    dropped = examples_of(max_length=80, overlong="drop")
    longer = int((whole.lengths > 80).sum())
    assert (len(whole),) == whole.report.rows == (160,) and not whole.report.counts
    assert 0 < longer < 160 and len(cut) == 160 and cut.lengths.max() == 80
    assert cut.report.counts == {"cut at max_length": longer}
    assert f"{longer} cut at max_length" in cut.describe()
    assert dropped.report.counts == {"too long, left out": longer} and len(dropped) == 160 - longer
    with pytest.raises(UserError, match=f"{longer} of 160 rows cannot be used .{longer} too long"):
        examples_of(max_length=80, overlong="error")


def test_split_rows_lose_no_token(examples_of):
    whole, split = examples_of(), examples_of(max_length=32, overlong="split")
    first = int(np.argmax(whole.lengths))
    pieces = [split[i] for i in range(len(split)) if split[i]["row"] == whole[first]["row"]]
    learned = [label for piece in pieces for label in piece["labels"].tolist() if label != IGNORE]
    wanted = [label for at, label in enumerate(whole[first]["labels"].tolist()) if label != IGNORE and at % 32]
    assert learned == wanted  # the first token of a piece has nothing in front
    assert split.lengths.max() == 32 and (split.supervised > 0).all()
    assert split.report.counts["pieces of longer rows"] == len(split) - int((whole.lengths <= 32).sum())


def test_an_answer_that_is_cut_off_is_a_bad_row(examples_of):
    with pytest.raises(UserError, match="nothing to learn") as caught:
        examples_of(max_length=16)
    assert "data/sample.jsonl, line " in caught.value.where


# Bad rows


def bad_file(file):
    return file(
        qa("a"),
        qa("b", ""),
        '{"question": "c"',
        {"question": "d"},
        qa("e", float("nan")),
        qa("f\ud800"),
        qa("g"),
        *[qa(f"h{i}", None) for i in range(8)],
    )


def test_bad_rows_stop_the_run_with_places_and_reasons(examples_of, file):
    path = bad_file(file)
    with pytest.raises(UserError) as caught:
        examples_of(data_path=path)
    assert caught.value.what.startswith("13 of 15 rows cannot be used (9 missing field, ")
    for reason in ("1 empty field", "1 not JSON", "1 NaN", "1 half a surrogate pair"):
        assert reason in caught.value.what
    places = caught.value.where.splitlines()
    assert places[0].startswith(f"{path}, line 2: 'answer' is empty")
    assert places[1].startswith(f"       {path}, line 3: ")
    assert len(places) == 11 and places[-1].endswith("and 3 more")
    assert "on_bad_row: skip" in caught.value.fix


def test_skipped_rows_are_counted_and_written_aside(examples_of, file, tmp_path):
    path = bad_file(file)
    examples = examples_of(data_path=path, on_bad_row="skip")
    assert rows_of(examples) == [1, 7] and examples.report.counts == {"bad, quarantined": 13}
    write_quarantine(examples, tmp_path / "logs" / "quarantine.jsonl")
    written = [json.loads(line) for line in (tmp_path / "logs" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["place"] for row in written] == [f"{path}, line {n}" for n in (*range(2, 7), *range(8, 16))]
    assert json.loads(written[0]["row"]) == qa("b", "") and written[0]["reason"] == "empty field"


def test_invalid_utf8_is_one_bad_row(examples_of, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        json.dumps(qa("a")).encode() + b'\n{"question": "\xff", "answer": "b"}\n' + json.dumps(qa("c")).encode()
    )
    assert rows_of(examples_of(data_path=str(path), on_bad_row="skip")) == [1, 3]


def test_the_lines_that_could_not_be_read_are_kept(examples_of, file, tmp_path):
    path = file(*["{broken"] * 3, '["no", "object"]', qa("a"))
    write_quarantine(examples_of(data_path=path, on_bad_row="skip"), tmp_path / "quarantine.jsonl")
    written = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == ["{broken"] * 3 + ['["no", "object"]']


def test_bad_rows_before_the_first_good_one(examples_of, file):
    path = file(*["nonsense"] * 150, {"note": "a row of no format"}, qa("a"), qa("b"))
    with pytest.raises(UserError, match=r"151 of 153 rows .*150 not JSON, 1 missing field") as caught:
        examples_of(data_path=path)
    assert len(caught.value.where.splitlines()) == 11
    assert rows_of(examples_of(data_path=path, on_bad_row="skip")) == [152, 153]


def test_a_source_without_a_readable_row_beside_a_good_one(examples_of, file):
    sources = f"[{file('x', 'y', name='bad.jsonl')}, {SAMPLE}]"
    examples = examples_of(data_path=sources, on_bad_row="skip")
    assert len(examples) == 160 and examples.report.rows == (2, 160)
    assert examples.report.counts == {"bad, quarantined": 2}


def test_a_users_function_cannot_change_the_rows(examples_of, file, tmp_path, monkeypatch):
    (tmp_path / "taking.py").write_text("def read(row):\n    row.pop('note')\n    raise ValueError('no')\n")
    monkeypatch.chdir(tmp_path)
    examples = examples_of(
        data_path=f"[{{path: {file({'note': 'x'})}, format_type: 'taking:read'}}, {{path: {file(qa('a'), name='b.jsonl')}}}]",
        on_bad_row="skip",
    )
    assert [json.loads(row["row"]) for row in examples.report.bad()] == [{"note": "x"}]


def test_no_row_left(examples_of, file):
    with pytest.raises(UserError, match="no row is left"):
        examples_of(data_path=file(qa("a", "")), on_bad_row="skip", format_type="question_answer")


def test_tokens_that_the_model_does_not_have(examples_of, file):
    labels = {"input_ids": [5, 6], "labels": [-100, 999_999]}
    path = file({"input_ids": [5, 6, 7]}, {"input_ids": [5, 999_999]}, {"input_ids": [5, -1]}, labels)
    with pytest.raises(UserError, match=r"3 of 4 rows .*2 unknown token"):
        examples_of(data_path=path)


def test_a_template_that_does_not_fit_is_named_as_the_cause(examples_of, file, tmp_path):
    picky = tmp_path / "picky.jinja"
    picky.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="refused by template") as caught:
        examples_of(data_path=file(qa("a")), chat_template=str(picky))
    assert "--chat_template" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (b"{% for m in messages %}\n{{ m.content }", "the chat template is not valid Jinja: ", "t.jinja, line 2"),
        (b"\xff\xfe\0", "not text in UTF-8", "t.jinja"),
        (b" \n", "an empty template", "t.jinja"),
    ],
)
def test_a_template_that_is_none(examples_of, file, tmp_path, content, what, where):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError) as caught:
        examples_of(data_path=file(qa("a")), chat_template=str(tmp_path / "t.jinja"))
    assert caught.value.what.startswith(what) and caught.value.where.endswith(where)


def test_variables_of_the_template(examples_of, file, tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ day }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    given = {"data_path": file(qa("a")), "chat_template": str(tmp_path / "t.jinja")}
    dated = examples_of(**given, chat_template_kwargs="{day: 2024-07-26}")
    assert (
        dated[0]["input_ids"] == examples_of(**given, chat_template_kwargs="{day: '2024-07-26'}")[0]["input_ids"]
    ).all()
    for wrong, what in {"messages": "not the recipe's to set", "dai": "knows no variable 'dai'"}.items():
        with pytest.raises(UserError, match=what):
            examples_of(**given, chat_template_kwargs=f"{{{wrong}: x}}")


def test_the_fix_fits_the_reason(examples_of, file):
    with pytest.raises(UserError) as caught:
        examples_of(data_path=file(qa("a " * 50)), max_length=8, on_bad_row="skip")
    assert caught.value.fix == "raise max_length if the answers lie behind it, or fix these rows"
    with pytest.raises(UserError) as caught:
        examples_of(data_path=file(qa("a " * 50)), max_length=8, overlong="error")
    assert caught.value.fix.startswith("raise max_length, or set overlong") and "on_bad_row: skip" in caught.value.fix


def test_an_end_of_turn_that_is_no_token_is_told(examples_of, file):
    told = examples_of(data_path=file(qa("a")), chat_template="llama3").report.counts
    assert told == {"whose end of turn is no token of the tokenizer (another chat_template?)": 1}


def test_what_is_wrong_with_a_file_is_said_by_several_processes_too(examples_of, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"question": "a", "answer": "b"}, {"question" "c"}]')
    with pytest.raises(UserError, match="broken JSON"):
        examples_of(data_path=str(path), dataset_num_proc=2)


def test_a_row_that_is_not_used_makes_no_duplicate(examples_of, file):
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 50, "weight": 0}]
    rows = [{"messages": [*long, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]
    rows.append(json.loads(json.dumps(rows[0]).replace(', "weight": 0', "")))
    found = examples_of(data_path=file(*rows), max_length=40, on_bad_row="skip", duplicates="drop")
    assert rows_of(found) == [2]


# Duplicates, parts, sources


def test_duplicates_are_counted_and_dropped_by_option(examples_of, file):
    path = file(qa("one"), qa("two"), qa("one"), {"instruction": "one", "output": "yes"}, qa("one", "no"))
    both = f"[{path}, {{path: {file(dict(instruction='two', output='yes'), name='b.jsonl')}}}]"
    kept = examples_of(data_path=both, format_type="auto", on_bad_row="skip")
    assert kept.report.counts == {"bad, quarantined": 1, "duplicates": 2} and len(kept) == 5
    dropped = examples_of(data_path=both, on_bad_row="skip", duplicates="drop")
    assert rows_of(dropped) == [1, 2, 5] and dropped.report.counts["duplicates, left out"] == 2


def test_rows_of_which_other_tokens_are_learned_are_no_duplicates(examples_of, file):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "if x:\n    y"}]
    turns += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "no"}]
    weighted = [*turns[:1], turns[1] | {"weight": 0}, *turns[2:]]
    indented = [*turns[:1], turns[1] | {"content": "if x:\n  y"}, *turns[2:]]
    path = file(*({"messages": one} for one in (turns, weighted, indented, turns)))
    examples = examples_of(data_path=path, duplicates="drop")
    assert rows_of(examples) == [1, 2, 3]
    assert len(set(examples.content)) == 1  # what they say is the same, so they are on one side of a split


def test_the_labels_of_token_ids_do_not_move_a_row_to_the_other_side(examples_of, file):
    examples = examples_of(data_path=file({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}))
    assert examples.content[0] == examples.content[1]


def test_the_fingerprint_tells_another_text_of_the_template(examples_of, file, tmp_path):
    path, templates = file(qa("a"), qa("b")), []
    for name in ("assistant", "assistent"):
        templates.append(tmp_path / f"{name}.jinja")
        text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        templates[-1].write_text(
            text.replace("{{ m.role }}", "{{ 'user' if m.role == 'user' else 'NAME' }}".replace("NAME", name))
        )
    one, same, other = (examples_of(data_path=path, chat_template=str(templates[choice])) for choice in (0, 0, 1))
    assert one.lengths.tolist() == other.lengths.tolist() and (one.content == other.content).all()
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_the_split_is_by_content_and_rows_never_move(examples_of, file):
    rows = [qa(f"question {i}") for i in range(300)]
    train, held = examples_of(data_path=file(*rows)).split(0.2)
    assert 30 < len(held) < 90 and not set(train.content) & set(held.content) and len(train) + len(held) == 300
    more = [qa(f"new {i}") for i in range(50)] + rows[::-1] + rows[:20]
    train_2, held_2 = examples_of(data_path=file(*more, name="more.jsonl")).split(0.2)
    assert set(train.content) <= set(train_2.content) and set(held.content) <= set(held_2.content)
    assert not set(train_2.content) & set(held_2.content)


def test_a_split_without_rows_is_an_error(examples_of):
    with pytest.raises(UserError, match="0 of 160"):
        examples_of().split(0.0000011)


def test_a_number_of_examples_is_held_back(examples_of, file):
    rows = [{"question": f"q{number}", "answer": "a"} for number in range(40)]
    train, held = examples_of(data_path=file(*rows, *rows[:3])).split(7)
    assert 7 <= len(held) <= 10 and len(train) + len(held) == 43
    assert not set(held.content.tolist()) & set(train.content.tolist())
    share, few = examples_of(data_path=file(*rows)), examples_of(data_path=file(*rows)).split(1)[1]
    assert len(few) == 1 and set(few.content.tolist()) < set(share.split(7)[1].content.tolist())
    with pytest.raises(UserError, match="40 of 40 examples are in the validation part"):
        share.split(40)


def weighted(examples_of, file, **weights):
    sources = [
        f"{{path: {file(*[qa(f'{name} {i}') for i in range(10)], name=name + '.jsonl')}, weight: {weight}}}"
        for name, weight in weights.items()
    ]
    return examples_of(data_path=f"[{', '.join(sources)}]")


def test_weights_say_how_often_a_row_is_seen(examples_of, file):
    examples = weighted(examples_of, file, a=1, b=2, c=0.5)
    epochs = [epoch_order(examples, 7, epoch) for epoch in range(4)]
    for order in epochs:
        seen = np.bincount(order, minlength=30)
        assert (seen[:10] == 1).all() and (seen[10:20] == 2).all() and seen[20:].sum() == 5 and seen.max() == 2
    halves = [set(order[order >= 20]) for order in epochs]
    assert halves[0] | halves[1] == set(range(20, 30)) and halves[0] == halves[2]
    assert list(epochs[0]) != list(epochs[2]) and list(epochs[0]) == list(epoch_order(examples, 7, 0))


def sources(file, **rows):
    return [file(*[qa(f"{name} {i}") for i in range(count)], name=f"{name}.jsonl") for name, count in rows.items()]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (900, 90, 10)),
        ({"sampling_temperature": 2}, (703, 222, 74)),  # 1000 / (30 + 9.487 + 3.162) times each root
        ({"sampling_temperature": 1e9}, (333, 333, 333)),
        ({"sampling_temperature": 1e9, "max_repeats": 4}, (333, 333, 40)),
    ],
)
def test_temperature_evens_out_sources(examples_of, file, options, expected):
    paths = sources(file, a=900, b=90, c=10)
    made = config(data_path=paths, **options)
    examples = examples_of(data_path=paths).tempered(made)
    assert examples.in_epoch == pytest.approx(expected, abs=1)
    epochs = [epoch_order(examples, 5, epoch) for epoch in range(3)]
    for order in epochs:
        assert tuple(np.bincount(examples.source[order], minlength=3)) == examples.in_epoch
        assert np.bincount(order).max() <= max(1, np.ceil(max(examples.weights)))
    seen = np.bincount(np.concatenate(epochs), minlength=1000)
    assert all(np.ptp(seen[examples.source == source]) <= 1 for source in range(3))  # in turn, whatever the epochs
    plain = examples_of(data_path=paths)
    assert (examples.fingerprint == plain.fingerprint) == (not options)
    shown = f"an epoch has {examples.in_epoch[0]} of {paths[0]}" if options else "1,000 examples"
    assert shown in examples.describe()


def test_steps_of_a_temperature_are_the_same_on_any_ranks(examples_of, file):
    paths = sources(file, a=40, b=4)
    examples = examples_of(data_path=paths).tempered(config(data_path=paths, sampling_temperature=3))
    loaders = [
        [
            StepLoader(
                examples=examples,
                batch_size=8,
                micro_batch_size=8 // ranks,
                max_length=512,
                packing="step",
                pad_token=0,
                rank=rank,
                ranks=ranks,
                seed=3,
            )
            for rank in range(ranks)
        ]
        for ranks in (1, 2)
    ]
    for number in range(2 * loaders[0][0].steps_per_epoch):
        seen = [
            sorted(row for loader in of for micro in loader.step(number).micro_batches for row in micro.rows)
            for of in loaders
        ]
        assert seen[0] == seen[1]


def test_a_cap_on_all_sources_counts_where_a_source_has_none(examples_of, file):
    a, b = sources(file, a=30, b=30)
    examples = examples_of(data_path=[a, {"path": b, "max_rows": 3}], max_rows=20)
    assert list(np.bincount(examples.source)) == [20, 3]
    alone = examples_of(data_path=[a], max_samples=20)
    assert rows_of(alone) == rows_of(examples)[:20]


def test_weights_that_leave_nothing(examples_of, file):
    examples = weighted(examples_of, file, a=0.01)
    loader = StepLoader(
        examples=examples,
        batch_size=1,
        micro_batch_size=1,
        max_length=512,
        packing="step",
        pad_token=0,
        rank=0,
        ranks=1,
        seed=3,
    )
    with pytest.raises(UserError, match="leaves no example"):
        loader.step(0)


def test_caps_take_a_part_that_the_seed_chooses(examples_of, file):
    path = file(*[qa(f"q {i}") for i in range(50)])
    one, other = (rows_of(examples_of(data_path=f"{{path: {path}, max_rows: 8}}", seed=seed)) for seed in (1, 2))
    assert len(one) == len(other) == 8 and one != other and one == sorted(one) and max(one) > 8


def test_a_stream_is_not_read_to_its_end(examples_of, tmp_path):
    """Its end is broken, and more than a read ahead away."""
    path = tmp_path / "long.json"
    path.write_text("[" + ",".join(json.dumps(qa(f"q {i} " + "word " * 400)) for i in range(2000)) + ", nonsense")
    with pytest.raises(UserError, match="JSON"):
        examples_of(data_path=str(path), max_rows=8)
    streamed = examples_of(data_path=str(path), max_rows=8, streaming=True)
    assert rows_of(streamed) == list(range(1, 9)) and streamed.report.rows == (8,)
    assert "8 examples, streamed (" in streamed.describe()


def test_a_stream_of_several_files_takes_them_in_the_seeds_order(examples_of, tmp_path):
    for part in range(6):
        rows = [json.dumps({"question": f"part {part} row {i}", "answer": "a"}) for i in range(4)]
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(rows))

    def parts(seed: int) -> list[bytes]:
        examples = examples_of(data_path=str(tmp_path), max_rows=8, streaming=True, seed=seed)
        return [examples.dataset[int(i)]["input_ids"].tobytes() for i in examples.index]

    assert len(parts(1)) == 8 and parts(1) == parts(1) and set(parts(1)) != set(parts(2))


def test_questions_of_a_stream_are_those_of_its_rows(examples_of, tokenizer, tmp_path):
    """Rewards look rows up by number, of files in the seed's order."""
    for part in range(6):
        rows = [json.dumps({"question": f"part {part} row {i}", "answer": f"{part} {i}"}) for i in range(4)]
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(rows))
    options = {"data_path": str(tmp_path), "max_rows": 6, "streaming": True, "seed": 5}
    examples, made = examples_of(**options), config(**options)
    found = read_questions(made.data_path, made, examples.keys())
    assert len(found) == 6
    for at, key in enumerate(examples.keys()):
        assert found[key].prompt[-1]["content"] in tokenizer.decode(examples[at]["input_ids"])


def test_a_cap_on_one_of_several_sources_is_told(examples_of, file):
    path = file(*[qa(f"q {i}") for i in range(50)])
    examples = examples_of(data_path=f"[{{path: {path}, max_rows: 8}}, {SAMPLE}]")
    assert examples.report.rows == (8, 160) and examples.report.out_of == (50, 160) and examples.report.needed == 1
    assert "168 examples of 210 rows (max_rows)" in examples.describe()


def test_formats_of_several_sources(examples_of, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("q,a\nwhat?,this\nwho?,she\n")
    sources = f"[{SAMPLE}, {{path: {table}, columns: {{question: q, answer: a}}}}, data/formats/alpaca.json, data/formats/text.jsonl]"
    examples = examples_of(data_path=sources)
    assert examples.report.formats == ("question_answer", "question_answer of q, a", "alpaca", "text")
    assert np.bincount(examples.source)[:2].tolist() == [160, 2]
    text = examples[len(examples) - 1]
    assert (text["labels"][1:] == text["input_ids"][1:]).all() and text["labels"][0] == IGNORE


# How much is tokenised, and the cache


def test_a_short_run_tokenises_what_it_needs(examples_of, file):
    path = file(*[qa(f"q {i}") for i in range(2000)])
    few = examples_of(data_path=path, needed=64)
    assert 64 <= len(few) < 100 and len(few.dataset) < 100
    assert f"{few.report.rows[0]} examples of 2,000 rows" in few.describe() and few.report.needed < 0.05
    assert max(rows_of(few)) > 1000  # out of the whole file
    assert rows_of(few) == rows_of(examples_of(data_path=path, needed=64))
    assert len(examples_of(data_path=path, needed=1990)) == 2000


def test_a_short_run_looks_further_where_few_rows_can_be_used(examples_of, file):
    path = file(*[qa(f"q {i}" if i in (7, 180, 300) else "long " * 80) for i in range(400)])
    assert rows_of(examples_of(data_path=path, needed=3, max_length=64, overlong="drop")) == [8, 181, 301]


def test_rows_are_counted_once(file, monkeypatch):
    source = Source(file(*[qa(f"{i}") for i in range(30)]))
    assert count_rows(source) == 30
    monkeypatch.setattr("manyrank.data.tokenize.read_rows", None)
    assert count_rows(source) == 30
    monkeypatch.undo()
    file(*[qa(f"{i}") for i in range(31)])
    assert count_rows(source) == 31


def test_a_short_run_goes_on_when_rows_are_left_out(examples_of, file):
    rows = [qa(f"q {i}", "word " * 300 if i % 4 else "yes") for i in range(2000)]
    few = examples_of(data_path=file(*rows), needed=64, overlong="drop")
    assert 64 <= len(few) < 500


def test_several_processes_give_the_same_examples(examples_of, file):
    path = file(*[qa(f"q {i}", "a " * (i % 40 + 1)) for i in range(301)])
    one = examples_of(data_path=path, dataset_num_proc=1, seed=1)
    other = examples_of(
        data_path=file(*[qa(f"q {i}", "a " * (i % 40 + 1)) for i in range(301)], name="b.jsonl"), dataset_num_proc=3
    )
    assert rows_of(one) == rows_of(other) == list(range(1, 302))
    assert (one.lengths == other.lengths).all() and (one.content == other.content).all()
    assert one.fingerprint == other.fingerprint


def test_the_cache_is_used_until_something_changes(examples_of, file):
    path = file(qa("a"), qa("b"))
    first, again = examples_of(data_path=path), examples_of(data_path=path)
    assert first.dataset.cache_files == again.dataset.cache_files
    for change in ({"max_length": 511}, {"train_on_prompt": True}, {"chat_template_kwargs": "{x: 1}"}):
        assert examples_of(data_path=path, **change).dataset.cache_files != first.dataset.cache_files
    file(qa("a"), qa("c"))
    assert examples_of(data_path=path).fingerprint != first.fingerprint


def test_a_table_of_an_older_version_is_made_again(examples_of, file, monkeypatch):
    """Masks that an earlier version got wrong do not survive in the cache."""
    assert tokenize.CACHE_VERSION > 9, "9 left the end of Cohere's turns out"
    path, right = file(qa("a"), qa("b")), tokenize._ids_and_labels

    def wrong(*given):
        ids, labels, notes = right(*given)
        last = max(at for at, label in enumerate(labels) if label != IGNORE)
        return ids, [*labels[:last], IGNORE, *labels[last + 1 :]], notes

    with monkeypatch.context() as older:
        older.setattr(tokenize, "CACHE_VERSION", tokenize.CACHE_VERSION - 1)
        with older.context() as making:
            making.setattr(tokenize, "_ids_and_labels", wrong)
            old = examples_of(data_path=path)
        assert list(examples_of(data_path=path).supervised) == list(old.supervised)  # read from the cache
    new = examples_of(data_path=path)
    assert list(new.supervised) == [count + 1 for count in old.supervised]


def test_a_function_of_one_s_own_and_its_changes(examples_of, file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_rows.py"
    module.write_text("def rows(row):\n    return {'question': row['x'], 'answer': 'one'}\n")
    path = file({"x": "a"}, {"x": "b"})
    first = examples_of(data_path=path, format_type="own_rows:rows")
    module.write_text("def rows(row):\n    return {'question': row['x'], 'answer': 'one and two'}\n")
    monkeypatch.delitem(__import__("sys").modules, "own_rows")
    formats.load_function.cache_clear()
    assert examples_of(data_path=path, format_type="own_rows:rows").fingerprint != first.fingerprint


# What is learned


@pytest.mark.parametrize(
    ("option", "learned"),
    [
        ({}, ["one<|im_end|>", "two<|im_end|>"]),
        ({"train_on_last_turn": True}, ["two<|im_end|>"]),
        ({"roles_to_train": "human,gpt"}, ["a<|im_end|>", "one<|im_end|>", "b<|im_end|>", "two<|im_end|>"]),
        ({"roles_to_train": ["user"]}, ["a<|im_end|>", "b<|im_end|>"]),
        ({"train_on_eos": "all"}, ["<|im_end|>", "one<|im_end|>", "<|im_end|>", "two<|im_end|>"]),
        ({"train_on_eos": "last"}, ["one", "two<|im_end|>"]),
        ({"mask_history": True}, ["two<|im_end|>"]),
        ({"train_on_prompt": True}, None),
        ({"assistant_only_loss": "0"}, None),
        ({"completion_only_loss": True}, ["one<|im_end|>", "two<|im_end|>"]),
    ],
)
def test_options_say_what_is_learned(examples_of, file, tokenizer, option, learned):
    turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    path = file({"messages": [{"role": role, "content": text} for role, text in turns]})
    row = examples_of(data_path=path, **option)[0]
    text = tokenizer.decode(row["labels"][row["labels"] != IGNORE])
    assert text == ("".join(learned) if learned else tokenizer.decode(row["input_ids"][1:]))


@pytest.mark.parametrize("whole", [False, True])
def test_a_message_that_is_not_to_be_learned(examples_of, file, tokenizer, whole):
    turns = [
        qa_turn("user", "a"),
        qa_turn("assistant", "one", train=False),
        qa_turn("user", "b"),
        qa_turn("assistant", "two"),
    ]
    row = examples_of(data_path=file({"messages": turns}), train_on_prompt=whole)[0]
    learned = tokenizer.decode(row["labels"][row["labels"] != IGNORE])
    text = tokenizer.decode(row["input_ids"][1:])
    assert learned == (text.replace("one<|im_end|>", "") if whole else "two<|im_end|>") and "one" in text


def test_roles_that_cannot_be_learned_are_answered(examples_of, file):
    turns = [qa_turn("user", "a", train=True), qa_turn("assistant", "one")]
    path = file({"messages": turns})
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used \(1 role not named\)") as caught:
        examples_of(data_path=path)
    assert caught.value.fix.startswith("name the role in roles_to_train")
    assert len(examples_of(data_path=path, roles_to_train="user")) == 1
    with pytest.raises(UserError, match="1 role without end of turn") as caught:
        examples_of(data_path=path, roles_to_train="user", chat_template="mistral")
    assert caught.value.fix.startswith("leave the role out of roles_to_train")


def test_packs_of_the_data_set_lose_and_repeat_nothing(examples_of):
    examples = examples_of()
    loader = StepLoader(
        examples=examples,
        batch_size=3,
        micro_batch_size=1,
        max_length=512,
        packing="dataset",
        pad_token=0,
        rank=0,
        ranks=1,
        seed=3,
    )
    epochs = []
    for epoch in range(2):
        steps = [loader.step(epoch * loader.steps_per_epoch + turn) for turn in range(loader.steps_per_epoch)]
        rows = [row for step in steps for micro in step.micro_batches for _, row in micro.rows]
        assert sorted(rows) == list(range(1, 161))
        assert sum(step.tokens for step in steps) == examples.lengths.sum()
        assert all(micro.inputs["input_ids"].numel() <= 512 for step in steps for micro in step.micro_batches)
        epochs.append(rows)
    assert epochs[0] != epochs[1]


MEMORY = """
import resource, sys
from manyrank.config.resolve import Setting, resolve
from manyrank.data.dataset import prepare
from manyrank.models.tokenizer import load_tokenizer

def peak(path):
    config = resolve(None, [Setting("model", "embedded", ""), Setting("data_path", path, ""), Setting("dataset_num_proc", 1, "")]).config
    examples = prepare(config.data_path, load_tokenizer(config), config)
    return len(examples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

(few, before), (many, after) = peak(sys.argv[1]), peak(sys.argv[2])
print(few, many, after - before)
"""


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_data(embedded_model, file, tmp_path):
    """75 MB of rows, 115 MB of tokens: what is in memory is a part of that."""
    row = json.dumps({"input_ids": [1000 + i % 500 for i in range(500)]})
    small, big = file(row, name="small.jsonl"), tmp_path / "big.jsonl"
    big.write_text((row[:-1] + ', "n": 0}\n') * 25_000)
    assert big.stat().st_size > 70e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, small, str(big)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    few, many, grown = done.stdout.split()
    assert (few, many) == ("1", "25000") and float(grown) < 80
