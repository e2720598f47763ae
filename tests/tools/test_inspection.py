"""`manyrank data inspect` tells what the training will see: its figures are those of the rows, on the page too."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import warm
from browser import Page, browse, look_at, needs_chromium
from hypothesis import given
from hypothesis import strategies as st

from manyrank import cli
from manyrank.chat_template.render import render
from manyrank.config.args import Setting
from manyrank.config.resolve import resolve
from manyrank.data.dataset import prepare
from manyrank.data.formats import to_sample
from manyrank.data.histogram import bars
from manyrank.data.loader import StepLoader
from manyrank.data.sources import Source, read_rows
from manyrank.data.stats import Piece, gather, padding, pieces, spread
from manyrank.data.survey import survey as surveyed
from manyrank.errors import UserError
from manyrank.project_files import asset
from manyrank.tools import inspect_data
from manyrank.tools.report import terminal
from manyrank.tools.report.blocks import visible
from manyrank.tools.report.pages import page, write_page

SAMPLE, VALIDATION = (str(asset("data", name)) for name in ("sample.jsonl", "validation.jsonl"))


def chat(question: str, *answers: str) -> dict:
    turns = [{"role": "assistant", "content": answer} for answer in answers]
    asked = [{"role": "user", "content": question} for _ in answers]
    return {"messages": [message for pair in zip(asked, turns) for message in pair]}


GOOD = chat("What is a mean?", "The sum over the count.")
HOSTILE = chat("<script>document.title='owned'</script>", "<b>Half</b> are below & \x1b[31m\u202eabove.\n\nSo?")
NO_ANSWER = {"messages": [{"role": "user", "content": "Why?"}]}
EMPTY = chat("Why?", "")


def write(path: Path, *rows: dict | str) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def survey(tokenizer, samples: int = 3, **values):
    values = {"data_path": SAMPLE, "max_length": 256, **values}
    config = resolve("verify", [Setting(key, value, "the test") for key, value in values.items()]).config
    return gather(config, tokenizer, recipe="verify", samples=samples)


def html(found) -> str:
    return page(inspect_data.title(found), inspect_data.blocks(found))


def text_of(found, *, colour: bool = False, width: int = terminal.UNLIMITED) -> str:
    return terminal.text(inspect_data.title(found), inspect_data.blocks(found), colour=colour, width=width)


def rendered(path: str, tokenizer, format_type: str = "question_answer") -> list:
    rows = (row.value for row in read_rows(Source(path)))
    return [render(tokenizer, to_sample(row, format_type).messages) for row in rows]


# What was read


def test_figures_are_those_of_the_rows(tokenizer):
    found = survey(tokenizer, eval_data_path=VALIDATION)
    for part, reading, path in zip(found.parts, found.readings, (SAMPLE, VALIDATION)):
        rows = rendered(path, tokenizer)
        lengths = [len(row.input_ids) for row in rows]
        tokens, supervised = sum(lengths), sum(label != -100 for row in rows for label in row.labels)
        (source,) = reading.sources
        assert (source.path, source.format_type, source.rows) == (path, "question_answer", len(rows))
        assert (source.examples, source.tokens, source.supervised) == (len(rows), tokens, supervised)
        assert (part.examples, part.rows, part.tokens, part.supervised) == (len(rows), len(rows), tokens, supervised)
        assert (part.lengths.shortest, part.lengths.longest) == (min(lengths), max(lengths))
        assert part.lengths.median == np.median(lengths)
        assert part.lengths.mean == pytest.approx(tokens / len(rows))
        assert part.lengths.p95 == np.percentile(lengths, 95)
        for bar in part.lengths.bars:
            assert bar.count == sum(bar.first <= length <= bar.last for length in lengths)
    assert [part.name for part in found.parts] == ["training", "validation"]


def test_sources_are_told_apart(tokenizer, tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", GOOD, NO_ANSWER, HOSTILE)
    found = survey(tokenizer, data_path=[mixed, {"path": SAMPLE, "weight": 2, "max_rows": 10}])
    first, second = found.readings[0].sources
    assert (first.path, first.format_type, first.rows, first.examples) == (mixed, "messages", 3, 2)
    assert (second.format_type, second.rows, second.examples, second.weight) == ("question_answer", 10, 10, 2)
    assert found.readings[0].rows == 13
    assert found.parts[0].tokens == first.tokens + second.tokens


def test_rows_of_an_epoch_are_shown_by_source(tokenizer, tmp_path):
    few = write(tmp_path / "few.jsonl", *[chat(f"Why {i}?", "Because.") for i in range(10)])
    found = survey(tokenizer, data_path=[few, SAMPLE], sampling_temperature=1e9, eval_split=0.2)
    train = found.parts[0].examples
    assert all(abs(source.in_epoch - train / 2) <= 1 for source in found.readings[0].sources)
    assert found.readings[0].sources[0].weight > 4 and found.readings[0].sources[0].examples == 10
    assert "an epoch" in text_of(found)


def test_bad_rows_are_named_and_do_not_stop_it(tokenizer, tmp_path):
    path = write(tmp_path / "bad.jsonl", GOOD, NO_ANSWER, "not json", HOSTILE, *[EMPTY] * 11)
    found = survey(tokenizer, data_path=path, on_bad_row="error")
    (reading,) = found.readings
    assert reading.rows == 15
    assert reading.counts["bad, quarantined"] == 13
    assert list(reading.reasons.items()) == [("empty field", 11), ("no assistant turn", 1), ("not JSON", 1)]
    assert len(reading.bad) == 10
    assert [row.place for row in reading.bad[:3]] == [f"{path}, line {line}" for line in (2, 3, 5)]
    assert [row.reason for row in reading.bad[:2]] == ["no assistant turn", "not JSON"]
    shown = text_of(found)
    assert "the training will stop at them (on_bad_row: error)" in shown
    assert f"{path}, line 2" in shown
    skipping = text_of(survey(tokenizer, data_path=path, on_bad_row="skip"))
    assert "the training will stop" not in skipping


def test_only_bad_rows_are_named_in_the_error(tokenizer, tmp_path):
    path = write(tmp_path / "bad.jsonl", NO_ANSWER, EMPTY)
    with pytest.raises(UserError) as caught:
        survey(tokenizer, data_path=path)
    assert f"{path}, line 1: " in caught.value.where
    assert f"{path}, line 2: " in caught.value.where


def test_duplicates_overlap_and_special_tokens(tokenizer, tmp_path):
    special = chat("What does <|im_end|> do?", "It ends a turn.")
    train = write(tmp_path / "train.jsonl", GOOD, HOSTILE, GOOD, GOOD, special)
    other = write(tmp_path / "other.jsonl", HOSTILE, special, chat("New?", "Yes."))
    found = survey(tokenizer, data_path=train, eval_data_path=other)
    assert [part.duplicates for part in found.parts] == [2, 0]
    assert found.overlap == 2
    assert found.readings[0].counts["with special-token text, read as plain text"] == 1
    dropped = survey(tokenizer, data_path=train, duplicates="drop")
    assert (dropped.parts[0].duplicates, dropped.parts[0].examples, dropped.overlap) == (0, 3, None)
    assert dropped.readings[0].counts["duplicates, left out"] == 2


def test_pieces_of_one_row_are_no_duplicates(tokenizer):
    part = survey(tokenizer, max_length=60, overlong="split").parts[0]
    assert part.examples > part.rows == 160
    assert part.duplicates == 0


def test_a_split_gives_two_parts_of_one_reading(tokenizer):
    found = survey(tokenizer, eval_split=0.25)
    assert len(found.readings) == 1
    assert sum(part.examples for part in found.parts) == found.readings[0].rows == 160
    assert found.overlap == 0
    assert found.settings["eval_split"] == "0.25"


# How full batches are


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_bars_hold_every_length_once(lengths):
    made = bars(np.array(lengths))
    assert len(made) <= 16
    assert [bar.count for bar in made] == [sum(bar.first <= n <= bar.last for n in lengths) for bar in made]
    assert sum(bar.count for bar in made) == len(lengths)
    assert all(before.last + 1 == after.first for before, after in pairwise(made))


def test_a_few_long_examples_do_not_flatten_the_bars():
    made = bars(np.array([*range(50, 150), *range(50, 150), 5000]))
    assert len(made) == 11
    assert [(bar.first, bar.last, bar.count) for bar in made[-2:]] == [(140, 149, 20), (150, 5000, 1)]


def loader(tokenizer, packing: str, batch: int, ranks: int, micro: int) -> StepLoader:
    config = resolve("verify", [Setting("data_path", SAMPLE, "the test")]).config
    examples = prepare(config.data_path, tokenizer, config)
    return StepLoader(examples, batch, micro, 256, packing, tokenizer.pad_token_id, 0, ranks, config.seed)


@pytest.mark.parametrize(("batch", "micro"), [(8, 2), (7, 3), (160, 4)])
def test_padding_is_what_padded_batches_have(tokenizer, batch, micro):
    padded = loader(tokenizer, "none", batch, 1, micro)
    masks = [
        micro_batch.inputs["attention_mask"]
        for step in range(padded.steps_per_epoch)
        for micro_batch in padded.step(step).micro_batches
    ]
    empty = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    lengths = padded.examples.lengths[padded._order(0)]
    assert padding(lengths, batch=batch, rows=micro) == pytest.approx(empty)
    found = survey(tokenizer, global_batch_size=batch, per_device_train_batch_size=micro)
    assert found.parts[0].packing.padding == pytest.approx(empty)


@pytest.mark.parametrize("packing", ["step", "dataset", "none"])
def test_balance_and_packs_are_those_of_the_batches(tokenizer, packing):
    found = survey(tokenizer, packing=packing, global_batch_size=8, eval_data_path=VALIDATION)
    training, validation = (part.packing for part in found.parts)
    assert [row.ranks for row in training.balances] == [1, 2, 4, 8]
    for row in training.balances:
        assert row.batch == 8
        assert row.over == pytest.approx(loader(tokenizer, packing, 8, row.ranks, 2).imbalance())
    packs = loader(tokenizer, "dataset", 1, 1, 2)
    assert training.packs == packs.steps_per_epoch
    assert training.filled == pytest.approx(packs.examples.lengths.sum() / (packs.steps_per_epoch * 256))
    assert (validation.packs, validation.method) == (None, "step" if packing == "dataset" else packing)
    assert [row.batch for row in validation.balances] == [2, 4, 8, 16]


# Samples


def test_samples_are_spread_over_the_lengths():
    lengths = np.array([5, 1, 9, 3, 7, 7])
    assert lengths[spread(lengths, 3)].tolist() == [1, 5, 9]
    assert lengths[spread(lengths, 1)].tolist() == [7]
    assert sorted(spread(lengths, 99).tolist()) == [0, 1, 2, 3, 4, 5]
    assert spread(lengths, 0).tolist() == []


def test_what_is_learned_is_among_the_settings(tokenizer):
    assert "train_on_eos" not in survey(tokenizer).settings
    found = survey(tokenizer, roles_to_train="user", train_on_eos="last").settings
    assert (found["roles_to_train"], found["train_on_eos"]) == ("['user']", "last")


def learned(sample) -> list[str]:
    """The text of each run of supervised pieces."""
    runs, before = [], False
    for piece in sample.pieces:
        if piece.supervised:
            runs = [*runs[:-1], runs[-1] + piece.text] if before else [*runs, piece.text]
        before = piece.supervised
    return runs


def test_samples_show_what_is_learned(tokenizer, tmp_path):
    rows = [chat("One?", "First.\n", "Zwei äöü 漢字 🙂."), HOSTILE, GOOD]
    path = write(tmp_path / "rows.jsonl", *rows)
    (part,) = survey(tokenizer, data_path=path, samples=5).parts
    assert sorted(sample.row for sample in part.samples) == [1, 2, 3]
    expected = rendered(path, tokenizer, "messages")
    for sample in part.samples:
        row = expected[sample.row - 1]
        assert learned(sample) == row.supervised_texts
        assert "".join(piece.text for piece in sample.pieces) == row.text
        assert (sample.source, sample.tokens, sample.stop) == (path, len(row.input_ids), "<|im_end|>")
        assert sample.supervised == sum(label != -100 for label in row.labels)
        assert {piece.text for piece in sample.pieces if piece.special} == {"<|im_start|>", "<|im_end|>"}


def test_pieces_of_a_tokenizer_that_drops_the_first_blank():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁ask": 0, "▁yes": 1, "▁sir": 2, "</s>": 3}, unk_token="</s>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found = pieces(tokenizer, [0, 1, 2, 3], [-100, 1, 2, -100])
    assert found == [
        Piece("ask", supervised=False, special=False),
        Piece(" yes sir", supervised=True, special=False),
        Piece("</s>", supervised=False, special=True),
    ]


# In the terminal


def inspect(*args: str, **env: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "manyrank.cli", "data", "inspect", *args]
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    env = {**clean, "CUDA_VISIBLE_DEVICES": "", **env}
    return warm.run(argv, env=env)


def test_command_without_a_terminal(embedded_model, tokenizer):
    done = inspect("verify", "--samples", "2", "--max-length=200")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    # A supervised run ends at its own bracket; the sample's text has none.
    runs = re.findall("⟦(.*?)⟧", done.stdout, re.DOTALL)
    assert runs == [run for sample in survey(tokenizer, 2).parts[0].samples for run in learned(sample)]
    assert re.search(r"max_length +200\n", done.stdout)
    assert re.search(r"\n  tokens +11,767\n", done.stdout)


# Rows, before any model

WATCHED = """
import io, sys
from manyrank import cli

class BeforeTorch(io.StringIO):
    def write(self, text):
        return len(text) if "torch" in sys.modules else sys.__stdout__.write(text)

sys.stdout = BeforeTorch()
code = cli.main(["data", "inspect", *sys.argv[1:]])
sys.__stdout__.write(f"\\ncode {code}, torch {'torch' in sys.modules}\\n")
"""


def watch(*args: str, **env: str) -> subprocess.CompletedProcess:
    """Inspect in a new interpreter; its output is what was printed before torch was imported."""
    argv = [sys.executable, "-c", WATCHED, *args]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env})


def test_a_bad_file_is_refused_without_torch(tmp_path):
    wrong = {
        "bad.jsonl": (write(tmp_path / "bad.jsonl", NO_ANSWER, EMPTY), "2 of 2 rows cannot be used"),
        "strange.jsonl": (write(tmp_path / "strange.jsonl", {"colour": 1}), "no format has the keys ['colour']"),
        "no.jsonl": (str(tmp_path / "no.jsonl"), "there is no file"),
    }
    for path, what in wrong.values():
        done = watch(path)
        assert done.stdout.strip() == "code 2, torch False"
        assert what in done.stderr.splitlines()[0]


def test_formats_counts_bad_rows_and_an_example_come_before_torch(embedded_model, tmp_path):
    path = write(tmp_path / "rows.jsonl", NO_ANSWER, GOOD, "not json", HOSTILE, EMPTY)
    done = watch(path)
    assert done.stdout.endswith("code 0, torch True\n"), done.stderr
    assert re.search(rf"{path} +messages +1 +5 +2\n", done.stdout)
    assert re.search(r"no assistant turn +1\n +not JSON +1\n +empty field +1\n", done.stdout)
    assert all(f"{path}, line {line} " in done.stdout for line in (1, 3, 5))
    assert f"The first example: {path}, line 2\n" in done.stdout and "The sum over the count." in done.stdout
    assert "no model is given: the template and tokenizer are those of the embedded one" in done.stdout
    assert "In tokens of" not in done.stdout


def test_rows_are_shown_where_nobody_names_a_model_and_no_hub_answers(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, HOSTILE)
    recipe = tmp_path / "my.yaml"
    recipe.write_text(f"data_path: {path}\nmax_length: 64\n")
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}
    done = watch(str(recipe), f"--html={tmp_path / 'page.html'}", **away)
    assert done.stdout.endswith("code 0, torch False\n"), done.stderr
    assert re.search(rf"{path} +messages +1 +2 +2\n", done.stdout)
    assert "no model is given, so no tokens are shown: " in done.stdout and "--model embedded" in done.stdout
    assert path in (tmp_path / "page.html").read_text()
    named = watch(str(recipe), "--model=some/model", **away)
    assert named.stdout.endswith("code 2, torch False\n")
    assert "the model some/model cannot be downloaded" in named.stderr.splitlines()[0]
    gone = watch(path, "--model=./gone")
    assert gone.stdout.endswith("code 2, torch False\n") and "there is no folder ./gone" in gone.stderr


def test_bad_rows_are_shown_once(embedded_model, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", GOOD, NO_ANSWER)
    assert inspect_data.main([path]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{path}, line 2 ") == out.count("the training will stop at them") == 1
    assert out.index("In tokens of embedded") > out.index(f"{path}, line 2 ")


def test_a_message_that_is_not_learned_is_shown_so(embedded_model, tmp_path, capsys):
    (asked, said), unlearned = (
        chat("Why?", "Because.")["messages"],
        {"role": "assistant", "content": "No.", "train": False},
    )
    path = write(tmp_path / "rows.jsonl", {"messages": [asked, unlearned, asked, said]})
    assert inspect_data.main([path, "--samples=0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"assistant \(not learned\)\s+No\.", out) and re.search(r"assistant\s+Because\.", out)


def test_a_folder_is_inspected(embedded_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", GOOD, HOSTILE)
    monkeypatch.chdir(tmp_path)
    assert inspect_data.main(["rows", "--samples=1"]) == 0
    assert re.search(r"rows +messages +1 +2 +2\n", capsys.readouterr().out)


def test_rows_that_are_surveyed_are_those_that_are_tokenised(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, NO_ANSWER, "not json", *[EMPTY] * 12)
    values = {"data_path": [path, SAMPLE], "eval_data_path": VALIDATION, "max_length": 256}
    config = resolve("verify", [Setting(key, value, "the test") for key, value in values.items()]).config
    tokenised = gather(config, tokenizer, recipe="verify", samples=0).readings
    for rows, reading in zip(surveyed(config), tokenised, strict=True):
        assert (rows.name, rows.reasons, rows.bad) == (reading.name, reading.reasons, reading.bad)
        assert [(source.path, source.format_type, source.rows, source.usable) for source in rows.sources] == [
            (source.path, source.format_type, source.rows, source.examples) for source in reading.sources
        ]


@pytest.mark.parametrize(
    ("env", "terminal", "colour"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
    ],
)
def test_when_there_is_colour(embedded_model, monkeypatch, capsys, env, terminal, colour):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert inspect_data.main(["verify", "--samples=1"]) == 0
    out = capsys.readouterr().out
    assert ("\x1b[32m" in out) == colour
    assert ("⟦" in out) != colour


def test_colours_are_those_of_the_tokens(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", HOSTILE)
    shown = text_of(survey(tokenizer, data_path=path), colour=True)
    green = re.findall(r"\x1b\[(2;)?32m(.*?)\x1b\[0m", shown)
    answer = visible(HOSTILE["messages"][1]["content"])
    assert green == [*(("", line) for line in answer.splitlines() if line), ("2;", "<|im_end|>")]
    # What the row itself would have the terminal do is written out.
    assert r"\x1b[31m\u202eabove." in answer
    assert "\x1b[31m" not in shown
    assert "\x1b[2m<|im_start|>\x1b[0muser" in shown


def test_a_reader_that_leaves_early(embedded_model, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["data", "inspect", "verify"]) == 0


def test_a_terminal_wraps_tables_and_a_pipe_cuts_nothing(tokenizer, tmp_path):
    path = write(tmp_path / f"{'long' * 30}.jsonl", GOOD, "not json")
    found = survey(tokenizer, data_path=path)
    assert f"  {path}  messages" in text_of(found)
    narrow = text_of(found, colour=True, width=60)
    tables = re.sub(r"\x1b\[\d+m", "", narrow).split("== training samples")[0].splitlines()
    assert max(map(len, tables)) <= 60 and path in re.sub(r"\s", "", narrow.replace("  messages", ""))


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["verify", "--samples=-1"], "samples: '-1' is invalid"),
        (["verify", "--samples", "few"], "samples: 'few' is invalid"),
        (["verify", "--samples"], "--samples needs a value"),
        (["verify", "--html=page.txt"], "is not named as a page"),
        (["verify", "--html=no/such/folder/page.html"], "cannot be written"),
        (["verify", "--sampels=1"], "there is no option"),
        (["verify", "--sampels=1"], "did you mean --samples?"),
        (["verify", "--data_path=no.jsonl"], "no.jsonl"),
        (["verify", "--eval_split=0.1", "--eval_data_path=no.jsonl"], "eval_data_path and eval_split together"),
        (["verify", "--chat_template_kwargs={enable_thinkin: false}"], "knows no variable 'enable_thinkin'"),
        (["no_recipe"], "there is no recipe"),
    ],
)
def test_wrong_use_is_the_users_error(embedded_model, monkeypatch, tmp_path, args, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        inspect_data.main(args)
    assert what in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_help_has_its_own_options_and_the_recipes(capsys):
    with pytest.raises(SystemExit, match="0"):
        inspect_data.main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: manyrank data inspect [RECIPE] [--key value ...]")
    assert all(option in out for option in ("--samples", "--html", "--max_length", "--packing"))


# The page


@pytest.fixture(scope="module")
def shown(tokenizer, tmp_path_factory):
    """A survey with everything in it, and its page."""
    folder = tmp_path_factory.mktemp("page")
    rows = write(folder / "<i>rows.jsonl", HOSTILE, GOOD, GOOD, NO_ANSWER, "not json", chat("<|im_end|>?", "\nYes"))
    text = write(folder / "text.jsonl", {"text": "\n\nPlain"})  # shorter than the others, so it is a sample
    sources = [rows, text, {"path": SAMPLE, "max_rows": 20}]
    found = survey(tokenizer, 9, data_path=sources, eval_data_path=VALIDATION)
    write_page(html(found), folder / "page.html")
    assert sorted(file.name for file in folder.iterdir()) == ["<i>rows.jsonl", "page.html", "text.jsonl"]
    return found, folder / "page.html"


@needs_chromium
def test_figures_on_the_page_are_those_of_the_survey(shown, tmp_path):
    found, path = shown
    dom = Page(browse(path, tmp_path, "--dump-dom"))
    assert dom.title == "Data of verify"
    for reading in found.readings:
        assert dom.figures[f"{reading.name}-sources"] == [
            repr(value)
            for source in reading.sources
            for value in (
                *(source.weight, source.rows, source.examples, source.in_epoch, source.tokens),
                source.supervised / source.tokens,
            )
        ]
    reading = found.readings[0]
    assert dom.figures["data_path-counts"] == [repr(rows) for rows in reading.counts.values()]
    assert dom.figures["data_path-reasons"] == [repr(rows) for rows in reading.reasons.values()] == ["1", "1"]
    assert all(
        row.place in dom.texts["data_path-bad"] and row.detail in dom.texts["data_path-bad"] for row in reading.bad
    )
    for part in found.parts:
        facts = (part.examples, part.rows, part.duplicates, part.tokens, part.supervised / part.tokens)
        assert dom.figures[f"{part.name}-examples"] == [repr(value) for value in facts]
        lengths = part.lengths
        facts = (lengths.shortest, lengths.median, lengths.mean, lengths.p95, lengths.longest)
        assert dom.figures[f"{part.name}-lengths"] == [
            repr(value) for value in (*facts, *(b.count for b in lengths.bars))
        ]
        balances = [repr(value) for row in part.packing.balances for value in (row.ranks, row.batch, row.over)]
        assert dom.figures[f"{part.name}-balance"] == balances
    packing = found.parts[0].packing
    assert dom.figures["training-fill"] == [repr(value) for value in (packing.padding, packing.packs, packing.filled)]
    assert dom.figures["overlap"] == [repr(found.overlap), repr(found.overlap / found.parts[1].examples)]
    assert f"{found.parts[0].tokens:,}" in dom.texts["training-examples"]


@needs_chromium
def test_supervised_spans_are_the_supervised_texts(shown, tmp_path):
    found, path = shown
    dom = Page(browse(path, tmp_path, "--dump-dom"))
    expected = [visible(run) for part in found.parts for sample in part.samples for run in learned(sample)]
    assert len(expected) >= 18
    assert dom.learned == expected
    samples = [sample for part in found.parts for sample in part.samples]
    assert dom.samples == ["".join(visible(piece.text) for piece in sample.pieces) for sample in samples]
    assert any(text.startswith("\n\nPlain") for text in dom.samples)  # a newline that browsers like to drop


@needs_chromium
def test_rows_are_text_and_nothing_is_fetched(tokenizer, tmp_path):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    tag = f'<img src="{address}/img"><script src="{address}/js"></script><style>@import "{address}/css";</style>'
    attack = f"{tag}<script>document.title='owned'</script></pre></span>"
    try:
        bare = tmp_path / "bare.html"
        bare.write_text(f"<title>bare</title>{attack}")
        assert Page(browse(bare, tmp_path / "a", "--dump-dom")).title == "owned"
        assert {"/img", "/js"} <= set(asked)  # unescaped it would be fetched and run
        asked.clear()
        made = survey(tokenizer, data_path=write(tmp_path / "rows.jsonl", chat(attack, attack)), max_length=1024)
        write_page(html(made), tmp_path / "page.html")
        dom = Page(browse(tmp_path / "page.html", tmp_path / "b", "--dump-dom"))
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []
    assert dom.title == "Data of verify"
    assert not dom.tags & {"script", "img", "iframe", "link", "object"}
    assert dom.learned == [f"{attack}<|im_end|>"]


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(500, 0), (1100, 1)])
def test_page_looks_like_something(shown, tmp_path, width, scheme):
    picture = look_at(shown[1], tmp_path, width=width, scheme=scheme).mean(axis=2)
    assert picture.mean() > 200 if scheme else picture.mean() < 60
    # Text and cards from top to bottom, nothing over the right edge.
    assert all(np.ptp(band) > 100 for band in np.array_split(picture, 7)) and np.ptp(picture[:, -4:]) == 0


def test_page_needs_nothing_else(shown):
    found, path = shown
    text = path.read_text(encoding="utf-8")
    assert text == html(found)
    assert not re.search(r"<(script|link|img|iframe)|https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_an_old_page_is_replaced_and_an_interrupted_one_is_not(embedded_model, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    with pytest.raises(UserError):
        inspect_data.main(["verify", "--data_path=no.jsonl", f"--html={target}"])
    assert target.read_text() == "old"
    done = inspect("verify", "--html", str(target), "--samples=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written to {target}\n")
    assert "<title>Data of verify</title>" in target.read_text()
    assert list(tmp_path.iterdir()) == [target]
